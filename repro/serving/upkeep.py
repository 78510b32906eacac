"""What keeps a deployment serving for as long as it is asked to: instances that have ended are started anew, and counters are asked for."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from repro.errors import UserError
from repro.processes import beside
from repro.serving.fleet import Fleet
from repro.serving.messages import Report

log = logging.getLogger("repro.serving")

_EVERY_S = 0.5
#: An instance that has been started so often is not started again: whatever ends it is not over.
_STARTS = 10


@contextmanager
def kept_up(fleet: Fleet, replace: Callable[[str], None]) -> Iterator[None]:
    """Within, `replace` is called for each instance that has ended, a second later at the earliest, and all say what they have sent."""
    starts, ended_s = Counter[str](), dict[str, float]()

    def look() -> None:
        for name in fleet.names:
            if fleet.is_alive(name):
                ended_s.pop(name, None)
            elif time.monotonic() - ended_s.setdefault(name, time.monotonic()) > 1.0 and starts[name] < _STARTS:
                starts[name] += 1
                log.warning("instance %s has ended and is started anew (%d of %d times)", name, starts[name], _STARTS)
                ended_s.pop(name)
                replace(name)

    def run(over: threading.Event) -> None:
        while not over.wait(_EVERY_S):
            try:
                look()
                fleet.tell_all(Report())
            except (OSError, UserError) as error:  # the next look finds it as it is
                log.warning("upkeep: %s", error)

    with beside(run, name="upkeep"):
        yield
