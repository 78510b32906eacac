"""Prefix caches of the configured model for the simulated studies: its state as a block-level and a request-level group."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from repro.errors import UserError
from repro.kvcache.pool import CacheSpec, GroupSpec
from repro.simulate.spec import Profile


@dataclass(frozen=True)
class CacheOptions:
    """Per cluster. `capacity_gb` null is unlimited; `checkpoint_blocks` 0 keeps recurrent state at the end of each prompt only."""

    capacity_gb: float | None = 2000.0
    block_tokens: int = 512
    checkpoint_blocks: int = 0
    eviction: Literal["lru", "length_aware"] = "lru"

    def __post_init__(self) -> None:
        if self.capacity_gb is not None and not self.capacity_gb > 0:
            raise UserError(
                f"options.cache.capacity_gb: {self.capacity_gb} is not positive; accepted: gigabytes, or null for no limit"
            )

    def spec(self, profile: Profile) -> CacheSpec:
        """S_kv(0) is what a checkpoint weighs, the slope of S_kv what a token of full attention does."""
        fixed = float(profile.kv_bytes(0))
        per_token = (float(profile.kv_bytes(262_144)) - float(profile.kv_bytes(131_072))) / 131_072
        groups = [GroupSpec("full_attention", "block", per_token)] if per_token > 0 else []
        if fixed > 0:
            groups.append(GroupSpec("request_level", "request", fixed))
        capacity = math.inf if self.capacity_gb is None else self.capacity_gb * 1e9
        return CacheSpec(tuple(groups), capacity, self.block_tokens, 1 << 20, self.checkpoint_blocks, self.eviction)
