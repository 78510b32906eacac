"""KVCache on a diet: what codecs save of real states by kind, what they do to the next token, and on which links they pay.

States are those of a small hybrid model that was trained on this repository's bytes (`pretrained=<folder>` takes another checkpoint):
of random weights neither ratio nor quality would mean anything. Ratio, speed of one core and entropy are measured by kind of state; the
entropy of the byte planes is what a lossless codec without a model of the data could reach. With these the paper's deployment is asked
what egress and TTFT become on slower links: the state of an instance is encoded on so many cores, beside prefill and transfer.

What is published is set beside it, not reproduced: CacheGen (arXiv:2310.07240; 3.5 to 4.3 times smaller, delay 3.2 to 3.7 times shorter
than that of earlier ways to reuse a cache) and KVFetcher (arXiv:2602.09725; lossless, on the GPU's video units, TTFT up to
3.51 times shorter).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from repro.errors import UserError, at_least
from repro.experiments.base import EQUATIONS, MODEL, Context, Experiment, Outcome
from repro.experiments.deployment import check_offloading, deployment, profile_files
from repro.experiments.trained_model import check_trained, trained_model
from repro.kvcache.codecs import CODECS, CodecSpec
from repro.models.architectures import layout_of
from repro.models.layout import StateKind
from repro.models.spec import names, names_of_today
from repro.models.train import TrainSpec
from repro.record.directory import Record
from repro.record.metrics import each, value
from repro.record.statistics import Estimate
from repro.report import style
from repro.scheduling.search import search
from repro.scheduling.throughput import Deployment
from repro.settings import Settings

#: Which measured kind stands for a kind that the small model does not have.
_STANDS_FOR = {
    StateKind.LATENT: "key", StateKind.LATENT_ROPE: "key", StateKind.SLIDING_KEY: "key", StateKind.SLIDING_VALUE: "value",
    StateKind.INDEXER_KEY: "key",
}  # fmt: skip
PUBLISHED = (
    ("CacheGen", "ratio", 3.5, 4.3, ""), ("CacheGen", "ttft_gain", 3.2, 3.7, ""), ("KVFetcher", "ttft_gain", 1.0, 3.51, ""),
)  # fmt: skip
_LOSSLESS = tuple(name for name, codec in CODECS.items() if codec.lossless and name != "none")


@dataclass(frozen=True)
class Options:
    """`prompts` of `prompt_tokens` bytes, judged on the `following_tokens`; a codec's speed is its best of `repeats`.

    Without `pretrained` the model is trained first, as `training` says. An instance encodes on `cores`; its share of the link goes
    over `links_bps`.
    """

    prompts: int = 2
    prompt_tokens: int = 512
    following_tokens: int = 32
    repeats: int = 3
    training: TrainSpec = field(default_factory=lambda: TrainSpec(steps=80, batch=4, window_tokens=128))
    cores: int = 16
    links_bps: tuple[float, ...] = (1e8, 2e8, 5e8, 1e9, 2e9, 5e9, 1e10, 2e10)

    def __post_init__(self) -> None:
        at_least(self, "options", prompts=1, prompt_tokens=2, following_tokens=2, repeats=1, cores=1)
        if not self.links_bps or min(self.links_bps) <= 0:
            raise UserError(f"options.links_bps: {list(self.links_bps)}; accepted: one rate or more, above 0")


def run(context: Context) -> Outcome:
    """Measure by kind and codec, judge what is decoded, and put the ratios to the paper's link."""
    kinds, quality = _measured(context)
    base, rows = deployment(context.settings), []
    for row in each(kinds):
        case = f"{row.kind}, {row.codec}"
        rows.append(context.metric(case, "ratio", row.ratio, "", "measured"))
        rows.append(context.metric(case, "encode_bps", row.encode_bps, "bit/s", "measured"))
        if row.codec == "none":
            rows.append(
                context.metric(
                    str(row.kind), "entropy_bits_per_byte", row.entropy_bits_per_byte, "bits/byte", "measured"
                )
            )
    for codec, own in quality.groupby("codec", sort=False):
        for metric, unit in (("kl_nats", "nats"), ("token_agreement", ""), ("loss_increase_nats", "nats")):
            found = (
                Estimate.of_signed(own[metric].to_list())
                if metric.startswith("loss")
                else Estimate.of(own[metric].to_list())
            )
            span = (found.low, found.high)
            rows.append(context.metric(str(codec), metric, found.value, unit, "measured", interval=span, n=found.n))
    links = pd.DataFrame([*_over_links(context, base, kinds)])
    point = search(base, context.settings.policy)
    for codec, own in links.groupby("codec", sort=False):
        first = own.iloc[0]
        rows.append(context.metric(f"deployment, {codec}", "ratio", first["ratio"], "", "computed"))
        rows.append(
            context.metric(f"deployment, {codec}", "egress_bps", point.egress_bps / first["ratio"], "bit/s", "computed")
        )
        rows.append(context.metric(f"deployment, {codec}", "ttft_gain", own["ttft_gain"].max(), "", "computed"))
        pays = own.loc[own["ttft_gain"] > 1.01, "link_bps"]
        rows.append(
            context.metric(
                f"deployment, {codec}", "pays_below_bps", pays.max() if len(pays) else 0.0, "bit/s", "computed"
            )
        )
    rows.append(context.metric("deployment", "phi_kv_bps", links["phi_kv_bps"].iloc[0], "bit/s", "computed"))
    for who, metric, low, high, unit in PUBLISHED:
        rows.append(context.metric(who, metric, high, unit, "published", interval=(low, high)))
    return Outcome(rows, {"kinds": kinds, "quality": quality, "links": links})


