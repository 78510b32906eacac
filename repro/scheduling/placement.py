"""Which instance of a cluster takes a request: least work, sampled least work, round robin.

A router knows the work that it has promised to each instance, because T_prefill of a known length is known; `free_at_s` is that
promise, and a live router corrects it with what workers report. Least work is a heap, so that 10,000 instances cost as little as 10.
"""

from __future__ import annotations

import heapq
from typing import Protocol

from repro.errors import UserError
from repro.scheduling.policies import splitmix64


class Placement(Protocol):
    """Chooses instances and keeps the time at which each has done what it was given."""

    free_at_s: dict[int, float]

    def take(self, now_s: float, work_s: float) -> int:
        """Give `work_s` seconds of work to an instance and return its id. LookupError when there is none."""
        ...

    def add(self, instance: int, free_at_s: float) -> None:
        """Let an instance take work."""
        ...

    def remove(self, instance: int) -> None:
        """Give an instance no more work."""
        ...

    def correct(self, instance: int, free_at_s: float) -> None:
        """Replace the promise by what was reported."""
        ...


class _Ledger:
    def __init__(self) -> None:
        self.free_at_s: dict[int, float] = {}

    def add(self, instance: int, free_at_s: float) -> None:
        self.free_at_s[instance] = free_at_s

    def remove(self, instance: int) -> None:
        self.free_at_s.pop(instance, None)

    def correct(self, instance: int, free_at_s: float) -> None:
        if instance in self.free_at_s:
            self.free_at_s[instance] = free_at_s

    def _give(self, instance: int, now_s: float, work_s: float) -> int:
        self.free_at_s[instance] = max(self.free_at_s[instance], now_s) + work_s
        return instance


class LeastWork(_Ledger):
    """The instance that is free first; of equals the lowest id."""

    def __init__(self) -> None:
        super().__init__()
        self._heap: list[tuple[float, int]] = []

    def add(self, instance: int, free_at_s: float) -> None:
        """Let an instance take work."""
        self.free_at_s[instance] = free_at_s
        heapq.heappush(self._heap, (free_at_s, instance))

    def correct(self, instance: int, free_at_s: float) -> None:
        """Replace the promise by what was reported."""
        if instance in self.free_at_s:
            self.add(instance, free_at_s)

    def take(self, now_s: float, work_s: float) -> int:
        """The least loaded instance."""
        heap, free_at = self._heap, self.free_at_s
        while heap:
            promised, instance = heap[0]
            if free_at.get(instance) != promised:  # an entry that a removal or a correction left behind
                heapq.heappop(heap)
                continue
            done = (promised if promised > now_s else now_s) + work_s
            free_at[instance] = done
            heapq.heapreplace(heap, (done, instance))
            return instance
        raise LookupError("no instance takes work")


class RoundRobin(_Ledger):
    """Instances in turn, whatever they have to do."""

    def __init__(self) -> None:
        super().__init__()
        self._turn = -1

    def take(self, now_s: float, work_s: float) -> int:
        """The next instance in id order."""
        if not self.free_at_s:
            raise LookupError("no instance takes work")
        later = [i for i in self.free_at_s if i > self._turn]
        self._turn = min(later) if later else min(self.free_at_s)
        return self._give(self._turn, now_s, work_s)


class Sampled(_Ledger):
    """The least loaded of two drawn instances, as routers without a shared view do."""

    def __init__(self) -> None:
        super().__init__()
        self._draws = 0

    def take(self, now_s: float, work_s: float) -> int:
        """The better of two pseudo-random instances."""
        ids = list(self.free_at_s)
        if not ids:
            raise LookupError("no instance takes work")
        self._draws += 1
        draw = splitmix64(self._draws)
        first, second = ids[draw % len(ids)], ids[(draw >> 32) % len(ids)]
        return self._give(min(first, second, key=lambda i: (self.free_at_s[i], i)), now_s, work_s)


#: Placements by the name that `policy.placement` takes.
PLACEMENTS: dict[str, type[Placement]] = {
    "least_work": LeastWork,
    "sampled": Sampled,
    "round_robin": RoundRobin,
}


def placement(name: str) -> Placement:
    """A fresh placement by name.

    Raises:
        UserError: for a name that is not in `PLACEMENTS`.
    """
    if name not in PLACEMENTS:
        raise UserError(f"policy.placement: {name!r} is unknown; accepted: {', '.join(PLACEMENTS)}")
    return PLACEMENTS[name]()


class FewestHeld:
    """The decode instance that holds fewest requests, of equals the lowest id: which one takes a KVCache before it is sent there."""

    def __init__(self) -> None:
        self._held: dict[int, int] = {}
        self._paused: set[int] = set()

    def add(self, instance: int) -> None:
        """Let an instance take requests."""
        self._held[instance] = 0

    def remove(self, instance: int) -> None:
        """Give an instance no more requests."""
        self._held.pop(instance, None)
        self._paused.discard(instance)

    def pause(self, instance: int) -> None:
        """Pass an instance over as long as there is another; what it holds stays counted."""
        if instance in self._held:
            self._paused.add(instance)

    def resume(self, instance: int) -> None:
        """Count an instance in again."""
        self._paused.discard(instance)

    def take(self) -> int | None:
        """Give a request to an instance and return its id; None where there is none."""
        held = self._held
        if not held:
            return None
        able = (held.keys() - self._paused or held) if self._paused else held
        instance = min(able, key=lambda one: (held[one], one))
        held[instance] += 1
        return instance

    def release(self, instance: int) -> None:
        """A request has left an instance."""
        if instance in self._held:
            self._held[instance] -= 1
