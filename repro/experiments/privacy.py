"""Privacy on the KVCache's path: what a state reveals, what TLS costs, and what it costs to prefill on the trusted side.

A KVCache is not the text, and whoever has the model reads the text out of it: state by state, every token is tried and the one whose key
fits is kept (a collision attack as in "Shadow in the Cache", arXiv:2508.09442, which also inverts single layers and defends by a secret
transformation). Here that is done to a small hybrid model trained on this repository's bytes, as the bytes arrive: from the keys of its one
attention layer, exact, in eight bits, and by an attacker whose weights are not quite the right ones.

TLS protects the way and not the other end. Its speed on one core is measured; the throughput model says how many cores an instance needs.
The reverse split keeps prompts at home: the trusted PD cluster prefills all of them, and the remote instances only decode, from states
that reveal as much: it protects against who reads prompts, not against who reads memory.
"""

from __future__ import annotations

import copy
import ssl
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from repro.errors import UserError, at_least
from repro.experiments.base import EQUATIONS, HOMOGENEOUS, MODEL, Context, Experiment, Outcome
from repro.experiments.deployment import check_offloading, deployment, latencies, operating_points, profile_files
from repro.experiments.table3 import one_model
from repro.experiments.trained_model import check_trained, trained_model
from repro.models.layout import StateKind
from repro.models.train import TrainSpec
from repro.record.directory import Record
from repro.record.metrics import each, value
from repro.report import style
from repro.scheduling.search import search
from repro.scheduling.spec import PolicySpec
from repro.scheduling.throughput import Deployment, decode_per_instance
from repro.settings import Settings

