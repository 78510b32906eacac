"""What a codec buys and what it costs: ratio and speed on a model's real state, and its effect on what is decoded.

A prompt is prefilled, its state encoded, decoded and restored, and the following tokens are fed to both caches. Compared
are the next-token distributions (KL divergence) and the most likely token. Only a trained model gives numbers that mean
anything: the attention of a random one is flat, so nothing that happens to its keys matters.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from repro.kvcache.codecs import CodecSpec, decode, encode
from repro.kvcache.state import State, extract, restore, seal
from repro.kvcache.tensors import tensor_of
from repro.models.prefill import Cache, chunked_prefill, forward


@dataclass(frozen=True)
class CodecQuality:
    """One codec on one prompt. Speeds are raw bytes per second of one thread; KL in nats, averaged over positions."""

    raw_bytes: int
    encoded_bytes: int
    encode_bytes_per_s: float
    decode_bytes_per_s: float
    kl_nats: float
    kl_max_nats: float
    token_agreement: float
    loss_nats: float
    loss_reference_nats: float

    @property
    def ratio(self) -> float:
        """Raw bytes per byte on the link."""
        return self.raw_bytes / self.encoded_bytes


def through(states: list[State], spec: CodecSpec, clock: Callable[[], float]) -> tuple[list[State], int, float, float]:
    """States after encoding and decoding; bytes on the link; seconds of encoding and of decoding."""
    plain = [seal(state, 0, index) for index, state in enumerate(states)]
    start = clock()
    encoded = [encode(piece, spec.of(piece.header.kind)) for piece in plain]
    middle = clock()
    decoded = [decode(piece) for piece in encoded]
    end = clock()
    received = [
        State(s.layer, s.kind, s.slot, s.start, s.end, tensor_of(piece).clone())
        for s, piece in zip(states, decoded, strict=True)
    ]
    return received, sum(p.header.payload_bytes for p in encoded), middle - start, end - middle


@torch.no_grad()
def codec_quality(
    model: torch.nn.Module,
    ids: torch.Tensor,
    prompt_tokens: int,
    spec: CodecSpec,
    clock: Callable[[], float] = time.perf_counter,
) -> CodecQuality:
    """Judge a codec on `ids` [1, n]: the first `prompt_tokens` are the prompt, the others are what follows it."""
    cache = chunked_prefill(model, ids[:, :prompt_tokens])[0]
    states = extract(cache, model.config, prompt_tokens)  # type: ignore[arg-type]
    states = [State(s.layer, s.kind, s.slot, s.start, s.end, s.tensor.clone()) for s in states]
    received, on_link, encode_s, decode_s = through(states, spec, clock)
    restored = restore(received, model.config, prompt_tokens)  # type: ignore[arg-type]
    following = ids[:, prompt_tokens:]
    reference, judged = (log_probabilities(model, following, c, prompt_tokens) for c in (cache, restored))
    kl = (reference.exp() * (reference - judged)).sum(-1)
    raw = sum(state.nbytes for state in states)
    return CodecQuality(
        raw_bytes=raw,
        encoded_bytes=on_link,
        encode_bytes_per_s=raw / max(encode_s, 1e-9),
        decode_bytes_per_s=raw / max(decode_s, 1e-9),
        kl_nats=float(kl.mean()),
        kl_max_nats=float(kl.max()),
        token_agreement=float((reference.argmax(-1) == judged.argmax(-1)).float().mean()),
        loss_nats=loss_of(judged, following),
        loss_reference_nats=loss_of(reference, following),
    )


def log_probabilities(model: torch.nn.Module, following: torch.Tensor, cache: Cache, seen_tokens: int) -> torch.Tensor:
    """Distributions [n − 1, vocabulary] of the tokens after each but the last, one decode step at a time."""
    rows = [
        forward(model, following[:, at : at + 1], cache, seen_tokens + at)[0].double()
        for at in range(following.shape[1] - 1)
    ]
    return torch.log_softmax(torch.stack(rows), dim=-1)


def loss_of(log_probabilities: torch.Tensor, following: torch.Tensor) -> float:
    """Mean loss in nats of the tokens after the first, by their predecessors' distributions."""
    return float(torch.nn.functional.nll_loss(log_probabilities, following[0, 1:]))
