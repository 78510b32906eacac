"""The models of Table 1, the reconstructed one and those of today at every size: layers by kind, parameters, S_kv(l), ratio to dense.

Nothing is allocated: parameters are counted on modules without weights, sizes of state come from the layout. At full size
the parameters are set beside those that the publishers state, as a check on the configurations in conf/model. S_kv is also given for a
KVCache in fp8: what attention keeps per token halves, recurrent state does not.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Final

import pandas as pd
from matplotlib.figure import Figure

from repro.experiments.base import Context, Experiment, Outcome
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
        for size in model.sizes or (model.size,):
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
    quantised = layout_of(replace(model, kv_dtype="fp8"), size)
    dense = None if model.baseline is None else layout_of(model.baseline, size)
    row: dict[str, object] = {
        "model": model.name,
        "title": model.title,
        "size": size,
        "layers": layout.layers,
        "layers_by_kind": ", ".join(f"{count} {kind}" for kind, count in layout.layers_by_kind().items()),
        "mechanisms": f"{model.linear} / {model.full}",
        "published": model.published,
        "parameters": math.nan if model.layout_only else parameters(build(replace(model, kv_dtype=None), "meta")),
        "stated_parameters": model.parameters if size == "full" and model.parameters else math.nan,
        "fixed_bytes": layout.fixed_bytes,
        "bytes_per_token": layout.bytes_per_token,
        "baseline": model.baseline or "",
    }
    for label, tokens in LENGTHS.items():
        row[f"kv_bytes_{label}"] = layout.kv_bytes(tokens)
        row[f"kv_bytes_fp8_{label}"] = quantised.kv_bytes(tokens)
        row[f"dense_ratio_{label}"] = dense.kv_bytes(tokens) / layout.kv_bytes(tokens) if dense else math.nan
    return row


def _metrics(context: Context, row: dict[str, object]) -> list[Metric]:
    case = f"{row['model']}.{row['size']}"
    stated = float(str(row["stated_parameters"]))
    metrics = [context.metric(case, "layers", float(str(row["layers"])), "", "public")]
    if math.isfinite(count := float(str(row["parameters"]))):
        metrics.append(context.metric(case, "parameters", count, "", "computed", paper=stated))
    metrics += [
        context.metric(case, "fixed_bytes", float(str(row["fixed_bytes"])), "bytes", "computed"),
        context.metric(case, "bytes_per_token", float(str(row["bytes_per_token"])), "bytes/token", "computed"),
    ]
    for label in LENGTHS:
        at = f"{case}.{label}"
        for named in ("kv_bytes", "kv_bytes_fp8"):
            metrics.append(context.metric(at, named, float(str(row[f"{named}_{label}"])), "bytes", "computed"))
        ratio = float(str(row[f"dense_ratio_{label}"]))
        if math.isfinite(ratio):
            metrics.append(context.metric(at, "dense_kv_ratio", ratio, "", "computed"))
    return metrics


#: More models than `style.SERIES` has looks.
_LOOKS: Final = (*style.SERIES, (style.GREEN, "*", ":"), (style.BLUE, "h", "--"), (style.RED, "<", "-"))


def draw(record: Record) -> Figure:
    """S_kv over the length at full size, of the paper's models and of those since: dense ones grow from the first token."""
    table = record.table("models")
    full = table[table["size"] == "full"]
    since = full["published"].notna() & (full["published"].astype(str) != "")
    groups = [
        (title, part)
        for title, part in (("Models of the paper", full[~since]), ("Models of today", full[since]))
        if len(part)
    ]
    figure, axes = style.panels(len(groups), height_in=5.0, width_in=7.0, sharey=True)
    for axis, (title, part) in zip(axes, groups, strict=True):
        for (_, row), (colour, marker, dash) in zip(part.iterrows(), _LOOKS, strict=False):
            points = [row[f"kv_bytes_{label}"] / 2**20 for label in LENGTHS]
            look: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": dash, "markersize": 4.5}
            axis.plot(list(LENGTHS.values()), points, label=row["title"].replace(" (", "\n("), **look)
        axis.set(yscale="log", title=title)
        style.tokens_axis(axis)
        axis.legend(
            loc="upper center",
            bbox_to_anchor=(0.42, -0.17),
            ncols=2,
            fontsize=7,
            handlelength=1.4,
            handletextpad=0.4,
            columnspacing=0.6,
        )
    axes[0].set_ylabel("KVCache size (MiB)")
    return figure


EXPERIMENT = Experiment(name="models", reads={"model": ("model",)}, run=run, figures={"models": draw})
