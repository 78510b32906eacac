"""Table 6: throughput, latency and egress of PrfaaS-PD against homogeneous and naive heterogeneous PD (§4.1–4.3).

The grid search must find the paper's operating point by itself; nothing of Λ_max, Θ_prfaas, egress or PrfaaS-PD's TTFT is an input.
Values that did enter H20's calibration are marked `calibrated`, and predicted a second time with themselves left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from repro.errors import UserError
from repro.experiments import spread
from repro.experiments import table6_emulated as emulated
from repro.experiments import table6_goodput as goodput
from repro.experiments import table6_live as live
from repro.experiments import table6_simulated as simulated
from repro.experiments.base import DECODE, EQUATIONS, HOMOGENEOUS, SIMULATED, WIRE, Context, Experiment, Outcome
from repro.experiments.deployment import (
    check_decoding,
    check_deployment,
    deployment,
    latencies,
    operating_points,
    profile_files,
)
from repro.paper import tables, text
from repro.paper.quantity import Quantity
from repro.profiles.calibration import FAMILIES, prefill_residuals
from repro.profiles.presets import PaperInputs
from repro.record.directory import Record
from repro.record.metrics import Metric, value
from repro.report import style
from repro.scheduling.throughput import Lengths
from repro.settings import Settings

#: Printed values that the calibration of H20 used: ours for these are no prediction. The first three only when read as the calibration
#: reads them, at representative lengths.
CALIBRATED_AT_REPRESENTATIVE = {
    ("prfaas_pd", "theta_pd_p"),
    ("homogeneous_pd", "theta_pd_p"),
    ("homogeneous_pd", "lambda_max"),
}
CALIBRATED = {
    ("homogeneous_pd", "ttft_mean_s"), ("homogeneous_pd", "ttft_p90_s"),
    ("prfaas_pd", "theta_pd_d"), ("homogeneous_pd", "theta_pd_d"), ("naive_heterogeneous_pd", "theta_pd_d"),
}  # fmt: skip

READINGS: tuple[Lengths, ...] = ("representative", "true_mean")

UNITS = {
    "lambda_max": "req/s", "theta_prfaas": "req/s", "theta_pd_p": "req/s", "theta_pd_d": "req/s", "threshold_tokens": "tokens",
    "n_prfaas": "instances", "n_p": "instances", "n_d": "instances",
    "l_long_tokens": "tokens", "l_short_tokens": "tokens", "egress_bps": "bit/s", "ttft_mean_s": "s", "ttft_p90_s": "s",
    "ttft_mean_reduction": "%", "ttft_p90_reduction": "%",
}  # fmt: skip

_IN_TEXT: Mapping[str, tuple[Quantity, float]] = {
    "offload_fraction": (text.OFFLOAD_FRACTION, 1),
    "l_long_tokens": (text.L_LONG, 1),
    "egress_bps": (text.EGRESS, 1e9),
    "link_utilisation": (text.LINK_UTILISATION, 1),
    "ttft_mean_reduction": (text.TTFT_MEAN_REDUCTION, 1),
    "ttft_p90_reduction": (text.TTFT_P90_REDUCTION, 1),
}


@dataclass(frozen=True)
class Options:
    """Effort on each tier.

    `draws` from within the rounding of the paper's inputs give tier `model` its spread (0 varies the interpolation alone); tier
    `simulate` runs `requests` per simulation and `seeds` simulations per value; `emulate` has its own.
    """

    draws: int = 8
    requests: int = 30_000
    seeds: int = 4
    emulate: emulated.Emulated = field(default_factory=emulated.Emulated)

    def __post_init__(self) -> None:
        if self.draws < 0:
            raise UserError(f"options.draws: {self.draws} is negative")
        if self.requests < 1000 or self.seeds < 2:
            raise UserError(
                f"options.requests, options.seeds: {self.requests} and {self.seeds}; accepted: 1000 requests and 2 seeds or more"
            )


def paper_value(case: str, metric: str) -> float:
    """What the paper prints for a case, in table or text; nan where it is silent."""
    if metric in tables.TABLE_6.get(case, {}):
        return tables.TABLE_6[case][metric].value
    if case == "prfaas_pd" and metric in _IN_TEXT:
        quantity, scale = _IN_TEXT[metric]
        return quantity.value * scale
    return math.nan


def check(settings: Settings, options: Options) -> None:
    """A deployment that can serve; on tier simulate, with decode batches that it can have. Raises UserError naming the key."""
    check_deployment(settings, options)
    if settings.tier == "simulate":
        check_decoding(settings)


def run(context: Context) -> Outcome:
    """The three deployments under the configured policy, and again with the other reading of T_prefill's mean."""
    settings = context.settings
    if settings.tier == "simulate":
        return simulated.run(context, simulated.Effort(context.options.requests, context.options.seeds))
    if settings.tier == "emulate":
        return emulated.run(context, context.options.emulate)
    base, papers = deployment(settings), spread.is_papers(settings)
    readings: dict[Lengths, Settings] = {
        lengths: replace(settings, policy=replace(settings.policy, lengths=lengths)) for lengths in READINGS
    }
    values = {}
    for lengths, reading in readings.items():
        points = operating_points(base, reading)
        ttft = latencies(base, points, settings.cluster.homogeneous_instances)
        values[lengths] = list(spread.quantities(points, ttft))
        context.progress(f"T_prefill as {lengths.replace('_', ' ')}: Λ_max {points['prfaas_pd'].lambda_max:.3f} req/s")
    ranges: dict[Lengths, spread.Ranges] = {lengths: {} for lengths in readings}
    if papers:
        context.progress("now the spread over rounding and interpolation")
        variants = spread.variants(base, context.options.draws, np.random.default_rng(settings.seed))
        ranges = spread.ranges(readings, (variant for _, variant in variants))
    rows: list[Metric] = []
    for lengths in readings:
        calibrated = CALIBRATED | (CALIBRATED_AT_REPRESENTATIVE if lengths == "representative" else set())
        for case, metric, number in values[lengths]:
            low, high, n = ranges[lengths].get((case, metric), (math.nan, math.nan, 1))
            rows.append(
                context.metric(
                    case if lengths == settings.policy.lengths else f"{case}.{lengths}",
                    metric, number, UNITS.get(metric, ""),
                    "calibrated" if papers and (case, metric) in calibrated else "computed",
                    interval=(low, high), n=n, paper=paper_value(case, metric) if papers else math.nan,
                )
            )  # fmt: skip
    saved = {"calibration": _calibration(), "interpolations": _interpolations(context)} if papers else {}
    return Outcome(rows, saved)


