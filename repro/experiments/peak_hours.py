"""A day with a peak: what each deployment must buy, how busy it is, and how many requests miss the service level.

Clusters are bought for the peak and sit half empty in the other hours. Here one day of traffic, simulated request by request, meets a
homogeneous cluster of as many GPUs, one that is sized for the peak, and PrfaaS-PD; each with roles that stay and roles that the slow loop
converts; and PrfaaS-PD that rents its prefill instances only in the hours that need them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from repro.errors import UserError
from repro.experiments import simulated
from repro.experiments.base import HOMOGENEOUS, SCHEDULER, SIMULATED, Context, Experiment, Outcome
from repro.experiments.deployment import fewest_prfaas, profile_files
from repro.experiments.study import Point, run_once, run_points, seeds_of
from repro.record.directory import Record
from repro.record.metrics import value
from repro.record.request_metrics import good, over_runs, summarise
from repro.record.statistics import Estimate
from repro.report import style
from repro.scheduling.search import search
from repro.scheduling.spec import PolicySpec
from repro.settings import Settings
from repro.simulate.deployments import requests, with_scheduler
from repro.simulate.deployments import simulated as spec_of
from repro.simulate.spec import Fault, SimulationSpec
from repro.workload.arrivals import Diurnal
from repro.workload.spec import ServiceLevel

_HOURS = 24
NAMES = {
    "homogeneous": "homogeneous, as many GPUs", "homogeneous_converted": "the same, roles converted",
    "homogeneous_peak": "homogeneous, for the peak", "prfaas_pd": "PrfaaS-PD, fixed",
    "prfaas_pd_converted": "PrfaaS-PD, both loops", "prfaas_pd_elastic": "PrfaaS-PD, rented by the hour",
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """A day of `day_s` seconds whose demand is a sine of `amplitude`, at its peak `peak_load` of PrfaaS-PD's Λ_max by true means.

    A shorter day keeps the shape and makes the controllers' times longer against it: harder, not easier.
    """

    day_s: float = 86_400.0
    amplitude: float = 0.6
    peak_load: float = 0.9
    seeds: int = 2

    def __post_init__(self) -> None:
        if self.seeds < 2:
            raise UserError(f"options.seeds: {self.seeds} is below 2, which an interval needs")
        if not (self.day_s > 0 and 0 < self.amplitude < 1 and self.peak_load > 0):
            raise UserError(
                "options.day_s, options.amplitude, options.peak_load: accepted: positive, between 0 and 1, positive"
            )


@dataclass(frozen=True)
class Day:
    """What a run of a day amounts to, with its course by the hour."""

    good_fraction: float
    ttft_p90_s: float
    prefill_utilisation: float
    hours: pd.DataFrame


@dataclass(frozen=True)
class Measuring:
    """Simulates a day. `prefill_s_bought` are the seconds of all instances that prefill, by case; of those by the hour the rented ones."""

    day_s: float
    slo: ServiceLevel
    prefill_s_bought: Mapping[str, float]

    def __call__(self, point: Point) -> Day:
        """Simulate and measure."""
        frame, _ = run_once(point.spec, point.stream)
        totals = summarise(frame, (0.0, self.day_s), self.slo).values()
        met = good(frame["ttft_s"].to_numpy(), frame["tpot_s"].to_numpy(), self.slo)
        hour = (frame["arrival_s"] * _HOURS / self.day_s).astype(int)
        hours = (
            frame.assign(hour=hour, met=met)
            .groupby("hour")
            .agg(arrived=("id", "size"), met=("met", "sum"))
            .reset_index()
        )
        busy = float(frame["prefill_s"].sum()) / self.prefill_s_bought[point.case]
        return Day(totals["good_fraction"], totals["ttft_p90_s"], busy, hours[hours["hour"] < _HOURS])


def run(context: Context) -> Outcome:
    """Every deployment through the same days."""
    settings, options = context.settings, context.options
    setting = simulated.Setting.of(context)
    base, policies = setting.base, setting.policies()
    free = PolicySpec(
        "free", threshold_step_tokens=max(settings.policy.threshold_step_tokens, 200), lengths="true_mean"
    )
    peak = setting.rate(options.peak_load)
    mean = peak / (1 + options.amplitude)
    demand = mean * (1 + options.amplitude * np.sin(2 * np.pi * (np.arange(_HOURS) + 0.5) / _HOURS))
    needed = [max(1, n) for n in fewest_prfaas(base, free, demand / options.peak_load)]
    sized = next(
        n for n in range(2, 1000) if search(base.without_prfaas(n), free).lambda_max * options.peak_load >= peak - 1e-9
    )

    def alone(instances: int) -> SimulationSpec:
        cluster = base.without_prfaas(instances)
        return spec_of(cluster, search(cluster, free), setting.link)

    same, both = alone(settings.cluster.homogeneous_instances), policies["two_timescale"]
    cases = {
        "homogeneous": same,
        "homogeneous_converted": with_scheduler(same, long_term=settings.policy.long_term),
        "homogeneous_peak": alone(sized),
        "prfaas_pd": policies["static"],
        "prfaas_pd_converted": both,
        "prfaas_pd_elastic": replace(both, faults=_away(needed, base.n_prfaas, options.day_s)),
    }
    hours = {case: float(_HOURS * sum(cluster.instances for cluster in spec.prfaas)) for case, spec in cases.items()}
    hours["prfaas_pd_elastic"] = float(sum(needed))
    bought = {case: options.day_s / _HOURS * (hours[case] + _HOURS * spec.pd[0].n_p) for case, spec in cases.items()}
    days = {seed: requests(base, Diurnal(mean, options.amplitude, options.day_s), round(mean * options.day_s), seed)
            for seed in seeds_of(context, options.seeds)}  # fmt: skip
    points = {
        f"{case}, seed {seed}": Point(case, seed, spec, day)
        for seed, day in days.items()
        for case, spec in cases.items()
    }
    results = iter(run_points(context, Measuring(options.day_s, setting.slo, bought), points))
    found: dict[str, list[Day]] = {case: [] for case in cases}
    for _ in days:
        for case in cases:
            found[case].append(next(results))
    rows, ratio = (
        [],
        settings.cost.gpu_hour_usd(base.prfaas.accelerator) / settings.cost.gpu_hour_usd(base.pd.accelerator),
    )
    for case, runs in found.items():
        missed = [1 - day.good_fraction for day in runs]
        pd_hours = float(_HOURS * (cases[case].pd[0].n_p + cases[case].pd[0].n_d)) * base.pd.gpus_per_instance
        gpu_hours = hours[case] * base.prfaas.gpus_per_instance
        for metric, values, unit in (
            ("beyond_slo_fraction", missed, ""), ("ttft_p90_s", [day.ttft_p90_s for day in runs], "s"),
            ("prefill_utilisation", [day.prefill_utilisation for day in runs], ""),
        ):  # fmt: skip
            estimate = over_runs("_fraction" if not unit else metric, values)
            rows.append(
                context.metric(
                    case,
                    metric,
                    estimate.value,
                    unit,
                    "simulated",
                    interval=(estimate.low, estimate.high),
                    n=estimate.n,
                )
            )
        rows.append(context.metric(case, "gpu_hours_bought", pd_hours + gpu_hours, "GPU h", "computed"))
        rows.append(context.metric(case, "pd_gpu_hours_equivalent", pd_hours + ratio * gpu_hours, "GPU h", "computed"))
        if case != "prfaas_pd":
            paired = Estimate.paired(missed, [1 - day.good_fraction for day in found["prfaas_pd"]])
            ends, metric = (paired.low, paired.high), "beyond_slo_fraction_minus_prfaas_pd"
            rows.append(context.metric(case, metric, paired.value, "", "simulated", interval=ends, n=paired.n))
    course = pd.concat(
        [
            day.hours.assign(case=case, seed=seed)
            for case, runs in found.items()
            for seed, day in zip(days, runs, strict=True)
        ]
    )
    rented = pd.DataFrame({"hour": range(_HOURS), "demand_per_s": demand, "n_prfaas": needed})
    return Outcome(rows, {"hours": course, "rented": rented})


def _away(needed: Sequence[int], instances: int, day_s: float) -> tuple[Fault, ...]:
    """The hours in which each instance is not rented; work that it holds when it leaves is lost and done again."""
    hour_s, faults = day_s / _HOURS, []
    for instance in range(instances):
        gone = [instance >= count for count in needed]
        hour = 0
        while hour < _HOURS:
            last = hour
            while last < _HOURS and gone[last]:
                last += 1
            if last > hour:
                faults.append(Fault("prfaas", instance, hour * hour_s, (last - hour) * hour_s))
            hour = last + 1
    return tuple(faults)


def check(settings: Settings, options: object) -> None:
    """A deployment with a PrfaaS cluster, and prices for both accelerators."""
    simulated.check(settings, options)


def finding(record: Record) -> str:
    """What renting by the hour saves, and who keeps the service level."""
    table = record.metrics

    def missed(case: str) -> float:
        return 100 * value(table, "beyond_slo_fraction", case)

    spent = {case: value(table, "pd_gpu_hours_equivalent", case) for case in NAMES}
    saved = 100 * (1 - spent["prfaas_pd_elastic"] / spent["homogeneous_peak"])
    return (
        f"Over a day with a peak, {missed('homogeneous'):.0f} % of the requests miss the service level on as many GPUs of one kind and "
        f"{missed('prfaas_pd_converted'):.1f} % on PrfaaS-PD; renting its prefill by the hour costs {saved:.0f} % less than a homogeneous "
        f"cluster for the peak, with {missed('prfaas_pd_elastic'):.1f} % missed against {missed('homogeneous_peak'):.1f} %."
    )


def draw(record: Record) -> Figure:
    """Requests within the service level by the hour; what was bought and missed."""
    hours, table = record.table("hours"), record.metrics
    figure, (left, right) = style.panels(2, height_in=3.9, width_in=7.0)
    for index, (case, name) in enumerate(NAMES.items()):
        own = hours[hours["case"] == case].groupby("hour")[["arrived", "met"]].sum()
        colour, _, dash = style.SERIES[index]
        left.plot(own.index + 0.5, 100 * own["met"] / own["arrived"], color=colour, linestyle=dash, label=name)
        bought, missed = value(table, "pd_gpu_hours_equivalent", case), 100 * value(table, "beyond_slo_fraction", case)
        busy = 100 * value(table, "prefill_utilisation", case)
        right.barh(-index, bought, color=colour)
        right.text(bought, -index, f" {missed:.1f} % missed,\n prefill {busy:.0f} % busy", va="center", fontsize=7.5)
    left.set(
        xlabel="hour of the day",
        ylabel="requests within the SLO (%)",
        title="Who keeps the service level",
        ylim=(-3, 103),
    )
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    right.set_yticks([-index for index in range(len(NAMES))], list(NAMES.values()), fontsize=8)
    right.set(xlabel="GPU-hours a day, in PD GPUs' price", title="What it costs")
    right.margins(x=0.75)
    right.grid(axis="y", visible=False)
    return figure


EXPERIMENT = Experiment(
    name="peak_hours",
    reads={"simulate": (*SIMULATED, *SCHEDULER, HOMOGENEOUS, "cost.usd_per_gpu_hour", "options")},
    run=run,
    figures={"peak_hours": draw},
    options=Options,
    check=check,
    inputs=profile_files,
    finding=finding,
    hinges_on=(
        "the day is a sine and known in advance, an instance can be had and given back on the hour with its model loaded, and prices "
        "are those of the configuration (an H200 for two H20)."
    ),
)
