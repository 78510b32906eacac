"""The link loses most of its capacity for a minute: at which loads and rates adapting helps, and at which there is nothing to gain.

At Λ_max offloading takes about 12 Gbps of egress, so a drop from 100 to 10 Gbps hardly binds; and near Λ_max the PD cluster is as busy as
the link is thin, so requests that may not be offloaded have nowhere to go. A moving threshold can help where bandwidth is scarce *and*
local prefill has slack. The grid shows where that is. Goodput is measured from the drop to its recovery, where it is decided, and over the
whole run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from repro.errors import UserError
from repro.experiments import simulated
from repro.experiments.base import SCHEDULER, SIMULATED, Context, Experiment, Outcome
from repro.experiments.deployment import profile_files
from repro.experiments.study import Point, run_once, run_points, seeds_of
from repro.record.directory import Record
from repro.record.metrics import Metric
from repro.record.request_metrics import summarise
from repro.record.statistics import Estimate
from repro.report import style
from repro.simulate.deployments import payload_share, requests
from repro.simulate.link_spec import CapacityChange
from repro.workload.arrivals import Poisson
from repro.workload.spec import ServiceLevel

POLICIES = ("static", "short_term", "two_timescale")


@dataclass(frozen=True)
class Options(simulated.StudyOptions):
    """From `at_s` on, for `for_s`, the link carries one of `dropped_bps`, at each of `loads`; a drop counts until `recovery_s` after it."""

    duration_s: float = 600.0
    seeds: int = 20
    at_s: float = 240.0
    for_s: float = 60.0
    recovery_s: float = 60.0
    loads: tuple[float, ...] = (0.5, 0.65, 0.8)
    dropped_bps: tuple[float, ...] = (10e9, 4e9, 2e9)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.at_s < self.at_s + self.for_s + self.recovery_s <= self.duration_s:
            raise UserError(
                f"options.at_s, for_s, recovery_s: {self.at_s}, {self.for_s} and {self.recovery_s} must lie within "
                f"options.duration_s ({self.duration_s})"
            )
        if not self.dropped_bps or min(self.dropped_bps) < 0:
            raise UserError(f"options.dropped_bps: {self.dropped_bps}; accepted: one rate or more, none negative")
        if not self.loads or not min(self.loads) > 0:
            raise UserError(f"options.loads: {self.loads}; accepted: one positive load or more")


def run(context: Context) -> Outcome:
    """Every cell of the grid; its table has the gain in goodput over static t, in per cent, paired over seeds."""
    options: Options = context.options
    setting = simulated.Setting.of(context)
    end_s = options.at_s + options.for_s
    windows = {"drop": (options.at_s, end_s + options.recovery_s), "run": (options.warmup_s, options.duration_s)}
    points: dict[str, Point] = {}
    for load in options.loads:
        rate = setting.rate(load)
        for dropped in options.dropped_bps:
            reduced = dropped * payload_share(context.settings.link)
            changes = (CapacityChange(options.at_s, reduced), CapacityChange(end_s, setting.link.rate_bps))
            specs = setting.policies(replace(setting.link, changes=changes))
            for seed in seeds_of(context, options.seeds):
                stream = requests(setting.base, Poisson(rate), round(rate * options.duration_s), seed)
                for case in POLICIES:
                    points[f"{_cell(load, dropped)}.{case}, seed {seed}"] = Point(case, seed, specs[case], stream)
    measured = dict(zip(points, run_points(context, partial(_goodput, windows, setting.slo), points), strict=True))
    rows: list[Metric] = []
    cells: list[dict[str, object]] = []
    for load in options.loads:
        for dropped in options.dropped_bps:
            cell = _cell(load, dropped)
            goodput = {
                (case, window): [
                    measured[f"{cell}.{case}, seed {seed}"][window] for seed in seeds_of(context, options.seeds)
                ]
                for case in POLICIES
                for window in windows
            }
            for (case, window), values in goodput.items():
                rows.append(_row(context, f"{cell}.{case}", f"goodput_{window}", "req/s", Estimate.of(values)))
                if case == "static":
                    continue
                static = goodput["static", window]
                mean = float(np.mean(static))
                scale = 100 / max(mean, 1e-9)
                gain = Estimate.of_signed(
                    [scale * (value - other) for value, other in zip(values, static, strict=True)]
                )
                rows.append(_row(context, f"{cell}.{case}", f"gain_{window}", "%", gain))
                cells.append({
                    "load": load, "dropped_bps": dropped, "case": case, "window": window, "static": mean, "gain": gain.value,
                    "low": gain.low, "high": gain.high,
                })  # fmt: skip
    return Outcome(rows, {"cells": pd.DataFrame(cells)})


def _cell(load: float, dropped_bps: float) -> str:
    return f"load_{load:g}.{dropped_bps / 1e9:g}_gbps"


def _goodput(windows: Mapping[str, tuple[float, float]], slo: ServiceLevel, point: Point) -> dict[str, float]:
    """Goodput of one run in each window."""
    found, _ = run_once(point.spec, point.stream)
    return {name: summarise(found, window, slo).goodput for name, window in windows.items()}


def _row(context: Context, case: str, metric: str, unit: str, found: Estimate) -> Metric:
    return context.metric(case, metric, found.value, unit, "simulated", interval=(found.low, found.high), n=found.n)


def draw(record: Record) -> Figure:
    """Gain in goodput of both timescales over static t by load and rate, during the drop and over the whole run."""
    import seaborn  # a second of imports that only drawing needs

    cells = record.table("cells")
    cells = cells[cells["case"] == "two_timescale"]
    loads, rates = sorted(cells["load"].unique()), sorted(cells["dropped_bps"].unique(), reverse=True)
    most = max(float(cells["gain"].abs().max()), 1.0)
    figure, axes = style.panels(2, height_in=3.4)
    titles = {"drop": "From the drop to its recovery", "run": "Whole run"}
    for axis, (window, title) in zip(axes, titles.items(), strict=True):
        own = cells[cells["window"] == window].set_index(["load", "dropped_bps"])
        table = pd.DataFrame({rate: [own.loc[(load, rate), "gain"] for load in loads] for rate in rates}, index=loads)
        words = table.copy().astype(object)
        for load in loads:
            for rate in rates:
                low, high = (float(own.loc[(load, rate), key]) for key in ("low", "high"))
                verdict = "no difference" if low <= 0 <= high else f"{low:+.1f} to {high:+.1f}"
                words.loc[load, rate] = f"{float(table.loc[load, rate]):+.1f} %\n{verdict}"
        seaborn.heatmap(
            table[::-1], annot=words[::-1], fmt="", ax=axis, cmap="RdBu", vmin=-1.6 * most, vmax=1.6 * most, cbar=False,
            annot_kws={"fontsize": 7, "color": "black"}, xticklabels=[f"{rate / 1e9:g}" for rate in rates],
            yticklabels=[f"{load:g}" for load in reversed(loads)],
        )  # fmt: skip
        axis.tick_params(axis="y", rotation=0)
        axis.set(xlabel="link during the drop (Gbps)", ylabel="load (λ / Λ_max)", title=title)
        axis.grid(visible=False)
    return figure


EXPERIMENT = Experiment(
    "bandwidth_drop",
    {"simulate": (*SIMULATED, *SCHEDULER, "options")},
    run,
    {"gain": draw},
    Options,
    simulated.check,
    profile_files,
)
