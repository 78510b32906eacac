"""The slow loop of §3.4.3: convert PD nodes between prefill and decode when one phase is much busier than the other.

The paper compares Θ_prfaas + Θ_pd-p with Θ_pd-d. With the load λ known, the same question is how busy the busiest stage would be with
one node more or less on either side; a node moves only when that gains more than `margin`, because a move costs a drain and a restart.
Queues are none of its business, and what it sees is averaged over minutes: a burst or a drop that is over before a node has moved is the
fast loop's to bear.
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
    """Times of the slow loop. `restart_s` is what a drained node needs to serve its new role; `memory_s` the time it averages over."""

    enabled: bool = False
    period_s: float = 20.0
    margin: float = 0.1
    busy: float = 0.8
    restart_s: float = 10.0
    memory_s: float = 120.0

    def __post_init__(self) -> None:
        for key in ("period_s", "memory_s"):
            if not getattr(self, key) > 0:
                raise UserError(f"policy.long_term.{key}: {getattr(self, key)} is not positive")
        for key in ("margin", "restart_s", "busy"):
            if not getattr(self, key) >= 0:
                raise UserError(f"policy.long_term.{key}: {getattr(self, key)} is negative")


class DecodeView(NamedTuple):
    """The decode stage: instances, tokens per second of one at full batch, mean output of finished requests."""

    instances: int
    tokens_per_s: float
    output_tokens: float


def decode_load(rate_per_s: float, decode: DecodeView, instances: int) -> float:
    """Load of the decode stage with that many instances (equation 5 against λ); 1 is saturated."""
    if instances < 1:
        return math.inf
    return rate_per_s * decode.output_tokens / (instances * decode.tokens_per_s)


def step(spec: LongTermSpec, seen: Observation, decode: DecodeView, costs: Costs) -> int:
    """Nodes to convert from decode to prefill: 1, 0, or −1 for the other way.

    Nothing moves while the busiest stage is below `busy`: there is nothing to gain from a move that nobody would notice.
    """
    if not spec.enabled or not seen.lengths:
        return 0

    def loads(extra: int) -> tuple[float, float]:
        n_p, n_d = seen.pd.instances + extra, decode.instances - extra
        if n_p < 0 or n_d < 1:
            return math.inf, math.inf
        prefill = balance(seen.lengths, seen.rate_per_s, costs, capacity_of(seen)._replace(n_p=n_p)).load
        return prefill, decode_load(seen.rate_per_s, decode, n_d)

    prefill, decoding = now = loads(0)
    if max(now) < spec.busy:
        return 0
    choice = 1 if prefill > decoding else -1
    return choice if max(loads(choice)) < max(now) * (1 - spec.margin) else 0
