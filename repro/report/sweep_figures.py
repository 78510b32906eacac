"""Figures of a sweep, chosen by its axes: lines over one, a heat map over two, small multiples over three.

An axis of seeds is never drawn: values are means over it, with their interval. Of more than three axes the others stay at their first
value, and the figure's title says at which.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from repro.record.statistics import Estimate
from repro.report import style
from repro.report.sweep_spec import SweepSpec
from repro.report.words import label, value_label

#: What a sweep is drawn for where nobody says: the first of these that its points have.
USUAL = (
    "lambda_max", "goodput", "equal_cost_gain", "cost_per_mtok_usd", "ttft_bound_ratio", "rate_share", "phi_kv_bps", "egress_bps",
    "ttft_mean_s",
)  # fmt: skip
#: As many cases as one figure holds apart.
MOST_CASES = 4
#: From this ratio of the largest to the smallest value on, an axis is logarithmic.
_LOGARITHMIC = 15


@dataclass(frozen=True)
class Drawn:
    """One metric of a sweep, ready to draw: a row per point and case, the axes by length, and what was held."""

    metric: str
    unit: str
    table: pd.DataFrame
    axes: tuple[str, ...]
    held: Mapping[str, object]


def figures(table: pd.DataFrame, axes: Mapping[str, Sequence[object]], spec: SweepSpec) -> dict[str, Figure]:
    """A figure for each metric asked for, or for what the points are about; by the metric's name."""
    present = set(table["metric"])
    wanted = [name for name in spec.metrics if name in present]
    if not spec.metrics:
        wanted = [name for name in USUAL if name in present][:1] or sorted(present)[:1]
    return {name: _draw(select(table, name, axes, spec.cases)) for name in wanted}


def select(table: pd.DataFrame, metric: str, axes: Mapping[str, Sequence[object]], cases: Sequence[str]) -> Drawn:
    """One metric's values as means over seeds; cases that another point lacks stay."""
    rows = table[table["metric"] == metric]
    rows = rows.assign(case=cases_without_axes(rows, axes))
    chosen = [case for case in cases if case in set(rows["case"])] or _telling(rows)[:MOST_CASES]
    rows = rows[rows["case"].isin(chosen)]
    varied = [key for key, values in axes.items() if len(values) > 1 and key != "seed"]
    ordered = sorted(varied, key=lambda key: (not _numbers(axes[key]), -len(axes[key])))
    held = {key: axes[key][0] for key in ordered[3:]}
    for key, value in held.items():
        rows = rows[rows[key] == value]
    by = [*ordered[:3], "case"]
    found = []
    for own, group in rows.groupby(by, sort=False, dropna=False):
        one = group["value"].to_numpy(np.float64)
        many = Estimate.of_signed(list(one)) if len(one) > 1 else None
        low = many.low if many else float(group["ci_low"].iloc[0])
        high = many.high if many else float(group["ci_high"].iloc[0])
        found.append({**dict(zip(by, own, strict=True)), "value": float(one.mean()), "low": low, "high": high})
    unit = str(rows["unit"].iloc[0]) if len(rows) and rows["unit"].notna().iloc[0] else ""
    columns = [*by, "value", "low", "high"]
    return Drawn(metric, unit, pd.DataFrame(found, columns=columns), tuple(ordered[:3]), held)


def cases_without_axes(rows: pd.DataFrame, axes: Mapping[str, Sequence[object]]) -> list[str]:
    """Cases without the point's own text values of axes: `ring 32K` and `kimi 32K` are one case of a sweep over models."""
    texts = [key for key, values in axes.items() if key in rows and not _numbers(values)]
    found = []
    for values in rows[["case", *texts]].itertuples(index=False):
        case = str(values[0])
        for value in map(str, values[1:]):
            case = case.replace(value, "").strip(" ,./")
        found.append(case)
    return found


def _telling(rows: pd.DataFrame) -> list[str]:
    """Cases whose values the sweep changes, those of another reading last; all of them where it changes none."""
    changing = [case for case, own in rows.groupby("case", sort=False)["value"] if own.nunique() > 1]
    return sorted(changing or dict.fromkeys(rows["case"]), key=lambda case: "." in case)


def _numbers(values: Sequence[object]) -> bool:
    return all(isinstance(value, (int, float)) for value in values)


def _draw(drawn: Drawn) -> Figure:
    if len(drawn.axes) == 2 and all(len(set(drawn.table[key])) > 2 for key in drawn.axes):
        return _heat_map(drawn)
    return _lines(drawn)


def _title(drawn: Drawn) -> str:
    at = ", ".join(f"{label(key)} {value_label(key, value)}" for key, value in drawn.held.items())
    return label(drawn.metric) + (f" (at {at})" if at else "")


