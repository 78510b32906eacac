"""The fast loop of §3.4.3: watch egress utilisation and prefill queues, and move the threshold while either is under pressure.

Pressure begins and ends at different levels (hysteresis), so that a load near one level does not make the threshold chatter. Under
pressure t is searched anew over the recent incremental lengths, queues included, at once when bandwidth gets scarce and else every
`search_s`; when pressure ends, t returns to where it was. A search moves t only for a clear gain: a sample's optimum is always a little
better than the t in force on that sample, and following it would be following noise. One pure step, from state and observation to state.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

from repro.errors import UserError
from repro.scheduling.load import Capacity, Costs, balance
from repro.scheduling.views import ClusterView, LinkView


@dataclass(frozen=True)
class ShortTermSpec:
    """Levels and times of the fast loop, which measures every `period_s`.

    `queue_*_s` is prefill work waiting per instance, `horizon_s` how far a search looks ahead, `patience_s` the wait
    after which a request is lost (the target for TTFT), `gain` the relative gain below which t is left where it is.
    """

    enabled: bool = False
    period_s: float = 1.0
    search_s: float = 5.0
    utilisation_high: float = 0.8
    utilisation_low: float = 0.6
    queue_high_s: float = 2.0
    queue_low_s: float = 0.5
    horizon_s: float = 30.0
    patience_s: float = 10.0
    outage_memory_s: float = 20.0
    gain: float = 0.03
    window_requests: int = 512

    def __post_init__(self) -> None:
        for high, low in (("utilisation_high", "utilisation_low"), ("queue_high_s", "queue_low_s")):
            if not 0 <= getattr(self, low) <= getattr(self, high):
                raise UserError(
                    f"policy.short_term.{low}: {getattr(self, low)} must lie between 0 and policy.short_term.{high} "
                    f"({getattr(self, high)})"
                )
        for key in ("period_s", "search_s", "horizon_s", "patience_s", "outage_memory_s", "window_requests"):
            if not getattr(self, key) > 0:
                raise UserError(f"policy.short_term.{key}: {getattr(self, key)} is not positive")
        if not self.gain >= 0:
            raise UserError(f"policy.short_term.gain: {self.gain} is negative")


class Observation(NamedTuple):
    """What is measured at the end of a period. `lengths` are the incremental lengths of recent requests, oldest first."""

    at_s: float
    lengths: Collection[float]
    rate_per_s: float
    prfaas: ClusterView
    pd: ClusterView
    link: LinkView


class ShortTermState(NamedTuple):
    """What the loop remembers, and all that it decides. `resting_tokens` is the threshold that was in force when pressure began."""

    threshold_tokens: float
    bandwidth_scarce: bool = False
    pressed: bool = False
    searched_s: float = -math.inf
    capacity_bps: float = 0.0
    resting_tokens: float = 0.0


def capacity_of(seen: Observation) -> Capacity:
    """The stages' capacities and queues as an observation shows them."""
    return Capacity(
        seen.prfaas.instances,
        seen.pd.instances,
        seen.link.capacity_bps,
        seen.prfaas.waiting_s,
        seen.pd.waiting_s,
        seen.link.backlog_bytes,
    )


def step(spec: ShortTermSpec, state: ShortTermState, seen: Observation, costs: Costs) -> ShortTermState:
    """The state after one period."""
    if not spec.enabled:
        return state
    link = seen.link
    waiting_s = max(seen.prfaas.waiting_s, seen.pd.waiting_s)
    utilisation = link.utilisation if link.capacity_bps > 0 else 1.0
    scarce = utilisation > (spec.utilisation_low if state.bandwidth_scarce else spec.utilisation_high)
    surge = waiting_s > (spec.queue_low_s if state.pressed else spec.queue_high_s)
    pressed = scarce or surge
    # An outage may end at any moment: what the link carried before it is believed less and less, not forgotten at once.
    capacity_bps = link.capacity_bps or state.capacity_bps * math.exp(-spec.period_s / spec.outage_memory_s)
    if not pressed and not state.pressed:
        if capacity_bps == state.capacity_bps:
            return state
        return ShortTermState(state[0], state[1], state[2], state[3], capacity_bps, state[5])
    threshold, resting = state.threshold_tokens, state.resting_tokens
    if not state.pressed:
        resting = threshold
    newly_scarce = scarce and not state.bandwidth_scarce
    if not seen.lengths or not (newly_scarce or seen.at_s - state.searched_s >= spec.search_s):
        return ShortTermState(threshold, scarce, True, state.searched_s, capacity_bps, resting)
    horizon_s, held = (spec.horizon_s, threshold) if pressed else (None, resting)
    capacity = capacity_of(seen)._replace(egress_bps=capacity_bps)
    found = balance(seen.lengths, seen.rate_per_s, costs, capacity, horizon_s, spec.patience_s, held)
    threshold = found.threshold_tokens if found.worth > (1 + spec.gain) * found.held_worth else held
    return ShortTermState(threshold, scarce, pressed, seen.at_s, capacity_bps, resting)
