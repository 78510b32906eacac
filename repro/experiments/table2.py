"""Table 2, measured: which mechanisms are slow to prefill long prompts, and which emit much KVCache per second (§2.2).

Each mechanism is isolated by configuration: the same tiny model with all layers of one kind (linear attention keeps one
full layer, without which transformers cannot count tokens). Two verdicts follow the table's words. Prefill latency is high
where the time per token grows: at the longest prompt it is at least `growth` times that at the shortest. KV throughput
Φ_kv (equation 1) is high where it is at least half of GQA's at the longest prompt. Kernels are transformers' PyTorch
fallbacks unless others are installed: absolute times are theirs, the growth is the mechanism's. Sparse attention is not
measured, since its gain needs a kernel that skips what is not attended to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure

from repro.errors import UserError
from repro.experiments.base import Context, Experiment, Outcome
from repro.experiments.split_model import check_models
from repro.models.build import build
from repro.models.layout import layout_from_config
from repro.models.spec import ModelSpec
from repro.paper import tables
from repro.profiles.measured import Timing, time_prefill
from repro.record.directory import Record
from repro.record.metrics import Metric
from repro.report import style
from repro.settings import Settings

#: Mechanism of Table 2 → the model whose code has it, and the word of its layers.
MECHANISMS = {
    "GQA": ("mimo_v2_flash", "F*8"),
    "MLA": ("kimi_linear", "F*8"),
    "SWA": ("mimo_v2_flash", "S*8"),
    "linear attention": ("qwen3_5_397b", "L*7 F"),
}


@dataclass(frozen=True)
class Options:
    """Prompts of these lengths, each timed `repeats` times in chunks of `chunk_tokens` on `device`."""

    device: str = "cpu"
    lengths: tuple[int, ...] = (512, 2048, 8192)
    chunk_tokens: int = 512
    repeats: int = 3
    growth: float = 1.5

    def __post_init__(self) -> None:
        if len(self.lengths) < 2 or list(self.lengths) != sorted(set(self.lengths)) or self.lengths[0] < 1:
            raise UserError(f"options.lengths: {self.lengths}; two or more increasing lengths are needed")
        if self.repeats < 3 or self.chunk_tokens < 1 or not self.growth > 1:
            raise UserError("options: repeats is 3 or more, chunk_tokens 1 or more, growth above 1")


def isolated(mechanism: str, models: Mapping[str, ModelSpec]) -> ModelSpec:
    """The model with all layers of one mechanism."""
    name, layers = MECHANISMS[mechanism]
    model = models[name]
    return replace(model, name=mechanism, sizes={model.size: {**model.sizes[model.size], "layers": layers}})


def check(settings: Settings, options: object) -> None:
    """The mechanisms are isolated from certain models, GQA among them, which the others are held against."""
    known = {name for name, _ in MECHANISMS.values()}
    reference, _ = MECHANISMS["GQA"]
    for name, model in settings.model.items():
        if name not in known or model.pretrained is not None:
            raise UserError(f"model: {name!r}; accepted for {settings.name}: {', '.join(sorted(known))}")
    if reference not in settings.model:
        raise UserError(
            f"model: {', '.join(settings.model)}; {settings.name} needs {reference}, whose GQA all are held against"
        )
    check_models(settings, options)


def run(context: Context) -> Outcome:
    """Time every mechanism at every length, and hold the two verdicts against the table's."""
    options, models = context.options, context.settings.model
    assert isinstance(options, Options)
    rows: list[dict[str, Any]] = []
    for mechanism, (name, _) in MECHANISMS.items():
        if name not in models:
            continue
        model = isolated(mechanism, models)
        built, layout = build(model, options.device), layout_from_config(model.model_type, model.values(), model.dtype)
        for tokens in options.lengths:
            timing = time_prefill(built, tokens, options.chunk_tokens, options.repeats)
            rows.append(_row(mechanism, timing, layout.kv_bytes(tokens)))
            context.progress(f"{mechanism}, {tokens} tokens: {timing.seconds:.3f} s")
    table = pd.DataFrame(rows)
    verdicts = judge(table, options.growth)
    return Outcome(_metrics(context, table, verdicts), {"timings": table, "verdicts": verdicts}, provenance={
        "threads": torch.get_num_threads(),
    })  # fmt: skip