def _measured(context: Context) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Ratio, speed and entropy by kind and codec; and what each codec does to the following tokens, prompt by prompt."""
    from repro.kvcache.quality import (
        codec_quality,
        through,
    )  # torch and transformers: two seconds that a figure does not need
    from repro.kvcache.state import extract
    from repro.models.prefill import chunked_prefill

    options = context.options
    model, held_out = trained_model(context, options.training)
    length = options.prompt_tokens + options.following_tokens
    if len(held_out) < options.prompts * length:
        raise UserError(
            f"options.prompt_tokens: {options.prompts} prompts of {length}; {len(held_out)} bytes are held out"
        )
    stride = len(held_out) // options.prompts
    prompts = [held_out[None, i * stride : i * stride + length] for i in range(options.prompts)]
    cache = chunked_prefill(model, prompts[0][:, : options.prompt_tokens])[0]
    held = extract(cache, model.config, options.prompt_tokens)  # type: ignore[arg-type]
    states = [replace(state, tensor=state.tensor.clone()) for state in held]
    kinds = []
    for kind in dict.fromkeys(state.kind for state in states):
        own = [state for state in states if state.kind is kind]
        raw, entropy = sum(state.nbytes for state in own), _entropy_bits_per_byte([state.tensor for state in own])
        for codec in CODECS:
            runs = [through(own, CodecSpec(codec), time.perf_counter) for _ in range(options.repeats)]
            kinds.append({
                "kind": kind.name.lower(), "codec": codec, "raw_bytes": raw, "ratio": raw / runs[0][1],
                "encode_bps": 8 * raw / max(min(found[2] for found in runs), 1e-9),
                "decode_bps": 8 * raw / max(min(found[3] for found in runs), 1e-9), "entropy_bits_per_byte": entropy,
            })  # fmt: skip
    judged = []
    choices = {name: CodecSpec(name) for name in CODECS} | {
        "int8, recurrent zstd": CodecSpec("int8", {"recurrent": "zstd"})
    }
    for name, choice in choices.items():
        for index, ids in enumerate(prompts):
            found = codec_quality(model, ids, options.prompt_tokens, choice)
            judged.append({
                "codec": name, "prompt": index, "ratio": found.ratio, "kl_nats": found.kl_nats, "token_agreement": found.token_agreement,
                "loss_increase_nats": found.loss_nats - found.loss_reference_nats, "loss_nats": found.loss_reference_nats,
            })  # fmt: skip
        context.progress(f"{name}: KL {judged[-1]['kl_nats']:.2e} nats")
    return pd.DataFrame(kinds), pd.DataFrame(judged)


def _entropy_bits_per_byte(tensors: Sequence[Any]) -> float:
    """Entropy of the bytes, plane by plane: the lowest bytes of all elements, the next ones, … each with a distribution of its own."""
    from repro.kvcache.tensors import bytes_of

    size, bits, itemsize = 0, 0.0, tensors[0].element_size()
    planes = np.concatenate([np.frombuffer(bytes_of(tensor), np.uint8).reshape(-1, itemsize) for tensor in tensors])
    for plane in planes.T:
        share = np.bincount(plane, minlength=256) / len(plane)
        bits -= len(plane) * float(np.sum(share[share > 0] * np.log2(share[share > 0])))
        size += len(plane)
    return bits / size


def _over_links(context: Context, base: Deployment, kinds: pd.DataFrame) -> Iterator[dict[str, object]]:
    """TTFT of an offloaded request of mean length over an instance's share of the link: the slowest of prefill, encoding and wire."""
    options, policy = context.options, context.settings.policy
    tokens = search(base, policy).l_long_tokens
    size, prefill_s = float(base.prfaas.kv_bytes(tokens)), float(base.prfaas.prefill_s(tokens))
    shares = kind_shares(base.prfaas.model, tokens)
    by_kind = {(row.kind, row.codec): row for row in each(kinds)}
    for codec in CODECS:
        left = sum(share / by_kind[kind, codec].ratio for kind, share in shares.items())
        encode_s = sum(8 * size * share / by_kind[kind, codec].encode_bps for kind, share in shares.items())
        encode_s = 0.0 if codec == "none" else encode_s / options.cores
        for link_bps in options.links_bps:
            plain_s = max(prefill_s, 8 * size / link_bps)
            coded_s = max(prefill_s, encode_s, 8 * size * left / link_bps)
            yield {"codec": codec, "link_bps": link_bps, "ratio": 1 / left, "ttft_gain": plain_s / coded_s, "ttft_s": coded_s,
                   "phi_kv_bps": 8 * size / prefill_s}  # fmt: skip


