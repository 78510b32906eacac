"""An event loop on the real clock: things to do at a time, and things that other threads ask for, in one thread.

It is to the live system what the event queue is to the simulator. A wait ends within some 60 µs of its time, because it is a wait for a
semaphore with a deadline: asyncio's selector rounds up to whole milliseconds, too coarse where time runs 40 times as fast.
"""

from __future__ import annotations

import heapq
import itertools
import queue
import time
from collections.abc import Callable
from typing import Any

#: What is done: a function and its arguments.
Task = tuple[Callable[..., None], tuple[Any, ...]]


class Clockwork:
    """Runs tasks in the thread that calls `run`. `late_s` collects by how much timed tasks came late, `keep_lateness` of them at most."""

    def __init__(self, keep_lateness: int = 200_000) -> None:
        self._timed: list[tuple[float, int, Task]] = []
        self._asked: queue.SimpleQueue[Task] = queue.SimpleQueue()
        self._order = itertools.count()
        self._stopped = False
        self._keep = keep_lateness
        self.late_s: list[float] = []

    def at(self, at_s: float, task: Callable[..., None], *arguments: Any) -> None:
        """Do something at a time of CLOCK_MONOTONIC. For the loop's own thread."""
        heapq.heappush(self._timed, (at_s, next(self._order), (task, arguments)))

    def ask(self, task: Callable[..., None], *arguments: Any) -> None:
        """Do something as soon as the loop comes to it. Safe from any thread."""
        self._asked.put((task, arguments))

    def stop(self) -> None:
        """End `run` after the task that is running. Safe from any thread."""
        self.ask(self._stop)

    def _stop(self) -> None:
        self._stopped = True

    def run(self) -> None:
        """Do what is due, and wait for what comes, until stopped."""
        timed, asked = self._timed, self._asked
        while not self._stopped:
            now = time.monotonic()
            if timed and timed[0][0] <= now:
                at_s, _, (task, arguments) = heapq.heappop(timed)
                if len(self.late_s) < self._keep:
                    self.late_s.append(now - at_s)
                task(*arguments)
                # What was asked for meanwhile has its turn even where timed tasks are due without end.
                if asked.empty():
                    continue
            try:
                task, arguments = asked.get(timeout=max(timed[0][0] - time.monotonic(), 0.0) if timed else None)
            except queue.Empty:
                continue
            task(*arguments)
