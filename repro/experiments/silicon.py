"""Tables 3 and 5 predicted from kernel times that somebody measured: T_prefill and Φ_kv as a band beside the paper's values.

The paper gives Φ_kv of six models on 8×H200; with S_kv exact, its T_prefill follows (equation 1). The committed points
of `profile=silicon:…` give the same quantity from single kernels, once per framework, placement of the experts and
quantisation: these span a band. What lies above the band at short lengths is time that no kernel explains (scheduling,
launches, tokenisation): the fixed part, on which the worth of a threshold hangs.

Kimi-K3 is of Table 5's kind and far larger; scaled by the number of layers it is set beside the unnamed model. That is
a likeness, not a prediction: the width of its experts and heads is its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from repro.experiments.base import Context, Experiment, Outcome
from repro.experiments.table3 import check, implied_prefill
from repro.paper import tables
from repro.profiles.silicon import FILES, cases, full_layout
from repro.record.directory import Record
from repro.record.metrics import Metric, each
from repro.report import style
from repro.settings import Settings

SYSTEM: Final = "h200"
_SCALED: Final = "kimi_k3"


def run(context: Context) -> Outcome:
    """The band of every model with points, the paper's value in it or not, the fixed part, and Table 5 beside Kimi-K3."""
    printed = implied_prefill(context.settings.model.values())
    points, rows = [], list[Metric]()
    for model, series in printed.groupby("model", sort=False):
        found = [*_points(str(model), series)]
        if not found:
            rows.append(context.metric(str(model), "silicon_cases", 0, "", "silicon"))
            continue
        points += found
        rows += _bands(context, str(model), pd.DataFrame(found))
    table = pd.DataFrame(points)
    fixed = [row.value for row in rows if row.metric == "fixed_part_s"]
    if fixed:
        spread = (min(fixed), max(fixed))
        rows.append(
            context.metric(
                "all models", "fixed_part_s", float(np.median(fixed)), "s", "silicon", interval=spread, n=len(fixed)
            )
        )
    scaled = _table_5()
    for row in each(scaled):
        rows.append(
            context.metric(
                f"{_SCALED} scaled by layers {row.label}", "prefill_s", row.seconds, "s", "silicon", interval=(row.low_s, row.high_s),
                paper=row.paper_s,
            )
        )  # fmt: skip
    return Outcome(rows, {"points": table, "bands": bands(table), "table5": scaled})


