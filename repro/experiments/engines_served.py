"""The requests of `experiment=engines`: the same prompts through two vLLM instances and through the kit's own workers, a row for each.

Both sides of a link exchange state over it and nothing else: orders and answers go past it (vLLM listens on Unix sockets, the kit's
workers on their channel), so no round trip of a router is in any TTFT.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from repro.engine.base import Request
from repro.engine.reference import TOLERANCE, Agreement, Reference, compare, logits_error
from repro.engine.vllm import CACHE_INFO, handed_over_bytes, offered, serve_split, state_tokens_of
from repro.models.layout import StateLayout
from repro.profiles.answers import Answer
from repro.serving.system import Served, System

#: bfloat16, the only type that vLLM's linear attention computes in without a GPU.
TOLERANCE_BF16 = TOLERANCE[torch.bfloat16]
VLLM, VLLM_ALONE, KIT_ALONE = "vllm_nixl", "vllm_unsplit", "unsplit"
#: What is compared with which unsplit run.
ALONE_OF: Mapping[str, str] = {VLLM: VLLM_ALONE, "layerwise": KIT_ALONE, "bulk": KIT_ALONE}


@dataclass(frozen=True)
class Row:
    """One request. `condition` is empty where nothing crossed a link; `tokens_equal` and `ties` compare with the unsplit run."""

    model: str
    condition: str
    rate_bps: float
    rtt_s: float
    mode: str
    input_tokens: int
    repeat: int
    ttft_s: float
    tpot_s: float
    prefill_s: float
    transfer_s: float
    kv_bytes: float
    kv_bytes_layout: float
    tokens_equal: bool
    ties: int


@dataclass(frozen=True)
class Condition:
    """A rate and RTT of the link; both nan where the network is not the kit's."""

    name: str = ""
    rate_bps: float = math.nan
    rtt_s: float = math.nan


class Instances:
    """The instances of vLLM that answer: one prefill and one decode of each request, in turn where there are several."""

    def __init__(self, model: str, layout: StateLayout, prefill: Sequence[Any], decode: Sequence[Any]) -> None:
        self.model, self._layout, self._prefill, self._decode = model, layout, prefill, decode
        self.cache: Mapping[str, str] = decode[0].info(CACHE_INFO)
        self._alone: dict[int, tuple[int, ...]] = {}
        #: Log-probabilities of the unsplit answer's steps [steps, vocabulary], and how the split one compares, by request.
        self._logprobs: dict[int, torch.Tensor] = {}
        self.agreements: dict[int, Agreement] = {}
        #: The same of first tokens, which come straight from the state that was handed over.
        self.first_errors: dict[int, float] = {}

    def warm_up(self, request: Request) -> None:
        """Both ways once, the handshake of the connector included; nothing is kept."""
        for number in range(max(len(self._prefill), len(self._decode))):
            near, far = self._of(number)
            serve_split(near, far, list(request.prompt), 2, time.perf_counter)
            far.answer(list(request.prompt), 2)

    def alone(self, request: Request, repeat: int) -> Row:
        """The decode instance by itself: the unsplit answer, which later ones are held against."""
        _, decode = self._of(request.request_id)
        answer = decode.answer(list(request.prompt), request.output_tokens)
        self._alone[request.request_id] = answer.tokens
        # What it remembers of a prompt that was handed to it before is no T_prefill.
        ttft_s = answer.ttft_s if not answer.cached_tokens else math.nan
        return self._row(request, repeat, Condition(), VLLM_ALONE, ttft_s, tpot_of(answer))

    def split(self, request: Request, repeat: int, condition: Condition) -> Row:
        """Prefill on one instance, decode on another. Raises UserError where no byte crosses."""
        prefill, decode = self._of(request.request_id)
        found = serve_split(prefill, decode, list(request.prompt), request.output_tokens, time.perf_counter)
        tokens = found.state_tokens or state_tokens_of(self._layout, len(request.prompt))
        expected, alone = handed_over_bytes(self._layout, tokens, self.cache), self._alone[request.request_id]
        row = self._row(request, repeat, condition, VLLM, found.ttft_s, tpot_of(found.answer))
        return replace(
            row, prefill_s=found.prefill_s, transfer_s=found.transfer_s, kv_bytes=found.kv_bytes, kv_bytes_layout=expected,
            tokens_equal=found.answer.tokens == alone, ties=self._ties(request.request_id, alone, found.answer.tokens),
        )  # fmt: skip

    def compare(self, request: Request, vocabulary: int) -> None:
        """Hold the log-probabilities of a split answer against the unsplit one's, step by step until a token differs; not timed."""
        prefill, decode = self._of(request.request_id)
        prompt, asked = list(request.prompt), {"logprobs": vocabulary, "return_tokens_as_token_ids": True}
        tokens, alone = steps_of(decode.complete(prompt, request.output_tokens, **asked), vocabulary)
        parameters = offered(prefill, prompt)
        found = decode.complete(prompt, request.output_tokens, kv_transfer_params=parameters, **asked)
        split_tokens, split = steps_of(found, vocabulary)
        self._logprobs[request.request_id] = alone
        self.agreements[request.request_id] = compare(
            Reference(tokens, alone), split_tokens, list(split), TOLERANCE_BF16
        )
        self.first_errors[request.request_id] = logits_error(alone[0], split[0])

    def _of(self, number: int) -> tuple[Any, Any]:
        return self._prefill[number % len(self._prefill)], self._decode[number % len(self._decode)]

    def _row(self, request: Request, repeat: int, at: Condition, mode: str, ttft_s: float, tpot_s: float) -> Row:
        return Row(
            self.model, at.name, at.rate_bps, at.rtt_s, mode, len(request.prompt), repeat, ttft_s, tpot_s, math.nan, math.nan,
            0.0, 0.0, True, 0,
        )  # fmt: skip

    def _ties(self, request_id: int, alone: Sequence[int], split: Sequence[int]) -> int:
        logprobs = self._logprobs.get(request_id)
        return 0 if logprobs is None else int(is_tie(logprobs, alone, split))


