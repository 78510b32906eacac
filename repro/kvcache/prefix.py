"""The hybrid prefix cache pool holding real state (§3.2): what a worker need not compute, because an earlier prompt began alike.

The pool and its rules are those of the simulator; here its entries carry tensors. A prompt's full blocks are named by a chain of
hashes, each over all tokens up to its block's end, so that equal prefixes share and nothing else does. Per-token states go into the
block-level group, recurrent states and windows into request-level groups, as checkpoints of the positions at which they were taken.

The decode side keeps blocks too, so that only the increment crosses the link. It needs no checkpoints: state that stands for a whole
prefix is sent with every request.

Blocks end where chunks of prefill end. What is computed after a hit is then the same operations on the same numbers that it would
have been without the cache: tokens and states are equal bit for bit, not merely close.
"""

from __future__ import annotations

import hashlib
import threading
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from transformers import PreTrainedConfig

from repro.errors import UserError, at_least
from repro.kvcache.frames import StateKind
from repro.kvcache.pool import CacheSpec, Changes, GroupSpec, HybridPool
from repro.kvcache.state import Cache, State, extract
from repro.models.layout import StateLayout


@dataclass(frozen=True)
class PrefixCacheSpec:
    """The prefix cache of a prefill worker, in its host memory. `capacity_bytes` 0 turns it off.

    Checkpoints of recurrent states and windows are taken at the last full block of every prefill, and every
    `checkpoint_blocks` blocks before it (0: only there). With `increments` the decode worker keeps as many bytes of blocks, and
    what it has of a prompt is not sent again.
    """

    capacity_bytes: float = 0.0
    block_tokens: int = 256
    checkpoint_blocks: int = 0
    eviction: Literal["lru", "length_aware"] = "lru"
    increments: bool = False

    def __post_init__(self) -> None:
        if self.capacity_bytes < 0:
            raise UserError(f"prefix_cache.capacity_bytes: {self.capacity_bytes}; accepted: 0 (off) or bytes")
        at_least(self, "prefix_cache", block_tokens=1, checkpoint_blocks=0)


_FULL, _WINDOW, _RECURRENT = "full_attention", "sliding_window", "recurrent"


def groups_of(layout: StateLayout) -> tuple[GroupSpec, ...]:
    """A model's states as groups of the pool: bytes per token of full attention, bytes per checkpoint of the others."""
    windows = sum(s.bytes_per_token * s.window_tokens for s in layout.states if s.window_tokens is not None)
    sizes: tuple[tuple[str, Literal["block", "request"], int], ...] = (
        (_FULL, "block", layout.bytes_per_token),
        (_WINDOW, "request", windows),
        (_RECURRENT, "request", sum(s.bytes_fixed for s in layout.states)),
    )
    return tuple(GroupSpec(name, kind, float(size)) for name, kind, size in sizes if size)


def grows(kind: StateKind) -> bool:
    """Whether later tokens only add to such a state, so that it can be kept and sent in blocks."""
    return kind.token_axis is not None and not kind.is_windowed


def block_chain(tokens: Sequence[int], block_tokens: int, root: bytes) -> tuple[int, ...]:
    """One key per full block. A prompt is a stranger's, so the hash is one for which nobody can make collisions."""
    ids, key, chain = array("q", tokens), root, []
    for start in range(0, len(ids) - block_tokens + 1, block_tokens):
        key = hashlib.blake2b(key + ids[start : start + block_tokens].tobytes(), digest_size=16).digest()
        chain.append(int.from_bytes(key, "little"))
    return tuple(chain)


def root_of(identity: str, salt: str = "") -> bytes:
    """What the names of all blocks of one model, and of one salt, begin from."""
    return hashlib.blake2b(f"{identity}\0{salt}".encode(), digest_size=16).digest()


class Prefix:
    """A prompt's handle on a prefix cache: what it found there, and what it leaves. This base is the case without a cache.

    `states` are those of the first `cached_tokens` tokens, the earliest layer first, in host memory that nobody may write to.
    At `checkpoints` (token counts) the prompt's changing states are wanted, by `note`.
    """

    cached_tokens: int = 0
    states: tuple[State, ...] = ()
    checkpoints: frozenset[int] = frozenset()

    def note(self, state: State) -> None:
        """Copy a changing state as it was at a checkpoint."""

    def key(self, tokens: int) -> int:
        """The name of the prompt's first `tokens` tokens, full blocks; 0 for none."""
        assert tokens == 0
        return 0

    def keep(self, cache: Cache, seen_tokens: int) -> None:
        """`cache` has seen the prompt and maybe more: keep the prompt's full blocks and its checkpoints that find room.

        It may be None where all of the prompt was found.
        """

    def close(self) -> None:
        """Nothing of the cache is needed for this prompt any more. More than once does no harm."""


