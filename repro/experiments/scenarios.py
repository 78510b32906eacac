"""When does the scheduler matter? Six ways in which the world changes under a deployment, and every policy on the same requests.

`static` never moves, but is no straw man: threshold and split are the best for all that it will meet. The others begin where a planner
would who knows the first hour only. `by_hand` is re-planned at every full hour for what the last one was like. `oracle` knows the future:
for each seed it is the best of several timetables that are planned for what comes, moves paid, and of those of static and by hand.
Regret is the goodput that a policy leaves to the oracle, seed by seed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from repro.configuration import build
from repro.errors import UserError
from repro.experiments import scenario_plans as plans
from repro.experiments import simulated
from repro.experiments.base import SCHEDULER, SIMULATED, Context, Experiment, Outcome
from repro.experiments.deployment import deployment, profile_files
from repro.experiments.scenario_worlds import SCENARIOS, Changes, World, world
from repro.experiments.study import Point, run_once, run_points, seeds_of
from repro.presets import preset
from repro.record.directory import Record
from repro.record.metrics import Metric
from repro.record.request_metrics import over_runs, summarise
from repro.record.statistics import Estimate
from repro.report import style
from repro.scheduling.long_term import LongTermSpec
from repro.scheduling.policies import Threshold
from repro.scheduling.search import search
from repro.scheduling.spec import PolicySpec
from repro.scheduling.throughput import Deployment, OperatingPoint
from repro.settings import Settings
from repro.simulate.deployments import shared_link, with_scheduler
from repro.simulate.deployments import simulated as deployed
from repro.simulate.spec import SimulationSpec
from repro.workload.phases import Phases
from repro.workload.spec import ServiceLevel

#: Case → what a figure calls it, in the order of the figure.
POLICIES = {
    "static": "static t and split", "by_hand": "re-planned by hand", "short_term": "short-term loop", "long_term": "long-term loop",
    "two_timescale": "both, as in the paper", "adaptive": "adaptive",
}  # fmt: skip
#: Timetables of which the oracle takes the best, seed by seed.
_KNOWING = ("planned", "planned_early", "static", "by_hand")
#: Plans are tried on this seed, far from those that are reported.
_PLANNING_SEED = 90_000
_BIN_S = 60.0
#: A policy has reacted when its share of requests in time stays within this of the oracle's, over windows of so many bins.
_CAUGHT_UP, _WINDOW = 0.05, 5


@dataclass(frozen=True)
class Options:
    """`scenarios` to play, each of `hours` of `hour_s`; at `load` of what the oracle could carry in the worst of them.

    The changes: μ of short and long prompts and of the crowd's below and above the usual one, outputs, PrfaaS instances lost, the link's
    rate, the crowd's arrivals, the cached share of prompts. A halved link is bought with `link_headroom` over the usual egress.
    """

    scenarios: tuple[str, ...] = SCENARIOS
    load: float = 0.8
    hours: int = 6
    hour_s: float = 3600.0
    warmup_s: float = 300.0
    seeds: int = 20
    mu_change: float = 0.6
    output_factor: float = 2.0
    lost_instances: int = 2
    link_factor: float = 0.5
    link_headroom: float = 1.25
    crowd_factor: float = 1.6
    hit_rate: float = 0.5

    def __post_init__(self) -> None:
        unknown = [name for name in self.scenarios if name not in SCENARIOS]
        if unknown or not self.scenarios:
            raise UserError(f"options.scenarios: {unknown or 'none'}; accepted: {', '.join(SCENARIOS)}")
        for key in ("load", "hour_s", "output_factor", "link_factor", "link_headroom", "crowd_factor"):
            if not getattr(self, key) > 0:
                raise UserError(f"options.{key}: {getattr(self, key)} is not positive")
        if self.hours < 3 or self.seeds < 2:
            raise UserError(f"options.hours, options.seeds: {self.hours} and {self.seeds}; accepted: 3 and 2 or more")
        if not 0 <= self.warmup_s < self.hour_s:
            raise UserError(f"options.warmup_s: {self.warmup_s} must lie within options.hour_s ({self.hour_s})")
        if not 0 <= self.hit_rate < 1:
            raise UserError(f"options.hit_rate: {self.hit_rate}; accepted: 0 to below 1")
        if self.lost_instances < 0:
            raise UserError(f"options.lost_instances: {self.lost_instances} is negative")

    @property
    def changes(self) -> Changes:
        """How much the worlds change."""
        return Changes(
            self.mu_change, self.output_factor, self.lost_instances, self.link_factor, self.crowd_factor, self.hit_rate
        )


@dataclass(frozen=True)
class Ran:
    """What is kept of one run: its metrics, conversions, and requests over time."""

    values: Mapping[str, float]
    conversions: int
    overloaded: bool
    series: pd.DataFrame


@dataclass(frozen=True)
class Measuring:
    """Simulates one scenario under one policy and measures the requests that arrive in the window."""

    window_s: tuple[float, float]
    slo: ServiceLevel

    def __call__(self, point: Point) -> Ran:
        """Simulate and measure."""
        requests, summary = run_once(point.spec, point.stream)
        return Ran(
            summarise(requests, self.window_s, self.slo).values(),
            summary.conversions,
            summary.overloaded or simulated.overloaded(requests),
            simulated.over_time(requests, _BIN_S, self.slo),
        )


def check(settings: Settings, options: Options) -> None:
    """A deployment with PrfaaS and a policy that adapts. Raises UserError naming the key."""
    simulated.check(settings, options)
    if not settings.policy.adaptive.enabled:
        raise UserError(
            "policy.adaptive.enabled: false; experiment=scenarios compares the adaptive policy with the others; accepted: true"
        )


def run(context: Context) -> Outcome:
    """Every scenario under every policy."""
    settings, options = context.settings, context.options
    base, link = deployment(settings), shared_link(settings.link, settings.transport)
    free = PolicySpec(
        "free", threshold_step_tokens=max(settings.policy.threshold_step_tokens, 200), lengths="true_mean"
    )
    seeds = seeds_of(context, options.seeds)
    rows: list[Metric] = []
    series: list[pd.DataFrame] = []
    samples: list[dict[str, object]] = []
    for name in options.scenarios:
        place = world(name, base, link, options.changes, options.hours, options.hour_s, options.link_headroom, free)
        rate = place.rate(options.load, free)
        tables = plans.worth(context, name, place, rate, free, settings.workload.slo, _PLANNING_SEED)
        cases = cases_of(settings, place, tables, free, options.hour_s)
        streams = {seed: Phases(place.phases(rate), seed) for seed in seeds}
        points = {
            f"{name}.{case}, seed {seed}": Point(case, seed, spec, stream)
            for seed, stream in streams.items()
            for case, spec in cases.items()
        }
        window_s = (options.warmup_s, place.seconds)
        results = iter(run_points(context, Measuring(window_s, settings.workload.slo), points))
        found: dict[str, list[Ran]] = {case: [] for case in cases}
        for _ in seeds:
            for case in cases:
                found[case].append(next(results))
        found["oracle"] = [
            max((found[case][i] for case in _KNOWING), key=lambda ran: ran.values["goodput"]) for i in range(len(seeds))
        ]
        del found["planned"], found["planned_early"]
        rows.append(context.metric(name, "arrival_rate", rate, "req/s", "computed"))
        rows += _rows(context, name, place, found)
        for case, runs in found.items():
            for seed, ran in zip(seeds, runs, strict=True):
                series.append(ran.series.assign(scenario=name, case=case, seed=seed))
                samples += [
                    {"case": f"{name}.{case}", "seed": seed, "metric": metric, "value": ran.values[metric]}
                    for metric in ("goodput", "good_fraction")
                ]
    course = pd.concat(series).groupby(["scenario", "case", "at_s"], sort=False)[["arrived", "met"]].sum()
    return Outcome(rows, {"series": course.reset_index(), "samples": pd.DataFrame(samples)})


def cases_of(
    settings: Settings, place: World, tables: plans.Worth, free: PolicySpec, hour_s: float
) -> dict[str, SimulationSpec]:
    """All policies in one scenario."""
    policy, base = settings.policy, place.conditions[0].base
    paper = build(PolicySpec, preset("policy", "paper"))

    def at(point: OperatingPoint, **loops: object) -> SimulationSpec:
        spec = with_scheduler(
            deployed(base, point, place.link), router=policy.router_at(point.offload_fraction), placement=policy.placement,
            admission=policy.admission, **loops,
        )  # fmt: skip
        return place.happening(spec)

    def still(point: OperatingPoint) -> SimulationSpec:
        return with_scheduler(at(point), router=Threshold())

    threshold, n_p = plans.roomiest(base, free)
    first = search(base, replace(free, threshold_tokens=threshold, n_p=n_p))
    adaptive = at(first, short_term=policy.short_term, adaptive=policy.adaptive, fallback_s=policy.fallback_s)
    both = at(first, short_term=paper.short_term, long_term=paper.long_term, fallback_s=paper.fallback_s)
    threshold, n_p = plans.best_static(place, tables)
    sequence = plans.best_sequence(place, tables, gone_s := _gone_s(base, policy.adaptive.restart_s))
    starts = replace(free, threshold_tokens=min(sequence[0][0], base.lengths.maximum_tokens), n_p=sequence[0][1])
    prophet = still(search(base, starts))
    held = replace(free, threshold_tokens=min(threshold, base.lengths.maximum_tokens), n_p=n_p)
    return {
        "static": with_scheduler(still(search(base, held)), threshold_tokens=threshold),
        "by_hand": with_scheduler(still(first), timetable=plans.by_hand(place, free, hour_s)),
        "short_term": with_scheduler(both, long_term=LongTermSpec()),
        "long_term": with_scheduler(both, short_term=replace(paper.short_term, enabled=False)),
        "two_timescale": both,
        "adaptive": adaptive,
        "planned": with_scheduler(prophet, timetable=plans.timetable(place, sequence)),
        "planned_early": with_scheduler(prophet, timetable=plans.timetable(place, sequence, gone_s)),
    }


def _gone_s(base: Deployment, restart_s: float) -> float:
    """For how long a node that turns serves nobody: its longest output, at least, and the restart."""
    step_s = base.pd.decode_step_s(base.pd.batch_max, 0.0)
    return base.output_tokens * step_s + restart_s


def _rows(context: Context, name: str, place: World, found: Mapping[str, Sequence[Ran]]) -> Iterable[Metric]:
    """Of each case: goodput, share in time, regret, difference to static, conversions, reaction; intervals over seeds, paired."""
    hours = place.seconds / 3600
    oracle = [ran.values["goodput"] for ran in found["oracle"]]
    static = [ran.values["goodput"] for ran in found["static"]]
    for case, runs in found.items():
        own = [ran.values["goodput"] for ran in runs]
        estimates = {
            ("goodput", "req/s"): over_runs("goodput", own),
            ("good_fraction", ""): over_runs("good_fraction", [ran.values["good_fraction"] for ran in runs]),
            ("ttft_p90_s", "s"): over_runs("ttft_p90_s", [ran.values["ttft_p90_s"] for ran in runs]),
            ("conversions_per_hour", "1/h"): Estimate.of([ran.conversions / hours for ran in runs]),
        }
        if case != "oracle":
            estimates["regret_fraction", ""] = Estimate.of_signed([
                (best - value) / best for best, value in zip(oracle, own, strict=True)
            ])  # fmt: skip
            lags = [reaction_s(place, a.series, b.series) for a, b in zip(runs, found["oracle"], strict=True)]
            estimates["reaction_s", "s"] = Estimate.of(lags, place.seconds)
        if case != "static":
            estimates["goodput_over_static_fraction", ""] = Estimate.of_signed([
                value / other - 1 for other, value in zip(static, own, strict=True)
            ])  # fmt: skip
        for (metric, unit), one in estimates.items():
            yield context.metric(
                f"{name}.{case}", metric, one.value, unit, "simulated", interval=(one.low, one.high), n=one.n
            )
        growing = sum(ran.overloaded for ran in runs)
        if growing:
            yield context.metric(f"{name}.{case}", "runs_overloaded", growing, "runs", "simulated", n=len(runs))


def reaction_s(place: World, own: pd.DataFrame, oracle: pd.DataFrame) -> float:
    """Mean time after a change until a policy stays as good as the oracle; a change that it never catches up with lasts to the next."""
    starts = place.starts_s()
    changes = [b for (a, b) in itertools.pairwise(range(len(starts))) if place.conditions[a] != place.conditions[b]]
    bins = np.arange(0.0, place.seconds, _BIN_S)

    def share(table: pd.DataFrame) -> NDArray[np.float64]:
        sums = table.set_index("at_s")[["arrived", "met"]].reindex(bins, fill_value=0).rolling(_WINDOW).sum()
        return np.asarray(sums["met"] / sums["arrived"])

    behind = share(own) < share(oracle) - _CAUGHT_UP
    lags = []
    for number in changes:
        later = [starts[other] for other in changes if other > number]
        low, high = starts[number], later[0] if later else place.seconds
        late = bins[behind & (bins >= low) & (bins < high)]
        lags.append(float(late[-1] + _BIN_S - low) if len(late) else 0.0)
    return float(np.mean(lags)) if lags else 0.0


def _cases(table: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Rows of one metric, with scenario and policy in columns of their own."""
    rows = table[table["metric"] == metric].copy()
    rows[["scenario", "policy"]] = rows["case"].str.split(".", n=1, expand=True)
    return rows


