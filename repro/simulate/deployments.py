"""From the throughput model's deployments to simulated ones, so that both tiers answer for the same instances, link and threshold."""

from __future__ import annotations

from dataclasses import replace

from repro.link.spec import LinkSpec
from repro.scheduling.policies import Homogeneous, Naive, Router, Threshold
from repro.scheduling.spec import SchedulerSpec
from repro.scheduling.throughput import Deployment, OperatingPoint
from repro.simulate.link_spec import CapacityChange, SharedLinkSpec
from repro.simulate.spec import PdCluster, PrfaasCluster, SimulationSpec
from repro.workload.arrivals import ArrivalProcess
from repro.workload.outputs import FixedOutput, OutputLengths
from repro.workload.stream import Independent

#: An unlimited link, as a number that a division can take.
_UNLIMITED_BPS = 1e15


def shared_link(link: LinkSpec) -> SharedLinkSpec:
    """The forward direction of the configured link, with its schedule of rates; loss and jitter are for the emulated link."""
    first, *later = link.conditions("forward")
    rate = first.rate_bps or _UNLIMITED_BPS
    changes = tuple(
        CapacityChange(change.at_s, _UNLIMITED_BPS if change.rate_bps is None else change.rate_bps) for change in later
    )
    return SharedLinkSpec(rate_bps=rate, rtt_s=2 * first.delay_s, nic_bps=max(400e9, rate), changes=changes)


def simulated(
    base: Deployment, point: OperatingPoint, link: SharedLinkSpec, router: Router | None = None
) -> SimulationSpec:
    """A deployment at an operating point; without a `router`, the one that the model assumes: t, all, or nothing offloaded."""
    if router is None:
        router = Homogeneous() if point.n_prfaas == 0 else Naive() if point.n_p == 0 else Threshold()
    remote = (PrfaasCluster(base.prfaas, point.n_prfaas, link),) if point.n_prfaas else ()
    return SimulationSpec(
        pd=(PdCluster(base.pd, point.n_p, point.n_d),),
        prfaas=remote,
        scheduler=SchedulerSpec(router=router, threshold_tokens=point.threshold_tokens),
    )


def requests(
    base: Deployment, arrivals: ArrivalProcess, count: int, seed: int, outputs: OutputLengths | None = None
) -> Independent:
    """The deployment's own lengths under an arrival process."""
    return Independent(arrivals, base.lengths, outputs or FixedOutput(round(base.output_tokens)), count, seed)


def with_scheduler(spec: SimulationSpec, **changes: object) -> SimulationSpec:
    """The same deployment with other scheduler settings."""
    return replace(spec, scheduler=replace(spec.scheduler, **changes))  # type: ignore[arg-type]
