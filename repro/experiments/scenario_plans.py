"""Plans for a scenario that is known in advance: the best static one, the one re-planned by hand every hour, and the oracle's.

What a threshold and split are worth in a condition is simulated, not computed: the equations know the highest rate, but not how many
requests below it miss their service level. The simulations draw from seeds of their own, so that no plan was fitted to the requests on
which it is judged.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from repro.experiments.base import Context
from repro.experiments.scenario_worlds import Condition, World
from repro.experiments.study import Point, run_once, run_points
from repro.record.request_metrics import summarise
from repro.scheduling.policies import Threshold
from repro.scheduling.search import search, surface, threshold_grid
from repro.scheduling.spec import PolicySpec
from repro.scheduling.throughput import Deployment, OperatingPoint, evaluate
from repro.scheduling.timetable import Planned
from repro.simulate.deployments import simulated
from repro.workload.phases import Phases
from repro.workload.spec import ServiceLevel

#: What share of a trial is warm-up.
_WARM_SHARE = 0.1
#: A plan whose Λ_max by the equations is below this share of the arrival rate is worth nothing: its queues grow.
_HOPELESS = 0.95

#: Threshold and instances that prefill.
Choice = tuple[float, int]
#: Choice → share of requests within the service level, for each condition of a world.
Worth = Sequence[Mapping[Choice, float]]


@dataclass(frozen=True)
class Trial:
    """Simulates one condition under one plan; the share of its requests that meet the service level."""

    slo: ServiceLevel

    def __call__(self, point: Point) -> float:
        """Simulate and measure."""
        requests, summary = run_once(point.spec, point.stream)
        last_s = summary.last_arrival_s
        found = summarise(requests, (_WARM_SHARE * last_s, last_s), self.slo).values()["good_fraction"]
        return float(found)


def choices(world: World, policy: PolicySpec) -> list[Choice]:
    """For each split, the thresholds that are best in one of the conditions or for all of them together."""
    deployments = [*(one.base for one in world.conditions), world.met()]
    found: dict[Choice, None] = {}
    for base in deployments:
        for n_p in range(1, base.n_pd):
            found[roomiest(base, replace(policy, n_p=n_p))] = None
    return list(found)


def roomiest(base: Deployment, policy: PolicySpec) -> Choice:
    """The best split, and the threshold that leaves prefill the most room there: where decode binds, many have the same Λ_max."""
    n_p = search(base, policy).n_p
    found = surface(base, threshold_grid(base, policy.threshold_step_tokens), np.array([n_p]), policy.lengths)
    prefill = np.minimum(found.prfaas_bound, found.pd_prefill_bound[:, 0])
    return float(found.threshold_tokens[int(np.nanargmax(prefill))]), n_p


def worth(
    context: Context, name: str, world: World, rate_per_s: float, policy: PolicySpec, slo: ServiceLevel, seed: int
) -> Worth:
    """What every choice brings in every condition. A choice that cannot carry the rate is worth 0, the best of them all excepted."""
    every = choices(world, policy)
    points: dict[tuple[int, Choice], Point] = {}
    for index, condition in enumerate(world.conditions):
        if world.conditions.index(condition) < index:
            continue  # simulated before
        base, capacity = condition.base, {choice: _at(world, index, choice) for choice in every}
        best = max(capacity, key=lambda choice: capacity[choice].lambda_max)
        phase = replace(condition.phase(rate_per_s), seconds=_lasting_s(world, condition))
        link = replace(world.link, rate_bps=min(world.link.rate_bps, base.egress_bps), changes=())
        for choice, point in capacity.items():
            if choice == best or point.lambda_max >= _HOPELESS * phase.rate_per_s:
                spec = simulated(base, point, link, Threshold())
                points[index, choice] = Point("plan", seed, spec, Phases((phase,), seed))
    named = {
        f"{name}, condition {index}, plan {choice[0]:g}, {choice[1]}": one for (index, choice), one in points.items()
    }
    values = dict(zip(points, run_points(context, Trial(slo), named), strict=True))
    return [
        {choice: values.get((world.conditions.index(condition), choice), 0.0) for choice in every}
        for condition in world.conditions
    ]


def _lasting_s(world: World, condition: Condition) -> float:
    """The longest that a condition lasts without a break: queues of a plan that is a little too small need hours to show."""
    runs = ((one, math.fsum(each.seconds for each in same)) for one, same in itertools.groupby(world.conditions))
    return max(seconds for one, seconds in runs if one == condition)


def _at(world: World, index: int, choice: Choice) -> OperatingPoint:
    threshold, n_p = choice
    base = world.conditions[index].base
    return evaluate(base, min(threshold, base.lengths.maximum_tokens), n_p, base.n_pd - n_p, "true_mean")


def best_static(world: World, tables: Worth) -> Choice:
    """The one threshold and split that serve most requests of the whole scenario; of equals the first."""
    weights = [one.seconds * one.factor for one in world.conditions]
    return max(tables[0], key=lambda choice: sum(w * table[choice] for w, table in zip(weights, tables, strict=True)))


def best_sequence(world: World, tables: Worth, gone_s: float) -> list[Choice]:
    """The sequence of choices that serves most requests, moves paid: a node that turns is away for `gone_s`.

    Dynamic programming over conditions and splits; within a split the best threshold costs nothing to set.
    """
    nodes = world.conditions[0].base.n_pd
    splits = sorted({n_p for _, n_p in tables[0]})
    best: dict[int, tuple[float, list[Choice]]] = {}
    for number, (condition, table) in enumerate(zip(world.conditions, tables, strict=True)):
        requests = condition.seconds * condition.factor
        reached: dict[int, tuple[float, list[Choice]]] = {}
        for n_p in splits:
            choice = max((one for one in table if one[1] == n_p), key=table.__getitem__)
            # A condition is not over before its nodes have turned; where it is, they were away for all of it.
            away = min(gone_s / condition.seconds, 1.0)
            found = [
                (value - requests * away * abs(n_p - before) / nodes + requests * table[choice], [*path, choice])
                for before, (value, path) in best.items()
            ]
            reached[n_p] = max(found) if number else (requests * table[choice], [choice])
        best = reached
    return max(best.values())[1]


def timetable(world: World, sequence: Sequence[Choice], early_s: float = 0.0) -> tuple[Planned, ...]:
    """A choice for each condition, as moments; `early_s` before the condition begins."""
    return tuple(
        Planned(max(start - early_s, 0.0), choice[0], choice[1])
        for start, choice in zip(world.starts_s(), sequence, strict=True)
    )


def by_hand(world: World, policy: PolicySpec, hour_s: float) -> tuple[Planned, ...]:
    """What an operator does who plans at every full hour, by the equations, for what most of the last hour was like."""
    starts, plans = world.starts_s(), [roomiest(one.base, policy) for one in world.conditions]
    ends = [*starts[1:], world.seconds]
    entries = [Planned(0.0, *plans[0])]
    for hour in range(1, max(1, round(world.seconds / hour_s))):
        low, high = (hour - 1) * hour_s, hour * hour_s
        lasted = [max(0.0, min(end, high) - max(start, low)) for start, end in zip(starts, ends, strict=True)]
        seen = plans[max(range(len(lasted)), key=lasted.__getitem__)]
        entries.append(Planned(high, *seen))
    return tuple(entries)
