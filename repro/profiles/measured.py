"""Measure a model's phase profile on a device: T_prefill(l), T_decode(batch, context) and what they reach of the device.

The result takes the place of a published profile by name (equation 1 needs no more). Every time is a mean over repeats
after a warm-up, synchronised with the device, with its 95 % interval; lengths grow by doubling until the next one would
not fit the memory or the time given, so nothing is tried that is known to crash. What a device can do is measured with the
same library: the best rate of a large matrix product, and of a large copy.
"""

from __future__ import annotations

import itertools
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import psutil
import torch
from scipy.optimize import nnls
from torch.utils.flop_counter import FlopCounterMode

from repro.errors import UserError
from repro.models.layout import StateLayout
from repro.models.observed import kernels_called
from repro.models.prefill import chunked_prefill, forward
from repro.profiles.base import DecodeRows, DecodeStep, PhaseProfile, PrefillCurve
from repro.profiles.sizes import kv_size
from repro.record.statistics import Estimate

Clock = Callable[[], float]
Progress = Callable[[str], None]
_SHARE_OF_MEMORY: Final = 0.8
_OF_ENDPOINTS: Final = ("served_model", "api_key_variable", "timeout_s", "accelerator")


@dataclass(frozen=True)
class ProfileSpec:
    """What to measure. Lengths double from `first_tokens` to `last_tokens`, or to what memory and `budget_s` allow.

    Either the model on a `device` (null: the processor; auto: a GPU where there is one) in chunks of `chunk_tokens` (null: 512), or
    what answers at `endpoint`, the address of an OpenAI-compatible server: its `served_model` (null: the first that it lists), with the
    key in the environment variable `api_key_variable`, each answer within `timeout_s` (null: 60), on an `accelerator` that only its
    owner knows.
    """

    device: str | None = None
    chunk_tokens: int | None = None
    endpoint: str | None = None
    served_model: str | None = None
    api_key_variable: str | None = None
    timeout_s: float | None = None
    accelerator: str | None = None
    first_tokens: int = 128
    last_tokens: int = 4096
    repeats: int = 5
    batches: tuple[int, ...] = (1, 2, 4)
    contexts: tuple[int, ...] = (128, 1024)
    decode_steps: int = 8
    budget_s: float = 240.0
    slo_tokens_per_s: float = 40.0
    gpus_per_instance: int = 1

    def __post_init__(self) -> None:
        beside = ("device", "chunk_tokens") if self.endpoint is not None else _OF_ENDPOINTS
        for name in beside:
            if getattr(self, name) is not None:
                what = (
                    "an engine behind options.endpoint has its own"
                    if self.endpoint is not None
                    else "only of options.endpoint"
                )
                raise UserError(f"options.{name}: {getattr(self, name)}; {what}; accepted: null")
        if self.timeout_s is not None and not self.timeout_s > 0:
            raise UserError(f"options.timeout_s: {self.timeout_s}; accepted: a positive number, or null for 60")
        for name in ("chunk_tokens", "first_tokens", "last_tokens", "decode_steps", "gpus_per_instance"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"options.{name}: {getattr(self, name)} is below 1")
        if self.repeats < 3:
            raise UserError(f"options.repeats: {self.repeats}; a confidence interval needs 3 or more")
        if self.last_tokens < 2 * self.first_tokens:
            raise UserError(f"options.last_tokens: {self.last_tokens} is not at least twice first_tokens")
        for name in ("batches", "contexts"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise UserError(f"options.{name}: {getattr(self, name)}; a list of positive numbers is needed")
        if not (self.budget_s > 0 and self.slo_tokens_per_s > 0):
            raise UserError("options.budget_s, options.slo_tokens_per_s: must be positive")

    @property
    def chunk(self) -> int:
        """The grain of prefill on a device."""
        return self.chunk_tokens or 512


@dataclass(frozen=True)
class Timing:
    """A mean over repeats in seconds with its 95 % interval, and the peak memory of the process or device."""

    tokens: int
    batch: int
    seconds: float
    low_s: float
    high_s: float
    repeats: int
    peak_bytes: int


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches: matrix product in FLOP/s in the model's dtype, copy in bytes/s read and written."""

    matmul_flops: float
    copy_bytes_per_s: float


@dataclass(frozen=True)
class Measurement:
    """All timings of one model on one device. `stopped` says why no longer prompt was tried."""

    prefill: tuple[Timing, ...]
    decode: tuple[Timing, ...]
    ceilings: Ceilings
    flops_per_token: float
    flops_per_token_pair: float
    kernels: Mapping[str, str]
    stopped: str = ""
    notes: tuple[str, ...] = field(default=())

    def prefill_flops(self, tokens: int) -> float:
        """Floating-point operations of a prefill: linear layers per token, attention per pair of tokens."""
        return self.flops_per_token * tokens + self.flops_per_token_pair * tokens**2


def measure(
    model: torch.nn.Module,
    bare: torch.nn.Module,
    spec: ProfileSpec,
    progress: Progress,
    clock: Clock = time.perf_counter,
    *,
    lengths: Sequence[int] = (),
    together: bool = True,
) -> Measurement:
    """Time both phases of `model`. `bare` is the same model on the meta device, on which operations are counted.

    Prefills are of the `lengths` given, in increasing order, else of those that the spec doubles. A decode step takes the requests of a
    batch `together` in one forward pass, or one after the other, as `TorchEngine` does.
    """
    device = next(model.parameters()).device
    dtype = next(model.parameters()).dtype
    deadline = clock() + spec.budget_s
    ceilings = measure_ceilings(device, dtype, clock)
    progress(f"ceilings: {ceilings.matmul_flops / 1e9:.0f} GFLOP/s, copy {ceilings.copy_bytes_per_s / 1e9:.1f} GB/s")
    prefill, stopped = _prefill_timings(model, spec, lengths or _doubled(spec), progress, clock, deadline)
    decode = list(_decode_timings(model, spec, progress, clock, deadline, together))
    per_token, per_pair = count_flops(bare)
    return Measurement(tuple(prefill), tuple(decode), ceilings, per_token, per_pair, kernels_of(model, spec), stopped)


def time_prefill(
    model: torch.nn.Module, tokens: int, chunk_tokens: int, repeats: int, clock: Clock = time.perf_counter
) -> Timing:
    """T_prefill of one length: warmed up, repeated, synchronised."""
    ids = _prompt(model, 1, tokens)
    return _repeat(model, tokens, 1, repeats, clock, lambda: chunked_prefill(model, ids, chunk_tokens))


def _doubled(spec: ProfileSpec) -> Iterator[int]:
    length = spec.first_tokens
    while length <= spec.last_tokens:
        yield length
        length *= 2


def _prefill_timings(
    model: torch.nn.Module, spec: ProfileSpec, lengths: Iterable[int], progress: Progress, clock: Clock, deadline: float
) -> tuple[list[Timing], str]:
    timings: list[Timing] = []
    for length in lengths:
        if timings and (reason := _too_much(model, timings, length, spec, deadline - clock())):
            return timings, reason
        try:
            timing = time_prefill(model, length, spec.chunk, spec.repeats, clock)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            if len(timings) < 2:
                raise UserError(f"profile: a prompt of {length} tokens does not fit the device") from None
            return timings, f"memory: {length} tokens did not fit"
        timings.append(timing)
        progress(f"prefill of {length} tokens: {timing.seconds:.3f} s ({length / timing.seconds:.0f} tokens/s)")
    return timings, f"last_tokens: {spec.last_tokens}"


def _too_much(model: torch.nn.Module, timings: list[Timing], length: int, spec: ProfileSpec, left_s: float) -> str:
    """Why a prompt of `length` is not tried, judged by the growth so far; empty where it is."""
    last = timings[-1]
    growth = last.seconds / timings[-2].seconds if len(timings) > 1 else 2.0
    expected_s = (spec.repeats + 1) * last.seconds * max(growth, 2.0)
    if len(timings) >= 2 and expected_s > 0.7 * left_s:
        return f"time: {length} tokens would take about {expected_s:.0f} s of the {left_s:.0f} s left"
    needed = last.peak_bytes + (last.peak_bytes - timings[0].peak_bytes) * 2
    limit = _memory_limit(next(model.parameters()).device)
    if len(timings) >= 2 and needed > limit:
        return f"memory: {length} tokens would need about {needed / 2**30:.1f} GiB of {limit / 2**30:.1f} GiB"
    return ""


def _memory_limit(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory * 0.97
    process = psutil.Process().memory_info().rss
    return process + _SHARE_OF_MEMORY * psutil.virtual_memory().available


def _decode_timings(
    model: torch.nn.Module, spec: ProfileSpec, progress: Progress, clock: Clock, deadline: float, together: bool
) -> Iterator[Timing]:
    for context in spec.contexts:
        for batch in spec.batches:
            if clock() > deadline and batch > spec.batches[0]:
                progress(f"decode at batch {batch}, context {context}: skipped, the time given is used up")
                continue
            passes, rows = (1, batch) if together else (batch, 1)
            caches = [_prefill(model, _prompt(model, rows, context), spec) for _ in range(passes)]
            token = _prompt(model, rows, 1)
            seen_tokens = itertools.count(context)

            def step(
                token: torch.Tensor = token, caches: list[Any] = caches, seen_tokens: Iterator[int] = seen_tokens
            ) -> None:
                seen = next(seen_tokens)
                for cache in caches:
                    forward(model, token, cache, seen)

            timing = _repeat(model, context, batch, spec.decode_steps, clock, step)
            progress(f"decode at batch {batch}, context {context}: {1e3 * timing.seconds:.1f} ms per step")
            yield timing


def _prompt(model: torch.nn.Module, batch: int, tokens: int) -> torch.Tensor:
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(vocabulary // 8, vocabulary, (batch, tokens), generator=generator)
    return ids.to(next(model.parameters()).device)


def _prefill(model: torch.nn.Module, ids: torch.Tensor, spec: ProfileSpec) -> Any:
    return chunked_prefill(model, ids, spec.chunk)[0]


@torch.no_grad()
def _repeat(
    model: torch.nn.Module, tokens: int, batch: int, repeats: int, clock: Clock, action: Callable[[], object]
) -> Timing:
    device = next(model.parameters()).device
    cuda = device.type == "cuda"
    action()  # warm-up: allocations, kernels, caches
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    samples = []
    for _ in range(repeats):
        _synchronise(device)
        start = clock()
        action()
        _synchronise(device)
        samples.append(clock() - start)
    found = Estimate.of(samples)
    peak = (
        torch.cuda.max_memory_allocated(device) if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )
    return Timing(tokens, batch, found.value, found.low, found.high, repeats, peak)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_ceilings(device: torch.device, dtype: torch.dtype, clock: Clock = time.perf_counter) -> Ceilings:
    """The best of several runs of a large matrix product and of a large copy."""
    side, length = (8192, 2**30) if device.type == "cuda" else (1024, 2**26)
    left, right = (torch.randn((side, side), device=device).to(dtype) for _ in range(2))
    source = torch.ones(length, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def best(action: Callable[[], object]) -> float:
        seconds = []
        for _ in range(6):
            _synchronise(device)
            start = clock()
            action()
            _synchronise(device)
            seconds.append(clock() - start)
        return min(seconds[1:])

    return Ceilings(2.0 * side**3 / best(lambda: left @ right), 2.0 * length / best(lambda: target.copy_(source)))


def count_flops(bare: torch.nn.Module, lengths: tuple[int, int] = (64, 128)) -> tuple[float, float]:
    """Operations per token and per pair of tokens, from two prompts run on the meta device: a·l + b·l²."""
    counts = []
    for tokens in lengths:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            ids = torch.ones((1, tokens), dtype=torch.long, device="meta")
            chunked_prefill(bare, ids, chunk_tokens=tokens)
        counts.append(float(counter.get_total_flops()))
    design = np.array([[tokens, tokens**2] for tokens in lengths], np.float64)
    per_token, per_pair = np.linalg.solve(design, np.array(counts))
    return float(per_token), max(float(per_pair), 0.0)


@torch.no_grad()
def kernels_of(model: torch.nn.Module, spec: ProfileSpec) -> dict[str, str]:
    """Attention and experts as configured, and the kernels that a prefill and a decode step call when they are watched."""
    config: Any = model.config
    ids = _prompt(model, 1, spec.first_tokens)
    with kernels_called() as prefill:
        cache = _prefill(model, ids, spec)
    with kernels_called() as decode:
        forward(model, ids[:, :1], cache, spec.first_tokens)
    return {
        "attention": str(getattr(config, "_attn_implementation", "unknown")),
        "experts": str(getattr(config, "_experts_implementation", "none")),
        "prefill": ", ".join(sorted(prefill)),
        "decode": ", ".join(sorted(decode)),
    }


def fit_decode(timings: tuple[Timing, ...], slo_tokens_per_s: float) -> DecodeStep:
    """Base, per sequence and per context token, none negative, by least squares of the relative error.

    BS_max is the largest measured batch whose step keeps the service level at every measured context, at least 1.
    """
    design = np.array([[1.0, t.batch, t.batch * t.tokens] for t in timings])
    seconds = np.array([t.seconds for t in timings])
    (base, per_sequence, per_context), _ = nnls(design / seconds[:, None], np.ones(len(timings)))
    slow = {t.batch for t in timings if t.seconds > 1 / slo_tokens_per_s}
    batch_max = max((t.batch for t in timings if t.batch not in slow), default=1)
    return DecodeStep(float(base), float(per_sequence), float(per_context), batch_max)


def profile_of(
    name: str, model: str, accelerator: str, measurement: Measurement, layout: StateLayout, spec: ProfileSpec
) -> PhaseProfile:
    """The profile that the other tiers use, with what it was measured on."""
    return fitted(
        name, model, accelerator, spec, measurement.prefill, measurement.decode, layout,
        notes=f"Prefill in chunks of {spec.chunk} tokens; lengths ended by {measurement.stopped}.",
        provenance={f"kernel {key}": value for key, value in measurement.kernels.items()},
    )  # fmt: skip


def fitted(
    name: str,
    model: str,
    accelerator: str,
    spec: ProfileSpec,
    prefill: Sequence[Timing],
    decode: Sequence[Timing],
    layout: StateLayout,
    *,
    notes: str,
    provenance: dict[str, str],
) -> PhaseProfile:
    """A profile through measured times: T_prefill at its lengths, T_decode fitted, S_kv of the layout."""
    return PhaseProfile(
        name=name,
        model=model,
        accelerator=accelerator,
        gpus_per_instance=spec.gpus_per_instance,
        prefill=PrefillCurve(
            tokens=tuple(float(t.tokens) for t in prefill),
            seconds=tuple(t.seconds for t in prefill),
        ),
        kv=kv_size(layout),
        decode=fit_decode(tuple(decode), spec.slo_tokens_per_s),
        prefill_source="measured",
        kv_source="computed",
        decode_source="measured",
        notes=notes,
        provenance=provenance,
        decode_rows=_rows(decode),
    )


def _rows(decode: Sequence[Timing]) -> DecodeRows | None:
    """The decode timings as they are; none where a single batch was timed, which says nothing of others."""
    if len({timing.batch for timing in decode}) < 2:
        return None
    return DecodeRows(
        tuple(timing.batch for timing in decode),
        tuple(float(timing.tokens) for timing in decode),
        tuple(timing.seconds for timing in decode),
    )