def finding(record: Record) -> str:
    """The largest regret of each policy, and how the adaptive one does against static."""
    regret = _cases(record.metrics, "regret_fraction")
    worst = {policy: 100 * regret.loc[regret["policy"] == policy, "value"].max() for policy in POLICIES}
    gains = _cases(record.metrics, "goodput_over_static_fraction")
    over = gains[gains["policy"] == "adaptive"].set_index("scenario")["value"]
    turns = _cases(record.metrics, "conversions_per_hour")
    most = turns.loc[turns["policy"] == "adaptive", "value"].max()
    return (
        f"Over {len(over)} changing worlds the adaptive policy leaves at most {worst['adaptive']:.1f} % of an oracle's goodput, the best "
        f"static plan {worst['static']:.0f} %, re-planning by hand {worst['by_hand']:.0f} %, the paper's loops "
        f"{worst['two_timescale']:.0f} %; against static it gains from {100 * over.min():+.1f} % "
        f"({str(over.idxmin()).replace('_', ' ')}) to {100 * over.max():+.1f} % ({str(over.idxmax()).replace('_', ' ')}), with at most "
        f"{most:.1f} conversions an hour."
    )


def draw(record: Record) -> Figure:
    """Regret of every policy in every scenario, with intervals; hollow where queues grew; conversions and reaction beside it."""
    table = record.metrics
    growing = set(table.loc[table["metric"] == "runs_overloaded", "case"])
    scenarios = list(dict.fromkeys(_cases(table, "regret_fraction")["scenario"]))
    figure, (left, middle, right) = style.panels(3, height_in=4.2, width_in=10.5)
    height = np.arange(len(scenarios))[::-1]
    panels = ((left, "regret_fraction", 100.0), (middle, "conversions_per_hour", 1.0), (right, "reaction_s", 1 / 60))
    for index, (policy, name) in enumerate(POLICIES.items()):
        colour, marker, _ = style.SERIES[index]
        for axis, metric, scale in panels:
            own = _cases(table, metric)
            own = own[own["policy"] == policy].set_index("scenario").reindex(scenarios)
            at = height + 0.12 * (len(POLICIES) / 2 - index)
            value = scale * own["value"].to_numpy()
            error = [
                np.nan_to_num(np.maximum(value - scale * own["ci_low"], 0)),
                np.nan_to_num(np.maximum(scale * own["ci_high"] - value, 0)),
            ]
            if axis is left:  # few seeds leave wide intervals of counts and times; the record has them
                axis.errorbar(value, at, xerr=error, fmt="none", ecolor=colour, lw=1, capsize=2)
            faces = ["white" if f"{scenario}.{policy}" in growing else colour for scenario in scenarios]
            axis.scatter(
                value, at, marker=marker, c=faces, edgecolors=colour, s=26, zorder=3,
                label=name if axis is left else None,
            )  # fmt: skip
    left.set_yticks(height, [scenario.replace("_", " ") for scenario in scenarios])
    for axis in (middle, right):
        axis.set_yticks(height, [])
    left.set_xscale("symlog", linthresh=10)
    left.set_xticks([0, 5, 10, 30, 100], ["0", "5", "10", "30", "100"])
    left.set_xlim(right=110)
    left.axvline(0, color="black", lw=0.8)
    left.set(xlabel="goodput left to the oracle (%)", title="Regret (hollow: queues grew)")
    middle.set(xlabel="conversions per hour", title="Nodes that turn")
    right.set(xlabel="minutes", title="Time to catch up with a change")
    figure.legend(loc="outside lower center", ncols=len(POLICIES) // 2)
    return figure


def draw_over_time(record: Record) -> Figure:
    """Share of requests within the service level by time of arrival: oracle, static, the paper's loops and the adaptive policy."""
    series = record.table("series")
    scenarios = list(dict.fromkeys(series["scenario"]))
    rows = -(-len(scenarios) // 2)
    figure, axes = style.panels(min(2, len(scenarios)), rows, height_in=1.9 * rows + 0.8, sharey=True)
    shown = {"oracle": style.GREY, "static": style.BLUE, "two_timescale": style.GREEN, "adaptive": style.RED}
    for axis, scenario in zip(axes, scenarios, strict=False):
        for policy, colour in shown.items():
            own = series[(series["scenario"] == scenario) & (series["case"] == policy)].set_index("at_s")
            sums = own[["arrived", "met"]].rolling(_WINDOW, min_periods=1).sum()
            thick = 3.0 if policy == "oracle" else 1.4
            axis.plot(
                sums.index / 3600,
                100 * sums["met"] / sums["arrived"],
                color=colour,
                lw=thick,
                label=POLICIES.get(policy, policy),
            )
        axis.set(title=scenario.replace("_", " "), ylim=(-3, 103), ylabel="within SLO (%)", xlabel="hours")
    for axis in axes[len(scenarios) :]:
        axis.remove()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(shown))
    return figure


#: Threshold and split are what is compared, and μ of the log-normal lengths moves: a mixture or a trace has none.
_LEFT_OUT = (
    "workload.mixture",
    "workload.trace",
    "policy.threshold_tokens",
    "policy.n_p",
    "policy.long_term",
    "link.schedule",
)
_READS = tuple(key for key in (*SIMULATED, *SCHEDULER) if not key.startswith(_LEFT_OUT))
EXPERIMENT = Experiment(
    name="scenarios",
    reads={"simulate": (*_READS, "options")},
    run=run,
    figures={"scenarios": draw, "scenarios_over_time": draw_over_time},
    options=Options,
    check=check,
    inputs=profile_files,
    finding=finding,
    hinges_on=(
        "changes are steps, arrivals are Poisson within a step, decode runs at the profile's full batch, and a hit rate shortens what is "
        "prefilled and sent alike (no cache is simulated)."
    ),
)
