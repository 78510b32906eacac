"""An instance's connections to those that it sends to: each tried for as long as somebody may come to answer it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from repro.processes import background
from repro.serving.messages import Connect
from repro.transport import ReceiverAwayError, Sender

log = logging.getLogger("repro.serving")


class Dialling:
    """Dials whom it is told to, in threads of its own, and hands the open sender to `connected(name, sender)` there, one at a time.

    Whoever is away is dialled again until another `Connect` of that name says where its successor is: an instance that dies while others
    dial it, or a link that is down at that moment, is no fault of theirs. What a receiver that is there refuses is an error.
    """

    def __init__(self, dial: Callable[[tuple[str, int]], Sender], connected: Callable[[str, Sender], None]) -> None:
        self._dial, self._connected = dial, connected
        self._wanted: dict[str, Connect] = {}
        self._lock = threading.Lock()

    def to(self, told: Connect) -> None:
        """Reach that instance at that address from now on."""
        with self._lock:
            self._wanted[told.name] = told
        background(self._until_it_answers, told, name=f"connect {told.name}")

    def _until_it_answers(self, told: Connect) -> None:
        while self._wanted[told.name] is told:
            try:
                sender = self._dial((told.host, told.port))
            except ReceiverAwayError as error:
                log.info("%s is dialled again: %s", told.name, error)
                continue
            with self._lock:  # or what is late could take its successor's place
                if is_wanted := self._wanted[told.name] is told:
                    self._connected(told.name, sender)
            if not is_wanted:
                sender.close()
            return
