"""What the scheduler keeps of each cluster: work promised to instances, their roles, and what the control loops have seen and decided."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from repro.scheduling.adaptive import Decaying, History
from repro.scheduling.decisions import Conversion
from repro.scheduling.link_estimate import LinkEstimate
from repro.scheduling.load import Costs, Recent
from repro.scheduling.observations import LinkReport
from repro.scheduling.placement import placement
from repro.scheduling.short_term import ShortTermState
from repro.scheduling.spec import SchedulerSpec
from repro.scheduling.tables import CostTables, Profile, StepTimes
from repro.scheduling.views import ClusterView, LinkView, SchedulerState

#: Context per request at which decode is taken to run when its speed is compared with prefill's.
_CONTEXT_TOKENS = 32_768.0


class EgressPlan(Protocol):
    """A PrfaaS cluster's link as it was provisioned."""

    @property
    def rate_bps(self) -> float:
        """What it was sold as."""
        ...

    @property
    def rtt_s(self) -> float:
        """Round trip to the PD clusters."""
        ...


class PrfaasPlan(Protocol):
    """A PrfaaS cluster as it is configured."""

    @property
    def profile(self) -> Profile:
        """The model on one of its instances."""
        ...

    @property
    def instances(self) -> int:
        """All of them prefill."""
        ...

    @property
    def link(self) -> EgressPlan:
        """What its KVCache leaves over."""
        ...


class PdPlan(Protocol):
    """A PD cluster as it is configured: the first `n_p` instances prefill, the next `n_d` decode."""

    @property
    def profile(self) -> Profile:
        """The model on one of its instances."""
        ...

    @property
    def n_p(self) -> int:
        """Instances that prefill at first."""
        ...

    @property
    def n_d(self) -> int:
        """Instances that decode at first."""
        ...

    @property
    def share(self) -> float:
        """Weight of this cluster among those that arrivals call home."""
        ...


class PrefillState:
    """Prefill instances of a cluster that take work, and the work promised to each."""

    def __init__(self, name: str, index: int, profile: Profile, instances: int, scheduler: SchedulerSpec) -> None:
        self.name = name
        self.index = index
        self.tables = CostTables(profile)
        self.placement = placement(scheduler.placement)
        for instance in range(instances):
            self.placement.add(instance, 0.0)

    @property
    def serving(self) -> int:
        """Instances that take work."""
        return len(self.placement.free_at_s)

    def predicted_wait_s(self, now_s: float) -> float:
        """Seconds until the next request given could start; infinite without instances."""
        free_at = self.placement.free_at_s
        return max(min(free_at.values()) - now_s, 0.0) if free_at else math.inf

    def waiting_s(self, now_s: float) -> float:
        """Promised work that is left, in seconds per instance."""
        free_at = self.placement.free_at_s
        return sum([at - now_s for at in free_at.values() if at > now_s]) / len(free_at) if free_at else 0.0


class PrfaasClusterState(PrefillState):
    """A PrfaaS cluster. `link_up`: whether anything crosses its link; `down_since_s`: when a loop first saw that nothing does.

    Among several clusters also: `believed_bps`, the link's rate as it was provisioned and then as the loops were told, and `crossed_s`,
    when what the cluster has been given will have crossed.
    """

    def __init__(self, index: int, plan: PrfaasPlan, scheduler: SchedulerSpec) -> None:
        super().__init__(f"prfaas{index}", index, plan.profile, plan.instances, scheduler)
        self.link_up = True
        self.link_estimate = LinkEstimate()
        self.down_since_s = math.inf
        self.believed_bps = plan.link.rate_bps
        self.half_rtt_s = plan.link.rtt_s / 2
        self.crossed_s = 0.0

    def delivers_s(self, now_s: float, tokens: int) -> float:
        """Seconds until a request given now would have its KVCache in the PD cluster: layers cross while later ones are computed."""
        begins_s = self.predicted_wait_s(now_s)
        crossing_s = 8 * self.tables.kv_bytes[tokens] / self.believed_bps
        crosses_s = max(begins_s, self.crossed_s - now_s) + crossing_s
        return max(begins_s + self.tables.prefill_s[tokens], crosses_s) + self.half_rtt_s

    def given(self, now_s: float, kv_bytes: float) -> None:
        """So much more is to cross."""
        self.crossed_s = max(self.crossed_s, now_s) + 8 * kv_bytes / self.believed_bps

    def told(self, now_s: float, report: LinkReport) -> None:
        """Replace the own account of the link by what it says of itself; one that carries nothing says nothing of its rate."""
        if report.capacity_bps > 0:
            self.believed_bps = report.capacity_bps
            self.crossed_s = now_s + 8 * report.backlog_bytes / report.capacity_bps


class PdClusterState(PrefillState):
    """A PD cluster. `share` is the part of all arrivals that call it home; each has control loops of its own."""

    def __init__(
        self, index: int, plan: PdPlan, share: float, scheduler: SchedulerSpec, prfaas: Sequence[PrfaasClusterState]
    ) -> None:
        super().__init__(f"pd{index}", index, plan.profile, plan.n_p, scheduler)
        self.share = share
        self.decoding = set(range(plan.n_p, plan.n_p + plan.n_d))
        steps = StepTimes(plan.profile.decode_step_s, plan.profile.batch_max)
        self.tokens_per_s = steps.tokens_per_s(_CONTEXT_TOKENS)
        self.batch_max = plan.profile.batch_max
        self.costs = _costs(self.tables, prfaas[0].tables if prfaas else self.tables)
        # What has been seen.
        self.recent = Recent(scheduler.short_term.window_requests)
        self.arrived = 0
        self.measured_s = 0.0
        self.rate_per_s = math.nan
        self.slow_rate_per_s = math.nan
        self.slow_capacity_bps = math.nan
        memory_s = scheduler.adaptive.memory_s
        self.arrival_rate = Decaying(memory_s)
        self.egress_bps = Decaying(memory_s)
        self.output_length = Decaying(memory_s)
        self.finished = self.finished_tokens = 0
        # What has been decided.
        self.short_term = ShortTermState(scheduler.threshold_tokens)
        self.conversions: list[Conversion] = []
        self.history = History(scheduler.adaptive.hold_s)
        instances = sum(cluster.serving for cluster in prfaas)
        self.state = SchedulerState(
            scheduler.threshold_tokens, False, ClusterView(plan.n_p), ClusterView(round(instances * share)), LinkView()
        )


def _costs(local: CostTables, remote: CostTables) -> Costs:
    """What requests of a PD cluster cost, read off the tables as they are when asked."""
    return Costs(
        lambda tokens: remote.prefill[tokens],
        lambda tokens: local.prefill[tokens],
        lambda tokens: remote.kv[tokens],
    )