def kind_shares(model: str, tokens: float) -> Mapping[str, float]:
    """Share of S_kv by measured kind, of a model whose layout is known; all of it keys and values of one whose layout is not."""
    if model not in (*names(), *names_of_today()):
        return {"key": 0.5, "value": 0.5}
    found: dict[str, float] = {}
    sizes = layout_of(model).by_kind(int(tokens))
    for kind, size in sizes.items():
        name = _STANDS_FOR.get(kind, kind.name.lower())
        if size:
            found[name] = found.get(name, 0.0) + size / sum(sizes.values())
    return found


def check(settings: Settings, options: object) -> None:
    """One model that can be trained or loaded, and a PrfaaS cluster. Raises UserError naming the key."""
    check_trained(settings, options)
    check_offloading(settings)


def finding(record: Record) -> str:
    """What lossless and lossy codecs save, what they cost, and where they pay."""
    table, links = record.metrics, record.table("links")
    ratio = {codec: value(table, "ratio", f"deployment, {codec}") for codec in CODECS}
    lossless = max(_LOSSLESS, key=lambda codec: ratio[codec])
    best = str(links.sort_values("ttft_gain")["codec"].iloc[-1])
    phi, pays = (
        value(table, "phi_kv_bps", "deployment"),
        max(value(table, "pays_below_bps", f"deployment, {codec}") for codec in CODECS),
    )
    return (
        f"Without loss {lossless} makes the state {ratio[lossless]:.2f} times smaller, int8 {ratio['int8']:.2f} times with "
        "a KL divergence of "
        f"{value(table, 'kl_nats', 'int8'):.1e} nats ({100 * value(table, 'token_agreement', 'int8'):.0f} % of the tokens "
        "unchanged); TTFT gains by it "
        f"only where an instance has less of the link than its Φ_kv of {phi / 1e9:.1f} Gbps (here up to {pays / 1e9:.1f} Gbps), at most "
        f"{links['ttft_gain'].max():.2f} times ({best}). CacheGen publishes 3.5 to 4.3 times smaller, KVFetcher up to "
        "3.51 times in TTFT, both for dense "
        "models' keys and values on slower links."
    )