class PrefixCache:
    """One worker's pool. Thread-safe: a prompt is prefilled in one thread and reported as delivered in another."""

    def __init__(
        self,
        spec: PrefixCacheSpec,
        layout: StateLayout,
        config: PreTrainedConfig,
        identity: str,
        *,
        blocks_only: bool = False,
    ) -> None:
        """`identity` names all that states depend on beside the tokens: prefixes are shared only where it is equal.

        With `blocks_only` it is the decode side's, to which the rest is sent with every request, and which sends nothing.
        """
        self.blocks_only = blocks_only
        # Entries own their memory and nothing is aligned: pages of one byte, so that what is accounted is what is held.
        groups = tuple(group for group in groups_of(layout) if group.kind == "block" or not blocks_only)
        self.pool = HybridPool(
            CacheSpec(groups, spec.capacity_bytes, spec.block_tokens, 1, spec.checkpoint_blocks, spec.eviction)
        )
        self.layout, self.config, self.lock = layout, config, threading.Lock()
        self._identity = identity

    def open(self, tokens: Sequence[int], salt: str = "") -> Prefix:
        """What the pool has of a prompt whose state is asked for; held until it is closed.

        Prompts share with those of the same `salt` only.
        """
        chain = block_chain(tokens, self.pool.spec.block_tokens, root_of(self._identity, salt))
        return _Pooled(self, chain, len(tokens))

    def lend(self, chain: Sequence[int]) -> tuple[State, ...] | None:
        """The states of the prefix of that name, for another instance; None where it is not here, or not whole."""
        with self.lock:
            if self.pool.match_blocks(chain) < len(chain):
                return None
            self.pool.touch(chain, len(chain))
            return states_in(self.pool, chain)

    def adopt(self, chain: Sequence[int], states: Sequence[State]) -> None:
        """Keep a prefix that another instance has lent, as far as there is room."""
        groups, block_tokens = self.pool.spec.groups, self.pool.spec.block_tokens

        def payload(group: int, blocks: int) -> tuple[State, ...]:
            end = blocks * block_tokens
            return tuple(_on_host(one) for one in states if one.end == end and _group(one.kind) == groups[group].name)

        with self.lock:
            self.pool.insert(chain, len(chain), payload)

    def changes(self) -> Changes:
        """What came into the pool and what was evicted since this was last asked."""
        with self.lock:
            return self.pool.changes()


class _Pooled(Prefix):
    def __init__(self, owner: PrefixCache, chain: tuple[int, ...], tokens: int) -> None:
        self._owner, self._chain = owner, chain
        self._noted: dict[tuple[str, int], list[State]] = {}
        pool, block_tokens = owner.pool, owner.pool.spec.block_tokens
        # What is sent but not kept. Where it finds no room here, the bound of the transport must do.
        tail_bytes = owner.layout.kv_bytes(tokens) - owner.layout.bytes_per_token * len(chain) * block_tokens
        with owner.lock:
            self._hit = pool.match_blocks(chain)
            self.states = states_in(pool, chain[: self._hit])
            pool.touch(chain, self._hit)
            pool.pin(chain, self._hit)
            self._lease = None if owner.blocks_only else pool.lease(tail_bytes)
            wanted = [n for n in pool.checkpoints(len(chain)) if n > self._hit]
        self.cached_tokens = self._hit * block_tokens
        self.checkpoints = frozenset(n * block_tokens for n in wanted)

    def note(self, state: State) -> None:
        self._noted.setdefault((_group(state.kind), state.end), []).append(_on_host(state))

    def key(self, tokens: int) -> int:
        return self._chain[tokens // self._owner.pool.spec.block_tokens - 1] if tokens else 0

    def keep(self, cache: Cache, seen_tokens: int) -> None:
        owner, groups, block_tokens = self._owner, self._owner.pool.spec.groups, self._owner.pool.spec.block_tokens
        if self._hit == len(self._chain):
            return
        filled = [state for state in extract(cache, owner.config, seen_tokens) if grows(state.kind)]

        def payload(group: int, blocks: int) -> tuple[State, ...]:
            end = blocks * block_tokens
            if groups[group].kind == "request":
                return tuple(self._noted[groups[group].name, end])
            return tuple(_on_host(_cut(state, end - block_tokens, end)) for state in filled)

        with owner.lock:
            owner.pool.insert(self._chain, self._hit, payload)
        self._noted.clear()

    def close(self) -> None:
        with self._owner.lock:
            self._owner.pool.unpin(self._chain, self._hit)
            if self._lease is not None:
                self._owner.pool.free(self._lease)
            self._hit, self._lease, self.states = 0, None, ()


def states_in(pool: HybridPool, chain: Sequence[int]) -> tuple[State, ...]:
    """The states of a prefix that the pool serves, the earliest layer first."""
    states = list[State]()
    for index, group in enumerate(pool.spec.groups):
        for key in chain if group.kind == "block" else chain[-1:]:
            states += cast(Sequence[State], pool.payload(index, key))
    return tuple(sorted(states, key=lambda state: (state.layer, state.kind, state.slot, state.start)))


def _group(kind: StateKind) -> str:
    return _FULL if grows(kind) else _WINDOW if kind.is_windowed else _RECURRENT


def _cut(state: State, start: int, end: int) -> State:
    """Tokens [start, end) of a state that grows, as a view."""
    axis = state.kind.token_axis
    assert axis is not None
    tensor = state.tensor.narrow(axis, start - state.start, end - start)
    return State(state.layer, state.kind, state.slot, start, end, tensor)


def _on_host(state: State) -> State:
    """The state in host memory of its own."""
    tensor = torch.empty_like(state.tensor, device="cpu", memory_format=torch.contiguous_format).copy_(state.tensor)
    return State(state.layer, state.kind, state.slot, state.start, state.end, tensor)
