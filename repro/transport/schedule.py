"""Which bytes go next: the earliest-needed layer of the oldest request, without one large request starving others.

Requests take turns of `turn_bytes`. Every second turn belongs to the oldest request; the turns between go round the
others by age. So the oldest always has half of the link at least, a small request behind a large one waits for two
turns at most, and a request alone has everything. Higher priority goes before lower, always. Within a request
the order is that of the keys that its items were pushed with: (layer, piece, offset). An item is a range of bytes, of
which as much is taken at a time as the connection can use. Pure: no clock, lock or socket.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right, insort
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")
Order = tuple[int, ...]


class _Waiting(NamedTuple, Generic[T]):
    order: Order
    age: int
    item: T
    offset: int
    size_bytes: int


class Schedule(Generic[T]):
    """Byte ranges of many requests, handed out bit by bit."""

    def __init__(self, turn_bytes: int) -> None:
        self._turn_bytes = turn_bytes
        self._queues: dict[int, list[_Waiting[T]]] = {}
        self._priority: dict[int, int] = {}
        # Requests with something to send: by priority (negative, so the highest comes first) the ages in order.
        self._ready: dict[int, list[int]] = {}
        self._levels: list[int] = []
        self._pushed = 0
        self._holder: int | None = None
        self._left = 0
        self._oldest_had_turn = False
        self._last_other = -1

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._queues.values())

    def add(self, request: int, priority: int = 0) -> None:
        """Make a request known. Lower numbers are older."""
        self._queues[request] = []
        self._priority[request] = priority

    def remove(self, request: int) -> None:
        """Forget a request and all that it still had to send."""
        if self._queues.pop(request, None):
            self._unready(request)
        self._priority.pop(request, None)

    def set_priority(self, request: int, priority: int) -> None:
        """From now on; what it has waiting moves with it."""
        waiting = bool(self._queues[request])
        if waiting:
            self._unready(request)
        self._priority[request] = priority
        if waiting:
            self._make_ready(request)

    def push(self, request: int, order: Order, item: T, offset: int, size_bytes: int) -> None:
        """Queue a range of an item of a known request."""
        queue = self._queues[request]
        if not queue:
            self._make_ready(request)
        self._pushed += 1
        heapq.heappush(queue, _Waiting(order, self._pushed, item, offset, size_bytes))

    def pop(
        self, limit_bytes: int, may_take: Callable[[int, T], bool] = lambda _request, _item: True
    ) -> tuple[T, int, int] | None:
        """The next item, offset and size of at most `limit_bytes`; None where nothing waits that `may_take` lets through."""
        for level in self._levels:
            request = self._next_request(self._ready[level], may_take)
            if request is None:
                continue
            queue = self._queues[request]
            order, age, item, offset, size = queue[0]
            if size > limit_bytes:
                heapq.heapreplace(queue, _Waiting(order, age, item, offset + limit_bytes, size - limit_bytes))
                size = limit_bytes
            else:
                heapq.heappop(queue)
                if not queue:
                    self._unready(request)
            self._left -= size
            return item, offset, size
        return None

    def _next_request(self, ready: list[int], may_take: Callable[[int, T], bool]) -> int | None:
        def open_to(request: int) -> bool:
            return may_take(request, self._queues[request][0].item)

        holder = self._holder
        if self._left > 0 and holder is not None and holder in ready and open_to(holder):
            return holder
        oldest, others = ready[0], ready[1:]
        at = bisect_right(others, self._last_other)
        turns = others[at:] + others[:at]
        turns.insert(len(turns) if self._oldest_had_turn else 0, oldest)
        for request in turns:
            if open_to(request):
                self._holder, self._left = request, self._turn_bytes
                self._oldest_had_turn = request == oldest
                if request != oldest:
                    self._last_other = request
                return request
        return None

    def _make_ready(self, request: int) -> None:
        level = -self._priority[request]
        if level not in self._ready:
            self._ready[level] = []
            insort(self._levels, level)
        insort(self._ready[level], request)

    def _unready(self, request: int) -> None:
        level = -self._priority[request]
        self._ready[level].remove(request)
        if not self._ready[level]:
            del self._ready[level]
            self._levels.remove(level)