def _points(model: str, series: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """T_prefill of every case at the lengths of the paper's table, beside what the table implies."""
    layout = full_layout(model)
    for case in cases(model, SYSTEM):
        by_tokens = case.prefill.set_index("tokens")
        for row in each(series):
            point = by_tokens.loc[row.tokens]
            yield {
                "model": model, "title": row.title, "label": row.label, "tokens": row.tokens, "backend": case.key[2],
                "placement": case.key[3], "quantisation": case.key[4], "stages": case.memory["stages"], "seconds": point["seconds"],
                "phi_kv_bps": 8 * layout.kv_bytes(row.tokens) / point["seconds"], "table_share": point["table_share"],
                "beyond_tables": bool(point["beyond_tables"]), "paper_s": row.prefill_s, "paper_phi_kv_bps": row.phi_kv_bps,
            }  # fmt: skip


def bands(points: pd.DataFrame) -> pd.DataFrame:
    """Per model and length: lowest, median and highest time over the cases, the paper's, and where it lies, in words."""
    if points.empty:
        return points
    rows = []
    for (model, label), group in points.groupby(["model", "label"], sort=False):
        low, middle, high = (float(group["seconds"].quantile(q)) for q in (0.0, 0.5, 1.0))
        paper = float(group["paper_s"].iloc[0])
        short = points[(points["model"] == model) & (points["tokens"] == points["tokens"].min())]
        fixed = max(float(short["paper_s"].iloc[0] - short["seconds"].max()), 0.0)
        rows.append({
            "model": model, "title": group["title"].iloc[0], "label": label, "tokens": int(group["tokens"].iloc[0]), "cases": len(group),
            "low_s": low, "median_s": middle, "high_s": high, "paper_s": paper, "fixed_part_s": fixed,
            "beyond_tables": bool(group["beyond_tables"].any()), "explanation": _explanation(group, paper, fixed),
        })  # fmt: skip
    return pd.DataFrame(rows)


def _explanation(group: pd.DataFrame, paper: float, fixed: float) -> str:
    low, high = group["seconds"].min(), group["seconds"].max()
    if low <= paper <= high:
        by = [
            name
            for name in ("placement", "quantisation", "backend")
            if group.groupby(name)["seconds"].median().pipe(_spread) > 1.1
        ]
        return f"within the band of {' and '.join(by) or 'the cases'}"
    if paper > high:
        return (
            "above it by the fixed part"
            if paper - fixed <= 1.02 * high
            else f"above it by {paper - high:.2f} s, {fixed:.2f} s of them fixed"
        )
    return f"below it: {100 * (1 - paper / low):.0f} % faster than the fastest case"


def _spread(seconds: pd.Series[float]) -> float:
    return float(seconds.max() / seconds.min())


def _bands(context: Context, model: str, points: pd.DataFrame) -> list[Metric]:
    rows = []
    for band in each(bands(points)):
        case, layout = f"{model} {band.label}", full_layout(model)
        bits = 8 * layout.kv_bytes(band.tokens)
        spans = (
            ("prefill_s", band.median_s, (band.low_s, band.high_s), "s", band.paper_s),
            ("phi_kv_bps", bits / band.median_s, (bits / band.high_s, bits / band.low_s), "bit/s", bits / band.paper_s),
        )
        for name, middle, span, unit, paper in spans:
            rows.append(context.metric(case, name, middle, unit, "silicon", interval=span, n=band.cases, paper=paper))
        inside = band.low_s <= band.paper_s <= band.high_s
        rows.append(context.metric(case, "paper_within_band", float(inside), "", "silicon"))
        rows.append(context.metric(case, "beyond_tables", float(band.beyond_tables), "", "silicon"))
        if band.label == "1K":
            rows.append(context.metric(model, "fixed_part_s", band.fixed_part_s, "s", "silicon"))
    rows.append(
        context.metric(
            model, "silicon_cases", points.groupby(["backend", "placement", "quantisation"]).ngroups, "", "silicon"
        )
    )
    return rows


def _table_5() -> pd.DataFrame:
    """Kimi-K3's T_prefill on H200, times 57 layers of 93, beside the unnamed model's."""
    share = full_layout("paper_1t").layers / full_layout(_SCALED).layers
    found = cases(_SCALED, SYSTEM)
    rows = []
    for label, printed in tables.TABLE_5.items():
        tokens = tables.TOKENS[label]
        seconds = [share * float(np.interp(tokens, case.prefill["tokens"], case.prefill["seconds"])) for case in found]
        rows.append({
            "label": label, "tokens": tokens, "seconds": float(np.median(seconds)), "low_s": min(seconds), "high_s": max(seconds),
            "paper_s": printed.prefill.value,
        })  # fmt: skip
    return pd.DataFrame(rows)


def draw(record: Record) -> Figure:
    """The paper's marks on silicon bands, a panel per model, and Table 5 on Kimi-K3 scaled by its layers."""
    table = record.table("bands")
    models = list(dict.fromkeys(table["model"])) if len(table) else []
    panels = len(models) + 1
    figure, axes = style.panels(3, -(-panels // 3), width_in=7.0, height_in=2.9 * -(-panels // 3))
    for axis, model in zip(axes, models, strict=False):
        band = table[table["model"] == model].sort_values("tokens")
        _band(axis, band, style.BLUE)
        axis.set_title(band["title"].iloc[0])
    scaled = record.table("table5")
    _band(
        axes[len(models)],
        scaled.assign(median_s=scaled["seconds"], beyond_tables=scaled["tokens"] > 16_384),
        style.GREEN,
    )
    axes[len(models)].set_title("Table 5's 1T on Kimi-K3 × 57/93")
    for axis in axes[panels:]:
        axis.set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle(
        "At 1K the paper's times hold some 0.3 to 0.4 s that no kernel explains",
        fontsize=11,
        weight="bold",
    )
    return figure


def _band(axis: Any, band: pd.DataFrame, colour: str) -> None:
    axis.fill_between(
        band["tokens"], band["low_s"], band["high_s"], color=colour, alpha=0.25, lw=0, label="kernels: all cases"
    )
    axis.plot(band["tokens"], band["median_s"], color=colour, label="kernels: median")
    far = band[band["beyond_tables"]]
    axis.plot(
        far["tokens"],
        far["median_s"],
        color=colour,
        marker="o",
        mfc="white",
        ls="none",
        label="beyond the measured tables",
    )
    axis.plot(band["tokens"], band["paper_s"], **style.PAPER)
    axis.set(yscale="log", ylabel="T_prefill (s)")
    style.tokens_axis(axis)


def points_files(_: Settings) -> list[Path]:
    """The committed points, whose contents decide the result."""
    return list(FILES.values())


EXPERIMENT = Experiment(
    name="silicon",
    reads={"model": ("model",)},
    run=run,
    figures={"silicon": draw},
    check=check,
    inputs=points_files,
)
