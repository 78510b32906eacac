"""The hybrid prefix cache pool (§3.2, Figure 4): block-level and request-level state in one shared pool of pages.

A prefix is a chain of keys, one per full block of tokens, each naming all tokens up to its end. Block-level groups (full attention)
keep an entry per block and match any prefix of a chain. Request-level groups (recurrent states, windows) keep a checkpoint of fixed
size that serves exactly the length at which it was taken. **A hit is only what every group can serve**: the longest run of blocks
that ends at a checkpoint. Prefix-cache entries are reusable and evicted; transfer-cache leases hold the tail of a prefill until it has
been sent. Entries may carry real state (the live system) or nothing (the simulator counts bytes).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from repro.errors import UserError

EVICTIONS = ("lru", "length_aware")


@dataclass(frozen=True)
class GroupSpec:
    """One group of layers: `block` with `bytes` per token, or `request` with `bytes` per checkpoint."""

    name: str
    kind: Literal["block", "request"]
    bytes: float

    def __post_init__(self) -> None:
        if self.kind not in ("block", "request"):
            raise UserError(f"cache.groups.{self.name}.kind: {self.kind!r} is unknown; accepted: block, request")
        if not self.bytes > 0:
            raise UserError(f"cache.groups.{self.name}.bytes: {self.bytes} is not positive")


@dataclass(frozen=True)
class CacheTier:
    """Slower memory below a cache's first tier. An instance loads from it at `load_bps` bits per second, null at once, after `latency_s`.

    `capacity_gb` is that of the whole cluster, null without limit.
    """

    NODE: ClassVar = "policy.cache.lower"
    name: str
    capacity_gb: float | None
    load_bps: float | None = None
    latency_s: float = 0.0

    def __post_init__(self) -> None:
        for key in ("capacity_gb", "load_bps"):
            value = getattr(self, key)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{self.NODE}.{key}: {value}; accepted: above 0, or null for no limit")
        if not 0 <= self.latency_s < math.inf:
            raise UserError(f"{self.NODE}.latency_s: {self.latency_s}; accepted: seconds, 0 or more")

    def load_s(self, size_bytes: float) -> float:
        """What loading so much takes."""
        return self.latency_s + (0.0 if self.load_bps is None else 8 * size_bytes / self.load_bps)


@dataclass(frozen=True)
class CacheSpec:
    """A pool of `capacity_bytes` in pages of `page_bytes`, to which every group's blocks are aligned.

    A checkpoint is kept at the end of each prefill, and every `checkpoint_blocks` blocks before it (0: only at the end). `lower` are
    the tiers that take what the pool has no room for, from which a hit has to be loaded.
    """

    groups: tuple[GroupSpec, ...]
    capacity_bytes: float = math.inf
    block_tokens: int = 512
    page_bytes: int = 1 << 20
    checkpoint_blocks: int = 0
    eviction: Literal["lru", "length_aware"] = "lru"
    lower: tuple[CacheTier, ...] = ()

    def __post_init__(self) -> None:
        if not any(group.kind == "block" for group in self.groups):
            raise UserError("cache.groups: no block-level group; prefixes match by blocks, so one at least is needed")
        if self.eviction not in EVICTIONS:
            raise UserError(f"cache.eviction: {self.eviction!r} is unknown; accepted: {', '.join(EVICTIONS)}")
        for key in ("capacity_bytes", "block_tokens", "page_bytes"):
            if not getattr(self, key) > 0:
                raise UserError(f"cache.{key}: {getattr(self, key)} is not positive")
        if self.checkpoint_blocks < 0:
            raise UserError(
                f"cache.checkpoint_blocks: {self.checkpoint_blocks} is negative; accepted: 0 for the end only, or blocks"
            )
        limitless = [self.capacity_bytes == math.inf, *(tier.capacity_gb is None for tier in self.lower)]
        if any(limitless[:-1]):
            above = limitless.index(True)
            raise UserError(
                f"policy.cache.lower[{above}]: has no effect below a tier without limit; accepted: capacity_gb above it"
            )


class Lease(NamedTuple):
    """Pages of the transfer cache, held until `free`."""

    id: int
    pages: int


class Changes(NamedTuple):
    """What a pool serves since it was last asked, by keys: blocks of attention and checkpoints, come and gone."""

    added: list[int]
    removed: list[int]
    added_checkpoints: list[int]
    removed_checkpoints: list[int]


class Entry:
    """One block of one group, or one checkpoint. `depth` is its end in blocks from the beginning of the prompt."""

    __slots__ = ("depth", "pages", "parent", "payload", "pins")

    def __init__(self, pages: int, depth: int, parent: tuple[int, int] | None, payload: object) -> None:
        self.pages = pages
        self.depth = depth
        self.parent = parent
        self.payload = payload
        self.pins = 0


class HybridPool:
    """The pool of one cluster."""

    #: How far from the least recently used end length-aware eviction looks for something cheaper to lose.
    LOOK = 16

    def __init__(self, spec: CacheSpec) -> None:
        self.spec = spec
        self.pages = math.inf if spec.capacity_bytes == math.inf else int(spec.capacity_bytes // spec.page_bytes)
        self.used_pages = 0
        self.evicted = 0
        self._blocks = [i for i, group in enumerate(spec.groups) if group.kind == "block"]
        self._states = [i for i, group in enumerate(spec.groups) if group.kind == "request"]
        self._size = [
            math.ceil(group.bytes * (spec.block_tokens if group.kind == "block" else 1) / spec.page_bytes)
            for group in spec.groups
        ]
        # Least recently used first. Deeper blocks are touched before their prefix, so that a prefix never leaves before what follows it.
        self._entries: OrderedDict[tuple[int, int], Entry] = OrderedDict()
        # How many kept blocks follow each block: only one without followers may be lost out of turn.
        self._followers: dict[tuple[int, int], int] = {}
        self._leases: dict[int, Lease] = {}
        self._next_lease = 0
        # Entries that came or went since `changes` was asked; None until it is.
        self._changed: set[tuple[int, int]] | None = None

    def __len__(self) -> int:
        return len(self._entries)

    def match_blocks(self, chain: Sequence[int]) -> int:
        """Blocks of `chain` that every group can serve; changes nothing."""
        n = self._run(chain)
        if not self._states:
            return n
        while n and not all((group, chain[n - 1]) in self._entries for group in self._states):
            n -= 1
        return n

    def match_tokens(self, chain: Sequence[int]) -> int:
        """The same in tokens."""
        return self.match_blocks(chain) * self.spec.block_tokens

    def attention_blocks(self, chain: Sequence[int]) -> int:
        """Blocks that the block-level groups alone could serve: what a pure-attention model would have hit."""
        return self._run(chain)

    def _run(self, chain: Sequence[int]) -> int:
        entries, groups = self._entries, self._blocks
        n = 0
        if len(groups) == 1:
            group = groups[0]
            for key in chain:
                if (group, key) not in entries:
                    break
                n += 1
            return n
        for key in chain:
            if not all((group, key) in entries for group in groups):
                break
            n += 1
        return n

    def touch(self, chain: Sequence[int], blocks: int) -> None:
        """Mark the first `blocks` blocks, and the checkpoint at their end, as used now."""
        self._each(chain, blocks, self._entries.move_to_end)

    def pin(self, chain: Sequence[int], blocks: int) -> None:
        """Keep a hit from eviction while it is read; `unpin` with the same arguments ends it."""
        self._each(chain, blocks, lambda at: self._pin(at, 1))

    def unpin(self, chain: Sequence[int], blocks: int) -> None:
        """The end of `pin`."""
        self._each(chain, blocks, lambda at: self._pin(at, -1))

    def _pin(self, at: tuple[int, int], change: int) -> None:
        self._entries[at].pins += change

    def _each(self, chain: Sequence[int], blocks: int, action: Callable[[tuple[int, int]], None]) -> None:
        if blocks:
            for group in self._states:
                if (group, chain[blocks - 1]) in self._entries:
                    action((group, chain[blocks - 1]))
        for i in range(blocks - 1, -1, -1):
            for group in self._blocks:
                if (group, chain[i]) in self._entries:
                    action((group, chain[i]))

    def payload(self, group: int, key: int) -> object:
        """The real state kept for a block or checkpoint. KeyError when it is not there."""
        return self._entries[group, key].payload

    def checkpoints(self, blocks: int) -> list[int]:
        """Block counts at which a prefill of so many full blocks leaves a checkpoint, longest first."""
        every = self.spec.checkpoint_blocks
        at = {blocks, *range(every, blocks, every)} if every else {blocks}
        return sorted((n for n in at if n), reverse=True)

    def insert(
        self, chain: Sequence[int], known_blocks: int = 0, payload: Callable[[int, int], object] | None = None
    ) -> int:
        """Keep all full blocks of `chain` and its checkpoints, evicting what is least worth keeping; returns entries added.

        `known_blocks` were there before this prefill, so that no checkpoint inside them can be made. `payload(group, block)` supplies
        the real state. What does not fit is not kept: first the checkpoint and the deepest blocks go without.
        """
        added = 0
        fits = (
            len(chain)
            if self.pages == math.inf
            else min(len(chain), int(self.pages // sum(self._size[g] for g in self._blocks)))
        )
        for blocks in self.checkpoints(len(chain)):
            if known_blocks < blocks <= fits or (blocks == known_blocks and blocks <= fits):
                for group in self._states:
                    added += self._put(group, chain[blocks - 1], blocks, None, payload)
        for i in range(fits - 1, -1, -1):
            for group in self._blocks:
                parent = (group, chain[i - 1]) if i else None
                added += self._put(group, chain[i], i + 1, parent, payload)
        return added

    def changes(self) -> Changes:
        """What came and went since this was last asked; the first time, from when on changes are noted."""
        changed, self._changed = self._changed or set(), set()
        found = Changes([], [], [], [])
        for groups, come, gone in (
            (self._blocks, found.added, found.removed),
            (self._states, found.added_checkpoints, found.removed_checkpoints),
        ):
            for key in {key for group, key in changed if group in groups}:
                there = all((group, key) in self._entries for group in groups)
                (come if there else gone).append(key)
        return found

    def prefilled(self, chain: Sequence[int], cached_tokens: int) -> None:
        """A prefill of `chain` has gone on from its first `cached_tokens` tokens: they were used, and what it left is kept."""
        blocks = cached_tokens // self.spec.block_tokens
        self.touch(chain, blocks)
        self.insert(chain, blocks)

    def received(self, chain: Sequence[int]) -> None:
        """State of `chain` has come from elsewhere: one state, that at its end, so no checkpoint inside it appears."""
        self.insert(chain, len(chain))

    def _put(
        self,
        group: int,
        key: int,
        depth: int,
        parent: tuple[int, int] | None,
        payload: Callable[[int, int], object] | None,
    ) -> int:
        at = (group, key)
        if at in self._entries:
            self._entries.move_to_end(at)
            return 0
        if not self._make_room(self._size[group]):
            return 0
        self._entries[at] = Entry(self._size[group], depth, parent, payload(group, depth) if payload else None)
        self.used_pages += self._size[group]
        if self._changed is not None:
            self._changed.add(at)
        if parent is not None:
            self._followers[parent] = self._followers.get(parent, 0) + 1
        return 1

    def lease(self, size_bytes: float) -> Lease | None:
        """Pages of the transfer cache for a tail of any length; None when pinned and leased pages leave no room."""
        pages = math.ceil(size_bytes / self.spec.page_bytes)
        if not self._make_room(pages):
            return None
        self._next_lease += 1
        lease = Lease(self._next_lease, pages)
        self._leases[lease.id] = lease
        self.used_pages += pages
        return lease

    def free(self, lease: Lease) -> None:
        """The transfer is done. KeyError for a lease that is not held."""
        self.used_pages -= self._leases.pop(lease.id).pages

    def _make_room(self, pages: int) -> bool:
        if pages > self.pages:
            return False
        while self.used_pages + pages > self.pages:
            victim = self._victim()
            if victim is None:
                return False
            self._drop(victim)
        return True

    def _drop(self, at: tuple[int, int]) -> None:
        entry = self._entries.pop(at)
        self.used_pages -= entry.pages
        self.evicted += 1
        if self._changed is not None:
            self._changed.add(at)
        if entry.parent is not None:
            left = self._followers[entry.parent] - 1
            if left:
                self._followers[entry.parent] = left
            else:
                del self._followers[entry.parent]

    def _victim(self) -> tuple[int, int] | None:
        if self.spec.eviction == "lru":
            return next((at for at, entry in self._entries.items() if not entry.pins), None)
        best, best_value, looked = None, math.inf, 0
        for at, entry in self._entries.items():
            if entry.pins or at in self._followers:
                continue
            # Prefill saved per page kept: a checkpoint stands for its whole prefix, a block at the end of a long prompt for an
            # expensive one (T_prefill is convex).
            value = entry.depth / entry.pages
            if value < best_value:
                best, best_value = at, value
            looked += 1
            if looked == self.LOOK:
                break
        return best
