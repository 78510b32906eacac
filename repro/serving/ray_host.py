"""The far end of a Ray placement: an actor that starts an instance on its node and passes messages on.

The instance is the same program as on this machine, a child of the actor's process: it dies with it, and is watched there. Messages pass
as texts in order; KVCache never does, it goes from node to node over the transport's own connections.
"""

from __future__ import annotations

import json
import queue
import sys
from dataclasses import asdict
from typing import Any

from repro.processes import Child, Ended, Message


class Host:
    """Runs one instance. `tell` and `said` are called in two concurrency groups of one thread each, so that each keeps its order."""

    def __init__(self, module: str, name: str, environment: dict[str, str]) -> None:
        self._said: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._child = Child(
            f"instance {name}",
            [sys.executable, "-m", module],
            hear=lambda message, _beside: self._said.put(message),
            environment=environment,
        )
        self._child.on_end(self._ended)

    def _ended(self, how: Ended) -> None:
        self._said.put({"kind": "ended", **asdict(how)})

    def tell(self, text: str) -> None:
        """Give the instance a message."""
        self._child.send_text(text.encode())

    def said(self) -> str:
        """What it has said since the last call, a JSON array of messages; waits for one. The last is `ended`."""
        found: list[Any] = [self._said.get()]
        while not self._said.empty():
            found.append(self._said.get())
        return json.dumps(found)
