"""The slow loop of §3.4.3: convert PD nodes between prefill and decode when one phase is much busier than the other.

The paper compares Θ_prfaas + Θ_pd-p with Θ_pd-d. With the load λ known, the same question is how busy the busiest stage would be with
one node more or less on either side; a node moves only when that gains more than `margin`, because a move costs a drain and a restart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from repro.errors import UserError
from repro.scheduling.load import Costs, balance
from repro.scheduling.short_term import Observation, capacity_of


@dataclass(frozen=True)
class LongTermSpec:
    """Times of the slow loop. `restart_s` is what a drained node needs to serve its new role."""

    enabled: bool = False
    period_s: float = 20.0
    margin: float = 0.1
    busy: float = 0.8
    restart_s: float = 10.0
    horizon_s: float = 60.0

    def __post_init__(self) -> None:
        for key in ("period_s", "horizon_s"):
            if not getattr(self, key) > 0:
                raise UserError(f"policy.long_term.{key}: {getattr(self, key)} is not positive")
        for key in ("margin", "restart_s", "busy"):
            if not getattr(self, key) >= 0:
                raise UserError(f"policy.long_term.{key}: {getattr(self, key)} is negative")


class DecodeView(NamedTuple):
    """The decode stage: instances, tokens per second of one at full batch, mean output of finished requests, requests waiting."""

    instances: int
    tokens_per_s: float
    output_tokens: float
    waiting_requests: int = 0


def decode_load(seen: Observation, decode: DecodeView, instances: int, horizon_s: float = math.inf) -> float:
    """Load of the decode stage with that many instances (equation 5 against λ); 1 is saturated."""
    if instances < 1:
        return math.inf
    rate = seen.rate_per_s + decode.waiting_requests / horizon_s
    return rate * decode.output_tokens / (instances * decode.tokens_per_s)


def step(spec: LongTermSpec, seen: Observation, decode: DecodeView, costs: Costs) -> int:
    """Nodes to convert from decode to prefill: 1, 0, or −1 for the other way.

    Nothing moves while the busiest stage is below `busy`: there is nothing to gain from a move that nobody would notice.
    """
    if not spec.enabled or not seen.lengths:
        return 0

    def busiest(extra: int) -> float:
        n_p, n_d = seen.pd.instances + extra, decode.instances - extra
        if n_p < 0 or n_d < 1:
            return math.inf
        waiting = seen.pd.waiting_s * seen.pd.instances / n_p if n_p else 0.0
        capacity = capacity_of(seen)._replace(n_p=n_p, waiting_pd_s=waiting)
        prefill = balance(seen.lengths, seen.rate_per_s, costs, capacity, spec.horizon_s).load
        return max(prefill, decode_load(seen, decode, n_d, spec.horizon_s))

    now = busiest(0)
    if now < spec.busy:
        return 0
    choice = min((1, -1), key=busiest)
    return choice if busiest(choice) < now * (1 - spec.margin) else 0
