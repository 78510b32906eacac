"""The failures that a configuration asks for, drawn before a run: the same seed gives the same outages, whatever the load or policy."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np

from repro.profiles.failures import FailureSpec
from repro.simulate.spec import Fault

Pool = Literal["prfaas", "pd"]
Instance = tuple[Pool, int]
#: Sets these draws apart from those of the workload under the same seed.
_STREAM = 0xFA11


def faults(spec: FailureSpec, instances: Mapping[Pool, int], until_s: float, seed: int) -> tuple[Fault, ...]:
    """Everything that fails before `until_s`; where a drawn and a scheduled outage overlap, the instance is back after both."""
    down = [(outage.at_s, outage.at_s + outage.for_s, (outage.pool, outage.instance)) for outage in spec.schedule]
    if spec.mtbf_s is not None and spec.repair_s is not None:
        down += _drawn(spec.mtbf_s, spec.repair_s, spec, instances, until_s, seed)
    found: dict[Instance, list[tuple[float, float]]] = {}
    for at_s, repaired_s, instance in sorted(down):
        back_s, own = repaired_s + spec.cold_start_s, found.setdefault(instance, [])
        if own and at_s <= own[-1][1]:
            own[-1] = own[-1][0], max(own[-1][1], back_s)
        else:
            own.append((at_s, back_s))
    return tuple(
        Fault(pool, instance, at_s, back_s - at_s) for (pool, instance), own in found.items() for at_s, back_s in own
    )


def _drawn(
    mtbf_s: float, repair_s: float, spec: FailureSpec, instances: Mapping[Pool, int], until_s: float, seed: int
) -> Iterable[tuple[float, float, Instance]]:
    """Failure, end of repair and instance, in order of failure. Each instance has random numbers of its own."""
    fleet: list[Instance] = [(pool, number) for pool, count in instances.items() for number in range(count)]
    rngs = {one: np.random.default_rng((seed, _STREAM, one[0] == "pd", one[1])) for one in fleet}
    failing = [(float(rngs[one].exponential(mtbf_s)), one) for one in fleet]
    heapq.heapify(failing)
    crew_free_s = [0.0] * (len(fleet) if spec.crews is None else spec.crews)
    while failing and failing[0][0] < until_s:
        at_s, one = heapq.heappop(failing)
        repaired_s = max(at_s, crew_free_s[0]) + float(rngs[one].exponential(repair_s))
        heapq.heapreplace(crew_free_s, repaired_s)
        yield at_s, repaired_s, one
        again_s = repaired_s + spec.cold_start_s + float(rngs[one].exponential(mtbf_s))
        heapq.heappush(failing, (again_s, one))


def available_fraction(faults: Iterable[Fault], pool: Pool, instances: int, until_s: float) -> float:
    """Share of the time until then that the instances of a pool can serve."""
    down_s = sum(
        min(fault.at_s + fault.for_s, until_s) - min(fault.at_s, until_s) for fault in faults if fault.pool == pool
    )
    return 1 - down_s / (instances * until_s)
