"""Table 6 on the simulator: Λ_max where queues stop being stable, and TTFT with the queueing that the paper's values leave out.

Each deployment runs at the operating point that the throughput model finds with true means, E[T_prefill(L)]; the model's Λ_max there,
and at the paper's representative lengths, stand beside the simulated one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pandas as pd

from repro.paper import tables
from repro.record.metrics import Metric
from repro.simulate.deployments import requests, shared_link, simulated
from repro.simulate.records import Streaming, Totals
from repro.simulate.simulation import Simulation
from repro.simulate.spec import SimulationSpec
from repro.simulate.stability import Estimate, lambda_max
from repro.workload.arrivals import Poisson

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from repro.experiments.base import Context, Outcome
    from repro.record.directory import Record
    from repro.scheduling.throughput import Deployment, OperatingPoint
    from repro.workload.spec import ServiceLevel

#: Load at which nobody waits: what remains is prefill, the last piece's transfer and one decode step, as in the paper's TTFT.
IDLE = 0.02
LOADS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
UNITS = {
    "ttft_mean_s": "s", "ttft_p50_s": "s", "ttft_p90_s": "s", "ttft_p99_s": "s", "tpot_mean_s": "s", "goodput": "req/s",
    "queue_mean_s": "s", "transfer_exposed_s": "s", "offload_fraction": "", "egress_bps": "bit/s",
}  # fmt: skip


@dataclass(frozen=True)
class Effort:
    """Requests of one run, and how many seeds each value rests on."""

    requests: int
    seeds: int


def run(context: Context, effort: Effort) -> Outcome:
    """The three deployments: Λ_max by bisection, then TTFT when idle and at 50 to 95 % of it."""
    from repro.experiments.base import Outcome
    from repro.experiments.deployment import deployment, operating_points

    settings = context.settings
    base = deployment(settings)
    link = shared_link(settings.link)
    points = operating_points(base, replace(settings, policy=replace(settings.policy, lengths="true_mean")))
    representative = operating_points(
        base, replace(settings, policy=replace(settings.policy, lengths="representative"))
    )
    seeds = [settings.seed + i for i in range(effort.seeds)]
    rows: list[Metric] = []
    best: dict[str, Estimate] = {}
    loads: list[dict[str, object]] = []
    for case, point in points.items():
        spec = simulated(base, point, link)
        printed = tables.TABLE_6[case]
        best[case] = found = lambda_max(
            spec, lambda rate, seed: requests(base, Poisson(rate), effort.requests, seed), point.lambda_max, seeds
        )
        context.progress(f"{case}: Λ_max {found.value:.3f} req/s, by the model {point.lambda_max:.3f}")
        rows += _throughput_rows(context, case, found, point, representative[case])
        for load in (IDLE, *LOADS):
            totals = at_load(spec, base, found.value * load, effort, seeds, settings.workload.slo)
            name = case if load == IDLE else f"{case}.load_{round(100 * load)}"
            for metric, unit in UNITS.items():
                estimate = Estimate.of([getattr(total, metric) for total in totals])
                paper = printed[metric].value if load == IDLE and metric in printed else float("nan")
                rows.append(
                    context.metric(
                        name, metric, estimate.value, unit, "simulated",
                        interval=(estimate.low, estimate.high), n=estimate.n, paper=paper,
                    )
                )  # fmt: skip
                loads.append({"case": case, "load": load, "metric": metric, **vars(estimate)})
    homogeneous = best["homogeneous_pd"]
    for case, found in best.items():
        paper = tables.TABLE_6[case]["ratio"].value
        rows.append(
            context.metric(case, "ratio", found.value / homogeneous.value, "", "simulated", n=found.n, paper=paper)
        )
    return Outcome(rows, {"loads": pd.DataFrame(loads)})


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


def at_load(
    spec: SimulationSpec, base: Deployment, rate_per_s: float, effort: Effort, seeds: list[int], slo: ServiceLevel
) -> list[Totals]:
    """One run per seed at that rate; the first tenth is warm-up and not counted."""
    span_s = effort.requests / rate_per_s
    results = []
    for seed in seeds:
        sink = Streaming(slo, from_s=0.1 * span_s)
        Simulation(spec, sink).run(requests(base, Poisson(rate_per_s), effort.requests, seed))
        results.append(sink.totals())
    return results


def draw_loads(record: Record) -> Figure:
    """TTFT over load for the three deployments: mean as lines, P90 dashed, with their intervals."""
    from repro.report import style

    table = record.table("loads")
    figure, (axis,) = style.panels(1)
    for case, colour in style.CASE_COLOURS.items():
        for metric, dash, label in (("ttft_mean_s", "-", "mean"), ("ttft_p90_s", "--", "P90")):
            rows = table[(table["case"] == case) & (table["metric"] == metric)]
            if len(rows):
                axis.plot(
                    100 * rows["load"], rows["value"], dash, color=colour, label=f"{style.CASE_NAMES[case]}, {label}"
                )
                axis.fill_between(100 * rows["load"], rows["low"], rows["high"], color=colour, alpha=0.2, lw=0)
    axis.set(
        xlabel="load (% of each deployment's own Λ_max)",
        ylabel="TTFT (s)",
        title="What the paper's queue-free TTFT leaves out",
    )
    axis.set_ylim(bottom=0)
    axis.legend(ncols=1)
    return figure
