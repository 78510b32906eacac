"""From the throughput model's deployments to simulated ones, so that both tiers answer for the same instances, link and threshold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from repro.link.spec import KERNEL_RTO_MIN_S, TCP_HEADERS_BYTES, LinkSpec
from repro.link.tcp_model import TcpPath
from repro.scheduling.policies import Homogeneous, Naive, Router, Threshold
from repro.scheduling.spec import SchedulerSpec
from repro.scheduling.throughput import Deployment, OperatingPoint
from repro.simulate.link_spec import CapacityChange, SharedLinkSpec, WindowSpec
from repro.simulate.spec import PdCluster, PrfaasCluster, SimulationSpec
from repro.transport.spec import TransportSpec
from repro.workload.arrivals import ArrivalProcess
from repro.workload.outputs import FixedOutput, OutputLengths
from repro.workload.stream import Independent

#: An unlimited link, as a number that a division can take.
_UNLIMITED_BPS = 1e15
#: Of a packet on the simulated link.
_MTU_BYTES = 1500


def tcp_counts(link: LinkSpec) -> bool:
    """Whether TCP decides what crosses the simulated link: where it loses segments, or a congestion control is asked for."""
    return link.loss > 0 or link.congestion_control is not None


def payload_share(link: LinkSpec) -> float:
    """What of a rate of the link is payload on the simulated one: all of it, or where TCP counts, all but its headers."""
    return (_MTU_BYTES - TCP_HEADERS_BYTES) / _MTU_BYTES if tcp_counts(link) else 1.0


def shared_link(link: LinkSpec, transport: TransportSpec) -> SharedLinkSpec:
    """The forward direction of the configured link, with its schedule of rates; jitter is for the emulated link.

    Where TCP counts, rates are of payload, a transfer has the transport's connections, each of which carries what the law leaves it
    (CUBIC's, which is Linux's own, unless another is asked for), and its windows open after a rest.
    """
    first, *later = link.conditions("forward")
    rate = first.rate_bps or _UNLIMITED_BPS
    rtt_s = 2 * first.delay_s
    changes = tuple(
        CapacityChange(change.at_s, _UNLIMITED_BPS if change.rate_bps is None else change.rate_bps) for change in later
    )
    plain = SharedLinkSpec(rate_bps=rate, rtt_s=rtt_s, nic_bps=max(400e9, rate), changes=changes)
    if not tcp_counts(link):
        return plain
    share = payload_share(link)
    path = TcpPath(
        rtt_s,
        link.loss,
        link.congestion_control or "cubic",
        transport.connections,
        window_bytes=math.inf,
        burst_segments=link.loss_burst_segments,
        link_bps=rate * share,
    )
    rto_s = rtt_s + KERNEL_RTO_MIN_S
    first_bps = path.idle_window_bps(math.inf, rto_s)
    return replace(
        plain,
        rate_bps=rate * share,
        connections=transport.connections,
        connection_bps=path.goodput_bps / transport.connections,
        changes=tuple(replace(change, rate_bps=change.rate_bps * share) for change in changes),
        window=WindowSpec(first_bps, rto_s, path.congestion_control != "bbr") if rtt_s > 0 else None,
    )


def simulated(
    base: Deployment,
    point: OperatingPoint,
    link: SharedLinkSpec,
    router: Router | None = None,
    site_links: Sequence[SharedLinkSpec] = (),
) -> SimulationSpec:
    """A deployment at an operating point; without a `router`, the one that the model assumes: t, all, or nothing offloaded.

    `site_links` are those of the deployment's further PrfaaS clusters, in their order.
    """
    if router is None:
        router = Homogeneous() if point.n_prfaas == 0 else Naive() if point.n_p == 0 else Threshold()
    remote: tuple[PrfaasCluster, ...] = ()
    if point.n_prfaas:
        first = PrfaasCluster(
            base.prfaas, point.n_prfaas - sum(site.instances for site in base.sites), _to(link, point.n_d)
        )
        sites = zip(base.sites, site_links, strict=True)
        others = [PrfaasCluster(site.profile, site.instances, _to(own, point.n_d)) for site, own in sites]
        remote = (first, *others)
    return SimulationSpec(
        pd=(PdCluster(base.pd, point.n_p, point.n_d),),
        prfaas=remote,
        scheduler=SchedulerSpec(router=router, threshold_tokens=point.threshold_tokens),
    )


def _to(link: SharedLinkSpec, receivers: int) -> SharedLinkSpec:
    """The link to so many decode instances, over connections to each of which a sender's transfers go in turn."""
    return link if link.window is None else replace(link, window=replace(link.window, receivers=receivers))


def requests(
    base: Deployment, arrivals: ArrivalProcess, count: int, seed: int, outputs: OutputLengths | None = None
) -> Independent:
    """The deployment's own lengths under an arrival process."""
    return Independent(arrivals, base.lengths, outputs or FixedOutput(round(base.output_tokens)), count, seed)


def with_scheduler(spec: SimulationSpec, **changes: object) -> SimulationSpec:
    """The same deployment with other scheduler settings."""
    return replace(spec, scheduler=replace(spec.scheduler, **changes))  # type: ignore[arg-type]
