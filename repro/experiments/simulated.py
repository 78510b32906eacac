"""What the simulated studies share: the policies that are compared, on the same arrivals, and how their difference is stated.

Every case of a study meets the same requests, seed by seed, so differences are taken within seeds: the interval of a difference is that of
paired values, and says whether a policy helps even where seeds differ more than policies do. `static` is what all are compared with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from repro.errors import UserError
from repro.experiments.base import Context, Outcome
from repro.experiments.deployment import check_deployment, deployment, operating_points
from repro.experiments.study import Point, run_once, run_points, seeds_of
from repro.kvcache.pool import CacheSpec
from repro.kvcache.sizing import KvBytes
from repro.record.metrics import Metric
from repro.record.request_metrics import good, over_runs, summarise
from repro.record.requests import ANSWERED
from repro.record.statistics import Estimate, repeats_for, warm_up
from repro.scheduling.adaptive import AdaptiveSpec
from repro.scheduling.long_term import LongTermSpec
from repro.scheduling.policies import RandomSplit, Threshold
from repro.scheduling.short_term import ShortTermSpec
from repro.scheduling.spec import PolicySpec
from repro.scheduling.throughput import Deployment, OperatingPoint
from repro.scheduling.views import Sample
from repro.settings import Settings
from repro.simulate.deployments import shared_link, simulated, with_scheduler
from repro.simulate.link_spec import SharedLinkSpec
from repro.simulate.spec import Fault, SimulationSpec
from repro.simulate.stability import growth_of
from repro.workload.spec import ServiceLevel
from repro.workload.stream import RequestBatch

_UNITS = {
    "goodput": "req/s", "good_fraction": "", "ttft_mean_s": "s", "ttft_p50_s": "s", "ttft_p90_s": "s", "ttft_p99_s": "s",
    "tpot_mean_s": "s", "offload_fraction": "", "completed_fraction": "", "cached_fraction": "", "egress_bps": "bit/s",
    "link_egress_bps": "bit/s", "copied_bytes": "bytes",
}  # fmt: skip
_SAMPLES = ("goodput", "good_fraction", "ttft_mean_s", "ttft_p90_s", "link_egress_bps")

#: From when on, and until when, requests count by their arrival; None begins where a run has settled.
Window = tuple[float | None, float]
USUAL_WARMUP_S = 60.0
#: The difference, as a share of the baseline, for which a study says how many seeds show it.
SOUGHT = 0.02
#: More requests in the system for every hundred that arrive, from the second quarter of a run to the last: its queues grow.
OVERLOADED = 0.05

Stream = Callable[[int], Iterable[RequestBatch]]


@dataclass(frozen=True)
class StudyOptions:
    """How long a study's runs take, how often they are repeated, and from when on requests count."""

    duration_s: float = 1200.0
    seeds: int = 5
    warmup_s: float = USUAL_WARMUP_S

    def __post_init__(self) -> None:
        check_effort(self.duration_s, self.seeds, self.warmup_s)


def check_effort(duration_s: float, seeds: int, warmup_s: float) -> None:
    """Refuse fewer seeds than an interval needs, and a warm-up as long as the run. Raises UserError naming the key."""
    if seeds < 2:
        raise UserError(f"options.seeds: {seeds} is below 2, which an interval needs")
    if not 0 <= warmup_s < duration_s:
        raise UserError(f"options.warmup_s: {warmup_s} must lie between 0 and options.duration_s ({duration_s})")


@dataclass(frozen=True)
class Options(StudyOptions):
    """`load` is the arrival rate as a share of the deployment's Λ_max by the model with true means."""

    load: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.load > 0:
            raise UserError(f"options.load: {self.load} is not positive")


def check(settings: Settings, options: object) -> None:
    """The deployment must be able to serve, and have a PrfaaS cluster. Raises UserError naming the key."""
    check_deployment(settings, options)
    if not settings.cluster.prfaas.instances:
        raise UserError(
            f"cluster.prfaas.instances: 0; experiment={settings.name} compares ways to offload and needs one or more"
        )


def check_blocks(settings: Settings, blocks: Mapping[str, int | None]) -> None:
    """Refuse caches whose blocks are of another size than those that requests name, by whoever names them.

    Raises:
        UserError: naming the cache's key; a prefix would be found under the keys of another.
    """
    cache = settings.policy.cache
    for who, tokens in blocks.items():
        if cache.enabled and tokens not in (None, cache.block_tokens):
            raise UserError(
                f"policy.cache.block_tokens: {cache.block_tokens}, but {who} names blocks of {tokens} tokens; accepted: {tokens}"
            )