def draw(record: Record) -> Figure:
    """Ratio by kind beside the entropy's, quality over ratio, and the gain in TTFT over an instance's share of the link."""
    kinds, quality, links = (record.table(name) for name in ("kinds", "quality", "links"))
    figure, axes = style.panels(3, width_in=11.0, height_in=3.6)
    names_of = list(dict.fromkeys(kinds["kind"]))
    looks = dict(zip(dict.fromkeys(quality["codec"]), style.SERIES, strict=False))
    codecs = [codec for codec in dict.fromkeys(kinds["codec"]) if codec != "none"]
    at = np.arange(len(names_of))
    for index, codec in enumerate(codecs):
        own = kinds[kinds["codec"] == codec].set_index("kind")["ratio"].reindex(names_of)
        axes[0].bar(at + (index - 1.5) * 0.2, own, width=0.19, color=looks[codec][0])
    bound = kinds[kinds["codec"] == "none"].set_index("kind")["entropy_bits_per_byte"].reindex(names_of)
    axes[0].plot(at, 8 / bound, "k_", markersize=26, label="entropy of the bytes")
    axes[0].set_xticks(at, names_of, fontsize=8, rotation=30, ha="right", rotation_mode="anchor")
    axes[0].set(ylabel="times smaller", title="By kind of state", ylim=(0, None))
    axes[0].margins(y=0.25)
    means = quality.groupby("codec", sort=False)[["ratio", "kl_nats"]].mean()
    for codec, row in means.iterrows():
        colour, marker, _ = looks[codec]
        axes[1].plot(
            row["ratio"], max(row["kl_nats"], 1e-8), color=colour, marker=marker, linestyle="none", label=str(codec)
        )
    axes[1].set(
        yscale="log", xlabel="times smaller", ylabel="KL of the next token (nats)", title="What it does to the answer"
    )
    for codec, rows in links.groupby("codec", sort=False):
        if codec != "none":
            colour, marker, dash = looks[codec]
            axes[2].plot(
                rows["link_bps"] / 1e9, rows["ttft_gain"], color=colour, marker=marker, linestyle=dash, markersize=4
            )
    phi = float(links["phi_kv_bps"].iloc[0])
    axes[2].axvline(phi / 1e9, color=style.GREY, lw=0.9)
    axes[2].text(phi / 1e9, 2.6, " Φ_kv", fontsize=8, va="center")
    axes[2].axhspan(3.2, 3.7, color="#EEEEEE")
    axes[2].text(0.02, 3.35, "CacheGen, published", fontsize=7, va="center", transform=axes[2].get_yaxis_transform())
    axes[2].axhline(3.51, color="black", linestyle=":", lw=0.9)
    axes[2].set(
        xscale="log",
        xlabel="an instance's share of the link (Gbps)",
        ylabel="TTFT without ÷ with codec",
        title="Where it pays",
        ylim=(0.9, 4.0),
    )
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    return figure


EXPERIMENT = Experiment(
    name="kv_diet",
    reads={"execute": (*MODEL, *EQUATIONS, "options")},
    run=run,
    figures={"kv_diet": draw},
    options=Options,
    check=check,
    inputs=profile_files,
    finding=finding,
    hinges_on=(
        "states of a model of a few million parameters, trained for minutes on bytes, compress as a large one's do (latents as its keys), "
        "and codecs run on the stated number of cores at the speed of this machine's, not on a GPU."
    ),
)