def is_tie(logprobs: torch.Tensor, alone: Sequence[int], split: Sequence[int]) -> bool:
    """Whether the first token that differs was as good as the other one, as far as bfloat16 tells.

    Each of the two logits may be off by the tolerance.
    """
    for row, own, other in zip(logprobs, alone, split, strict=False):
        if own != other:
            return float((row[own] - row[other]).abs() / row.std().clamp_min(1e-30)) <= 2 * TOLERANCE_BF16
    return False


def steps_of(answer: Mapping[str, Any], vocabulary: int) -> tuple[tuple[int, ...], torch.Tensor]:
    """Tokens of an answer that was asked for all log-probabilities, and these as [steps, vocabulary]."""
    found = answer["choices"][0]["logprobs"]
    rows = torch.full((len(found["tokens"]), vocabulary), -math.inf)
    for row, step in zip(rows, found["top_logprobs"], strict=True):
        ids = [_token(text) for text in step]
        row[ids] = torch.tensor(list(step.values()))
    return tuple(_token(text) for text in found["tokens"]), rows


def _token(text: str) -> int:
    return int(text.removeprefix("token_id:"))


def tpot_of(answer: Answer) -> float:
    """Mean time per output token after the first; nan with one event."""
    events = len(answer.token_times_s)
    later = sum(answer.token_counts[1:])
    return (answer.token_times_s[-1] - answer.token_times_s[0]) / later if events > 1 else math.nan


def kit_row(model: str, served: Served, repeat: int, condition: Condition, expected: float) -> Row:
    """A request of the kit's own workers."""
    agreement = served.agreement
    return Row(
        model, condition.name, condition.rate_bps, condition.rtt_s, served.mode, len(served.request.prompt), repeat, served.ttft_s,
        served.tpot_s, served.prefill_s, served.transfer_s, served.total_kv_bytes, expected if served.mode != "unsplit" else 0.0,
        agreement is not None and agreement.same_tokens, agreement.ties if agreement is not None else 0,
    )  # fmt: skip


def served_by_vllm(
    instances: Instances,
    repeats: Sequence[Sequence[Request]],
    conditions: Sequence[Condition],
    vocabulary: int | None,
    go: Callable[[int], object],
    progress: Callable[[str], None],
) -> Iterator[Row]:
    """All prompts unsplit, then split under each condition. With a `vocabulary` log-probabilities are compared first."""
    instances.warm_up(max(repeats[0], key=lambda request: len(request.prompt)))
    for repeat, requests in enumerate(repeats):
        for request in requests:
            yield instances.alone(request, repeat)
            if vocabulary is not None:
                instances.compare(request, vocabulary)
    progress(f"{instances.model}: vLLM unsplit served")
    for number, condition in enumerate(conditions):
        go(number)
        for repeat, requests in enumerate(repeats):
            for request in requests:
                yield instances.split(request, repeat, condition)
        progress(f"{instances.model}: vLLM with NIXL served{condition.name and ' at '}{condition.name}")


def served_by_kit(
    model: str,
    system: System,
    layout: StateLayout,
    repeats: Sequence[Sequence[Request]],
    conditions: Sequence[Condition],
    modes: Sequence[str],
    go: Callable[[int], object],
    progress: Callable[[str], None],
) -> Iterator[Row]:
    """The same prompts through the kit's prefill and decode workers: unsplit, then in all modes under each condition."""
    warm_up = [Request(0, max(repeats[0], key=lambda request: len(request.prompt)).prompt, 2, "warm-up")]
    for mode in ("unsplit", *modes):
        system.serve(warm_up, mode)
    for requests in repeats:
        system.reference(requests)
    for repeat, requests in enumerate(repeats):
        for served in system.serve(requests, "unsplit").served:
            yield kit_row(model, served, repeat, Condition(), 0.0)
    progress(f"{model}: the kit's workers unsplit served")
    for number, condition in enumerate(conditions):
        go(number)
        for repeat, requests in enumerate(repeats):
            for mode in (*modes[repeat % len(modes) :], *modes[: repeat % len(modes)]):
                for served in system.serve(requests, mode).served:
                    yield kit_row(model, served, repeat, condition, layout.kv_bytes(served.request.state_tokens))
        progress(f"{model}: {', '.join(modes)} served{condition.name and ' at '}{condition.name}")
