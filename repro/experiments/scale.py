"""The case study multiplied up to 100,000 GPUs: does Λ_max grow with it, what does pooling do to TTFT, and what egress does it take?

Instances, link and arrival rate grow together. The simulator is the same at every size; how fast it was is recorded with the results.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial

import pandas as pd
from matplotlib.figure import Figure

from repro.errors import UserError
from repro.experiments import simulated, study_figures
from repro.experiments.base import SCHEDULER, SIMULATED, Context, Experiment, Outcome
from repro.experiments.deployment import profile_files
from repro.experiments.study import Point, run_points
from repro.record.directory import Record
from repro.record.metrics import Metric
from repro.record.request_metrics import UNITS, Totals
from repro.report import style
from repro.simulate.deployments import requests
from repro.simulate.records import Streaming
from repro.simulate.simulation import Simulation
from repro.simulate.spec import SimulationSpec
from repro.workload.arrivals import Poisson
from repro.workload.spec import ServiceLevel


@dataclass(frozen=True)
class Options:
    """`factors` of the case study's 96 GPUs; 1042 is 100,032. A run has `minimum_requests`, or those of `duration_s` if more.

    `load` is the arrival rate as a share of Λ_max by the model with true means; requests count from `warmup_s` on.
    """

    load: float = 0.9
    duration_s: float = 90.0
    warmup_s: float = 45.0
    factors: tuple[int, ...] = (1, 10, 100, 1042)
    minimum_requests: int = 20_000

    def __post_init__(self) -> None:
        if not self.load > 0:
            raise UserError(f"options.load: {self.load} is not positive")
        if not 0 <= self.warmup_s < self.duration_s:
            raise UserError(
                f"options.warmup_s: {self.warmup_s} must lie between 0 and options.duration_s ({self.duration_s})"
            )
        if self.minimum_requests < 1:
            raise UserError(f"options.minimum_requests: {self.minimum_requests} is below 1")
        if not self.factors or min(self.factors) < 1:
            raise UserError(f"options.factors: {self.factors}; accepted: whole factors of 1 or more")


_METRICS = ("goodput", "good_fraction", "ttft_mean_s", "ttft_p99_s", "egress_bps")


def multiplied(spec: SimulationSpec, factor: int) -> SimulationSpec:
    """The deployment `factor` times as large, its link as well."""
    home = replace(spec.pd[0], n_p=spec.pd[0].n_p * factor, n_d=spec.pd[0].n_d * factor)
    site = spec.prfaas[0]
    link = replace(site.link, rate_bps=site.link.rate_bps * factor)
    return replace(
        spec,
        pd=(home,),
        prfaas=(replace(site, instances=site.instances * factor, link=link),),
        limit_requests=2_000_000,
    )


def run(context: Context) -> Outcome:
    """Static and two-timescale scheduling at every size."""
    options: Options = context.options
    setting = simulated.Setting.of(context)
    base = setting.base
    gpus = base.n_prfaas * base.prfaas.gpus_per_instance + base.n_pd * base.pd.gpus_per_instance
    chosen = {name: spec for name, spec in setting.policies().items() if name in ("static", "two_timescale")}
    points = {}
    for factor in options.factors:
        rate = setting.rate(options.load) * factor
        count = max(options.minimum_requests, round(rate * options.duration_s))
        stream = requests(base, Poisson(rate), count, context.settings.seed)
        for case, spec in chosen.items():
            point = Point(case, context.settings.seed, multiplied(spec, factor), stream)
            points[f"{gpus * factor}_gpus.{case}"] = (point, min(options.warmup_s, 0.5 * count / rate))
    runs = run_points(context, partial(_timed, setting.slo), points)
    rows: list[Metric] = []
    sizes: list[dict[str, object]] = []
    for (name, (point, _)), (totals, _) in zip(points.items(), runs, strict=True):
        rows += [
            context.metric(name, metric, getattr(totals, metric), UNITS[metric], "simulated", n=totals.requests)
            for metric in _METRICS
        ]
        total_gpus = int(name.partition("_")[0])
        sizes.append(
            {"gpus": total_gpus, "case": point.case} | {metric: getattr(totals, metric) for metric in _METRICS}
        )
    speeds = {name: round(speed) for name, (_, speed) in zip(points, runs, strict=True)}
    return Outcome(rows, {"sizes": pd.DataFrame(sizes)}, provenance={"simulated_requests_per_s": speeds})


def _timed(slo: ServiceLevel, timed: tuple[Point, float]) -> tuple[Totals, float]:
    """One run in numbers, and how many requests were simulated per second of wall time."""
    point, from_s = timed
    sink = Streaming(slo, from_s=from_s)
    started = time.perf_counter()
    summary = Simulation(point.spec, sink).run(point.stream)
    return sink.totals(), summary.arrived / (time.perf_counter() - started)


def draw(record: Record) -> Figure:
    """Goodput per GPU and TTFT over the number of GPUs."""
    sizes = record.table("sizes")
    figure, (left, right) = style.panels(2, height_in=3.2)
    for index, case in enumerate(dict.fromkeys(sizes["case"])):
        own = sizes[sizes["case"] == case]
        colour, marker, dash = style.SERIES[index]
        look = {
            "color": colour,
            "marker": marker,
            "linestyle": dash,
            "label": study_figures.POLICY_NAMES.get(case, case),
        }
        left.plot(own["gpus"], 1000 * own["goodput"] / own["gpus"], **look)
        right.plot(own["gpus"], own["ttft_p99_s"], **look)
    for axis in (left, right):
        axis.set(xscale="log", xlabel="GPUs")
        axis.set_ylim(bottom=0)
    left.set(ylabel="goodput per 1,000 GPUs (req/s)", title="Throughput scales with the fleet")
    right.set(ylabel="P99 TTFT (s)", title="A larger pool waits less")
    left.legend()
    return figure


EXPERIMENT = Experiment(
    "scale",
    {"simulate": (*SIMULATED, *SCHEDULER, "options")},
    run,
    {"scale": draw},
    Options,
    simulated.check,
    profile_files,
)
