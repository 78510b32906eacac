"""What Table 6 measures of a live deployment, replayed or computing: Λ_max by a search on the running system, then TTFT at shares of it.

The simulator gets the very same requests at the same rates, and its values stand beside: what differs is what a real clock, real messages
and real TCP add, and, where instances compute, the machine that they share.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from repro.errors import UserError
from repro.experiments.base import Context
from repro.experiments.live import Deployment, Played, lambda_max_of
from repro.experiments.study import run_once
from repro.paper import tables
from repro.record.directory import Record
from repro.record.metrics import Metric, value
from repro.record.request_metrics import UNITS, summarise
from repro.report import style
from repro.scheduling.throughput import Deployment as Planned
from repro.scheduling.throughput import OperatingPoint
from repro.simulate.deployments import requests
from repro.simulate.spec import SimulationSpec
from repro.simulate.stability import lambda_max
from repro.workload.arrivals import Deterministic, Poisson
from repro.workload.lengths import LengthDistribution
from repro.workload.stream import Independent

#: Of the arrivals of a run, the first of which are warm-up.
WARMUP = 0.1
#: The fraction whose multiples lie most evenly between 0 and 1, however many they are.
_GOLDEN = (5**0.5 - 1) / 2
METRICS = (
    "ttft_mean_s", "ttft_p50_s", "ttft_p90_s", "ttft_p99_s", "tpot_mean_s", "goodput", "queue_mean_s", "transfer_exposed_s",
    "offload_fraction", "egress_bps",
)  # fmt: skip


@dataclass(frozen=True)
class Effort:
    """`requests` are counted at each of `loads`, shares of Λ_max; `search_requests` are sent per rate that the search tries.

    The search begins `near` the model's value, and ends when what it leaves open is `search_width` of Λ_max. Its requests come as a Poisson
    process, or `even`, in their distances and lengths: a few hundred then tell what takes thousands where the number in the system
    fluctuates. Where a rate below the Λ_max found is more than the machine does, the error is about `key`, and ends with the `remedy`.
    """

    loads: tuple[float, ...]
    requests: int
    search_requests: int
    search_width: float
    near: float
    key: str
    remedy: str
    even: bool = False


@dataclass(frozen=True)
class Spread:
    """Lengths of a law without the chance of drawing them: of any few in a row, as many are short and as many long as the law says.

    Steps of the golden ratio through the law's quantiles, from where the seed says.
    """

    law: LengthDistribution

    def sample(self, rng: np.random.Generator, n: int) -> NDArray[np.int64]:
        """`n` lengths in whole tokens."""
        return np.rint(self.law.quantile((rng.random() + np.arange(n) * _GOLDEN) % 1.0)).astype(np.int64)


@dataclass(frozen=True)
class Case:
    """A deployment with what is asked of it; `stream` has the same lengths at every rate, only closer together."""

    name: str
    spec: SimulationSpec
    base: Planned
    point: OperatingPoint
    seed: int

    def stream(self, rate_per_s: float, count: int, *, even: bool = False) -> Independent:
        """The first `count` requests at that rate: a Poisson process, or at even distances with lengths spread evenly over the law."""
        drawn = requests(self.base, Poisson(rate_per_s), count, self.seed)
        return replace(drawn, arrivals=Deterministic(rate_per_s), inputs=Spread(self.base.lengths)) if even else drawn


@dataclass(frozen=True)
class Found:
    """What was measured of one deployment: Λ_max, metrics, what the figure needs of every load, and the runs at them."""

    lambda_max: float
    metrics: list[Metric]
    loads: list[dict[str, Any]]
    runs: dict[float, Played]


def measured(context: Context, live: Deployment, case: Case, effort: Effort, source: str, paper: float) -> Found:
    """Search Λ_max on the running system and ask it for TTFT; rows are of that `source`, Λ_max beside the `paper`'s (nan: none).

    Raises:
        UserError: where a rate below the Λ_max found is more than the machine does.
    """
    low, high = lambda_max_of(
        live,
        lambda rate: case.stream(rate, effort.search_requests, even=effort.even),
        case.point.lambda_max,
        effort.search_width,
        effort.near,
        lambda words: context.progress(f"{case.name}: {words}"),
    )
    best = (low + high) / 2
    rows, drawn, runs = _throughput(context, case, low, high, effort, source, paper), list[dict[str, Any]](), {}
    for load in effort.loads:
        found, table, runs[load] = _at_load(context, live, case, best, load, effort, source)
        rows += found
        drawn += table
    return Found(best, rows, drawn, runs)


def name_of(case: str, load: float) -> str:
    """What the rows of a load are called."""
    return f"{case}.load_{round(100 * load)}"


def _throughput(
    context: Context, case: Case, low: float, high: float, effort: Effort, source: str, paper: float
) -> list[Metric]:
    """Λ_max, beside the simulator's on the same requests and the model's."""
    found = (low + high) / 2
    sim = lambda_max(
        case.spec,
        lambda rate, _: case.stream(rate, effort.search_requests, even=effort.even),
        case.point.lambda_max,
        [case.seed],
    ).value
    return [
        context.metric(case.name, "lambda_max", found, "req/s", source, interval=(low, high), paper=paper),
        context.metric(f"{case.name}.simulate", "lambda_max", sim, "req/s", "simulated", paper=paper),
        context.metric(f"{case.name}.model_true_mean", "lambda_max", case.point.lambda_max, "req/s", "computed"),
        context.metric(case.name, "lambda_max_over_simulated", found / sim, "", source),
        context.metric(case.name, "threshold_tokens", case.point.threshold_tokens, "tokens", "computed"),
        context.metric(case.name, "n_p", case.point.n_p, "instances", "computed"),
        context.metric(case.name, "n_d", case.point.n_d, "instances", "computed"),
    ]


def _at_load(
    context: Context, live: Deployment, case: Case, best_per_s: float, load: float, effort: Effort, source: str
) -> tuple[list[Metric], list[dict[str, Any]], Played]:
    """One rate: what was measured, and what the simulator says of the same requests."""
    rate_per_s, count = load * best_per_s, round(effort.requests / (1 - WARMUP))
    window = (WARMUP * count / rate_per_s, count / rate_per_s)
    played = live.play(case.stream(rate_per_s, count))
    if played.overloaded or played.unfinished:
        raise UserError(
            f"{effort.key}: {case.name} at {rate_per_s:.2f} req/s did not finish ({played.unfinished} requests left); {effort.remedy}"
        )
    slo = context.settings.workload.slo
    found = summarise(played.requests, window, slo).values()
    sim = summarise(run_once(case.spec, case.stream(rate_per_s, count))[0], window, slo).values()
    context.progress(
        f"{case.name} at {100 * load:g} % of Λ_max: TTFT {found['ttft_mean_s']:.2f} s, simulated {sim['ttft_mean_s']:.2f} s"
    )
    name = name_of(case.name, load)
    rows, drawn = [], []
    for metric in METRICS:
        rows.append(context.metric(name, metric, found[metric], UNITS[metric], source, n=int(found["requests"])))
        rows.append(context.metric(f"{name}.simulate", metric, sim[metric], UNITS[metric], "simulated"))
        if sim[metric] and metric in ("ttft_mean_s", "ttft_p90_s", "egress_bps", "goodput"):
            rows.append(context.metric(name, f"{metric}_over_simulated", found[metric] / sim[metric], "", source))
        for tier, values in ((context.settings.tier, found), ("simulate", sim)):
            drawn.append({"case": case.name, "load": load, "tier": tier, "metric": metric, "value": values[metric]})
    return rows, drawn, played


def draw(record: Record) -> Figure:
    """Λ_max on three tiers, beside the paper's where it is the same deployment, and TTFT at the loads, measured beside simulated."""
    table, loads = record.metrics, record.table("loads")
    cases = [case for case in tables.CASES if case in set(table["case"])]
    figure, (left, right) = style.panels(2, height_in=3.6)
    at_loads, (tier,) = sorted(set(loads["load"])), set(loads["tier"]) - {"simulate"}
    live = {"emulate": "live, emulated", "execute": "live, computed"}[tier]
    tiers = (("model", ".model_true_mean", 0.35), ("simulate", ".simulate", 0.65), (live, "", 1.0))
    has_paper = bool(table.loc[(table["metric"] == "lambda_max") & (table["case"] == cases[0]), "paper"].notna().any())
    for index, case in enumerate(cases):
        for shift, (label, suffix, shade) in zip((-0.27, 0.0, 0.27), tiers, strict=True):
            row = table[(table["case"] == case + suffix) & (table["metric"] == "lambda_max")].iloc[0]
            left.bar(index + shift, row["value"], 0.25, color=style.CASE_COLOURS[case], alpha=shade)
            left.text(index + shift, 0.06, label, rotation=90, ha="center", va="bottom", fontsize=7,
                      color="white" if shade > 0.5 else "black")  # fmt: skip
            if suffix == "" and has_paper:
                left.plot(index + shift, row["paper"], **{**style.PAPER, "label": "paper" if index == 0 else None})
            elif suffix == "" and (table["metric"] == "ratio").any():
                words = f"{value(table, 'ratio', case):.2f}×"
                left.text(index + shift, row["value"], words, ha="center", va="bottom", fontsize=8)
        for load, shift in zip(at_loads, (-0.2, 0.2) if len(at_loads) == 2 else (0.0,), strict=True):
            at = loads[(loads["case"] == case) & (loads["load"] == load)].set_index(["tier", "metric"])["value"]
            named = index == 0 and load == at_loads[0]
            _latency(right, index + shift, at, tier, style.CASE_COLOURS[case], named=named)
            if len(at_loads) > 1:
                words = f"{100 * load:.0f} %"
                right.text(index + shift, 0.02, words, ha="center", fontsize=8, transform=right.get_xaxis_transform())
    names = [style.CASE_NAMES[case].replace(" ", "\n", 1).replace(" PD", "\nPD") for case in cases]
    for axis in (left, right):
        axis.set_xticks(range(len(cases)), names, fontsize=8)
        axis.set_xlim(-0.5, len(cases) - 0.5)
        axis.grid(axis="x", visible=False)
    left.set(ylabel="Λ_max (req/s)", title=f"Throughput: {'four' if has_paper else 'three'} sources")
    if has_paper:
        left.legend(loc="upper right")
    shares = " and ".join(f"{100 * load:.0f}" for load in at_loads)
    right.set(ylabel="TTFT (s)", title=f"Latency at {shares} % of Λ_max")
    right.set_ylim(0, 1.3 * right.get_ylim()[1])
    right.legend(fontsize=8, loc="upper right")
    return figure


def _latency(axis: Axes, x: float, at: pd.Series[float], tier: str, colour: str, *, named: bool) -> None:
    """Mean and P90 of TTFT: measured as dots, simulated as dashes behind them."""
    for metric, words, face in (("ttft_mean_s", "mean", colour), ("ttft_p90_s", "P90", "white")):
        name = "simulated" if named and face == colour else None
        axis.plot(x, at["simulate", metric], "_", color="black", ms=18, label=name)
        name = f"{words}, live" if named else None
        axis.plot(x, at[tier, metric], "o", color=colour, mfc=face, ms=7, zorder=3, label=name)