SEEN = {
    "exact": "as it is sent", "int8": "in int8", "other_weights": "with other\nweights", "guess": "no state:\na guess",
}  # fmt: skip
CASES = {
    "prfaas_pd": "PrfaaS-PD", "homogeneous_pd": "all trusted,\nas many GPUs", "trusted_alone": "trusted PD\ncluster alone",
    "reverse_split": "reverse split: prefill\ntrusted, decode remote",
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """`tokens` of each of `prompts` are read back from the state, but for the first, which is known.

    `weight_noise` is the other weights' relative difference. Without `pretrained` the model is trained first, as `training` says.
    TLS is timed over `tls_bytes` in records of 16 KiB.
    """

    prompts: int = 2
    tokens: int = 24
    weight_noise: float = 0.02
    training: TrainSpec = field(default_factory=lambda: TrainSpec(steps=80, batch=4, window_tokens=128))
    tls_bytes: int = 256_000_000

    def __post_init__(self) -> None:
        at_least(self, "options", prompts=1, tokens=2, tls_bytes=1 << 20)
        if not self.weight_noise >= 0:
            raise UserError(f"options.weight_noise: {self.weight_noise}; accepted: 0 or more")


def run(context: Context) -> Outcome:
    """Read prompts back, time TLS, and compare where prefill stands."""
    rows, read = [], pd.DataFrame([*_read_back(context)])
    for seen, own in read.groupby("seen", sort=False):
        shares = own.groupby("prompt")["right"].mean()
        ends = (float(shares.min()), float(shares.max()))
        rows.append(
            context.metric(
                str(seen), "tokens_recovered", float(shares.mean()), "", "measured", interval=ends, n=len(shares)
            )
        )
    rows.append(context.metric("chance", "tokens_recovered", 1 / 256, "", "computed"))
    for direction, bps in zip(("encrypt", "decrypt"), tls_bps(context.options.tls_bytes), strict=True):
        rows.append(context.metric(f"TLS 1.3, {direction}", "tls_bps", bps, "bit/s", "measured"))
    base, settings = deployment(context.settings), context.settings
    point = search(base, settings.policy)
    instance_bps = point.egress_bps / base.n_prfaas
    slower = min(row.value for row in rows if row.metric == "tls_bps")
    rows.append(context.metric("prfaas_pd", "egress_bps", point.egress_bps, "bit/s", "computed"))
    rows.append(context.metric("an instance at Λ_max", "tls_cores", instance_bps / slower, "cores", "computed"))
    phi = float(base.prfaas.kv_throughput_bps(point.l_long_tokens))
    rows.append(context.metric("an instance while it prefills", "tls_cores", phi / slower, "cores", "computed"))
    last = float(base.prfaas.kv_bytes(point.l_long_tokens)) * 8 / max(1, _layers(base)) / slower
    rows.append(context.metric("last layer's state on one core", "tls_added_ttft_s", last, "s", "computed"))
    splits = pd.DataFrame([*_splits(settings, base)])
    for row in each(splits):
        rows.append(context.metric(row.case, "lambda_max", row.lambda_max, "req/s", "computed"))
        rows.append(context.metric(row.case, "ttft_mean_s", row.ttft_mean_s, "s", "computed"))
        rows.append(context.metric(row.case, "link_utilisation", row.link_utilisation, "", "computed"))
    return Outcome(rows, {"read": read, "splits": splits})


def _layers(base: Deployment) -> int:
    """Layers of the model, where its layout is known."""
    from repro.models import spec
    from repro.models.architectures import layout_of

    return layout_of(base.prfaas.model).layers if base.prfaas.model in (*spec.names(), *spec.names_of_today()) else 1


def _splits(settings: Settings, base: Deployment) -> Iterator[dict[str, Any]]:
    """PrfaaS-PD, all GPUs trusted, the trusted cluster alone, and the reverse split at its best."""
    points = operating_points(base, settings, ("prfaas_pd", "homogeneous_pd"))
    ttft = latencies(base, points, settings.cluster.homogeneous_instances)
    for case, point in points.items():
        yield {
            "case": case,
            "lambda_max": point.lambda_max,
            "ttft_mean_s": ttft[case].mean_s,
            "link_utilisation": point.link_utilisation,
        }
    free = PolicySpec(
        settings.policy.name,
        threshold_step_tokens=settings.policy.threshold_step_tokens,
        lengths=settings.policy.lengths,
    )
    alone = search(base.without_prfaas(base.n_pd), free)
    yield {
        "case": "trusted_alone",
        "lambda_max": alone.lambda_max,
        "ttft_mean_s": ttft["homogeneous_pd"].mean_s,
        "link_utilisation": 0.0,
    }
    yield reverse_split(base, settings.policy.lengths == "representative")


def reverse_split(base: Deployment, representative: bool) -> dict[str, Any]:
    """The PD cluster prefills every prompt, on all instances but for some that decode; PrfaaS's instances decode what they are sent.

    TTFT is T_prefill, as Table 6 has it and as the other deployments have it here.
    """
    law = base.lengths
    prefill_s = (
        float(base.pd.prefill_s(law.mean_tokens))
        if representative
        else float(law.expectation_above(base.pd.prefill, 0.0))
    )
    sent_bits = 8 * float(law.expectation_above(base.pd.kv, 0.0))
    remote = base.n_prfaas * decode_per_instance(replace(base, pd=base.prfaas))
    best: dict[str, Any] = {"lambda_max": -1.0}
    for n_p in range(1, base.n_pd + 1):
        local = (base.n_pd - n_p) * decode_per_instance(base)
        served = min(n_p / prefill_s, local + min(remote, base.egress_bps / sent_bits))
        if served > best["lambda_max"] + 1e-12:
            best = {"lambda_max": served, "link_utilisation": max(0.0, served - local) * sent_bits / base.egress_bps}
    tokens, mass = law.atoms()
    ttft_s = float(np.sum(mass * base.pd.prefill_s(tokens)) / np.sum(mass))
    return {"case": "reverse_split", "ttft_mean_s": ttft_s, **best}


def tls_bps(size_bytes: int) -> tuple[float, float]:
    """What TLS 1.3 encrypts and decrypts per second of one core's time, in memory: no socket is part of it, nor what else the core does."""
    from repro.transport.certificates import make_certificates

    with tempfile.TemporaryDirectory() as folder:
        make_certificates(Path(folder) / "tls")
        there, here = (ssl.SSLContext(role) for role in (ssl.PROTOCOL_TLS_SERVER, ssl.PROTOCOL_TLS_CLIENT))
        there.load_cert_chain(f"{folder}/tls/receiver.pem", f"{folder}/tls/receiver.key")
        here.load_verify_locations(f"{folder}/tls/ca.pem")
    for side in (here, there):
        side.minimum_version = ssl.TLSVersion.TLSv1_3
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    receiver = there.wrap_bio(up, down, server_side=True)
    sender = here.wrap_bio(down, up, server_hostname="kvcache-receiver")
    for _ in range(3):
        for end in (sender, receiver):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    block, times = memoryview(bytes(1 << 20)), [0.0, 0.0]
    for _ in range(max(1, size_bytes // len(block))):
        start_s = time.thread_time()
        sent = 0
        while sent < len(block):
            sent += sender.write(block[sent : sent + 16_384])
        middle_s, received = time.thread_time(), 0
        while received < len(block):
            received += len(receiver.read(16_384))
        times = [times[0] + middle_s - start_s, times[1] + time.thread_time() - middle_s]
    bits = 8 * max(1, size_bytes // len(block)) * len(block)
    return bits / times[0], bits / times[1]


def _read_back(context: Context) -> Iterator[dict[str, Any]]:
    """Every prompt read back from the keys of the first attention layer, as each attacker sees them; and guessed without any state."""
    import torch

    from repro.kvcache.codecs import CodecSpec
    from repro.kvcache.quality import through
    from repro.kvcache.state import extract
    from repro.models.prefill import chunked_prefill

    options = context.options
    model, held_out = trained_model(context, options.training)
    # Attackers compute in float32, which a CPU does faster; the nearest key is the same.
    fine = copy.deepcopy(model).float()
    other = copy.deepcopy(fine)
    random = torch.Generator().manual_seed(context.settings.seed)
    for weight in other.parameters():
        noise = (
            torch.randn(weight.shape, generator=random)
            * options.weight_noise
            * float(weight.float().std() if weight.numel() > 1 else 0)
        )
        weight.data += noise.to(weight.dtype)
    stride = len(held_out) // options.prompts
    for prompt in range(options.prompts):
        ids = held_out[prompt * stride : prompt * stride + options.tokens]
        cache = chunked_prefill(model, ids[None])[0]
        held = extract(cache, model.config, len(ids))  # type: ignore[arg-type]
        states = [replace(state, tensor=state.tensor.clone()) for state in held if state.kind is StateKind.KEY][:1]
        if not states:
            raise UserError(
                f"model: {one_model(context.settings).name} has no attention layer with keys; accepted: a model with one"
            )
        coded = through(states, CodecSpec("int8"), time.perf_counter)[0]
        for seen, keys, attacker in (
            ("exact", states, fine),
            ("int8", coded, fine),
            ("other_weights", states, other),
            ("guess", [], fine),
        ):
            found = read_back(attacker, keys[0].tensor[0] if keys else None, states[0].layer, ids.tolist())
            yield from (
                {"seen": seen, "prompt": prompt, "position": at, "right": int(guess == token)}
                for at, (guess, token) in enumerate(zip(found, ids.tolist()[1:], strict=True), start=1)
            )
        context.progress(f"read back {prompt + 1} of {options.prompts} prompts")


def read_back(model: Any, keys: Any, layer: int, ids: list[int]) -> list[int]:
    """The tokens after the first, which is known: each the word whose key [heads, tokens, dim] is nearest; without keys, the likeliest.

    All words are tried in one batch, from the state of what was read so far.
    """
    import torch

    from repro.kvcache.state import extract, restore
    from repro.models.prefill import forward, new_cache

    words = int(model.config.get_text_config().vocab_size)
    every, cache, found = torch.arange(words)[:, None], new_cache(model), list[int]()
    with torch.no_grad():
        logits = forward(model, torch.tensor([[ids[0]]]), cache, 0)
        for at in range(1, len(ids)):
            if keys is None:
                best = int(logits[0].argmax())
            else:
                held = extract(cache, model.config, at)
                tried = restore(
                    [replace(state, tensor=state.tensor.repeat_interleave(words, dim=0)) for state in held],
                    model.config,
                    at,
                )
                forward(model, every, tried, at)
                own = tried.layers[layer].keys[:, :, at].float()
                best = int((own - keys[None, :, at].float()).square().sum(dim=(1, 2)).argmin())
            logits = forward(model, torch.tensor([[best]]), cache, at)
            found.append(best)
    return found


def check(settings: Settings, options: object) -> None:
    """One model that can be trained or loaded, and a PrfaaS cluster. Raises UserError naming the key."""
    check_trained(settings, options)
    check_offloading(settings)


def finding(record: Record) -> str:
    """What is read back, what TLS takes, and what trust costs."""
    table = record.metrics
    read = {seen: 100 * value(table, "tokens_recovered", seen) for seen in SEEN}
    served = {case: value(table, "lambda_max", case) for case in CASES}
    ttft = {case: value(table, "ttft_mean_s", case) for case in CASES}
    cores = value(table, "tls_cores", "an instance while it prefills")
    return (
        f"Whoever has the model reads {read['exact']:.0f} % of a prompt out of one layer's keys ({read['int8']:.0f} % of them in int8, "
        f"{read['other_weights']:.0f} % with weights that differ a little; {read['guess']:.0f} % are guessed without any "
        "state). TLS on the way takes "
        f"{cores:.2f} cores of a sending instance. To prefill on the trusted side and decode remotely serves "
        f"{served['reverse_split']:.2f} req/s against "
        f"PrfaaS-PD's {served['prfaas_pd']:.2f}, with a mean TTFT of {ttft['reverse_split']:.1f} in place of {ttft['prfaas_pd']:.1f} s: "
        f"{100 * (served['reverse_split'] / served['trusted_alone'] - 1):.0f} % more than the trusted cluster alone."
    )


def draw(record: Record) -> Figure:
    """What is read back by position and attacker; Λ_max and TTFT by where prefill stands."""
    read, table = record.table("read"), record.metrics
    figure, axes = style.panels(3, width_in=10.5, height_in=3.5)
    shares = [100 * value(table, "tokens_recovered", seen) for seen in SEEN]
    axes[0].bar(range(len(SEEN)), shares, color=[style.RED, style.ORANGE, style.PURPLE, style.GREY])
    for bar, share in enumerate(shares):
        axes[0].text(bar, share, f"{share:.0f}", ha="center", va="bottom", fontsize=8)
    names = [words.replace("\n", " ") for words in SEEN.values()]
    axes[0].set_xticks(range(len(SEEN)), names, fontsize=8, rotation=35, ha="right", rotation_mode="anchor")
    axes[0].set(
        ylabel="tokens read back (%)",
        title=f"From one layer's keys, {read['position'].max()} tokens",
        ylim=(0, 112),
    )
    at = range(len(CASES))
    for axis, metric, unit, title in (
        (axes[1], "lambda_max", "Λ_max (req/s)", "Where prefill stands"),
        (axes[2], "ttft_mean_s", "mean TTFT without queues (s)", "and what it costs"),
    ):  # fmt: skip
        values = [value(table, metric, case) for case in CASES]
        colours = [
            style.CASE_COLOURS.get(case, style.GREEN if case == "reverse_split" else style.SKY) for case in CASES
        ]
        axis.barh([-place for place in at], values, color=colours)
        for place, number in zip(at, values, strict=True):
            axis.text(number, -place, f" {number:.2f}", va="center", fontsize=8)
        axis.set_yticks(
            [-place for place in at], list(CASES.values()) if axis is axes[1] else [""] * len(CASES), fontsize=8
        )
        axis.set(xlabel=unit, title=title)
        axis.margins(x=0.15)
        axis.grid(axis="y", visible=False)
    return figure


EXPERIMENT = Experiment(
    name="privacy",
    reads={"execute": (*MODEL, *EQUATIONS, HOMOGENEOUS, "seed", "options")},
    run=run,
    figures={"privacy": draw},
    options=Options,
    check=check,
    inputs=profile_files,
    finding=finding,
    hinges_on=(
        "the attacker has the model's weights or nearly these and sees keys token by token; the remote accelerators decode as fast as "
        "the trusted ones (the paper gives their decode no profile); TLS runs on this machine's cores, with AES instructions."
    ),
)
