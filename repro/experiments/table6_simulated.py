"""Table 6 on the simulator: Λ_max where queues stop being stable, and TTFT with the queueing that the paper's values leave out.

Each deployment runs at the operating point that the throughput model finds with true means, E[T_prefill(L)]; the model's Λ_max there,
and at the paper's representative lengths, stand beside the simulated one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pandas as pd
from matplotlib.figure import Figure

from repro.experiments.base import Context, Outcome
from repro.experiments.deployment import decoding, deployment, operating_points, within_memory
from repro.experiments.study import run_points, seeds_of
from repro.paper import tables
from repro.record.directory import Record
from repro.record.metrics import Metric, value
from repro.record.request_metrics import UNITS, Totals, over_runs
from repro.record.statistics import Estimate
from repro.report import style
from repro.scheduling.throughput import Deployment, OperatingPoint
from repro.simulate.deployments import requests, shared_link, simulated
from repro.simulate.records import Streaming
from repro.simulate.simulation import Simulation
from repro.simulate.spec import SimulationSpec
from repro.simulate.stability import lambda_max
from repro.workload.arrivals import Poisson
from repro.workload.spec import ServiceLevel
from repro.workload.stream import Independent

#: Load at which nobody waits: what remains is prefill, the last piece's transfer and one decode step, as in the paper's TTFT.
IDLE = 0.02
LOADS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
#: Beyond Λ_max only goodput means anything: every time is that of a queue that grows as long as the run lasts.
OVERLOADS = (1.1, 1.25, 1.5)
METRICS = (
    "ttft_mean_s", "ttft_p50_s", "ttft_p90_s", "ttft_p99_s", "tpot_mean_s", "tpot_slo_ratio", "goodput", "queue_mean_s",
    "transfer_exposed_s", "offload_fraction", "egress_bps",
)  # fmt: skip


@dataclass(frozen=True)
class Effort:
    """Requests of one run, and how many seeds each value rests on."""

    requests: int
    seeds: int


@dataclass(frozen=True)
class Searched:
    """One search for Λ_max: a deployment under one seed, from the model's guess."""

    spec: SimulationSpec
    base: Deployment
    requests: int
    guess_per_s: float
    seed: int


@dataclass(frozen=True)
class Loaded:
    """One run at a rate; the first tenth is warm-up and not counted."""

    spec: SimulationSpec
    base: Deployment
    requests: int
    rate_per_s: float
    slo: ServiceLevel
    seed: int


def search(point: Searched) -> float:
    """Λ_max of one seed by bisection."""

    def stream(rate_per_s: float, seed: int) -> Independent:
        return requests(point.base, Poisson(rate_per_s), point.requests, seed)

    return lambda_max(point.spec, stream, point.guess_per_s, [point.seed]).value


@dataclass(frozen=True)
class Ran:
    """One run in numbers, and how often a request had to leave a decode batch, per request."""

    totals: Totals
    preempted: float


def at_load(point: Loaded) -> Ran:
    """One run in numbers."""
    sink = Streaming(point.slo, from_s=0.1 * point.requests / point.rate_per_s)
    stream = requests(point.base, Poisson(point.rate_per_s), point.requests, point.seed)
    summary = Simulation(point.spec, sink).run(stream)
    return Ran(sink.totals(), summary.preemptions / point.requests)


