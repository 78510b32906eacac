"""Hot-spot rebalancing (§3.2): how often caches are evened out between clusters, and how much of the link that may take.

What to copy is the global KVCache manager's to propose (kvcache_manager.py). Copies are worth less than requests, so they get
a share of what the link left unused, and nothing where it left nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from repro.errors import UserError


@dataclass(frozen=True)
class RebalanceSpec:
    """Every `period_s`, copies of up to `link_share` of the bytes that the egress left unused since the last time.

    `at_least_blocks`: a prefix is hot when requests lacked so many blocks of it in sum.
    """

    enabled: bool = False
    period_s: float = 5.0
    link_share: float = 0.2
    at_least_blocks: int = 16

    def __post_init__(self) -> None:
        if not self.period_s > 0:
            raise UserError(f"policy.rebalance.period_s: {self.period_s} is not positive")
        if not 0 < self.link_share <= 1:
            raise UserError(f"policy.rebalance.link_share: {self.link_share} is not a share; accepted: above 0, to 1")
        if self.at_least_blocks < 1:
            raise UserError(f"policy.rebalance.at_least_blocks: {self.at_least_blocks} is below 1")
