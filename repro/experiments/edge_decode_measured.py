"""`experiment=edge_decode tier=execute model=bytes`: do coarse weights still answer right from the state that full weights left?

A device at home that prefills by itself makes its state with the same coarse weights that it decodes with; one that gets the service's
state mixes a fine past with coarse weights. Both are held against the model as it is, token by token of held-out text, on a small
hybrid model that was trained on this repository's bytes. Weights are rounded to the nearest of 2^bits levels in groups of 64.

Beside that, on the same prompts, what prefill, restore and decode take where the decode side is throttled (`edge_decode_throttled`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from repro.errors import UserError, at_least
from repro.experiments import edge_decode_throttled
from repro.experiments.base import Context, Outcome
from repro.experiments.trained_model import trained_model
from repro.models.train import TrainSpec
from repro.record.directory import Record
from repro.record.metrics import value
from repro.record.statistics import Estimate
from repro.report import style

_GROUP = 64
WAYS = {"split": "the service's state", "local": "its own state"}


@dataclass(frozen=True)
class MeasuredOptions:
    """`prompts` of `prompt_tokens` bytes, judged on the `following_tokens`, with decode weights in each of `bits`.

    The decode side is timed at full speed and `throttle` times slower, for each of them; with none, nothing is timed.
    Without `pretrained` the model is trained first, as `training` says.
    """

    bits: tuple[int, ...] = (8, 4, 3)
    prompts: int = 2
    prompt_tokens: int = 256
    following_tokens: int = 32
    throttle: tuple[float, ...] = (4.0, 16.0)
    training: TrainSpec = field(default_factory=lambda: TrainSpec(steps=80, batch=4, window_tokens=128))

    def __post_init__(self) -> None:
        if not self.bits or not all(2 <= bits <= 8 for bits in self.bits):
            raise UserError(f"options.measured.bits: {list(self.bits)}; accepted: one or more of 2 to 8")
        if not all(1 < factor <= 100 for factor in self.throttle) or len(set(self.throttle)) < len(self.throttle):
            raise UserError(
                f"options.measured.throttle: {list(self.throttle)}; accepted: different factors above 1, to 100"
            )
        at_least(self, "options.measured", prompts=1, prompt_tokens=2, following_tokens=2)


def run(context: Context) -> Outcome:
    """Every number of bits, with the service's state and with the device's own, on the same prompts."""
    model, held_out = trained_model(context, context.options.measured.training)
    table = pd.DataFrame([*_judged(context, model, held_out)])
    rows = []
    for (bits, way), own in table.groupby(["bits", "way"], sort=False):
        for metric, unit in (("kl_nats", "nats"), ("token_agreement", ""), ("loss_increase_nats", "nats")):
            numbers = own[metric].to_list()
            found = Estimate.of_signed(numbers) if metric.startswith("loss") else Estimate.of(numbers)
            ends = (found.low, found.high)
            rows.append(
                context.metric(f"{bits} bits, {way}", metric, found.value, unit, "measured", interval=ends, n=found.n)
            )
    if not context.options.measured.throttle:
        return Outcome(rows, {"judged": table})
    slowed = pd.DataFrame([*_timed(context, model, held_out)])
    return Outcome([*rows, *edge_decode_throttled.measured(context, slowed)], {"judged": table, "throttled": slowed})


def _prompts(options: MeasuredOptions, held_out: Any) -> Iterator[Any]:
    """Token ids [1, n] of every prompt with what follows it."""
    length, stride = options.prompt_tokens + options.following_tokens, len(held_out) // options.prompts
    for prompt in range(options.prompts):
        yield held_out[None, prompt * stride : prompt * stride + length]


def _timed(context: Context, model: Any, held_out: Any) -> Iterator[dict[str, float]]:
    import torch

    options: MeasuredOptions = context.options.measured
    with torch.inference_mode():
        for prompt, ids in enumerate(_prompts(options, held_out)):
            for row in edge_decode_throttled.timed(model, ids, options.prompt_tokens, options.throttle):
                yield {"prompt": prompt, **row}
            context.progress(f"{prompt + 1} of {options.prompts} prompts timed")


def _judged(context: Context, model: Any, held_out: Any) -> Iterator[dict[str, Any]]:
    from repro.kvcache.quality import log_probabilities, loss_of
    from repro.models.prefill import chunked_prefill

    options: MeasuredOptions = context.options.measured
    coarse = {bits: rounded(model, bits) for bits in options.bits}
    for prompt, ids in enumerate(_prompts(options, held_out)):
        before, after = ids[:, : options.prompt_tokens], ids[:, options.prompt_tokens :]
        fine, _ = chunked_prefill(model, before)
        right = log_probabilities(model, after, copy.deepcopy(fine), options.prompt_tokens)
        for bits, other in coarse.items():
            for way in WAYS:
                cache = copy.deepcopy(fine) if way == "split" else chunked_prefill(other, before)[0]
                found = log_probabilities(other, after, cache, options.prompt_tokens)
                yield {
                    "bits": bits, "way": way, "prompt": prompt, "kl_nats": float((right.exp() * (right - found)).sum(-1).mean()),
                    "token_agreement": float((right.argmax(-1) == found.argmax(-1)).double().mean()),
                    "loss_increase_nats": loss_of(found, after) - loss_of(right, after),
                }  # fmt: skip
        context.progress(f"{prompt + 1} of {options.prompts} prompts judged")


def rounded(model: Any, bits: int) -> Any:
    """A copy whose linear layers' weights take 2^bits levels, symmetric around zero, with a scale for every 64 of a row."""
    import torch

    other, most = copy.deepcopy(model), 2 ** (bits - 1) - 1
    for module in other.modules():
        if isinstance(module, torch.nn.Linear) and module.weight.shape[1] % _GROUP == 0:
            groups = module.weight.data.float().reshape(module.weight.shape[0], -1, _GROUP)
            scale = (groups.abs().amax(dim=2, keepdim=True) / most).clamp(min=1e-12)
            module.weight.data = ((groups / scale).round() * scale).flatten(1).to(module.weight.dtype)
    return other