@dataclass(frozen=True)
class Setting:
    """The deployment under study at its best operating point, which is taken with true means."""

    base: Deployment
    points: Mapping[str, OperatingPoint]
    link: SharedLinkSpec
    slo: ServiceLevel
    policy: PolicySpec

    @staticmethod
    def of(context: Context, base: Deployment | None = None) -> Setting:
        """From the settings, whose deployment it is unless a `base` is given."""
        settings = context.settings
        base = base or deployment(settings)
        true = replace(settings, policy=replace(settings.policy, lengths="true_mean"))
        return Setting(
            base,
            operating_points(base, true, ("prfaas_pd", "naive_heterogeneous_pd")),
            shared_link(settings.link, settings.transport),
            settings.workload.slo,
            settings.policy,
        )

    @property
    def point(self) -> OperatingPoint:
        """Of PrfaaS-PD."""
        return self.points["prfaas_pd"]

    def rate(self, load: float) -> float:
        """Requests per second at that load."""
        return load * self.point.lambda_max

    def policies(self, link: SharedLinkSpec | None = None) -> dict[str, SimulationSpec]:
        """The configured policy with both loops, and with less: the fast loop alone, a static t, a blind split of equal share; and naive
        offloading on its own split.
        """
        through = link or self.link
        full = scheduled(simulated(self.base, self.point, through), self.policy, self.point)
        off = ShortTermSpec(), LongTermSpec()
        static = with_scheduler(
            full, router=Threshold(), short_term=off[0], long_term=off[1], adaptive=AdaptiveSpec(), fallback_s=None
        )
        naive = simulated(self.base, self.points["naive_heterogeneous_pd"], through)
        return {
            "static": static,
            "short_term": with_scheduler(full, long_term=off[1], adaptive=AdaptiveSpec()),
            "two_timescale": full,
            "random_split": with_scheduler(static, router=RandomSplit(self.point.offload_fraction)),
            "naive": with_scheduler(naive, placement=full.scheduler.placement, admission=full.scheduler.admission),
        }


def scheduled(spec: SimulationSpec, policy: PolicySpec, point: OperatingPoint) -> SimulationSpec:
    """The same deployment under the configured policy, its threshold and split those of the operating point; without caches."""
    return with_scheduler(
        spec,
        router=policy.router_at(point.offload_fraction),
        placement=policy.placement,
        admission=policy.admission,
        short_term=policy.short_term,
        long_term=policy.long_term,
        adaptive=policy.adaptive,
        fallback_s=policy.fallback_s,
    )


def cache_of(policy: PolicySpec, profile: KvBytes) -> CacheSpec | None:
    """The configured prefix cache with all its tiers, if it is switched on. Raises UserError for tiers that cannot be."""
    return replace(policy.cache.spec(profile), lower=policy.cache.lower) if policy.cache.enabled else None


def cached(spec: SimulationSpec, policy: PolicySpec) -> SimulationSpec:
    """The same deployment with the configured prefix caches and their rebalancing, if they are switched on."""
    cache = cache_of(policy, spec.pd[0].profile)
    return spec if cache is None else with_scheduler(replace(spec, cache=cache), rebalance=policy.rebalance)


