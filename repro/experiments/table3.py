"""Table 3: Φ_kv of six models on 8×H200, taken apart into S_kv from their public architectures and the T_prefill that this implies.

The paper prints Φ_kv alone. With S_kv(l) exact, T_prefill = S_kv / Φ_kv follows (equation 1), and each ratio of the text can be traced to
what it takes: fewer bytes or slower prefill.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from repro.errors import UserError
from repro.experiments.base import Context, Experiment, Outcome
from repro.models.architectures import layout_of
from repro.models.spec import ModelSpec
from repro.paper import tables, text
from repro.record.directory import Record
from repro.record.metrics import Metric, each
from repro.report import style
from repro.settings import Settings

_TWIN_KV_HEADS = 8


def check(settings: Settings, _: object) -> None:
    """Refuse a model that Table 3 does not print."""
    for name, model in settings.model.items():
        if name not in tables.TABLE_3 or model.pretrained:
            raise UserError(
                f"model: the paper prints no KV throughput of {name!r}; accepted for {settings.name}: {', '.join(tables.TABLE_3)}"
            )


def one_model(settings: Settings) -> ModelSpec:
    """The only model of the settings. Raises UserError where there are several."""
    if len(settings.model) != 1:
        raise UserError(f"model: {', '.join(settings.model)} are {len(settings.model)}; {settings.name} takes one")
    return next(iter(settings.model.values()))


def implied_prefill(models: Iterable[ModelSpec]) -> pd.DataFrame:
    """Per model and length: published Φ_kv with its rounding, S_kv of the architecture, and the T_prefill between them."""
    rows = []
    printed = {model.model: model for model in tables.TABLE_1}
    for asked in models:
        model, layout = printed[asked.name], layout_of(asked)
        for label, quantity in tables.TABLE_3[model.model].items():
            size_bytes = layout.kv_bytes(tables.TOKENS_BINARY[label])
            low, high = (bound * 1e9 for bound in quantity.interval)
            rows.append({
                "model": model.model, "title": model.name, "label": label, "tokens": tables.TOKENS_BINARY[label], "kv_bytes": size_bytes,
                "phi_kv_bps": quantity.value * 1e9, "prefill_s": 8 * size_bytes / (quantity.value * 1e9),
                "prefill_low_s": 8 * size_bytes / high, "prefill_high_s": 8 * size_bytes / low, "hybrid": model.linear is not None,
            })  # fmt: skip
    return pd.DataFrame(rows)


def _ratios(context: Context, table: pd.DataFrame) -> list[Metric]:
    """The text's 13×, 4× and 36×, each split into bytes and time."""
    at_32k = table[table["label"] == "32K"].set_index("model")
    rows = []
    pairs = (
        ("mimo_v2_flash", "minimax_m2_5", text.MIMO_BELOW_MINIMAX_32K.value),
        ("qwen3_5_397b", "qwen3_235b", text.QWEN35_BELOW_QWEN3_32K.value),
    )
    for hybrid, dense, claimed in pairs:
        if not {hybrid, dense} <= set(at_32k.index):
            continue
        case = f"{dense} / {hybrid} at 32K"
        rows += [
            context.metric(
                case,
                "phi_kv_ratio",
                at_32k["phi_kv_bps"][dense] / at_32k["phi_kv_bps"][hybrid],
                "",
                "computed",
                paper=claimed,
            ),
            context.metric(
                case, "kv_bytes_ratio", at_32k["kv_bytes"][dense] / at_32k["kv_bytes"][hybrid], "", "computed"
            ),
            context.metric(
                case, "prefill_ratio", at_32k["prefill_s"][dense] / at_32k["prefill_s"][hybrid], "", "computed"
            ),
        ]
    ring = context.settings.model.get("ring_2_5_1t")
    return rows + (_ring_saving(context, ring) if ring else [])


