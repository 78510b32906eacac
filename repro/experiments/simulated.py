"""What the simulated studies share: the policies that are compared, on the same arrivals, and how their difference is stated.

Every case of a study meets the same requests, seed by seed, so differences are taken within seeds: the interval of a difference is that of
paired values, and says whether a policy helps even where seeds differ more than policies do. `static` is what all are compared with.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from repro.errors import UserError
from repro.experiments.base import Context, Outcome
from repro.experiments.deployment import check_deployment, deployment, operating_points
from repro.experiments.study import Point, run_once, run_points, seeds_of
from repro.record.directory import Record
from repro.record.metrics import Metric
from repro.record.request_metrics import good, over_runs, summarise
from repro.record.statistics import Estimate
from repro.report import style
from repro.report.words import label
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
from repro.simulate.spec import SimulationSpec
from repro.simulate.stability import growth_of
from repro.workload.spec import ServiceLevel
from repro.workload.stream import RequestBatch

POLICY_NAMES = {
    "static": "static t",
    "short_term": "short-term only",
    "two_timescale": "both timescales",
    "random_split": "random split",
    "naive": "naive heterogeneous",
    "static_rebalanced": "static t, rebalanced",
    "no_short_term": "no short-term loop",
    "no_long_term": "no long-term loop",
    "least_work_to_round_robin": "round robin, not least work",
    "two_timescale_rebalanced": "both, rebalanced",
}
_UNITS = {
    "goodput": "req/s", "good_fraction": "", "ttft_mean_s": "s", "ttft_p50_s": "s", "ttft_p90_s": "s", "ttft_p99_s": "s",
    "tpot_mean_s": "s", "offload_fraction": "", "completed_fraction": "", "cached_fraction": "", "egress_bps": "bit/s",
    "link_egress_bps": "bit/s", "copied_bytes": "bytes",
}  # fmt: skip
_SAMPLES = ("goodput", "good_fraction", "ttft_mean_s", "ttft_p90_s", "link_egress_bps")

#: More requests in the system for every hundred that arrive, from the second quarter of a run to the last: its queues grow.
OVERLOADED = 0.05

Stream = Callable[[int], Iterable[RequestBatch]]


@dataclass(frozen=True)
class StudyOptions:
    """How long a study's runs take, how often they are repeated, and from when on requests count."""

    duration_s: float = 1200.0
    seeds: int = 5
    warmup_s: float = 60.0

    def __post_init__(self) -> None:
        if self.seeds < 2:
            raise UserError(f"options.seeds: {self.seeds} is below 2, which an interval needs")
        if not 0 <= self.warmup_s < self.duration_s:
            raise UserError(
                f"options.warmup_s: {self.warmup_s} must lie between 0 and options.duration_s ({self.duration_s})"
            )


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
    def of(context: Context) -> Setting:
        """From the settings."""
        settings = context.settings
        base = deployment(settings)
        true = replace(settings, policy=replace(settings.policy, lengths="true_mean"))
        return Setting(
            base,
            operating_points(base, true, ("prfaas_pd", "naive_heterogeneous_pd")),
            shared_link(settings.link),
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


def cached(spec: SimulationSpec, policy: PolicySpec) -> SimulationSpec:
    """The same deployment with the configured prefix caches and their rebalancing, if they are switched on."""
    if not policy.cache.enabled:
        return spec
    caching = replace(spec, cache=policy.cache.spec(spec.pd[0].profile))
    return with_scheduler(caching, rebalance=policy.rebalance)


@dataclass(frozen=True)
class Comparison:
    """Cases that meet the same requests, and what they are compared with.

    `stream` draws the requests of a seed; it is a value or a plain function, so that another process can draw them. `prefix` begins the
    names of the cases in the record. `against` names cases that are compared with another than the baseline.
    """

    cases: Mapping[str, SimulationSpec]
    stream: Stream
    baseline: str = "static"
    prefix: str = ""
    against: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """What a study keeps of one run: its metrics, its course over time, what the controllers did, and, if asked, its requests."""

    values: Mapping[str, float]
    series: pd.DataFrame
    controls: pd.DataFrame
    cut: bool
    requests: pd.DataFrame | None
    overloaded: bool = False


@dataclass(frozen=True)
class Measuring:
    """Simulates one point and measures the requests that arrive in the window; `keep` names the case whose requests are kept.

    `link_egress_bps` is all that left PrfaaS from the first arrival to the last finish, prefixes fetched and copied for caches included;
    `egress_bps` is the requests' own in the window.
    """

    window_s: tuple[float, float]
    slo: ServiceLevel
    bin_s: float
    seed: int
    keep: str

    def __call__(self, point: Point) -> Measured:
        """Simulate and measure."""
        requests, summary = run_once(point.spec, point.stream)
        values = summarise(requests, self.window_s, self.slo).values()
        values["link_egress_bps"] = 8 * summary.egress_bytes / max(summary.last_finish_s, 1e-9)
        values["copied_bytes"] = summary.copied_bytes
        first = point.seed == self.seed
        return Measured(
            values,
            over_time(requests, self.bin_s, self.slo),
            pd.DataFrame(summary.samples if first else (), columns=Sample._fields),
            summary.overloaded or bool(summary.unfinished),
            requests if first and point.case == self.keep else None,
            overloaded(requests),
        )


def overloaded(requests: pd.DataFrame) -> bool:
    """Whether queues grew for as long as requests arrived. Mean and percentiles of TTFT then say how long the run was, and no more."""
    if not len(requests):
        return False
    taken = requests[requests["outcome"] != "refused"]
    return len(taken) > 0 and bool(growth_of(taken["arrival_s"].to_numpy(), taken["finish_s"].to_numpy()) > OVERLOADED)


def compare(
    context: Context,
    comparisons: Sequence[Comparison],
    window_s: tuple[float, float],
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
            for case, spec in one.cases.items():
                points[f"{one.prefix}{case}, seed {seed}"] = Point(case, seed, spec, stream)
    results = iter(run_points(context, Measuring(window_s, slo, bin_s, first, "two_timescale"), points))
    rows: list[Metric] = []
    series: list[pd.DataFrame] = []
    controls: list[pd.DataFrame] = []
    samples: list[dict[str, Any]] = []
    kept: pd.DataFrame | None = None
    for one in comparisons:
        found: dict[str, list[Mapping[str, float]]] = {case: [] for case in one.cases}
        flagged: dict[str, int] = {}
        growing: dict[str, int] = {}
        for seed in seeds_of(context, seeds):
            for case in one.cases:
                run = next(results)
                found[case].append(run.values)
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
        rows += _rows(context, found, dict.fromkeys(found, one.baseline) | dict(one.against), one.prefix, growing)
        for case, runs in growing.items():
            rows.append(context.metric(one.prefix + case, "runs_overloaded", runs, "runs", "simulated", n=seeds))
            context.progress(f"{one.prefix}{case}: queues grow in {runs} of {seeds} runs; its TTFT is not compared")
        for case, runs in flagged.items():
            rows.append(context.metric(one.prefix + case, "runs_cut_or_unfinished", runs, "runs", "simulated", n=seeds))
    tables = {"series": pd.concat(series), "controls": pd.concat(controls), "samples": pd.DataFrame(samples)}
    return Outcome(rows, tables, requests=kept)


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


def _style(index: int) -> dict[str, Any]:
    colour, _, dash = style.SERIES[index % len(style.SERIES)]
    return {"color": colour, "linestyle": dash}


#: More lines than these in one panel cannot be told apart.
_MOST_LINES = 3
_MOST_BARS = 11


def case_name(case: str) -> str:
    """What a figure calls a case: words, and of a prefix such as `fixed_256.` what it says of the outputs."""
    prefix, _, own = case.rpartition(".")
    name = POLICY_NAMES.get(own, label(own))
    if found := re.fullmatch(r"(fixed|log_normal)_(\d+)", prefix):
        return f"output {found.group(2)}, {found.group(1).replace('_', '-')}: {name}"
    return f"{prefix.replace('_', ' ')}: {name}" if prefix else name


def draw_over_time(record: Record) -> Figure:
    """Share of requests that meet the service level by time of arrival, and, where lines are few, mean TTFT and the threshold.

    Of more than three cases each has a panel of its own, with what it is compared with in grey.
    """
    series, controls = record.table("series"), record.table("controls")
    cases = list(dict.fromkeys(series["case"]))
    if len(cases) > _MOST_LINES:
        return _draw_each_over_time(series, cases)
    figure, (top, middle, bottom) = style.panels(1, 3, height_in=6.2, sharex=True)
    for index, case in enumerate(cases):
        mean = series[series["case"] == case].groupby("at_s")[["arrived", "met", "ttft_s"]].mean()
        top.plot(mean.index, 100 * mean["met"] / mean["arrived"], label=case_name(case), **_style(index))
        middle.plot(mean.index, mean["ttft_s"], **_style(index))
        own = controls[controls["case"] == case] if len(controls) else controls
        if len(own):
            bottom.plot(own["at_s"], own["threshold_tokens"] / 1000, **_style(index))
    top.set(ylabel="within SLO (%)", title="Requests that meet the service level, by time of arrival")
    top.set_ylim(-3, 103)
    middle.set(ylabel="mean TTFT (s)", yscale="log")
    bottom.set(ylabel="threshold t (K tokens)", xlabel="time (s)")
    if len(cases) > 1:
        figure.legend(loc="outside upper center", ncols=len(cases))
    return figure


def _draw_each_over_time(series: pd.DataFrame, cases: Sequence[str]) -> Figure:
    met = series.groupby(["case", "at_s"])[["arrived", "met"]].mean()
    share = 100 * met["met"] / met["arrived"]
    baselines = [case for case in cases if case.rpartition(".")[2] == "static"] or list(cases[:1])
    others = [case for case in cases if case not in baselines]
    # A policy that lets a queue grow answers long after the last arrival of the others; their time is the figure's.
    last_s = min(share[case].index.max() for case in cases)
    columns = min(3, len(others))
    rows = -(-len(others) // columns)
    figure, axes = style.panels(columns, rows, height_in=1.5 * rows + 0.9, sharex=True, sharey=True)
    for axis, case in zip(axes, others, strict=False):
        beside = [one for one in baselines if one.rpartition(".")[0] == case.rpartition(".")[0]] or baselines
        axis.plot(share[beside[0]].index, share[beside[0]], color=style.GREY, lw=1.2, linestyle="--")
        axis.plot(share[case].index, share[case], color=style.BLUE, lw=1.6)
        axis.set_title(case_name(case), fontsize=8)
        axis.set(xlim=(0, last_s), ylim=(-3, 103))
    for axis in axes[len(others) :]:
        axis.remove()
    figure.supxlabel("time of arrival (s)", fontsize=9)
    figure.supylabel("requests within the SLO (%)", fontsize=9)
    figure.suptitle(
        f"Each case (blue) beside {case_name(baselines[0])} (grey)", x=0.01, ha="left", fontsize=10, weight="bold"
    )
    return figure


def draw_goodput(record: Record, without: str = "\0") -> Figure:
    """Goodput of each policy with its interval, and the paired difference to the baseline; cases that begin with `without` are left out."""
    table = record.metrics[~record.metrics["case"].str.startswith(without)]
    rows = table[table["metric"] == "goodput"].reset_index(drop=True)
    # Many long names leave no room for bars beside each other.
    many = len(rows) > _MOST_BARS
    figure, (left, right) = (
        style.panels(1, 2, height_in=0.38 * len(rows) + 1) if many else style.panels(2, height_in=3.4)
    )
    bars(left, rows)
    growing = set(table.loc[table["metric"] == "runs_overloaded", "case"])
    if growing:
        names = [POLICY_NAMES.get(case, case) + (" (overloaded)" if case in growing else "") for case in rows["case"]]
        left.set_yticks(range(len(names)), names)
    left.set(xlabel="goodput (req/s)", title="Goodput at the SLO")
    paired = table[table["metric"].str.startswith("goodput_minus_")].reset_index(drop=True)
    if len(paired):
        bars(right, paired)
        right.axvline(0, color="black", lw=0.8)
        baselines = [metric.removeprefix("goodput_minus_") for metric in paired["metric"]]
        usual = POLICY_NAMES.get(baselines[0], baselines[0])
        right.set(xlabel="paired difference (req/s)", title=f"Against {usual}")
        names = [case_name(str(case)) for case in paired["case"]]
        other = [
            name if base == baselines[0] else f"{name}\n− {POLICY_NAMES.get(base, base)}"
            for name, base in zip(names, baselines, strict=True)
        ]
        right.set_yticks(range(len(other)), other)
    return figure


def bars(axis: Axes, rows: pd.DataFrame) -> None:
    """Values of the cases from top to bottom, with their intervals."""
    import seaborn  # a second of imports that only drawing needs

    names = [case_name(str(case)) for case in rows["case"]]
    at = list(range(len(rows)))
    seaborn.barplot(x=rows["value"].to_numpy(), y=at, orient="h", color=style.BLUE, saturation=1, ax=axis)
    error = [np.nan_to_num(rows["value"] - rows["ci_low"]), np.nan_to_num(rows["ci_high"] - rows["value"])]
    axis.errorbar(rows["value"], at, xerr=error, fmt="none", ecolor="black", capsize=3, lw=1)
    axis.set_yticks(at, names)
    axis.set(ylabel="")
    axis.grid(axis="y", visible=False)


FIGURES = {"over_time": draw_over_time, "goodput": draw_goodput}