def run(context: Context, effort: Effort) -> Outcome:
    """The three deployments: Λ_max by bisection, then TTFT when idle and at 50 to 95 % of it, and goodput up to half as much again."""
    settings = context.settings
    base = decoding(deployment(settings), settings)
    link = shared_link(settings.link, settings.transport)
    points = operating_points(base, replace(settings, policy=replace(settings.policy, lengths="true_mean")))
    representative = operating_points(
        base, replace(settings, policy=replace(settings.policy, lengths="representative"))
    )
    specs = {case: within_memory(simulated(base, point, link), settings) for case, point in points.items()}
    seeds = seeds_of(context, effort.seeds)
    searches = {
        f"Λ_max of {case}, seed {seed}": Searched(specs[case], base, effort.requests, point.lambda_max, seed)
        for case, point in points.items()
        for seed in seeds
    }
    rates = iter(run_points(context, search, searches))
    best = {case: Estimate.of([next(rates) for _ in seeds]) for case in points}
    slo = settings.workload.slo
    loads = {
        f"{case} at {load:g} of Λ_max, seed {seed}": Loaded(
            specs[case], base, effort.requests, best[case].value * load, slo, seed
        )
        for case in points
        for load in (IDLE, *LOADS, *OVERLOADS)
        for seed in seeds
    }
    totals = iter(run_points(context, at_load, loads))
    rows: list[Metric] = []
    drawn: list[dict[str, object]] = []
    for case, point in points.items():
        rows += _throughput_rows(context, case, best[case], point, representative[case])
        printed = tables.TABLE_6[case]
        for load in (IDLE, *LOADS, *OVERLOADS):
            runs = [next(totals) for _ in seeds]
            found = [one.totals for one in runs]
            name = case if load == IDLE else f"{case}.load_{round(100 * load)}"
            for metric in METRICS if load < 1 else ("goodput",):
                estimate = over_runs(metric, [getattr(total, metric) for total in found])
                paper = printed[metric].value if load == IDLE and metric in printed else float("nan")
                rows.append(
                    context.metric(
                        name, metric, estimate.value, UNITS[metric], "simulated",
                        interval=(estimate.low, estimate.high), n=estimate.n, paper=paper,
                    )
                )  # fmt: skip
                drawn.append({"case": case, "load": load, "metric": metric, **vars(estimate)})
            if settings.cluster.decode.memory_bytes is not None:
                left = Estimate.of([one.preempted for one in runs])
                rows.append(
                    context.metric(
                        name,
                        "preemptions_per_request",
                        left.value,
                        "",
                        "simulated",
                        interval=(max(left.low, 0.0), left.high),
                        n=left.n,
                    )
                )
    homogeneous = best["homogeneous_pd"]
    for case, estimate in best.items():
        paper = tables.TABLE_6[case]["ratio"].value
        rows.append(
            context.metric(
                case, "ratio", estimate.value / homogeneous.value, "", "simulated", n=estimate.n, paper=paper
            )
        )
    return Outcome(rows, {"loads": pd.DataFrame(drawn)})


def _throughput_rows(
    context: Context, case: str, found: Estimate, point: OperatingPoint, representative: OperatingPoint
) -> list[Metric]:
    paper = tables.TABLE_6[case]["lambda_max"].value
    model, flattering = point.lambda_max, representative.lambda_max
    return [
        context.metric(
            case,
            "lambda_max",
            found.value,
            "req/s",
            "simulated",
            interval=(found.low, found.high),
            n=found.n,
            paper=paper,
        ),
        context.metric(f"{case}.model_true_mean", "lambda_max", model, "req/s", "computed"),
        context.metric(f"{case}.model_representative", "lambda_max", flattering, "req/s", "computed", paper=paper),
        context.metric(case, "simulated_over_model", found.value / model, "", "simulated", n=found.n),
        context.metric(case, "hidden_by_representative_length_pct", 100 * (flattering / model - 1), "%", "computed"),
        context.metric(case, "threshold_tokens", point.threshold_tokens, "tokens", "computed"),
        context.metric(case, "n_p", point.n_p, "instances", "computed"),
        context.metric(case, "n_d", point.n_d, "instances", "computed"),
    ]


def draw_loads(record: Record) -> Figure:
    """TTFT over the arrival rate for the three deployments, up to the Λ_max of each: mean as lines, P90 dashed, with their intervals."""
    table, metrics = record.table("loads"), record.metrics
    figure, (axis,) = style.panels(1)
    looks = zip(style.CASE_COLOURS.items(), style.SERIES, strict=False)
    for (case, colour), (_, marker, _) in looks:
        if not (table["case"] == case).any():
            continue
        most_per_s = value(metrics, "lambda_max", case)
        axis.axvline(most_per_s, color=colour, lw=0.8, linestyle=":")
        for metric, dash, label in (("ttft_mean_s", "-", "mean"), ("ttft_p90_s", "--", "P90")):
            rows = table[(table["case"] == case) & (table["metric"] == metric)]
            rate_per_s, name = rows["load"] * most_per_s, f"{style.CASE_NAMES[case]}, {label}"
            axis.plot(rate_per_s, rows["value"], dash, marker=marker, ms=3.5, color=colour, label=name)
            axis.fill_between(rate_per_s, rows["low"], rows["high"], color=colour, alpha=0.2, lw=0)
    axis.set(
        xlabel="arrival rate (req/s); dotted: the deployment's Λ_max",
        ylabel="TTFT (s)",
        title="What the paper's queue-free TTFT leaves out",
    )
    axis.set_ylim(bottom=0)
    axis.legend(ncols=1, handlelength=3)
    return figure
