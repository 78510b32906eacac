"""How large prefix caches are: a model's state as a block-level and a request-level group, from its S_kv(l) (§3.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from numpy.typing import ArrayLike

from repro.errors import UserError
from repro.kvcache.pool import CacheSpec, CacheTier, GroupSpec


class KvBytes(Protocol):
    """What tells the size of a model's state; every phase profile does."""

    def kv_bytes(self, tokens: ArrayLike) -> Any:
        """S_kv(l) in bytes."""
        ...


@dataclass(frozen=True)
class CacheOptions:
    """Prefix caches, one per cluster. `capacity_gb` null is unlimited; `checkpoint_blocks` 0 keeps recurrent state at the end
    of each prompt only. `lower` are the tiers below the one of `capacity_gb`, as DRAM and SSD are below HBM; what they hold is loaded
    before its prefill.
    """

    enabled: bool = False
    capacity_gb: float | None = 2000.0
    block_tokens: int = 512
    checkpoint_blocks: int = 0
    eviction: Literal["lru", "length_aware"] = "lru"
    lower: tuple[CacheTier, ...] = ()

    def __post_init__(self) -> None:
        if self.lower and not self.enabled:
            raise UserError("policy.cache.lower: has no effect without policy.cache.enabled=true")
        if self.capacity_gb is not None and not self.capacity_gb > 0:
            raise UserError(
                f"policy.cache.capacity_gb: {self.capacity_gb} is not positive; accepted: gigabytes, or null for no limit"
            )

    def spec(self, profile: KvBytes) -> CacheSpec:
        """S_kv(0) is what a checkpoint weighs, the slope of S_kv what a token of full attention does."""
        fixed = float(profile.kv_bytes(0))
        per_token = (float(profile.kv_bytes(262_144)) - float(profile.kv_bytes(131_072))) / 131_072
        groups = [GroupSpec("full_attention", "block", per_token)] if per_token > 0 else []
        if fixed > 0:
            groups.append(GroupSpec("request_level", "request", fixed))
        capacity = math.inf if self.capacity_gb is None else self.capacity_gb * 1e9
        return CacheSpec(tuple(groups), capacity, self.block_tokens, 1 << 20, self.checkpoint_blocks, self.eviction)