def _ring_saving(context: Context, model: ModelSpec) -> list[Metric]:
    """36× = 4.5 (MLA over GQA) × 8 (one layer in eight), per token of full-attention state.

    The paper does not name the GQA it compares with. 8 KV heads of MLA's own dimensions, 192 for keys and 128 for values, hold 2,560
    elements against the 576 of the latent: 4.44×, and 35.6× with the layers, which round to what is printed. (8 heads of 128 would give
    3.6× and 28×.) That counts full-attention state only; S_kv as a whole, recurrent state included, is shown against the same twin.
    """
    ring = layout_of(model)
    layers = ring.layers
    full = ring.layers_by_kind()["mla"]
    latent_bytes = ring.bytes_per_token / full
    gqa_bytes = _TWIN_KV_HEADS * (192 + 128) * 2
    rows = [
        context.metric("Ring-2.5-1T", "mla_saving", gqa_bytes / latent_bytes, "", "computed", paper=text.RING_SAVING_BY_MLA.value),
        context.metric("Ring-2.5-1T", "layer_saving", layers / full, "", "computed", paper=text.RING_SAVING_BY_RATIO.value),
        context.metric(
            "Ring-2.5-1T, per token", "kv_bytes_ratio", layers * gqa_bytes / ring.bytes_per_token, "", "computed",
            paper=text.RING_MEMORY_SAVING.value,
        ),
    ]  # fmt: skip
    for label, tokens in tables.TOKENS_BINARY.items():
        twin = layers * gqa_bytes * tokens
        rows.append(
            context.metric(
                f"Ring-2.5-1T, whole S_kv at {label}", "kv_bytes_ratio", twin / ring.kv_bytes(tokens), "", "computed"
            )
        )
    return rows


def run(context: Context) -> Outcome:
    """Every cell of Table 3 with what stands behind it, and the text's ratios."""
    table = implied_prefill(context.settings.model.values())
    rows: list[Metric] = []
    for row in each(table):
        case = f"{row.model} {row.label}"
        rows += [
            context.metric(case, "phi_kv_bps", row.phi_kv_bps, "bit/s", "published", paper=row.phi_kv_bps),
            context.metric(case, "kv_bytes", row.kv_bytes, "bytes", "public"),
            context.metric(
                case, "prefill_s", row.prefill_s, "s", "computed", interval=(row.prefill_low_s, row.prefill_high_s)
            ),
        ]
    for model, series in table.groupby("model"):
        increasing = bool(np.all(np.diff(series.sort_values("tokens")["prefill_s"]) > 0))
        rows.append(context.metric(str(model), "prefill_is_increasing", float(increasing), "", "computed", paper=1.0))
    return Outcome(rows + _ratios(context, table), {"implied_prefill": table})


def draw(record: Record) -> Figure:
    """Published Φ_kv beside the implied T_prefill: hybrids emit a tenth of what dense models do, at similar prefill times."""
    table = record.table("implied_prefill")
    figure, (left, right) = style.panels(2, height_in=3.4)
    for (model, series), (colour, marker, _) in zip(table.groupby("model", sort=False), style.SERIES, strict=False):
        hybrid = bool(series["hybrid"].iloc[0])
        look = {
            "color": colour,
            "marker": marker,
            "linestyle": "-" if hybrid else "--",
            "markersize": 5,
            "label": series["title"].iloc[0],
        }
        left.plot(series["tokens"], series["phi_kv_bps"] / 1e9, **look)
        right.plot(series["tokens"], series["prefill_s"], **look)
        assert math.isfinite(series["prefill_s"].sum()), model
    left.set(yscale="log", ylabel="Φ_kv (Gbps), as published", title="KV throughput")
    right.set(yscale="log", ylabel="implied T_prefill (s)", title="S_kv / Φ_kv")
    left.set_yticks([1, 3, 10, 30], ["1", "3", "10", "30"])
    right.set_yticks([0.3, 1, 3, 10], ["0.3", "1", "3", "10"])
    for axis in (left, right):
        style.tokens_axis(axis)
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=3, title="hybrid: solid, dense: dashed"
    )
    return figure


EXPERIMENT = Experiment(name="table3", reads={"model": ("model",)}, run=run, figures={"table3": draw}, check=check)