def finding(record: Record) -> str:
    """Whether the service's state helps or harms coarse weights, and which link the most throttled decode side needs."""
    table, options = record.metrics, record.configuration["options"]["measured"]
    words = [
        f"{value(table, 'kl_nats', f'{bits} bits, split'):.1e} against {value(table, 'kl_nats', f'{bits} bits, local'):.1e} "
        f"nats with {bits} bits "
        f"({100 * value(table, 'token_agreement', f'{bits} bits, split'):.0f} and "
        f"{100 * value(table, 'token_agreement', f'{bits} bits, local'):.0f} % of the tokens unchanged)"
        for bits in options["bits"]
    ]
    judged = f"From the service's state, coarse decode weights diverge from the model by {'; '.join(words)} from a state of their own."
    return judged + "".join(
        edge_decode_throttled.sentence(table, factor) for factor in sorted(options["throttle"])[-1:]
    )


def draw(record: Record) -> Figure:
    """KL divergence over the bits of the decode weights, by whose state they go on from; TTFT over the throttle."""
    table = record.table("judged")
    slowed = record.configuration["options"]["measured"]["throttle"]
    figure, axes = style.panels(3 if slowed else 2, height_in=3.2, width_in=7.0)
    for (way, own), (colour, marker, dash) in zip(table.groupby("way", sort=False), style.SERIES, strict=False):
        means = own.groupby("bits")[["kl_nats", "token_agreement"]].mean()
        label = f"from {WAYS[str(way)]}"
        axes[0].plot(
            means.index, means["kl_nats"].clip(lower=1e-9), color=colour, marker=marker, linestyle=dash, label=label
        )
        axes[1].plot(means.index, 100 * means["token_agreement"], color=colour, marker=marker, linestyle=dash)
    bits = sorted(table["bits"].unique())
    for axis, name in zip(axes[:2], ("KL of the next token (nats)", "tokens unchanged (%)"), strict=True):
        axis.set_xticks(bits, [str(int(each)) for each in bits])
        axis.set(xlabel="bits of the decode weights", ylabel=name)
    axes[0].set(yscale="log", title="Is the answer still right?")
    axes[0].legend(fontsize=7, handlelength=1.4)
    if slowed:
        edge_decode_throttled.draw(axes[2], record)
    return figure