@cache
def _calibration() -> pd.DataFrame:
    """Every calibrating value: printed, fitted, and predicted from the others, for both families of curve."""
    inputs, rows = PaperInputs.draw(), []
    fits = [(f"T_prefill, {family}", prefill_residuals(inputs.prefill_anchors(), family)) for family in FAMILIES]
    fits.append(("T_decode, constant step", inputs.decode_anchors().residuals()))
    for fit, residuals in fits:
        for residual in residuals:
            printed = residual.anchor.value
            rows.append({
                "fit": fit, "anchor": residual.anchor.name, "unit": residual.anchor.unit, "paper": printed, "fitted": residual.fitted,
                "residual_pct": 100 * (residual.fitted / printed - 1), "left_out": residual.left_out,
                "left_out_pct": 100 * (residual.left_out / printed - 1),
            })  # fmt: skip
    return pd.DataFrame(rows)


def _interpolations(context: Context) -> pd.DataFrame:
    """Λ_max of the three deployments under every interpolation of the printed points."""
    settings, rows = context.settings, []
    for name, variant in spread.variants(deployment(settings), 0, np.random.default_rng(settings.seed)):
        for case, point in operating_points(variant, settings).items():
            rows.append({
                "interpolation": name, "case": case, "lambda_max": point.lambda_max, "threshold_tokens": point.threshold_tokens,
                "n_p": point.n_p,
            })  # fmt: skip
    return pd.DataFrame(rows)


def draw(record: Record) -> Figure:
    """Λ_max and TTFT of each deployment, ours as bars with their spread, the paper's as diamonds."""
    table = record.metrics
    cases = [case for case in tables.CASES if case in set(table["case"])]
    figure, (left, right) = style.panels(2, height_in=3.3)
    for index, case in enumerate(cases):
        row = table[(table["case"] == case) & (table["metric"] == "lambda_max")].iloc[0]
        left.bar(index, row["value"], 0.62, color=style.CASE_COLOURS[case])
        if row["ci_low"] == row["ci_low"]:
            spread_below, spread_above = row["value"] - row["ci_low"], row["ci_high"] - row["value"]
            left.errorbar(index, row["value"], [[spread_below], [spread_above]], color="black", capsize=4, lw=1)
        left.plot(index + 0.2, row["paper"], **{**style.PAPER, "label": "paper" if index == 0 else None})
        words = f"{row['value']:.2f}\n{value(table, 'ratio', case):.2f}×"
        left.text(index - 0.05, 0.08, words, ha="center", color="white", fontsize=9, weight="bold")
        for shift, metric, shade in ((-0.2, "ttft_mean_s", 1.0), (0.2, "ttft_p90_s", 0.55)):
            row = table[(table["case"] == case) & (table["metric"] == metric)].iloc[0]
            label = {"ttft_mean_s": "mean", "ttft_p90_s": "P90"}[metric]
            right.bar(index + shift, row["value"], 0.36, color=style.CASE_COLOURS[case], alpha=shade)
            right.text(index + shift, 0.15, label, ha="center", fontsize=8, color="white" if shade == 1 else "black")
            right.plot(index + shift, row["paper"], **style.PAPER)
    names = [style.CASE_NAMES[case].replace(" ", "\n", 1).replace(" PD", "\nPD") for case in cases]
    for axis in (left, right):
        axis.set_xticks(range(len(cases)), names)
        axis.grid(axis="x", visible=False)
    left.set(ylabel="Λ_max (req/s)", title="Throughput")
    left.legend(loc="upper right")
    right.set(ylabel="TTFT without queueing (s)", title="Latency")
    return figure


EXPERIMENT = Experiment(
    name="table6",
    reads={
        "model": (*EQUATIONS, HOMOGENEOUS, "seed", "options.draws"),
        "simulate": (
            *SIMULATED,
            HOMOGENEOUS,
            DECODE,
            "options.requests",
            "options.seeds",
        ),
        "emulate": (*SIMULATED, HOMOGENEOUS, *WIRE, "options.emulate"),
    },
    run=run,
    figures={"table6": draw},
    options=Options,
    check=check,
    effort=("seed", "options"),
    inputs=profile_files,
    tier_figures={
        "simulate": {"table6_simulated": simulated.draw_loads, "table6_goodput": goodput.draw},
        "emulate": {"table6_emulated": live.draw, "table6_goodput": goodput.draw},
    },
)
