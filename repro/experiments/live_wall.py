"""The bandwidth wall with instances that compute (§2.3): Λ_max over the link's rate, of a hybrid and the dense model beside it in Table 1.

`bandwidth_wall` with nothing replayed. Both models serve on the same clusters, whose instances are slower than this machine by the same
factors, each at its own measured profile and at the threshold and split that are best for it at that rate. The two differ in everything, so
each is held against itself: what share of the Λ_max of an unlimited link is left.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from repro.errors import UserError, at_least
from repro.experiments import tiers
from repro.experiments.bandwidth_wall import LINK, curves, limits
from repro.experiments.base import MODEL, Context, Experiment, Outcome
from repro.experiments.computed import Answers, Computing
from repro.experiments.live import Wire, deployed, lambda_max_of
from repro.experiments.table3 import one_model
from repro.experiments.table6_live import Case
from repro.experiments.two_speeds import TwoSpeeds, answers, measured
from repro.models import spec as models
from repro.models.spec import ModelSpec
from repro.record.directory import Record
from repro.record.metrics import Metric, value
from repro.report import style
from repro.scheduling.search import search
from repro.scheduling.throughput import Deployment
from repro.serving.scale import Scale
from repro.settings import Settings
from repro.simulate.deployments import shared_link, simulated
from repro.simulate.stability import lambda_max


@dataclass(frozen=True)
class Options(TwoSpeeds):
    """Rates of the link; `search_requests` are sent per rate of arrivals that a search tries, until it is known to `search_width`."""

    rates_bps: tuple[float, ...] = (2e6, 8e6, 32e6)
    search_requests: int = 120
    search_width: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rates_bps or min(self.rates_bps) <= 0:
            raise UserError(f"options.rates_bps: {list(self.rates_bps)}; accepted: one or more rates above 0")
        if not self.search_width > 0:
            raise UserError(f"options.search_width: {self.search_width} is not positive")
        at_least(self, "options", search_requests=20)


def both(settings: Settings) -> dict[str, ModelSpec]:
    """The hybrid that was asked for, and the dense model that Table 1 sets beside it. Raises UserError where it has none."""
    hybrid = one_model(settings)
    if hybrid.baseline is None:
        raise UserError(f"model: {hybrid.name} has no dense model beside it; accepted: one whose file names a baseline")
    return {"hybrid": hybrid, "dense": models.load(hybrid.baseline, hybrid.size)}


def run(context: Context) -> Outcome:
    """Both models at every rate: equations, simulator and the running system."""
    options, settings = context.options, context.settings
    logs = context.folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    rows: list[Metric] = []
    drawn: list[dict[str, Any]] = []
    kept: list[pd.DataFrame] = []
    for name, model in both(settings).items():
        base = measured(context, model, math.inf)
        rows += limits(context, {name: base}, replace(settings.policy, lengths="true_mean"))
        computing = options.computing(model)
        right = answers(context, model, computing)
        for rate_bps in options.rates_bps:
            found, cell, requests = _cell(context, name, base, rate_bps, computing, right)
            rows += found
            drawn += cell
            kept.append(requests.assign(case=_case(name, rate_bps)))
    return Outcome(rows, {"wall": pd.DataFrame(drawn)}, requests=pd.concat(kept))


def _case(name: str, rate_bps: float) -> str:
    return f"{name}.{rate_bps / 1e6:g}_mbps"


def _cell(
    context: Context, name: str, base: Deployment, rate_bps: float, computing: Computing, right: Answers
) -> tuple[list[Metric], list[dict[str, Any]], pd.DataFrame]:
    """One model at one rate; the last run that was stable is kept, and its tokens are held against the model's."""
    options, settings, case = context.options, context.settings, _case(name, rate_bps)
    link = replace(settings.link, rate_bps=rate_bps)
    own = replace(base, egress_bps=rate_bps)
    point = search(own, replace(settings.policy, lengths="true_mean"))
    spec = simulated(own, point, shared_link(link, settings.transport))
    asked = Case(case, spec, own, point, settings.seed)
    sim = lambda_max(
        spec, lambda rate, _: asked.stream(rate, options.search_requests, even=True), point.lambda_max, [settings.seed]
    ).value
    wire = Wire(link, settings.transport, options.pieces, Scale())
    run_name = f"live-wall-{case}".replace("_", "-").replace(".", "-")
    with deployed(spec, wire, context.folder / "logs", run_name, settings.seed, computing) as live:
        low, high = lambda_max_of(
            live,
            lambda rate: asked.stream(rate, options.search_requests, even=True),
            sim,
            options.search_width,
            0.08,
            lambda words: context.progress(f"{case}: {words}"),
        )
        played = live.play(asked.stream(low, options.search_requests, even=True))
    found = (low + high) / 2
    same, compared = right.right(played, options.compared)
    rows = [
        context.metric(f"{case}.model", "lambda_max", point.lambda_max, "req/s", "computed"),
        context.metric(f"{case}.model", "threshold_tokens", point.threshold_tokens, "tokens", "computed"),
        context.metric(f"{case}.simulate", "lambda_max", sim, "req/s", "simulated"),
        context.metric(case, "lambda_max", found, "req/s", "measured", interval=(low, high)),
        context.metric(case, "lambda_max_over_simulated", found / sim, "", "measured"),
        context.metric(case, "tokens_match", same / compared if compared else math.nan, "", "measured", n=compared),
    ]
    drawn = [
        {"model": name, "rate_bps": rate_bps, "tier": tier, "lambda_max": at, "low": below, "high": above}
        for tier, at, below, above in (
            ("model", point.lambda_max, math.nan, math.nan), ("simulate", sim, math.nan, math.nan), ("execute", found, low, high),
        )
    ]  # fmt: skip
    return rows, drawn, played.requests