@dataclass(frozen=True)
class Comparison:
    """Cases that meet the same requests, and what they are compared with.

    `stream` draws the requests of a seed; it is a value or a plain function, so that another process can draw them. `prefix` begins the
    names of the cases in the record. `against` names cases that are compared with another than the baseline. `faults` are what fails
    under a seed, in every case beside its own.
    """

    cases: Mapping[str, SimulationSpec]
    stream: Stream
    baseline: str = "static"
    prefix: str = ""
    against: Mapping[str, str] = field(default_factory=dict)
    faults: Mapping[int, tuple[Fault, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """What a study keeps of one run: its metrics, its course over time, what the controllers did, and, if asked, its requests.

    `settled_s` is when TTFT has settled by MSER-5, infinity where it does not. `clusters_bps` is `link_egress_bps` of each PrfaaS cluster.
    """

    values: Mapping[str, float]
    series: pd.DataFrame
    controls: pd.DataFrame
    cut: bool
    requests: pd.DataFrame | None
    settled_s: float
    overloaded: bool = False
    clusters_bps: tuple[float, ...] = ()


@dataclass(frozen=True)
class Measuring:
    """Simulates one point and measures the requests that arrive in the window; `keep` names the case whose requests are kept.

    A window without a beginning begins where the run has settled, or at `USUAL_WARMUP_S` where it does not.

    `link_egress_bps` is all that left PrfaaS from the first arrival to the last finish, prefixes fetched and copied for caches included;
    `egress_bps` is the requests' own in the window.
    """

    window_s: Window
    slo: ServiceLevel
    bin_s: float
    seed: int
    keep: str

    def __call__(self, point: Point) -> Measured:
        """Simulate and measure."""
        requests, summary = run_once(point.spec, point.stream)
        settled_s = settles(requests)
        from_s, until_s = self.window_s
        if from_s is None:
            from_s = settled_s if math.isfinite(settled_s) else min(USUAL_WARMUP_S, until_s / 2)
        values = summarise(requests, (from_s, until_s), self.slo).values()
        duration_s = max(summary.last_finish_s, 1e-9)
        values["link_egress_bps"] = 8 * summary.egress_bytes / duration_s
        values["copied_bytes"] = summary.copied_bytes
        first = point.seed == self.seed
        return Measured(
            values,
            over_time(requests, self.bin_s, self.slo),
            pd.DataFrame(summary.samples if first else (), columns=Sample._fields),
            summary.overloaded or bool(summary.unfinished),
            requests if first and point.case == self.keep else None,
            settled_s,
            overloaded(requests),
            tuple(8 * own / duration_s for own in summary.cluster_egress_bytes),
        )


def settles(requests: pd.DataFrame) -> float:
    """When the TTFT of requests in the order of their arrival has settled, in seconds; infinity where it does not."""
    answered = requests[requests["outcome"].isin(ANSWERED)]
    cut = warm_up(answered["ttft_s"].to_numpy())
    return math.inf if cut < 0 else float(answered["arrival_s"].iloc[cut]) if cut else 0.0


def overloaded(requests: pd.DataFrame) -> bool:
    """Whether queues grew for as long as requests arrived. Mean and percentiles of TTFT then say how long the run was, and no more."""
    if not len(requests):
        return False
    taken = requests[requests["outcome"] != "refused"]
    return len(taken) > 0 and bool(growth_of(taken["arrival_s"].to_numpy(), taken["finish_s"].to_numpy()) > OVERLOADED)


def compare(
    context: Context,
    comparisons: Sequence[Comparison],
    window_s: Window,
    slo: ServiceLevel,
    seeds: int,
    *,
    bin_s: float = 10.0,
) -> Outcome:
    """All cases on the same requests: means over seeds, differences to the baseline within seeds, and both over time.

    The values of each seed are kept as `samples`, so that this study can be compared with another one seed by seed.
    """
    first = context.settings.seed
    points = {}
    for one in comparisons:
        for seed in seeds_of(context, seeds):
            stream = one.stream(seed)  # drawn once, so that all cases meet the same requests
            for case, alone in one.cases.items():
                spec = replace(alone, faults=(*alone.faults, *one.faults.get(seed, ())))
                points[f"{one.prefix}{case}, seed {seed}"] = Point(case, seed, spec, stream)
    results = iter(run_points(context, Measuring(window_s, slo, bin_s, first, "two_timescale"), points))
    rows: list[Metric] = []
    series: list[pd.DataFrame] = []
    controls: list[pd.DataFrame] = []
    samples: list[dict[str, Any]] = []
    settled: list[float] = []
    needed: list[int] = []
    kept: pd.DataFrame | None = None
    for one in comparisons:
        found: dict[str, list[Mapping[str, float]]] = {case: [] for case in one.cases}
        flagged: dict[str, int] = {}
        growing: dict[str, int] = {}
        clusters: dict[str, list[tuple[float, ...]]] = {}
        for seed in seeds_of(context, seeds):
            for case in one.cases:
                run = next(results)
                found[case].append(run.values)
                settled.append(run.settled_s)
                clusters.setdefault(case, []).append(run.clusters_bps)
                series.append(run.series.assign(case=one.prefix + case, seed=seed))
                if seed == first:
                    controls.append(run.controls.assign(case=one.prefix + case))
                if run.cut:
                    flagged[case] = flagged.get(case, 0) + 1
                if run.overloaded:
                    growing[case] = growing.get(case, 0) + 1
                if kept is None:
                    kept = run.requests
        samples += [
            {"case": one.prefix + case, "seed": seed, "metric": metric, "value": own[metric]}
            for case, runs in found.items()
            for seed, own in zip(seeds_of(context, seeds), runs, strict=True)
            for metric in _UNITS
        ]
        against = dict.fromkeys(found, one.baseline) | dict(one.against)
        rows += _rows(context, found, against, one.prefix, growing)
        needed += _seeds_needed(found, against)
        for case, by_seed in clusters.items():
            rows += _of_clusters(context, one.prefix + case, by_seed)
        for case, runs in growing.items():
            rows.append(context.metric(one.prefix + case, "runs_overloaded", runs, "runs", "simulated", n=seeds))
            context.progress(f"{one.prefix}{case}: queues grow in {runs} of {seeds} runs; its TTFT is not compared")
        for case, runs in flagged.items():
            rows.append(context.metric(one.prefix + case, "runs_cut_or_unfinished", runs, "runs", "simulated", n=seeds))
    tables = {"series": pd.concat(series), "controls": pd.concat(controls), "samples": pd.DataFrame(samples)}
    statistics = [_warm_up_said(window_s[0], settled), *_power_said(needed)]
    return Outcome(rows, tables, requests=kept, provenance={"statistics": statistics})


def _warm_up_said(from_s: float | None, settled_s: Sequence[float]) -> str:
    """What was cut of each run, and what MSER-5 would cut."""
    known = [value for value in settled_s if math.isfinite(value)]
    never = len(settled_s) - len(known)
    cut = "where it has settled" if from_s is None else f"{from_s:g} s"
    said = f"Requests count from {cut} on."
    if known:
        said += f" By MSER-5 on TTFT {len(known)} of {len(settled_s)} runs settle after {min(known):.0f} to {max(known):.0f} s"
        said += f" (median {float(np.median(known)):.0f} s)."
    if never:
        said += f" {never} of {len(settled_s)} do not: their load changes, or their queues grow."
        said += f" Of these, requests count from {USUAL_WARMUP_S:g} s on." if from_s is None else ""
    return said


def _seeds_needed(found: Mapping[str, Sequence[Mapping[str, float]]], against: Mapping[str, str]) -> Iterable[int]:
    """For each case, how many seeds show a difference of `SOUGHT` of the baseline's goodput."""
    for case, values in found.items():
        others = found.get(against[case], ())
        if case == against[case] or len(others) < 2:
            continue
        pairs = [value["goodput"] - other["goodput"] for value, other in zip(values, others, strict=True)]
        scatter, usual = float(np.std(pairs, ddof=1)), float(np.mean([other["goodput"] for other in others]))
        if scatter > 0 and usual > 0:
            yield repeats_for(scatter, SOUGHT * usual)


def _power_said(needed: Sequence[int]) -> list[str]:
    if not needed:
        return []
    few, many = min(needed), max(needed)
    seeds = f"{few}" if few == many else f"{few} to {many}"
    return [f"A paired difference of {SOUGHT:.0%} in goodput is seen four times out of five with {seeds} seeds."]


def _of_clusters(context: Context, case: str, by_seed: Sequence[tuple[float, ...]]) -> Iterable[Metric]:
    """What left each PrfaaS cluster, where there are several: whom the scheduler chose."""
    for index, rates_bps in enumerate(zip(*by_seed, strict=True) if len(by_seed[0]) > 1 else ()):
        found = Estimate.of(list(rates_bps))
        yield context.metric(
            f"{case}.prfaas{index}", "link_egress_bps", found.value, "bit/s", "simulated",
            interval=(found.low, found.high), n=found.n,
        )  # fmt: skip


def _rows(
    context: Context,
    found: Mapping[str, Sequence[Mapping[str, float]]],
    baselines: Mapping[str, str],
    prefix: str,
    growing: Mapping[str, int],
) -> Iterable[Metric]:
    """Metrics of each case, and differences to its baseline; those of TTFT only where no run of either was overloaded."""
    for case, values in found.items():
        baseline = baselines[case]
        for metric, unit in _UNITS.items():
            estimate = over_runs(metric, [value[metric] for value in values])
            yield context.metric(
                prefix + case,
                metric,
                estimate.value,
                unit,
                "simulated",
                interval=(estimate.low, estimate.high),
                n=estimate.n,
            )
            grows = metric.startswith("ttft") and (case in growing or baseline in growing)
            if case != baseline and metric in _SAMPLES and baseline in found and not grows:
                paired = Estimate.paired(
                    [value[metric] for value in values], [other[metric] for other in found[baseline]]
                )
                yield context.metric(
                    prefix + case, f"{metric}_minus_{baseline}", paired.value, unit, "simulated",
                    interval=(paired.low, paired.high), n=paired.n,
                )  # fmt: skip


def over_time(requests: pd.DataFrame, bin_s: float, slo: ServiceLevel) -> pd.DataFrame:
    """Per interval of arrival: requests, those that met the service level, and their mean TTFT."""
    met = good(requests["ttft_s"].to_numpy(), requests["tpot_s"].to_numpy(), slo)
    at = (requests["arrival_s"] // bin_s) * bin_s
    bins = requests.assign(at_s=at, met=met).groupby("at_s")
    return bins.agg(arrived=("id", "size"), met=("met", "sum"), ttft_s=("ttft_s", "mean")).reset_index()
