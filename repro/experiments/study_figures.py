"""Figures of the simulated studies: requests within the service level over time, and goodput with its paired differences.

Each is drawn from a record alone. What a study does to the deployment over time (bursts, a link that fails) is shaded, from the options
that the record holds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from repro.record.directory import Record
from repro.report import style
from repro.report.words import label

POLICY_NAMES = {
    "static": "static t",
    "short_term": "short-term only",
    "two_timescale": "both timescales",
    "random_split": "random split",
    "naive": "naive heterogeneous",
    "static_rebalanced": "static t, rebalanced",
    "no_short_term": "no short-term loop",
    "no_long_term": "no long-term loop",
    "least_work_to_round_robin": "round robin, not least work",
    "two_timescale_rebalanced": "both, rebalanced",
}


def _style(index: int) -> dict[str, Any]:
    colour, _, dash = style.SERIES[index % len(style.SERIES)]
    return {"color": colour, "linestyle": dash}


#: More lines than these in one panel cannot be told apart.
_MOST_LINES = 3
_MOST_BARS = 11
#: Beside longer names, in characters, two panels have no room for their bars.
_LONGEST_NAME = 32


def case_name(case: str) -> str:
    """What a figure calls a case: words, and of a prefix such as `fixed_256.` what it says of the outputs."""
    prefix, _, own = case.rpartition(".")
    name = POLICY_NAMES.get(own, label(own))
    if found := re.fullmatch(r"(fixed|log_normal)_(\d+)", prefix):
        return f"output {found.group(2)}, {found.group(1).replace('_', '-')}: {name}"
    return f"{prefix.replace('_', ' ')}: {name}" if prefix else name


class Span(NamedTuple):
    """A stretch of time in which something happens to a deployment; `what` is a word for it."""

    start_s: float
    end_s: float
    what: str


#: From a record's options, what a study does to the deployment over time.
Spans = Callable[[Mapping[str, Any]], Sequence[Span]]
_SHADES = (style.ORANGE, style.RED)


def every(period_s: float, length_s: float, until_s: float, what: str) -> list[Span]:
    """Stretches that end at each multiple of a period."""
    ends = np.arange(period_s, until_s + length_s, period_s)
    return [Span(float(end) - length_s, float(end), what) for end in ends]


def _shade(figure: Figure, axes: Sequence[Axes], spans: Sequence[Span], last_s: float) -> None:
    """Shade what happened in every panel, each kind in a colour that the legend names."""
    colours = dict(zip(dict.fromkeys(span.what for span in spans), _SHADES, strict=False))
    for axis in axes:
        for span in spans:
            if span.start_s < last_s:
                axis.axvspan(
                    span.start_s, min(span.end_s, last_s), color=colours[span.what], alpha=0.18, lw=0, zorder=0
                )
    handles = [Patch(color=colour, alpha=0.3, label=what) for what, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))


def draw_over_time(record: Record, spans: Spans = lambda options: ()) -> Figure:
    """Share of requests that meet the service level by time of arrival, and, where lines are few, mean TTFT and the threshold.

    Of more than three cases each has a panel of its own, with what it is compared with in grey. What `spans` gives is shaded.
    """
    series, controls = record.table("series"), record.table("controls")
    cases = list(dict.fromkeys(series["case"]))
    happened = spans(record.configuration.get("options", {}))
    if len(cases) > _MOST_LINES:
        return _draw_each_over_time(series, cases, happened)
    figure, (top, middle, bottom) = style.panels(1, 3, height_in=6.2, sharex=True)
    for index, case in enumerate(cases):
        mean = series[series["case"] == case].groupby("at_s")[["arrived", "met", "ttft_s"]].mean()
        top.plot(mean.index, 100 * mean["met"] / mean["arrived"], label=case_name(case), **_style(index))
        middle.plot(mean.index, mean["ttft_s"], **_style(index))
        own = controls[controls["case"] == case] if len(controls) else controls
        if len(own):
            bottom.plot(own["at_s"], own["threshold_tokens"] / 1000, **_style(index))
    top.set(ylabel="within SLO (%)", title="Requests that meet the service level, by time of arrival")
    top.set_ylim(-3, 103)
    middle.set(ylabel="mean TTFT (s)", yscale="log")
    bottom.set(ylabel="threshold t (K tokens)", xlabel="time (s)")
    if len(cases) > 1:
        figure.legend(loc="outside upper center", ncols=len(cases))
    if happened:
        _shade(figure, (top, middle, bottom), happened, float(series["at_s"].max()))
    return figure


def _draw_each_over_time(series: pd.DataFrame, cases: Sequence[str], happened: Sequence[Span]) -> Figure:
    met = series.groupby(["case", "at_s"])[["arrived", "met"]].mean()
    share = 100 * met["met"] / met["arrived"]
    baselines = [case for case in cases if case.rpartition(".")[2] == "static"] or list(cases[:1])
    others = [case for case in cases if case not in baselines]
    # A policy that lets a queue grow answers long after the last arrival of the others; their time is the figure's.
    last_s = min(share[case].index.max() for case in cases)
    columns = min(3, len(others))
    rows = -(-len(others) // columns)
    figure, axes = style.panels(columns, rows, height_in=1.5 * rows + 0.9, sharex=True, sharey=True)
    for axis, case in zip(axes, others, strict=False):
        beside = [one for one in baselines if one.rpartition(".")[0] == case.rpartition(".")[0]] or baselines
        axis.plot(share[beside[0]].index, share[beside[0]], color=style.GREY, lw=1.2, linestyle="--")
        axis.plot(share[case].index, share[case], color=style.BLUE, lw=1.6)
        axis.set_title(case_name(case), fontsize=8)
        axis.set(xlim=(0, last_s), ylim=(-3, 103))
    for axis in axes[len(others) :]:
        axis.remove()
    if happened:
        _shade(figure, axes[: len(others)], happened, last_s)
    for axis in axes[len(others) - columns : len(others)]:
        axis.tick_params(labelbottom=True)
        axis.set_xlabel("time of arrival (s)", fontsize=9)
    figure.supylabel("requests within the SLO (%)", fontsize=9)
    figure.suptitle(
        f"Each case (solid) beside {case_name(baselines[0])} (dashed)", x=0.01, ha="left", fontsize=10, weight="bold"
    )
    return figure


def draw_goodput(record: Record, without: str = "\0") -> Figure:
    """Goodput of each policy with its interval, and the paired difference to the baseline; cases that begin with `without` are left out."""
    table = record.metrics[~record.metrics["case"].str.startswith(without)]
    rows = table[table["metric"] == "goodput"].reset_index(drop=True)
    growing = set(table.loc[table["metric"] == "runs_overloaded", "case"])
    names = [case_name(str(case)) + (" (overloaded)" if case in growing else "") for case in rows["case"]]
    # Many names, or long ones, leave no room for bars beside each other.
    below = len(rows) > _MOST_BARS or max(map(len, names)) > _LONGEST_NAME
    figure, (left, right) = (
        style.panels(1, 2, height_in=max(0.38 * len(rows) + 1, 4.4)) if below else style.panels(2, height_in=3.4)
    )
    bars(left, rows)
    left.set_yticks(range(len(names)), names)
    left.set(xlabel="goodput (req/s)", title="Goodput at the SLO")
    paired = table[table["metric"].str.startswith("goodput_minus_")].reset_index(drop=True)
    if len(paired):
        bars(right, paired)
        right.axvline(0, color="black", lw=0.8)
        baselines = [metric.removeprefix("goodput_minus_") for metric in paired["metric"]]
        usual = POLICY_NAMES.get(baselines[0], baselines[0])
        right.set(xlabel="paired difference (req/s)", title=f"Against {usual}")
        names = [case_name(str(case)) for case in paired["case"]]
        other = [
            name if base == baselines[0] else f"{name}\n− {POLICY_NAMES.get(base, base)}"
            for name, base in zip(names, baselines, strict=True)
        ]
        right.set_yticks(range(len(other)), other)
    return figure


def bars(axis: Axes, rows: pd.DataFrame) -> None:
    """Values of the cases from top to bottom, with their intervals."""
    import seaborn  # a second of imports that only drawing needs

    names = [case_name(str(case)) for case in rows["case"]]
    at = list(range(len(rows)))
    seaborn.barplot(x=rows["value"].to_numpy(), y=at, orient="h", color=style.BLUE, saturation=1, ax=axis)
    error = [np.nan_to_num(rows["value"] - rows["ci_low"]), np.nan_to_num(rows["ci_high"] - rows["value"])]
    axis.errorbar(rows["value"], at, xerr=error, fmt="none", ecolor="black", capsize=3, lw=1)
    axis.set_yticks(at, names)
    axis.set(ylabel="")
    axis.grid(axis="y", visible=False)


def figures(spans: Spans) -> Mapping[str, Callable[[Record], Figure]]:
    """The figures of a study that does something to the deployment over time."""
    return {"over_time": partial(draw_over_time, spans=spans), "goodput": draw_goodput}


FIGURES: Mapping[str, Callable[[Record], Figure]] = {"over_time": draw_over_time, "goodput": draw_goodput}
