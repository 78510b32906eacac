"""Table 6 with instances that compute: PrfaaS-PD against its two baselines, on clusters of two speeds that one machine stands for.

An instance rests after every forward pass, so that a PD instance is slower than a PrfaaS one as H20 is slower than H200, and all of them
together need fewer cores than there are instances. Each cluster's profile is measured that way, with the machine to itself; the equations
find threshold and split from the two profiles; then the three deployments serve, over the link, and Λ_max is searched while they run.
Tokens are held against the model unsplit.

The clusters are as small as their model, so what compares with the paper are ratios and not rates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from repro.errors import UserError, at_least
from repro.experiments import tiers, two_speeds
from repro.experiments.base import HOMOGENEOUS, MODEL, WIRE, Context, Experiment, Outcome
from repro.experiments.computed import Answers, prefill_over_profile
from repro.experiments.deployment import CASES, operating_points
from repro.experiments.live import Played, Wire, deployed
from repro.experiments.table3 import one_model
from repro.experiments.table6_live import Case, Effort, draw, measured, name_of
from repro.experiments.two_speeds import TwoSpeeds
from repro.record.directory import Record
from repro.record.metrics import Metric, value
from repro.report import style
from repro.scheduling.throughput import Deployment
from repro.serving.scale import Scale
from repro.settings import Settings
from repro.simulate.deployments import shared_link, simulated


@dataclass(frozen=True)
class Options(TwoSpeeds):
    """Which deployments; `requests` are counted at `load` of each Λ_max, `search_requests` sent per rate that the search tries."""

    cases: tuple[str, ...] = CASES
    load: float = 0.7
    requests: int = 200
    search_requests: int = 120
    search_width: float = 0.08

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.cases or not set(self.cases) <= set(CASES):
            raise UserError(f"options.cases: {list(self.cases)}; accepted: some of {', '.join(CASES)}")
        if not 0 < self.load < 1:
            raise UserError(f"options.load: {self.load}; accepted: between 0 and 1")
        if not self.search_width > 0:
            raise UserError(f"options.search_width: {self.search_width} is not positive")
        at_least(self, "options", requests=20, search_requests=20)


def run(context: Context) -> Outcome:
    """Measure both profiles, find the three operating points, and let each deployment serve."""
    options, settings = context.options, context.settings
    model = one_model(settings)
    base = two_speeds.measured(context, model, settings.link.rate_bps or float("inf"))
    true_mean = replace(settings, policy=replace(settings.policy, lengths="true_mean"))
    points = {
        case: point for case, point in operating_points(base, true_mean, options.cases).items() if case in options.cases
    }
    computing = options.computing(model)
    answers = two_speeds.answers(context, model, computing)
    wire = Wire(settings.link, settings.transport, options.pieces, Scale())
    effort = Effort(
        (options.load,), options.requests, options.search_requests, options.search_width, 0.06, "options.search_requests",
        "a search over so few found a rate that does not last; accepted: more of them", even=True,
    )  # fmt: skip
    logs = context.folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    rows: list[Metric] = []
    drawn: list[dict[str, Any]] = []
    kept: list[pd.DataFrame] = []
    links, workers = dict[str, Any](), dict[str, Any]()
    for name, point in points.items():
        spec = simulated(base, point, shared_link(settings.link, settings.transport))
        case = Case(name, spec, base, point, settings.seed)
        context.progress(
            f"{name}: {point.n_prfaas + point.n_p + point.n_d} instances, Λ_max {point.lambda_max:.2f} req/s by the equations"
        )
        with deployed(spec, wire, logs, f"live-table6-{name.replace('_', '-')}", settings.seed, computing) as live:
            links[name] = live.measured_link()
            found = measured(context, live, case, effort, "measured", float("nan"))
            workers[name] = live.fleet.clocks.record()
        played = found.runs[options.load]
        rows += found.metrics
        rows.append(context.metric(name, "lambda_max_over_model", found.lambda_max / point.lambda_max, "", "measured"))
        rows += _proofs(context, name_of(name, options.load), played, base, answers)
        drawn += found.loads
        kept.append(played.requests.assign(case=name, load=options.load))
    rows += _ratios(context, rows)
    provenance = {"link": links, "workers": workers}
    return Outcome(rows, {"loads": pd.DataFrame(drawn)}, requests=pd.concat(kept), provenance=provenance)


def _proofs(context: Context, name: str, played: Played, base: Deployment, answers: Answers) -> list[Metric]:
    """That the instances did the work, tokens and bytes, and what their prefills took by the profiles that predicted them."""
    same, compared = answers.right(played, context.options.compared)
    rows = [
        context.metric(name, "tokens_match", same / compared if compared else float("nan"), "", "measured", n=compared)
    ]
    for route, profile in (("prfaas", base.prfaas), ("pd", base.pd)):
        own = played.requests[played.requests["route"] == route]
        if not len(own):
            continue
        took = prefill_over_profile(own, profile)
        rows.append(context.metric(f"{name}.{route}", "prefill_over_profile", took, "", "measured", n=len(own)))
        if route == "prfaas":
            over = float(own["payload_bytes"].sum()) / float(profile.kv_bytes(own["input_tokens"] - 1).sum())
            rows.append(context.metric(name, "kv_bytes_over_layout", over, "", "measured"))
    return rows


def _ratios(context: Context, rows: list[Metric]) -> list[Metric]:
    """Λ_max of each deployment over the homogeneous one's: served, simulated and by the equations."""
    found = {row.case: row for row in rows if row.metric == "lambda_max"}
    ratios = []
    for case in context.options.cases:
        for suffix in ("", ".simulate", ".model_true_mean"):
            if (base := found.get(f"homogeneous_pd{suffix}")) is not None:
                own = found[case + suffix]
                ratios.append(context.metric(own.case, "ratio", own.value / base.value, "", own.source))
    return ratios


def finding(record: Record) -> str:
    """Λ_max served and by the equations, PrfaaS-PD's gain, and how far the profiles hold while the instances serve."""
    table = record.metrics
    cases = [case for case in CASES if ((table["case"] == case) & (table["metric"] == "lambda_max")).any()]
    words = []
    for case in cases:
        served, planned = (value(table, "lambda_max", case + suffix) for suffix in ("", ".model_true_mean"))
        words.append(f"{style.CASE_NAMES[case]} {served:.2f} req/s ({planned:.2f})")
    said = f"Instances that compute sustain, beside the equations' value: {'; '.join(words)}."
    if {"prfaas_pd", "homogeneous_pd"} <= set(cases):
        served, planned = (value(table, "ratio", f"prfaas_pd{suffix}") for suffix in ("", ".model_true_mean"))
        said += f" PrfaaS-PD serves {served:.2f} times as much as the homogeneous cluster; {planned:.2f} times was predicted."
    took = table.loc[table["metric"] == "prefill_over_profile", "value"]
    return f"{said} While they serve, prefills take {took.min():.2f} to {took.max():.2f} times what the profiles say."


def check(settings: Settings, options: Options) -> None:
    """As for all tiers on one deployment; requests need a PD cluster for each phase. Raises UserError naming the key."""
    tiers.check(settings, options)


EXPERIMENT = Experiment(
    "live_table6",
    {
        "execute": (
            *MODEL, *(key for key in tiers.READS if key != "profile"), "cluster.prfaas.instances", "cluster.pd.instances", HOMOGENEOUS,
            *WIRE, "options",
        ),
    },
    run,
    {"live_table6": draw},
    Options,
    check,
    effort=("seed", "options.requests", "options.search_requests", "options.search_width", "options.repeats"),
    finding=finding,
)  # fmt: skip
