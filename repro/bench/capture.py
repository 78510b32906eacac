"""What layer-wise capture costs of T_prefill: the same prompts with and without it, in turns, as paired ratios.

`hooks` is capture with a consumer that drops what it gets: the price of hooks and of slicing views. `framed` adds what a
sender does before the link: a copy where memory is not contiguous, and the checksum. Beside the paired ratios stands the
time spent inside the hooks themselves, which needs no quiet machine but does not see what capture does to caches.

    scripts/bench capture --model kimi_linear --size tiny --tokens 2048 --pairs 15
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scipy.stats import t as student
from transformers import DynamicCache

from repro.bench._record import recorded
from repro.kvcache.capture import LayerwiseCapture
from repro.kvcache.state import State, seal
from repro.models import spec
from repro.models.build import build
from repro.models.prefill import chunked_prefill
from repro.record.metrics import Metric

TARGET_PCT = 3.0


def main(argv: list[str]) -> int:
    """Run, print one line per variant, write a record; its path is the last line."""
    parser = argparse.ArgumentParser(prog="bench capture", description=__doc__)
    parser.add_argument("--model", default="kimi_linear")
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--results", type=Path, default=Path("results"))
    arguments = parser.parse_args(argv)
    name = f"{arguments.model}_{arguments.size}_{torch.device(arguments.device).type}_{arguments.tokens}"
    with recorded("capture", name, arguments, argv, {"prompt": 0}) as directory:
        directory.write_metrics(_rows(arguments))
        directory.add_provenance({"threads": torch.get_num_threads()})
    return 0


def _rows(arguments: argparse.Namespace) -> list[Metric]:
    model = build(spec.load(arguments.model, arguments.size), arguments.device)
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 500, (1, arguments.tokens), generator=random).to(arguments.device)
    case, rows = f"{arguments.model}.{arguments.size}.{arguments.tokens}", []
    for variant, emit in (("hooks", _drop), ("framed", _frame)):
        plain_s, overheads = paired(
            lambda: _prefill(model, ids, arguments.chunk, None),
            lambda emit=emit: _prefill(model, ids, arguments.chunk, emit),  # type: ignore[misc]
            arguments.pairs,
            torch.device(arguments.device),
        )
        mean, half = float(np.mean(overheads)), 0.0
        if len(overheads) > 1:
            spread = float(np.std(overheads, ddof=1)) / math.sqrt(len(overheads))
            half = float(student.ppf(0.975, len(overheads) - 1)) * spread
        verdict = "within" if mean + half < TARGET_PCT else "not shown to be within"
        print(
            f"{variant}: {mean:+.2f} % of T_prefill {plain_s:.3f} s (95 %: {mean - half:+.2f} to {mean + half:+.2f}), "
            f"{verdict} {TARGET_PCT:g} %",
            file=sys.stderr,
        )
        rows.append(
            Metric(
                "bench_capture", "execute", f"{case}.{variant}", "capture_overhead_pct", mean, "%", "measured",
                mean - half, mean + half, len(overheads),
            )
        )  # fmt: skip
        share = _share_inside_hooks(model, ids, arguments.chunk, emit, arguments.pairs)
        print(f"{variant}: {share:.2f} % of T_prefill inside the hooks", file=sys.stderr)
        rows.append(
            Metric(
                "bench_capture", "execute", f"{case}.{variant}", "inside_hooks_pct", share, "%", "measured",
                n=arguments.pairs,
            )
        )  # fmt: skip
    return rows


class _TimedCapture(LayerwiseCapture):
    """Adds up the processor time of its own hooks."""

    spent_s = 0.0

    def _hook(self, index: int) -> Callable[..., None]:
        inner = super()._hook(index)

        def timed(*arguments: object) -> None:
            start = time.thread_time()
            inner(*arguments)
            self.spent_s += time.thread_time() - start

        return timed


def _share_inside_hooks(
    model: torch.nn.Module, ids: torch.Tensor, chunk: int, emit: Callable[[State], None], repeats: int
) -> float:
    """Median share of a prefill's processor time that its hooks take, in percent."""
    shares = []
    for _ in range(repeats):
        cache = DynamicCache(config=model.config)  # type: ignore[arg-type]
        start = time.process_time()
        capture = _TimedCapture(model, cache, emit)
        with capture:
            chunked_prefill(model, ids, chunk, cache, on_chunk=capture.chunk)
        shares.append(100 * capture.spent_s / (time.process_time() - start))
    return float(np.median(shares))


def paired(
    plain: Callable[[], None], other: Callable[[], None], pairs: int, device: torch.device
) -> tuple[float, list[float]]:
    """Median seconds of `plain`, and how much longer `other` took in each pair, in percent; the order alternates.

    On CPU both are this process's processor time, which other load on the machine does not stretch as it does wall time.
    """
    clock = time.perf_counter if device.type == "cuda" else time.process_time

    def seconds(action: Callable[[], None]) -> float:
        start = clock()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock() - start

    seconds(plain), seconds(other)
    times, overheads = [], []
    for index in range(pairs):
        first, second = (plain, other) if index % 2 == 0 else (other, plain)
        measured = {first: seconds(first), second: seconds(second)}
        times.append(measured[plain])
        overheads.append(100 * (measured[other] / measured[plain] - 1))
    return float(np.median(times)), overheads


def _prefill(model: torch.nn.Module, ids: torch.Tensor, chunk: int, emit: Callable[[State], None] | None) -> None:
    if emit is None:
        chunked_prefill(model, ids, chunk)
        return
    cache = DynamicCache(config=model.config)  # type: ignore[arg-type]
    with LayerwiseCapture(model, cache, emit) as capture:
        chunked_prefill(model, ids, chunk, cache, on_chunk=capture.chunk)


def _drop(_state: State) -> None:
    pass


def _frame(state: State) -> None:
    seal(state, 0, 0)