def _heat_map(drawn: Drawn) -> Figure:
    """One panel per case, the same colours in all; values in the cells where there are few."""
    across, down = drawn.axes
    cases = list(dict.fromkeys(drawn.table["case"]))
    figure, axes = style.panels(
        len(cases), width_in=max(style.WIDTH_IN, 2.6 * len(cases) + 0.8), height_in=3.4, sharey=True
    )
    known = drawn.table["value"].replace([np.inf, -np.inf], np.nan)
    low, high = float(known.min()), float(known.max())
    scale, name = style.scaled(drawn.unit, max(abs(low), abs(high)))
    # Over decades only a logarithmic scale of colours shows the small ones.
    ends = low / scale, max(high, low + 1e-12) / scale
    norm = LogNorm(*ends) if low > 0 and high / low >= 30 else Normalize(*ends)
    image = None
    for axis, case in zip(axes, cases, strict=True):
        grid = drawn.table[drawn.table["case"] == case].pivot(index=down, columns=across, values="value")
        values = grid.to_numpy(np.float64) / scale
        image = axis.imshow(values, origin="lower", aspect="auto", cmap="viridis", interpolation="nearest", norm=norm)
        _ticks(axis, across, list(grid.columns), down, list(grid.index), 8 if len(cases) < 3 else 5)
        axis.grid(visible=False)
        small = 7 if values.shape[1] < 7 or len(cases) == 1 else 5.5
        if values.size <= 60:
            for (row, column), value in np.ndenumerate(values):
                if math.isfinite(value):
                    bright = float(norm(value)) > 0.6
                    axis.text(column, row, f"{value:.3g}", ha="center", va="center", fontsize=small,
                              color="black" if bright else "white")  # fmt: skip
        axis.set_title(label(case) if len(cases) > 1 else _title(drawn))
    axes[0].set_ylabel(label(down))
    if image is not None:
        figure.colorbar(image, ax=axes, label=f"{label(drawn.metric)}{f' ({name})' if name else ''}")
    return figure


def _ticks(axis: Axes, across: str, columns: Sequence[object], down: str, rows: Sequence[object], most: int) -> None:
    every = max(1, math.ceil(len(columns) / most))
    axis.set_xticks(
        range(0, len(columns), every),
        [value_label(across, value) for value in columns[::every]],
        rotation=35,
        ha="right",
    )
    every = max(1, math.ceil(len(rows) / 12))
    axis.set_yticks(range(0, len(rows), every), [value_label(down, value) for value in rows[::every]])
    axis.set_xlabel(label(across))


def _lines(drawn: Drawn) -> Figure:
    """Values over the longest axis; a line for each case, or for each value of the second axis; a panel for each of the third or case."""
    table = drawn.table
    across = drawn.axes[0] if drawn.axes else None
    many_cases = table["case"].nunique() > 1
    line = drawn.axes[1] if len(drawn.axes) > 1 else "case"
    panel = drawn.axes[2] if len(drawn.axes) > 2 else ("case" if line != "case" and many_cases else None)
    if len(drawn.axes) > 2 and many_cases:
        table = table[table["case"] == table["case"].iloc[0]]
    panels = list(dict.fromkeys(table[panel])) if panel else [None]
    columns = min(len(panels), 3)
    figure, axes = style.panels(
        columns, math.ceil(len(panels) / columns), height_in=3.0 * math.ceil(len(panels) / columns) + 0.4, sharey=True,
        width_in=style.WIDTH_IN if columns < 3 else 8.4,
    )  # fmt: skip
    scale, name = style.scaled(drawn.unit, float(table["value"].abs().max()) if len(table) else 1.0)
    for axis, own in zip(axes, panels, strict=False):
        shown = table if panel is None else table[table[panel] == own]
        for index, (key, rows) in enumerate(shown.groupby(line, sort=False, dropna=False)):
            _line(axis, rows, across, index, value_label(line, key), scale)
        if panel is not None:
            axis.set_title(f"{label(panel)} {value_label(panel, own)}" if panel != "case" else label(str(own)))
        if across is not None:
            axis.set_xlabel(label(across))
            _scale(axis, across, table)
    for axis in axes[len(panels) :]:
        axis.remove()
    axes[0].set_ylabel(f"{label(drawn.metric)}{f' ({name})' if name else ''}")
    if panel is None:
        axes[0].set_title(_title(drawn))
    else:
        figure.suptitle(_title(drawn), x=0.01, ha="left", fontsize=10.5, weight="bold")
    if line != "case" or many_cases:
        axes[0].legend(title=label(line) if line != "case" else None)
    return figure


def _line(axis: Axes, rows: pd.DataFrame, across: str | None, index: int, name: str, scale: float) -> None:
    colour, marker, dash = style.SERIES[index % len(style.SERIES)]
    text = across is None or not pd.api.types.is_numeric_dtype(rows[across])
    if across is None:
        at = np.array([float(index)])
    elif text:
        at = np.arange(len(rows), dtype=np.float64)
    else:
        rows = rows.sort_values(across)
        at = rows[across].to_numpy(np.float64) / style.scaled_key(across, rows[across])[0]
    values = rows["value"].to_numpy(np.float64) / scale
    axis.plot(at, values, color=colour, marker=marker, linestyle=dash if not text else "none", label=name, markersize=4)
    low, high = rows["low"].to_numpy(np.float64) / scale, rows["high"].to_numpy(np.float64) / scale
    if np.isfinite(low).any():
        error = [np.nan_to_num(values - low).clip(min=0), np.nan_to_num(high - values).clip(min=0)]
        axis.errorbar(at, values, error, fmt="none", ecolor=colour, capsize=2, lw=0.8)
    if across is not None and text:
        axis.set_xticks(at, [value_label(across, value) for value in rows[across]], rotation=20, ha="right")


def _scale(axis: Axes, across: str, table: pd.DataFrame) -> None:
    """A number's axis is logarithmic where it spans decades, and its ticks are the values that ran."""
    if not pd.api.types.is_numeric_dtype(table[across]):
        return
    values = np.unique(table[across].to_numpy(np.float64))
    factor, unit = style.scaled_key(across, pd.Series(values))
    if values.min() > 0 and values.max() / values.min() >= _LOGARITHMIC:
        axis.set_xscale("log")
    every = max(1, math.ceil(len(values) / 7))
    axis.set_xticks(values[::every] / factor, [f"{value / factor:g}" for value in values[::every]])
    axis.minorticks_off()
    axis.set_xlabel(label(across) + (f" ({unit})" if unit else ""))
