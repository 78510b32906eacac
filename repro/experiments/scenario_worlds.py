"""The six ways in which the world changes under a deployment: what arrives in each phase, and what of clusters and link is there."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from repro.scheduling.search import search
from repro.scheduling.spec import PolicySpec
from repro.scheduling.throughput import Deployment
from repro.simulate.link_spec import CapacityChange, SharedLinkSpec
from repro.simulate.spec import Fault, SimulationSpec
from repro.workload.lengths import LengthDistribution, TruncatedLogNormal
from repro.workload.mixtures import Mixture
from repro.workload.outputs import FixedOutput, LogNormalOutput, OutputLengths
from repro.workload.phases import Phase

#: In the order of the figure.
SCENARIOS = ("mixed_prompts", "longer_outputs", "lost_instances", "halved_link", "flash_crowd", "moving_hit_rate")


@dataclass(frozen=True)
class Changes:
    """How much changes. `mu` is that of the log-normal lengths: short and long prompts lie so far below and above the usual ones.

    `hit_rate` is the cached share of each prompt in every second hour; only the rest is prefilled and sent.
    """

    mu: float
    output_factor: float
    lost_instances: int
    link_factor: float
    crowd_factor: float
    hit_rate: float


@dataclass(frozen=True)
class Condition:
    """What holds for so many seconds: requests at `factor` of the scenario's rate, and the deployment as it is then."""

    seconds: float
    base: Deployment
    outputs: OutputLengths
    factor: float = 1.0

    def phase(self, rate_per_s: float) -> Phase:
        """Its requests, at that rate of the scenario."""
        return Phase(self.seconds, self.factor * rate_per_s, self.base.lengths, self.outputs)


@dataclass(frozen=True)
class World:
    """A scenario: its conditions in order, and the deployment's link, which what happens to it changes."""

    conditions: tuple[Condition, ...]
    link: SharedLinkSpec
    faults: tuple[Fault, ...] = ()

    def starts_s(self) -> list[float]:
        """When each condition begins."""
        starts, at_s = [], 0.0
        for condition in self.conditions:
            starts.append(at_s)
            at_s += condition.seconds
        return starts

    @property
    def seconds(self) -> float:
        """All conditions together."""
        return math.fsum(condition.seconds for condition in self.conditions)

    def rate(self, load: float, policy: PolicySpec) -> float:
        """The arrival rate whose worst condition is at that load of the best threshold and split there: an oracle can serve it all."""
        return load * min(search(one.base, policy).lambda_max / one.factor for one in self.conditions)

    def phases(self, rate_per_s: float) -> tuple[Phase, ...]:
        """What arrives."""
        return tuple(one.phase(rate_per_s) for one in self.conditions)

    def met(self) -> Deployment:
        """The deployment with all requests that it will meet as its workload: what a static plan is made for."""
        weights = tuple(one.seconds * one.factor for one in self.conditions)
        first = self.conditions[0].base
        output = sum(w * one.base.output_tokens for w, one in zip(weights, self.conditions, strict=True)) / sum(weights)
        law = Mixture(tuple(one.base.lengths for one in self.conditions), weights)
        return replace(first, lengths=law, output_tokens=output)

    def happening(self, spec: SimulationSpec) -> SimulationSpec:
        """The same deployment on this scenario's link, with its faults."""
        (prfaas,) = spec.prfaas
        return replace(spec, prfaas=(replace(prfaas, link=self.link),), faults=self.faults)


def world(
    name: str, base: Deployment, link: SharedLinkSpec, changes: Changes, hours: int, hour_s: float, headroom: float,
    policy: PolicySpec,
) -> World:  # fmt: skip
    """A scenario of so many hours; `headroom` is the rate of a link bought for the usual egress, over that egress."""
    law = base.lengths
    assert isinstance(law, TruncatedLogNormal)
    fixed = FixedOutput(round(base.output_tokens))
    usual = Condition(hour_s, base, fixed)

    def prompts(lengths: LengthDistribution) -> Condition:
        return replace(usual, base=replace(base, lengths=lengths))

    if name == "mixed_prompts":
        short, long = replace(law, mu=law.mu - changes.mu), replace(law, mu=law.mu + changes.mu)
        shares = [round(0.5 + 0.4 * math.sin(2 * math.pi * (hour + 0.5) / hours), 6) for hour in range(hours)]
        return World(tuple(prompts(Mixture((short, long), (1 - share, share))) for share in shares), link)
    if name == "longer_outputs":
        mean = base.output_tokens * changes.output_factor
        longer = Condition(hour_s, replace(base, output_tokens=mean), LogNormalOutput(mean, 1.0))
        return World((usual, *[longer] * (hours - 1)), link)
    if name == "lost_instances":
        lost = min(changes.lost_instances, base.n_prfaas - 1)
        fewer = replace(usual, base=replace(base, n_prfaas=base.n_prfaas - lost))
        away = max(1, hours // 3)
        faults = tuple(Fault("prfaas", instance, hour_s, away * hour_s) for instance in range(lost))
        return World(_during(usual, fewer, hours, away), link, faults)
    if name == "halved_link":
        rate = min(link.rate_bps, headroom * search(base, policy).egress_bps)
        whole = replace(usual, base=replace(base, egress_bps=rate))
        half = replace(usual, base=replace(base, egress_bps=rate * changes.link_factor))
        swings = CapacityChange(hour_s, rate * changes.link_factor), CapacityChange(2 * hour_s, rate)
        return World(_during(whole, half, hours, 1), replace(link, rate_bps=rate, changes=swings))
    if name == "flash_crowd":
        crowd = replace(prompts(replace(law, mu=law.mu - changes.mu)), seconds=hour_s / 2, factor=changes.crowd_factor)
        rest = replace(usual, seconds=hour_s / 2)
        return World((usual, crowd, rest, *[usual] * (hours - 2)), link)
    assert name == "moving_hit_rate"
    hit = prompts(replace(law, mu=law.mu + math.log(1 - changes.hit_rate)))
    return World(tuple(hit if hour % 2 else usual for hour in range(hours)), link)


def _during(usual: Condition, other: Condition, hours: int, for_hours: int) -> tuple[Condition, ...]:
    """The other condition from the second hour on."""
    return tuple(other if 1 <= hour <= for_hours else usual for hour in range(hours))
