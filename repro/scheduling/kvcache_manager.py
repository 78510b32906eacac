"""The global KVCache manager (§3.2): what every cluster holds of a prompt, what to move, and which prefixes are hot in the wrong place.

It works on indices alone, never on state: a cluster's own pool is one, and a live router keeps `Replica`s that workers update by
message. Rebalancing counts what each cluster lacked although another held it, and proposes the copies that would have saved most per byte.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol


class PrefixIndex(Protocol):
    """Says how many blocks of a chain of keys a cluster can serve, and how many of them its attention layers hold."""

    def match_blocks(self, chain: Sequence[int]) -> int:
        """Blocks that every layer group of that cluster's pool can serve."""
        ...

    def attention_blocks(self, chain: Sequence[int]) -> int:
        """Blocks that its block-level groups alone hold, which need not be sent there."""
        ...


@dataclass
class Replica:
    """A remote pool's index as its messages told it: blocks of full attention, and checkpoints where the model needs them."""

    needs_checkpoint: bool
    blocks: set[int] = field(default_factory=set)
    checkpoints: set[int] = field(default_factory=set)

    def apply(
        self,
        added: Sequence[int],
        removed: Sequence[int],
        added_checkpoints: Sequence[int],
        removed_checkpoints: Sequence[int],
    ) -> None:
        """One message of a worker."""
        self.blocks.update(added)
        self.blocks.difference_update(removed)
        self.checkpoints.update(added_checkpoints)
        self.checkpoints.difference_update(removed_checkpoints)

    def match_blocks(self, chain: Sequence[int]) -> int:
        """Blocks that the remote pool can serve, if its messages are up to date."""
        n = self.attention_blocks(chain)
        if self.needs_checkpoint:
            while n and chain[n - 1] not in self.checkpoints:
                n -= 1
        return n

    def attention_blocks(self, chain: Sequence[int]) -> int:
        """Blocks of full attention that the remote pool holds."""
        n = 0
        for key in chain:
            if key not in self.blocks:
                break
            n += 1
        return n


class Move(NamedTuple):
    """Copy the first `blocks` blocks of `chain` from one cluster's pool to another's."""

    source: str
    target: str
    chain: tuple[int, ...]
    blocks: int
    size_bytes: float


class _Heat(NamedTuple):
    chain: tuple[int, ...]
    saved_blocks: int


class KVCacheManager:
    """Prefix matches of all clusters, by blocks of `block_tokens`. `size_bytes(blocks)` is what a prefix weighs on the link.

    `linked(source, target)` says whether anything can be sent from one cluster to the other. `under_way` holds the target and the last
    key of every copy that has begun and not ended.
    """

    def __init__(
        self,
        indices: dict[str, PrefixIndex],
        block_tokens: int,
        size_bytes: Callable[[int], float],
        remember: int = 4096,
        linked: Callable[[str, str], bool] = lambda source, target: True,
    ) -> None:
        self.under_way: set[tuple[str, int]] = set()
        self._indices = indices
        self._block_tokens = block_tokens
        self._size_bytes = size_bytes
        self._remember = remember
        self._elsewhere = {
            target: [
                (source, index) for source, index in indices.items() if source != target and linked(source, target)
            ]
            for target in indices
        }
        self._heat: dict[tuple[str, int], _Heat] = {}

    def usable(self, keys: Sequence[int], tokens: int) -> Sequence[int]:
        """The keys of a prompt of `tokens` that a cache could serve: one token at least is computed, or there is nothing to decode from."""
        return keys[: (tokens - 1) // self._block_tokens]

    def first(self, chain: Sequence[int], tokens: int) -> Sequence[int]:
        """The keys of a chain's first `tokens` tokens."""
        return chain[: tokens // self._block_tokens]

    def match_tokens(self, cluster: str, chain: Sequence[int]) -> tuple[int, int]:
        """Tokens of `chain` that `cluster` can serve, and the most that another cluster linked to it can."""
        own, elsewhere = self._indices[cluster].match_blocks(chain), self._longest_elsewhere(cluster, chain)[1]
        return own * self._block_tokens, elsewhere * self._block_tokens

    def attention_tokens(self, cluster: str, chain: Sequence[int]) -> int:
        """Tokens of `chain` whose attention blocks `cluster` holds, which need not be sent there."""
        return self._indices[cluster].attention_blocks(chain) * self._block_tokens

    def fetch(self, target: str, chain: Sequence[int]) -> Move | None:
        """The longest prefix that another cluster has and `target` has not; of equals, the first cluster's."""
        source, size = self._longest_elsewhere(target, chain)
        index = self._indices[target]
        if size <= index.match_blocks(chain):
            return None
        # Attention blocks that are there already stay; checkpoints always travel.
        there = min(index.attention_blocks(chain), size)
        weight = self._size_bytes(size) - (self._size_bytes(there) - self._size_bytes(0))
        return Move(source, target, tuple(chain[:size]), size, weight)

    def _longest_elsewhere(self, target: str, chain: Sequence[int]) -> tuple[str, int]:
        best, most = "", 0
        for name, index in self._elsewhere[target]:
            held = index.match_blocks(chain)
            if held > most:
                best, most = name, held
        return best, most

    def asked(self, cluster: str, chain: Sequence[int]) -> None:
        """Note that a request with this prefix goes to `cluster`, or calls it home: what it lacks and others hold becomes heat."""
        held = self._longest_elsewhere(cluster, chain)[1]
        saved = held - self._indices[cluster].match_blocks(chain)
        if saved <= 0:
            return
        key = (cluster, chain[held - 1])
        before = self._heat.pop(key, None)
        self._heat[key] = _Heat(tuple(chain[:held]), saved + (before.saved_blocks if before else 0))
        if len(self._heat) > self._remember:
            del self._heat[next(iter(self._heat))]

    def rebalance(self, budget_bytes: float, at_least_blocks: int = 1) -> list[Move]:
        """Copies worth making within the budget, the most prefill saved per byte first; what is proposed is forgotten."""
        ranked = sorted(
            self._heat.items(), key=lambda item: (-item[1].saved_blocks / self._size_bytes(len(item[1].chain)), item[0])
        )
        moves: list[Move] = []
        for key, heat in ranked:
            if heat.saved_blocks < at_least_blocks:
                continue
            move = self.fetch(key[0], heat.chain)
            del self._heat[key]
            if move is not None and move.size_bytes <= budget_bytes:
                budget_bytes -= move.size_bytes
                moves.append(move)
        return moves

    def begin(self, move: Move) -> bool:
        """Whether to begin a copy now: not when one like it is on its way, nor when its source has evicted the prefix meanwhile."""
        aim = (move.target, move.chain[-1])
        if aim in self.under_way or self._indices[move.source].match_blocks(move.chain) < move.blocks:
            return False
        self.under_way.add(aim)
        return True

    def end(self, move: Move) -> None:
        """A copy that was begun has arrived, or came to nothing."""
        self.under_way.discard((move.target, move.chain[-1]))
