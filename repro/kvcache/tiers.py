"""A prefix cache over several kinds of memory: HBM, then what is slower and larger (DRAM, SSD), each with its time to load.

The tiers share one order of use. What is used rises to the first tier; what overflows one tier sinks to the next, and only the last loses
anything. So all tiers together hit what one pool of their total size hits, and the first holds what a pool of its own size would: with
LRU a larger cache always contains the smaller one (Mattson's inclusion).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace

from repro.kvcache.pool import CacheSpec, HybridPool


class TieredPool(HybridPool):
    """The pool of one cluster, its first tier and the lower ones; pages are counted over all of them."""

    def __init__(self, spec: CacheSpec) -> None:
        tiers = spec.lower
        total = spec.capacity_bytes + sum(
            math.inf if one.capacity_gb is None else one.capacity_gb * 1e9 for one in tiers
        )
        super().__init__(replace(spec, capacity_bytes=total, lower=()))
        above = [spec.capacity_bytes, *(one.capacity_gb * 1e9 for one in tiers[:-1] if one.capacity_gb is not None)]
        # Pages of every tier but the last, which has what is left of the total.
        self._rooms = [int(capacity // spec.page_bytes) for capacity in above]
        self._lower = tiers
        self._tier: dict[tuple[int, int], int] = {}
        self._orders: list[OrderedDict[tuple[int, int], None]] = [OrderedDict() for _ in range(len(tiers) + 1)]
        self._held = [0] * (len(tiers) + 1)

    def touch(self, chain: Sequence[int], blocks: int) -> None:
        """Mark the first `blocks` blocks, and the checkpoint at their end, as used now: they are in the first tier afterwards."""
        super().touch(chain, blocks)
        self._each(chain, blocks, self._rise)

    def tier_of(self, group: int, key: int) -> int | None:
        """The number of the tier that holds a block or checkpoint, from 0; None where none does."""
        return self._tier.get((group, key))

    def load_s(self, chain: Sequence[int], blocks: int) -> float:
        """What loading that prefix into the first tier takes an instance: each lower tier's part, one after the other."""
        found = [0.0] * len(self._orders)
        for i, key in enumerate(chain[:blocks]):
            for group in self._blocks:
                found[self._tier.get((group, key), 0)] += self.spec.groups[group].bytes * self.spec.block_tokens
            if i == blocks - 1:
                for group in self._states:
                    found[self._tier.get((group, key), 0)] += self.spec.groups[group].bytes
        return sum((one.load_s(size) for one, size in zip(self._lower, found[1:], strict=True) if size), 0.0)

    def _put(
        self,
        group: int,
        key: int,
        depth: int,
        parent: tuple[int, int] | None,
        payload: Callable[[int, int], object] | None,
    ) -> int:
        added = super()._put(group, key, depth, parent, payload)
        if (group, key) in self._entries:
            self._rise((group, key))
        return added

    def _drop(self, at: tuple[int, int]) -> None:
        self._leave(at)
        super()._drop(at)

    def _leave(self, at: tuple[int, int]) -> None:
        tier = self._tier.pop(at, None)
        if tier is not None:
            del self._orders[tier][at]
            self._held[tier] -= self._entries[at].pages

    def _rise(self, at: tuple[int, int]) -> None:
        """To the first tier; what was used longest ago makes room, tier by tier."""
        self._leave(at)
        self._enter(at, 0)
        for tier, room in enumerate(self._rooms):
            while self._held[tier] > room:
                oldest = next(iter(self._orders[tier]))
                self._leave(oldest)
                self._enter(oldest, tier + 1)

    def _enter(self, at: tuple[int, int], tier: int) -> None:
        self._tier[at] = tier
        self._orders[tier][at] = None
        self._held[tier] += self._entries[at].pages


def made(spec: CacheSpec) -> HybridPool:
    """The pool of that form: with tiers where the specification has lower ones."""
    return TieredPool(spec) if spec.lower else HybridPool(spec)
