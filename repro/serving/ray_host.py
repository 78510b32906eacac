"""The far end of a Ray placement: an actor that starts a program of the kit on its node and passes messages on.

The program is the same as on this machine, a child of the actor's process: it dies with it, and is watched there. Messages pass as texts in
order; KVCache never does, it goes from node to node over the transport's own connections.

Whoever placed it asks for what was said once a second. An actor that nobody asks ends by itself: Ray tells it of its owner's end only while
Ray's own head lives.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from dataclasses import asdict
from typing import Any

from repro.errors import UserError
from repro.processes import Child, Ended, Message
from repro.serving.afflictions import Affliction, afflict

#: So long a call of `said` waits for something that was said.
TURN_S = 1.0
#: An actor that nobody has asked for so long ends, and with it its program.
UNASKED_S = 15.0
#: The longest that a program may take over a question; whoever asked has a time-out of its own.
_ANSWER_S = 600.0


class Host:
    """Runs one program. Each method has a concurrency group of one thread, so that `tell` and `said` keep their order."""

    def __init__(
        self, module: str, name: str, environment: dict[str, str], unasked_s: float | None = UNASKED_S
    ) -> None:
        """Start the program. A process that is more than an actor must not end unasked, and says None."""
        self._said: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._asked_s = time.monotonic()
        if unasked_s is not None:
            threading.Thread(target=self._end_unasked, args=(unasked_s,), name="unasked", daemon=True).start()
        self._child = Child(
            f"instance {name}",
            [sys.executable, "-m", module],
            hear=lambda message, _beside: self._said.put(message),
            environment=environment,
        )
        self._child.on_end(self._ended)

    def _ended(self, how: Ended) -> None:
        self._said.put({"kind": "ended", **asdict(how)})

    def _end_unasked(self, unasked_s: float) -> None:
        while time.monotonic() - self._asked_s < unasked_s:
            time.sleep(TURN_S)
        os._exit(1)

    def tell(self, text: str) -> None:
        """Give the program a message."""
        self._child.send_text(text.encode())

    def ask(self, text: str) -> str:
        """Put a question to the program; its answer, or the `error` that took its place."""
        question = json.loads(text)
        kind, _ = question.pop("kind"), question.pop("number")
        try:
            answer = self._child.ask(kind, _ANSWER_S, **question)
        except UserError as error:
            return json.dumps({"error": str(error)})
        return json.dumps({key: value for key, value in answer.items() if key not in ("kind", "number")})

    def said(self) -> str:
        """What it has said since the last call, a JSON array of messages; waits a second for one. The last is `ended`."""
        self._asked_s = time.monotonic()
        found: list[Any] = []
        try:
            found.append(self._said.get(timeout=TURN_S))
            while True:
                found.append(self._said.get_nowait())
        except queue.Empty:
            return json.dumps(found)

    def afflict(self, what: Affliction) -> None:
        """Do a fault to the program on its node; the worker that hosts it is what is killed."""
        afflict(os.getpid() if what == "kill" else self._child.pid, what)
