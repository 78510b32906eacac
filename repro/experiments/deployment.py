"""From settings to the deployments of §4.1: PrfaaS-PD and the two baselines that share its workload."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from repro.errors import UserError
from repro.link.spec import LinkSpec
from repro.profiles.base import PhaseProfile
from repro.profiles.presets import load_profile, profile_path
from repro.scheduling.latency import PrefillLatency, prefill_latency
from repro.scheduling.search import search
from repro.scheduling.spec import PolicySpec
from repro.scheduling.throughput import Deployment, OperatingPoint, PrfaasSite, evaluate
from repro.settings import Settings
from repro.simulate.deployments import shared_link, tcp_counts
from repro.simulate.link_spec import SharedLinkSpec
from repro.simulate.spec import SimulationSpec
from repro.transport.spec import TransportSpec


def profile_files(settings: Settings) -> list[Path]:
    """Files behind a run: the profiles that it uses (presets have none) and its workload's trace."""
    cluster = settings.cluster
    sites = [site.profile for site in cluster.also_prfaas if site.profile]
    names = [settings.profile] if settings.profile else [cluster.prfaas.profile, cluster.pd.profile, *sites]
    folder = Path(settings.results) / "profiles"
    found = [path for name in names if (path := profile_path(name, folder)) is not None]
    trace = settings.workload.trace
    return [*found, Path(trace.path)] if trace is not None and Path(trace.path).is_file() else found


def accelerators(settings: Settings) -> set[str]:
    """What the clusters consist of."""
    base = deployment(settings)
    return {base.pd.accelerator, base.prfaas.accelerator, *(site.profile.accelerator for site in base.sites)}


def check_deployment(settings: Settings, _: object = None) -> None:
    """Refuse what no tier can run before anything is written: the model answers in milliseconds.

    Raises:
        UserError: naming the key; a capacity trace is replayed by the emulated link alone.
    """
    link = settings.link
    if link.capacity_trace is not None or link.reverse_capacity_trace is not None:
        raise UserError(
            f"link.capacity_trace: not read by experiment={settings.name} on tier={settings.tier}; accepted: link.rate_bps"
        )
    if settings.tier == "simulate":
        _check_simulated(link, settings.transport.connections)
    operating_points(deployment(settings), settings)


def _check_simulated(link: LinkSpec, connections: int) -> None:
    """Refuse what the simulated link does not do. Raises UserError naming the key."""
    if any(change.loss is not None or change.rtt_s is not None for change in link.schedule):
        raise UserError(
            "link.schedule: changes of loss or rtt_s are not simulated; accepted on tier=simulate: rate_bps"
        )
    if link.loss_burst_segments > 1 and link.loss == 0:
        raise UserError("link.loss_burst_segments: has no effect without loss; accepted: with link.loss above 0")
    if connections != TransportSpec.connections and not tcp_counts(link):
        raise UserError(
            f"transport.connections: {connections} has no effect on tier=simulate while TCP carries whatever the link does; "
            "accepted: with link.loss above 0 or a link.congestion_control"
        )


def check_offloading(settings: Settings, _: object = None) -> None:
    """`check_deployment`, and there must be a PrfaaS cluster to offload to. Raises UserError naming the key."""
    check_deployment(settings)
    if not settings.cluster.prfaas.instances:
        raise UserError(f"cluster.prfaas.instances: 0; experiment={settings.name} needs one or more")


def check_priced(settings: Settings, _: object = None) -> None:
    """`check_offloading`, and both accelerators must have a price. Raises UserError naming the key."""
    check_offloading(settings)
    base = deployment(settings)
    settings.cost.gpu_hour_usd(base.prfaas.accelerator)
    settings.cost.gpu_hour_usd(base.pd.accelerator)


def deployment(settings: Settings) -> Deployment:
    """The PrfaaS-PD deployment that the settings describe.

    Raises:
        UserError: for a profile that does not exist, one of another model at a further PrfaaS cluster, or a link without a rate.
    """
    cluster = settings.cluster
    prfaas, pd = profiles(settings)
    sites = tuple(
        PrfaasSite(_site_profile(settings, i, prfaas), site.instances, site.rate_bps)
        for i, site in enumerate(cluster.also_prfaas)
    )
    return Deployment(
        prfaas=prfaas,
        n_prfaas=cluster.prfaas.instances,
        pd=pd,
        n_pd=cluster.pd.instances,
        egress_bps=settings.link.rate_bps or float("inf"),
        lengths=settings.workload.length_law(),
        output_tokens=settings.workload.mean_output_tokens(),
        sites=sites,
    )


