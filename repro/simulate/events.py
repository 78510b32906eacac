"""The virtual clock: what happens next, in order of time and, at equal times, in order of asking.

An event is a function and its argument. Arrivals never enter the heap; they come sorted and are merged with it, so the heap holds only
what is under way.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappush
from typing import Any

Handler = Callable[[float, Any], None]


class EventQueue:
    """Pending events of one run."""

    def __init__(self) -> None:
        self.heap: list[tuple[float, int, Handler, Any]] = []
        self._asked = 0

    def at(self, time_s: float, handler: Handler, argument: Any = None) -> None:
        """Call `handler(time_s, argument)` when the clock reaches `time_s`."""
        self._asked = order = self._asked + 1
        heappush(self.heap, (time_s, order, handler, argument))
