"""Table 6 on the live system: the three deployments with every instance a process, real sockets and the emulated link, phases replayed.

Λ_max is searched on the running system, from the model's value; TTFT is measured at 70 and 85 % of it, over `requests` requests each.
The simulator gets the very same requests at the same rates, and its values stand beside: what differs is what a real clock, real messages
and real TCP add. Time runs α times as fast and bytes are divided by β; results are unscaled, and lateness is reported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from repro.errors import UserError, at_least
from repro.experiments.base import Context, Outcome
from repro.experiments.deployment import CASES, deployment, operating_points
from repro.experiments.live import Deployment, Played, Wire, calibrated, deployed, lambda_max_of
from repro.experiments.study import run_once
from repro.paper import tables
from repro.record.directory import Record
from repro.record.metrics import Metric
from repro.record.request_metrics import UNITS, summarise
from repro.report import style
from repro.scheduling.throughput import Deployment as Planned
from repro.scheduling.throughput import OperatingPoint
from repro.serving.scale import Scale, Scaling
from repro.simulate.deployments import requests, shared_link, simulated
from repro.simulate.spec import SimulationSpec
from repro.simulate.stability import lambda_max
from repro.workload.arrivals import Poisson
from repro.workload.stream import Independent

LOADS = (0.7, 0.85)
#: Of the arrivals of a run, the first of which are warm-up.
WARMUP = 0.1
METRICS = (
    "ttft_mean_s", "ttft_p50_s", "ttft_p90_s", "ttft_p99_s", "tpot_mean_s", "goodput", "queue_mean_s", "transfer_exposed_s",
    "offload_fraction", "egress_bps",
)  # fmt: skip


@dataclass(frozen=True)
class Emulated(Scaling):
    """Which deployments, and the effort: `requests` are counted per rate, `search_requests` sent per rate that the search tries."""

    NODE: ClassVar[str] = "options.emulate"
    cases: tuple[str, ...] = CASES
    requests: int = 2000
    search_requests: int = 1000
    search_width: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.cases or not set(self.cases) <= set(CASES):
            raise UserError(f"options.emulate.cases: {list(self.cases)}; accepted: some of {', '.join(CASES)}")
        at_least(self, "options.emulate", requests=100, search_requests=100)
        if not self.search_width > 0:
            raise UserError(f"options.emulate.search_width: {self.search_width} is not positive")


@dataclass(frozen=True)
class _Case:
    """A deployment with what is asked of it; `stream` has the same lengths at every rate, only closer together."""

    name: str
    spec: SimulationSpec
    base: Planned
    point: OperatingPoint
    seed: int

    def stream(self, rate_per_s: float, count: int) -> Independent:
        return requests(self.base, Poisson(rate_per_s), count, self.seed)


def run(context: Context, options: Emulated) -> Outcome:
    """The three deployments, one after the other on the same machine."""
    settings = context.settings
    base = deployment(settings)
    true_mean = replace(settings, policy=replace(settings.policy, lengths="true_mean"))
    points = {case: point for case, point in operating_points(base, true_mean).items() if case in options.cases}
    scale, facts = calibrated(options, settings.link.rate_bps)
    context.progress(f"time runs {scale.time:g} times as fast, bytes are divided by {scale.bytes:g}")
    wire = Wire(settings.link, settings.transport, options.pieces, scale)
    logs = context.folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    rows: list[Metric] = []
    drawn: list[dict[str, Any]] = []
    kept: list[pd.DataFrame] = []
    best: dict[str, float] = {}
    workers: dict[str, Any] = {}
    for name, point in points.items():
        case = _Case(
            name, simulated(base, point, shared_link(settings.link, settings.transport)), base, point, settings.seed
        )
        with deployed(case.spec, wire, logs, f"table6-{name.replace('_', '-')}", settings.seed) as live:
            low, high = _search(context, live, case, options)
            best[name] = (low + high) / 2
            rows += _throughput(context, case, low, high, options)
            workers[name] = live.fleet.clocks.record()
            for load in LOADS:
                found, table, requests_ = _at_load(context, live, case, load * best[name], load, options)
                rows += found
                drawn += table
                kept.append(requests_.assign(case=name, load=load))
    for name, value in best.items():
        if "homogeneous_pd" in best:
            paper = tables.TABLE_6[name]["ratio"].value
            rows.append(context.metric(name, "ratio", value / best["homogeneous_pd"], "", "emulated", paper=paper))
    facts_ = {"emulation": facts, "workers": workers}
    return Outcome(rows, {"loads": pd.DataFrame(drawn)}, requests=pd.concat(kept), provenance=facts_)


def _search(context: Context, live: Deployment, case: _Case, options: Emulated) -> tuple[float, float]:
    """The highest rate whose queues stay and the lowest whose queues grow, on the running system."""
    return lambda_max_of(
        live,
        lambda rate: case.stream(rate, options.search_requests),
        case.point.lambda_max,
        options.search_width,
        0.04,
        lambda words: context.progress(f"{case.name}: {words}"),
    )


def _throughput(context: Context, case: _Case, low: float, high: float, options: Emulated) -> list[Metric]:
    """Λ_max, beside the simulator's on the same requests and the model's."""
    found = (low + high) / 2
    sim = lambda_max(
        case.spec, lambda rate, _: case.stream(rate, options.search_requests), case.point.lambda_max, [case.seed]
    ).value
    paper = tables.TABLE_6[case.name]["lambda_max"].value
    return [
        context.metric(case.name, "lambda_max", found, "req/s", "emulated", interval=(low, high), paper=paper),
        context.metric(f"{case.name}.simulate", "lambda_max", sim, "req/s", "simulated", paper=paper),
        context.metric(f"{case.name}.model_true_mean", "lambda_max", case.point.lambda_max, "req/s", "computed"),
        context.metric(case.name, "lambda_max_over_simulated", found / sim, "", "emulated"),
        context.metric(case.name, "threshold_tokens", case.point.threshold_tokens, "tokens", "computed"),
        context.metric(case.name, "n_p", case.point.n_p, "instances", "computed"),
        context.metric(case.name, "n_d", case.point.n_d, "instances", "computed"),
    ]


def _at_load(
    context: Context, live: Deployment, case: _Case, rate_per_s: float, load: float, options: Emulated
) -> tuple[list[Metric], list[dict[str, Any]], pd.DataFrame]:
    """One rate: what was measured, what the simulator says of the same requests, and how late this machine was."""
    count = round(options.requests / (1 - WARMUP))
    window = (WARMUP * count / rate_per_s, count / rate_per_s)
    played = live.play(case.stream(rate_per_s, count))
    if played.overloaded or played.unfinished:
        raise UserError(
            f"options.emulate.time_scale: {case.name} at {rate_per_s:.2f} req/s did not finish ({played.unfinished} requests left); "
            f"this machine does not keep up with {live.scale.time:g} times real time; accepted: a smaller number"
        )
    slo = context.settings.workload.slo
    measured = summarise(played.requests, window, slo).values()
    sim = summarise(run_once(case.spec, case.stream(rate_per_s, count))[0], window, slo).values()
    context.progress(
        f"{case.name} at {100 * load:g} % of Λ_max: TTFT {measured['ttft_mean_s']:.2f} s, simulated {sim['ttft_mean_s']:.2f} s"
    )
    name = f"{case.name}.load_{round(100 * load)}"
    rows, drawn = [], []
    for metric in METRICS:
        rows.append(
            context.metric(name, metric, measured[metric], UNITS[metric], "emulated", n=int(measured["requests"]))
        )
        rows.append(context.metric(f"{name}.simulate", metric, sim[metric], UNITS[metric], "simulated"))
        if sim[metric] and metric in ("ttft_mean_s", "ttft_p90_s", "egress_bps", "goodput"):
            rows.append(
                context.metric(name, f"{metric}_over_simulated", measured[metric] / sim[metric], "", "emulated")
            )
        for tier, values in (("emulate", measured), ("simulate", sim)):
            drawn.append({"case": case.name, "load": load, "tier": tier, "metric": metric, "value": values[metric]})
    rows += _lateness(context, name, played, live.scale)
    return rows, drawn, played.requests


def _lateness(context: Context, name: str, played: Played, scale: Scale) -> list[Metric]:
    """How late this machine was, unscaled, and what it cost: the error bars of an emulation."""
    count = max(len(played.requests), 1)
    values: Mapping[str, tuple[float, str]] = {
        "arrivals_late_p99_s": (played.late_p99_s * scale.time, "s"),
        "timers_late_mean_s": (played.timer_mean_s * scale.time, "s"),
        "timers_late_p99_s": (played.timer_p99_s * scale.time, "s"),
        "cpu_per_request_s": (played.cpu_s / count, "s"),
        "wire_overhead": (played.wire_overhead, ""),
    }
    return [context.metric(name, metric, value, unit, "measured") for metric, (value, unit) in values.items()]


def draw(record: Record) -> Figure:
    """Λ_max on three tiers beside the paper's, and TTFT at two loads, measured beside simulated."""
    table, loads = record.metrics, record.table("loads")
    cases = [case for case in tables.CASES if case in set(table["case"])]
    figure, (left, right) = style.panels(2, height_in=3.6)
    tiers = (("model", ".model_true_mean", 0.35), ("simulate", ".simulate", 0.65), ("live, emulated", "", 1.0))
    for index, case in enumerate(cases):
        for shift, (label, suffix, shade) in zip((-0.27, 0.0, 0.27), tiers, strict=True):
            row = table[(table["case"] == case + suffix) & (table["metric"] == "lambda_max")].iloc[0]
            left.bar(index + shift, row["value"], 0.25, color=style.CASE_COLOURS[case], alpha=shade)
            left.text(index + shift, 0.06, label, rotation=90, ha="center", va="bottom", fontsize=7,
                      color="white" if shade > 0.5 else "black")  # fmt: skip
            if suffix == "":
                left.plot(index + shift, row["paper"], **{**style.PAPER, "label": "paper" if index == 0 else None})
        for shift, load in zip((-0.2, 0.2), LOADS, strict=True):
            at = loads[(loads["case"] == case) & (loads["load"] == load)].set_index(["tier", "metric"])["value"]
            _latency(right, index + shift, at, style.CASE_COLOURS[case], named=index == 0 and load == LOADS[0])
            words = f"{100 * load:.0f} %"
            right.text(index + shift, 0.02, words, ha="center", fontsize=8, transform=right.get_xaxis_transform())
    names = [style.CASE_NAMES[case].replace(" ", "\n", 1).replace(" PD", "\nPD") for case in cases]
    for axis in (left, right):
        axis.set_xticks(range(len(cases)), names)
        axis.grid(axis="x", visible=False)
    left.set(ylabel="Λ_max (req/s)", title="Throughput: four sources")
    left.legend(loc="upper right")
    right.set(ylabel="TTFT (s)", title="Latency at 70 and 85 % of Λ_max")
    right.set_ylim(bottom=0)
    right.legend(fontsize=8)
    return figure


def _latency(axis: Axes, x: float, at: pd.Series[float], colour: str, *, named: bool) -> None:
    """Mean and P90 of TTFT: measured as dots, simulated as dashes behind them."""
    for metric, words, face in (("ttft_mean_s", "mean", colour), ("ttft_p90_s", "P90", "white")):
        axis.plot(
            x,
            at["simulate", metric],
            "_",
            color="black",
            ms=18,
            label="simulated" if named and face == colour else None,
        )
        axis.plot(
            x, at["emulate", metric], "o", color=colour, mfc=face, ms=7, zorder=3, label=f"{words}, live" if named else None
        )  # fmt: skip
