"""The models of Table 1 and the reconstructed one at every size: layers by kind, parameters, S_kv(l), ratio to dense.

Nothing is allocated: parameters are counted on modules without weights, sizes of state come from the layout. At full size
the parameters are set beside those that the publishers state, as a check on the configurations in conf/model.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Final

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from repro.experiments.base import Context, Experiment, Outcome
from repro.models import spec
from repro.models.architectures import layout_of
from repro.models.spec import ModelSpec
from repro.record.directory import Record
from repro.record.metrics import Metric
from repro.report import style

LENGTHS: Final = {"1K": 1024, "8K": 8192, "32K": 32_768, "128K": 131_072}


def run(context: Context) -> Outcome:
    """A row per model and size, and its metrics."""
    rows, metrics = [], list[Metric]()
    for name, model in context.settings.model.items():
        for size in spec.SIZES:
            context.progress(f"{name}, {size}")
            row = describe(replace(model, size=size))
            rows.append(row)
            metrics += _metrics(context, row)
    return Outcome(metrics, {"models": pd.DataFrame(rows)})


def describe(model: ModelSpec) -> dict[str, object]:
    """One model at one size: layers by kind, parameters, S_kv at each length, and how much less than its dense twin's."""
    from repro.models.build import build, parameters  # two seconds of imports that redrawing a figure does not need

    size = model.size
    layout = layout_of(model, size)
    dense = None if model.baseline is None else layout_of(model.baseline, size)
    row: dict[str, object] = {
        "model": model.name,
        "title": model.title,
        "size": size,
        "layers": layout.layers,
        "layers_by_kind": ", ".join(f"{count} {kind}" for kind, count in layout.layers_by_kind().items()),
        "mechanisms": f"{model.linear} / {model.full}",
        "parameters": parameters(build(model, "meta")),
        "stated_parameters": model.parameters if size == "full" else math.nan,
        "fixed_bytes": layout.fixed_bytes,
        "bytes_per_token": layout.bytes_per_token,
        "baseline": model.baseline or "",
    }
    for label, tokens in LENGTHS.items():
        row[f"kv_bytes_{label}"] = layout.kv_bytes(tokens)
        row[f"dense_ratio_{label}"] = dense.kv_bytes(tokens) / layout.kv_bytes(tokens) if dense else math.nan
    return row


def _metrics(context: Context, row: dict[str, object]) -> list[Metric]:
    case = f"{row['model']}.{row['size']}"
    stated = float(str(row["stated_parameters"]))
    metrics = [
        context.metric(case, "layers", float(str(row["layers"])), "", "public"),
        context.metric(case, "parameters", float(str(row["parameters"])), "", "computed", paper=stated),
        context.metric(case, "fixed_bytes", float(str(row["fixed_bytes"])), "bytes", "computed"),
        context.metric(case, "bytes_per_token", float(str(row["bytes_per_token"])), "bytes/token", "computed"),
    ]
    for label in LENGTHS:
        at = f"{case}.{label}"
        metrics.append(context.metric(at, "kv_bytes", float(str(row[f"kv_bytes_{label}"])), "bytes", "computed"))
        ratio = float(str(row[f"dense_ratio_{label}"]))
        if math.isfinite(ratio):
            metrics.append(context.metric(at, "dense_kv_ratio", ratio, "", "computed"))
    return metrics


def draw(record: Record) -> Figure:
    """S_kv over the length at full size: dense models grow from the first token, hybrid ones start flat."""
    table = record.table("models")
    figure, (axis,) = style.panels(height_in=3.8)
    tokens = np.geomspace(1024, 131_072, 60)
    full = table[table["size"] == "full"]
    for (_, row), (colour, marker, dash) in zip(full.iterrows(), style.SERIES, strict=False):
        line = row["fixed_bytes"] + row["bytes_per_token"] * tokens
        axis.plot(tokens, line / 2**20, color=colour, linestyle=dash, label=row["title"])
        points = [row[f"kv_bytes_{label}"] / 2**20 for label in LENGTHS]
        axis.plot(list(LENGTHS.values()), points, color=colour, marker=marker, linestyle="none", markersize=4)
    axis.set(yscale="log", ylabel="KVCache size (MiB)", title="Hybrid models keep an order of magnitude less state")
    style.tokens_axis(axis)
    axis.legend(ncols=2)
    return figure


EXPERIMENT = Experiment(name="models", reads={"model": ("model",)}, run=run, figures={"models": draw})