def _site_profile(settings: Settings, index: int, prfaas: PhaseProfile) -> PhaseProfile:
    """Of a further PrfaaS cluster. Raises UserError naming the key for one that does not exist or computes another model's KVCache."""
    own, key = settings.cluster.also_prfaas[index].profile, f"cluster.also_prfaas[{index}].profile"
    if own is None:
        return prfaas
    if settings.profile is not None:
        raise UserError(f"{key}: has no effect beside profile={settings.profile}; accepted: one of the two")
    found = load_profile(own, Path(settings.results) / "profiles", key)
    if (found.model, found.kv) != (prfaas.model, prfaas.kv):
        raise UserError(
            f"{key}: {own} emits another KVCache than {prfaas.name}; accepted: profiles of the same model ({prfaas.model})"
        )
    return found


def site_links(settings: Settings) -> list[SharedLinkSpec]:
    """The simulated links of the further PrfaaS clusters: like the configured one, each at its own rate and distance."""
    link = replace(settings.link, schedule=())
    return [
        shared_link(replace(link, rate_bps=site.rate_bps, rtt_s=site.rtt_s), settings.transport)
        for site in settings.cluster.also_prfaas
    ]


def profiles(settings: Settings) -> tuple[PhaseProfile, PhaseProfile]:
    """The profiles of the PrfaaS and the PD cluster. Raises UserError for one that does not exist."""
    folder = Path(settings.results) / "profiles"

    def profile(own: str, key: str) -> PhaseProfile:
        if settings.profile is not None:
            return load_profile(settings.profile, folder)
        return load_profile(own, folder, key)

    cluster = settings.cluster
    return profile(cluster.prfaas.profile, "cluster.prfaas.profile"), profile(cluster.pd.profile, "cluster.pd.profile")


def check_decoding(settings: Settings) -> None:
    """Refuse T_decode by rows that the profile does not have, and memory that the longest request does not fit.

    Raises:
        UserError: naming the key.
    """
    base = decoding(deployment(settings), settings)
    room = settings.cluster.decode.memory_bytes
    longest = base.lengths.maximum_tokens + base.output_tokens
    if room is not None and (needed := float(base.pd.kv_bytes(longest))) > room:
        raise UserError(
            f"cluster.decode.memory_bytes: {room:g}, but a request of {longest:g} tokens keeps {needed:.4g} bytes; accepted: that or more"
        )


def decoding(base: Deployment, settings: Settings) -> Deployment:
    """The deployment with T_decode read as the cluster's decode says. Raises UserError where the profile has no rows."""
    try:
        return replace(base, pd=base.pd.with_decode_steps(settings.cluster.decode.steps))
    except UserError as error:
        raise UserError(
            f"cluster.decode.steps: rows; {base.pd.name} has none; accepted: fitted, or a profile that was measured over batch and "
            "context (silicon:<model>@<system>, or saved by experiment=profile)"
        ) from error


def within_memory(spec: SimulationSpec, settings: Settings) -> SimulationSpec:
    """The simulated deployment with the configured room for KVCache on each decode instance."""
    room = settings.cluster.decode.memory_bytes
    return spec if room is None else replace(spec, pd=tuple(replace(pd, decode_memory_bytes=room) for pd in spec.pd))


def fewest_prfaas(base: Deployment, policy: PolicySpec, demand_per_s: Iterable[float]) -> list[int]:
    """For each rate, how many of the PrfaaS instances are enough, each number at its own best threshold and split; all where none is."""
    capacity = [search(replace(base, n_prfaas=n), policy).lambda_max for n in range(base.n_prfaas + 1)]
    return [next((n for n, most in enumerate(capacity) if most >= rate - 1e-9), base.n_prfaas) for rate in demand_per_s]


#: The deployments of Table 6.
CASES = ("prfaas_pd", "homogeneous_pd", "naive_heterogeneous_pd")


def operating_points(
    base: Deployment, settings: Settings, cases: Collection[str] = CASES
) -> Mapping[str, OperatingPoint]:
    """The deployments of Table 6, or some of them, each at its own best point.

    PrfaaS-PD follows the policy (what it leaves open is searched); homogeneous PD has no PrfaaS and searches its split; naive
    heterogeneous PD offloads every request and decodes on the whole PD cluster.
    """
    policy, law = settings.policy, base.lengths
    points = {"prfaas_pd": search(base, policy)}
    if "homogeneous_pd" in cases:
        homogeneous = base.without_prfaas(settings.cluster.homogeneous_instances)
        free = type(policy)(policy.name, threshold_step_tokens=policy.threshold_step_tokens, lengths=policy.lengths)
        points["homogeneous_pd"] = search(homogeneous, free)
    if base.n_prfaas > 0 and "naive_heterogeneous_pd" in cases:
        points["naive_heterogeneous_pd"] = evaluate(base, law.minimum_tokens, 0, base.n_pd, policy.lengths)
    return points


def latencies(
    base: Deployment, points: Mapping[str, OperatingPoint], homogeneous_instances: int
) -> dict[str, PrefillLatency]:
    """TTFT without queueing of each deployment at its operating point."""
    homogeneous = base.without_prfaas(homogeneous_instances)
    return {
        case: prefill_latency(homogeneous if case == "homogeneous_pd" else base, point.threshold_tokens)
        for case, point in points.items()
    }
