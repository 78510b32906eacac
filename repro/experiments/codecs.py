"""What each codec buys and costs on real state: ratio, speed, KL divergence and token agreement (§3.3, transport).

With `pretrained` (scripts/train_checkpoint makes one) prompts are bytes of this repository that training never saw. Without
it the weights are random, and every case is named `synthetic`: its ratios and quality say nothing about a real model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure

from repro.errors import UserError
from repro.experiments.base import MODEL, Context, Experiment, Outcome
from repro.experiments.split_model import check_one
from repro.experiments.table3 import one_model
from repro.kvcache.codecs import CODECS, CodecSpec
from repro.kvcache.quality import codec_quality
from repro.models.build import build
from repro.models.train import Corpus
from repro.record.directory import Record
from repro.record.metrics import Metric
from repro.record.statistics import Estimate
from repro.report import style


@dataclass(frozen=True)
class Options:
    """So many prompts of `prompt_tokens`, each judged on the `following_tokens` after it."""

    prompts: int = 4
    prompt_tokens: int = 1024
    following_tokens: int = 64

    def __post_init__(self) -> None:
        for name, least in (("prompts", 1), ("prompt_tokens", 1), ("following_tokens", 2)):
            if getattr(self, name) < least:
                raise UserError(f"options.{name}: {getattr(self, name)}; accepted: {least} or more")


#: Every codec for all kinds of state, and a mixture: what is exact where a state is reused for every later token.
CHOICES = {name: CodecSpec(name) for name in CODECS} | {
    "fp8, recurrent zstd": CodecSpec("fp8", {"recurrent": "zstd", "convolution": "zstd"}),
    "int8, recurrent zstd": CodecSpec("int8", {"recurrent": "zstd", "convolution": "zstd"}),
}

UNITS = {
    "ratio": "", "encode_bytes_per_s": "bytes/s", "decode_bytes_per_s": "bytes/s", "kl_nats": "nats",
    "kl_max_nats": "nats", "token_agreement": "", "loss_increase_nats": "nats",
}  # fmt: skip


def run(context: Context) -> Outcome:
    """Every codec on the same prompts; a row per codec and prompt, and the means with their intervals."""
    options, model = context.options, one_model(context.settings)
    assert isinstance(options, Options)
    built = build(model)
    trained = model.pretrained is not None
    if not trained:
        context.progress("random weights: all numbers are synthetic; scripts/train_checkpoint makes a checkpoint")
    prompts = _prompts(built, options, trained, context.settings.seed)
    rows: list[dict[str, Any]] = []
    for name, choice in CHOICES.items():
        for index, ids in enumerate(prompts):
            quality = codec_quality(built, ids, options.prompt_tokens, choice)
            rows.append({
                "codec": name, "synthetic": not trained, "prompt": index, "ratio": quality.ratio,
                "loss_increase_nats": quality.loss_nats - quality.loss_reference_nats, **asdict(quality),
            })  # fmt: skip
        last = rows[-1]
        context.progress(f"{name}: ratio {last['ratio']:.2f}, KL {last['kl_nats']:.2e} nats")
    table = pd.DataFrame(rows)
    return Outcome(_metrics(context, table, trained), {"codecs": table})


def _prompts(model: torch.nn.Module, options: Options, trained: bool, seed: int) -> Sequence[torch.Tensor]:
    length = options.prompt_tokens + options.following_tokens
    if not trained:
        vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
        random = torch.Generator().manual_seed(seed)
        return [torch.randint(vocabulary, (1, length), generator=random) for _ in range(options.prompts)]
    held_out = Corpus.of().held_out
    if len(held_out) < options.prompts * length:
        raise UserError(
            f"options.prompt_tokens: {options.prompts} prompts of {length}; {len(held_out)} bytes are held out"
        )
    stride = len(held_out) // options.prompts
    return [held_out[None, i * stride : i * stride + length] for i in range(options.prompts)]


def _metrics(context: Context, table: pd.DataFrame, trained: bool) -> list[Metric]:
    metrics = []
    for name, group in table.groupby("codec", sort=False):
        case = str(name) if trained else f"synthetic, {name}"
        for metric, unit in UNITS.items():
            found = Estimate.of(group[metric].to_list())
            span = (found.low, found.high)
            metrics.append(context.metric(case, metric, found.value, unit, "measured", interval=span, n=found.n))
    return metrics


def draw(record: Record) -> Figure:
    """Ratio against KL divergence: what is saved, and what it does to the next token."""
    table = record.table("codecs")
    figure, (left, right) = style.panels(2, height_in=3.2)
    means = table.groupby("codec", sort=False)[["ratio", "kl_nats", "encode_bytes_per_s"]].mean()
    for (name, row), (colour, marker, _) in zip(means.iterrows(), style.SERIES, strict=False):
        left.plot(
            row["ratio"], max(row["kl_nats"], 1e-9), color=colour, marker=marker, linestyle="none", label=str(name)
        )
        right.plot(row["ratio"], row["encode_bytes_per_s"] * 8e-9, color=colour, marker=marker, linestyle="none")
    kind = "random weights: synthetic" if bool(table["synthetic"].iloc[0]) else "trained checkpoint"
    left.set(xlabel="ratio", ylabel="KL (nats)", yscale="log", title=f"Quality, {kind}")
    right.set(xlabel="ratio", ylabel="encoding (Gbps per thread)", yscale="log", title="Speed")
    left.legend(fontsize=7)
    return figure


EXPERIMENT = Experiment(
    name="codecs",
    reads={"execute": (*MODEL, "seed", "options")},
    run=run,
    figures={"codecs": draw},
    options=Options,
    check=check_one,
)
