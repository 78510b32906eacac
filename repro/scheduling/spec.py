"""The configuration's `policy` node: the whole scheduler, from threshold and split to routing, admission, both loops and caches.

The throughput model reads the first part (what is fixed, and how the rest is searched), the simulator and the live router all of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from repro.errors import UserError
from repro.kvcache.sizing import CacheOptions
from repro.scheduling.adaptive import AdaptiveSpec
from repro.scheduling.admission import AdmissionSpec
from repro.scheduling.long_term import LongTermSpec
from repro.scheduling.placement import PLACEMENTS
from repro.scheduling.policies import RandomSplit, Router, Threshold, router
from repro.scheduling.rebalance import RebalanceSpec
from repro.scheduling.short_term import ShortTermSpec
from repro.scheduling.timetable import PERIOD_S, Planned


@dataclass(frozen=True)
class PolicySpec:
    """The scheduler of a deployment; a threshold or split that is null is found by the grid search of §3.4.2.

    `router` decides where a request is prefilled (`offload_share` is that of random_split; null takes the share that the threshold
    would offload), `placement` on which instance of the cluster. `fallback_s`: after so long an outage of the link, transfers are
    given up and prefilled in the PD cluster; null never.
    """

    name: str
    threshold_tokens: float | None = None
    n_p: int | None = None
    threshold_step_tokens: int = 100
    lengths: Literal["representative", "true_mean"] = "representative"
    router: Literal["threshold", "prfaas", "length_aware", "random_split", "naive", "homogeneous"] = "threshold"
    offload_share: float | None = None
    placement: Literal["least_work", "sampled", "round_robin"] = "least_work"
    admission: AdmissionSpec = field(default_factory=AdmissionSpec)
    short_term: ShortTermSpec = field(default_factory=ShortTermSpec)
    long_term: LongTermSpec = field(default_factory=LongTermSpec)
    adaptive: AdaptiveSpec = field(default_factory=AdaptiveSpec)
    rebalance: RebalanceSpec = field(default_factory=RebalanceSpec)
    fallback_s: float | None = None
    cache: CacheOptions = field(default_factory=CacheOptions)

    def __post_init__(self) -> None:
        if self.threshold_step_tokens < 1:
            raise UserError(f"policy.threshold_step_tokens: {self.threshold_step_tokens} is below 1 token")
        if self.threshold_tokens is not None and not self.threshold_tokens >= 0:
            raise UserError(
                f"policy.threshold_tokens: {self.threshold_tokens} is negative; accepted: 0 or more tokens, or null"
            )
        if self.n_p is not None and self.n_p < 0:
            raise UserError(f"policy.n_p: {self.n_p} is negative; accepted: 0 or more instances, or null")
        if self.fallback_s is not None and not self.fallback_s > 0:
            raise UserError(f"policy.fallback_s: {self.fallback_s} is not positive; accepted: seconds, or null")
        if self.offload_share is not None and self.router != "random_split":
            raise UserError(
                f"policy.offload_share: has no effect with policy.router={self.router}; accepted: random_split"
            )
        if self.adaptive.enabled and self.long_term.enabled:
            raise UserError(
                "policy.adaptive.enabled: policy.long_term.enabled moves the same nodes; accepted: one of the two"
            )
        if self.rebalance.enabled and not self.cache.enabled:
            raise UserError("policy.rebalance.enabled: there is nothing to copy without policy.cache.enabled=true")

    def router_at(self, offload_fraction: float) -> Router:
        """The router; a random split without a share of its own offloads this one."""
        if self.router == "random_split":
            return RandomSplit(offload_fraction if self.offload_share is None else self.offload_share)
        return router(self.router)


@dataclass(frozen=True)
class SchedulerSpec:
    """What a `Scheduler` is made of: a policy whose threshold and router have been found, as numbers and values.

    `fallback_s`: after so long an outage of the link, transfers are given up and prefilled in the PD cluster; null never.
    `timetable` moves threshold and nodes at set times, in place of a slow loop.
    """

    router: Router = field(default_factory=Threshold)
    threshold_tokens: float = 0.0
    placement: str = "least_work"
    short_term: ShortTermSpec = field(default_factory=ShortTermSpec)
    long_term: LongTermSpec = field(default_factory=LongTermSpec)
    adaptive: AdaptiveSpec = field(default_factory=AdaptiveSpec)
    admission: AdmissionSpec = field(default_factory=AdmissionSpec)
    fallback_s: float | None = None
    rebalance: RebalanceSpec = field(default_factory=RebalanceSpec)
    timetable: tuple[Planned, ...] = ()

    def __post_init__(self) -> None:
        if self.placement not in PLACEMENTS:
            raise UserError(f"policy.placement: {self.placement!r} is unknown; accepted: {', '.join(PLACEMENTS)}")
        if self.timetable and (self.adaptive.enabled or self.long_term.enabled):
            raise UserError("timetable: a slow loop moves the same nodes; accepted: one of the two")
        if [entry.at_s for entry in self.timetable] != sorted(entry.at_s for entry in self.timetable):
            raise UserError("timetable: its moments are not in order")

    @property
    def slow_period_s(self) -> float | None:
        """How often the slow loop looks, the paper's, the adaptive one or the timetable; null without one."""
        if self.timetable:
            return PERIOD_S
        if self.adaptive.enabled:
            return self.adaptive.period_s
        return self.long_term.period_s if self.long_term.enabled else None

    @property
    def restart_s(self) -> float:
        """What a drained node needs to serve its new role."""
        return self.adaptive.restart_s if self.adaptive.enabled else self.long_term.restart_s