def _row(mechanism: str, timing: Timing, kv_bytes: int) -> dict[str, Any]:
    return {
        "mechanism": mechanism, "tokens": timing.tokens, "prefill_s": timing.seconds, "low_s": timing.low_s,
        "high_s": timing.high_s, "repeats": timing.repeats, "kv_bytes": kv_bytes,
        "phi_kv_bps": 8 * kv_bytes / timing.seconds,
    }  # fmt: skip


def judge(table: pd.DataFrame, growth: float) -> pd.DataFrame:
    """High or low, per mechanism and column of Table 2, beside the paper's word."""
    shortest, longest = table["tokens"].min(), table["tokens"].max()
    at = table.set_index(["mechanism", "tokens"])
    rows = []
    for mechanism in table["mechanism"].unique():
        first, last = at.loc[(mechanism, shortest)], at.loc[(mechanism, longest)]
        grown = (last["prefill_s"] / longest) / (first["prefill_s"] / shortest)
        share = last["phi_kv_bps"] / at.loc[("GQA", longest), "phi_kv_bps"]
        paper_latency, paper_throughput = tables.TABLE_2[mechanism]
        rows.append({
            "mechanism": mechanism, "per_token_growth": grown, "phi_kv_of_gqa": share,
            "prefill_latency": "high" if grown >= growth else "low", "kv_throughput": "high" if share >= 0.5 else "low",
            "paper_prefill_latency": paper_latency, "paper_kv_throughput": paper_throughput,
        })  # fmt: skip
    return pd.DataFrame(rows)


def _metrics(context: Context, table: pd.DataFrame, verdicts: pd.DataFrame) -> list[Metric]:
    metrics = []
    timed: list[dict[Any, Any]] = table.to_dict("records")
    for row in timed:
        case, n = f"{row['mechanism']}.{row['tokens']}", row["repeats"]
        span = (row["low_s"], row["high_s"])
        metrics.append(context.metric(case, "prefill_s", row["prefill_s"], "s", "measured", interval=span, n=n))
        metrics.append(context.metric(case, "phi_kv_bps", row["phi_kv_bps"], "bit/s", "measured", n=n))
    judged: list[dict[Any, Any]] = verdicts.to_dict("records")
    for row in judged:
        for column, of in (("prefill_latency", "per_token_growth"), ("kv_throughput", "phi_kv_of_gqa")):
            holds = float(row[column] == row[f"paper_{column}"])
            metrics.append(context.metric(row["mechanism"], of, row[of], "", "measured"))
            metrics.append(context.metric(row["mechanism"], f"{column}_verdict_holds", holds, "", "measured", paper=1))
    return [metric for metric in metrics if math.isfinite(metric.value)]


def draw(record: Record) -> Figure:
    """Time per token over the length, and KV throughput over the length, a line per mechanism."""
    table = record.table("timings")
    figure, (left, right) = style.panels(2, height_in=3.2)
    for (name, series), (colour, marker, dash) in zip(
        table.groupby("mechanism", sort=False), style.SERIES, strict=False
    ):
        per_token = 1e3 * series["prefill_s"] / series["tokens"]
        look: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": dash, "label": str(name)}
        left.plot(series["tokens"], per_token / per_token.iloc[0], **look)
        right.plot(series["tokens"], series["phi_kv_bps"] / 1e6, **look)
    left.set(xscale="log", xlabel="input length (tokens)", ylabel="time per token, relative", title="Prefill latency")
    right.set(xscale="log", yscale="log", xlabel="input length (tokens)", ylabel="Φ_kv (Mbps)", title="KV throughput")
    left.legend()
    return figure


EXPERIMENT = Experiment(
    name="table2",
    reads={"execute": ("model", "size", "options")},
    run=run,
    figures={"table2": draw},
    options=Options,
    check=check,
)