def finding(record: Record) -> str:
    """What is left of either model's throughput behind the thinnest link, measured and by the equations."""
    table, wall = record.metrics, record.table("wall")
    rate = float(wall["rate_bps"].min())
    words = []
    for name in ("hybrid", "dense"):
        free = value(table, "lambda_max", f"{name}.unlimited")
        served, planned = (
            100 * value(table, "lambda_max", case) / free for case in (_case(name, rate), f"{_case(name, rate)}.model")
        )
        binds = value(table, "link_binds_below_bps", name) / 1e6
        words.append(
            f"the {name} model sustains {served:.0f} % of its unlimited Λ_max ({planned:.0f} % by the equations, whose link binds "
            f"below {binds:.1f} Mbps)"
        )
    return f"Through {rate / 1e6:g} Mbps, with instances that compute, {' and '.join(words)}."


def draw(record: Record) -> Figure:
    """Λ_max over the link's rate as a share of an unlimited link's: equations as lines, simulated as open marks, served as filled ones."""
    table, names = record.metrics, {name: name for name in ("hybrid", "dense")}
    figure, (axis,) = style.panels(1, height_in=3.4)
    per_cent = {name: value(table, "lambda_max", f"{name}.unlimited") / 100 for name in names}
    curves(axis, record, names, "Mbps", 1e6, ".1f", per_cent)
    axis.set(
        ylabel="Λ_max (% of an unlimited link's)",
        title="The bandwidth wall, computed: dotted, where the link begins to bind",
    )
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def check(settings: Settings, options: Options) -> None:
    """As for all tiers on one deployment, of a hybrid with a dense model beside it. Raises UserError naming the key."""
    tiers.check(settings, options)
    both(settings)


_READS = tuple(key for key in tiers.READS if key not in ("profile", "link.rate_bps", "workload.slo"))
EXPERIMENT = Experiment(
    "live_wall",
    {
        "execute": (
            *MODEL, *_READS, "cluster.prfaas.instances", "cluster.pd.instances", *LINK, "transport", "options",
        ),
    },
    run,
    {"live_wall": draw},
    Options,
    check,
    effort=("seed", "options.search_requests", "options.search_width", "options.repeats"),
    finding=finding,
    hinges_on="The dense model is not the hybrid's twin here: it prefills faster at this size, which moves its wall to the right.",
)  # fmt: skip
