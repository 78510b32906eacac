"""What does the emulation itself cost: to make a link, to carry a gigabyte, and after fifty links that came and went?

The forwarder's ceiling is two copies per super-packet through the kernel plus some microseconds of Python, so CPU per
gigabyte falls with the rate until a core is full. What is left behind by links is counted in file descriptors,
threads, child processes and interfaces of this host, and must not grow.

    scripts/bench link options.cycles=50 options.rates_bps=[1e8,1e9,5e9,1e10]
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from repro.errors import UserError
from repro.experiments.base import Context, Experiment, Outcome
from repro.link import LinkSpec, leftovers, open_link
from repro.link.link import Unavailable
from repro.link.spec import BACKENDS
from repro.record.metrics import Metric


@dataclass(frozen=True)
class Options:
    """Which backends carry which rates, for how long each, and how many links come and go."""

    backends: tuple[str, ...] = ("netem", "packet", "tbf", "relay")
    rates_bps: tuple[float, ...] = (1e8, 1e9, 5e9, 1e10)
    seconds: float = 2.0
    cycles: int = 50

    def __post_init__(self) -> None:
        for backend in self.backends:
            if backend not in BACKENDS or backend in ("auto", "none"):
                known = ", ".join(name for name in BACKENDS if name not in ("auto", "none"))
                raise UserError(f"options.backends: {backend!r}; accepted: {known}")
        if any(rate <= 0 for rate in self.rates_bps):
            raise UserError(f"options.rates_bps: {list(self.rates_bps)}; accepted: bits per second above 0")
        if self.seconds <= 0:
            raise UserError(f"options.seconds: {self.seconds:g}; accepted: above 0")
        if self.cycles < 1:
            raise UserError(f"options.cycles: {self.cycles}; accepted: 1 or more")


def run(context: Context) -> Outcome:
    """Every backend that can be used here."""
    options = context.options
    assert isinstance(options, Options)
    rows: list[Metric] = []
    for backend in options.backends:
        try:
            found = [*_carried(context, backend, options), *_cycles(context, backend, options.cycles)]
        except Unavailable as reason:
            context.progress(str(reason))
            continue
        for row in found:
            context.progress(f"{row.case:20} {row.metric:18} {row.value:12.5g} {row.unit}")
        rows += found
    if not rows:
        raise UserError(f"options.backends: none of {', '.join(options.backends)} can be used here")
    return Outcome(rows)


def _carried(context: Context, backend: str, options: Options) -> list[Metric]:
    """What is carried of each rate, what the probe finds of RTT, and what a gigabyte costs."""
    rows = []
    for rate in options.rates_bps:
        rtt_s = 0.0 if backend == "tbf" else 0.01
        with open_link(LinkSpec(rate_bps=rate, rtt_s=rtt_s, backend=backend), run="bench-link") as link:
            found = link.measure(rate_s=options.seconds)
            signals = link.signals()
        case = f"{backend} {rate / 1e9:g} Gbps"
        rows += [
            _row(context, case, "rate_share", found.rate_share, "1"),
            _row(context, case, "rtt_error_s", found.rtt_s - rtt_s, "s"),
            _row(context, case, "rtt_p99_error_s", found.rtt_p99_s - rtt_s, "s"),
        ]
        cpu_s = signals.forward.cpu_s + signals.reverse.cpu_s
        if cpu_s:  # the kernel's own disciplines have no process to charge
            rows.append(_row(context, case, "cpu_s_per_gb", cpu_s / (signals.forward.forwarded_bytes / 1e9), "s/GB"))
    return rows


def _cycles(context: Context, backend: str, cycles: int) -> list[Metric]:
    """How long a link takes to make and to remove, and what many of them leave behind."""
    spec = LinkSpec(rate_bps=1e9, backend=backend)
    open_link(spec, run="bench-link").close()
    before, opening_s, closing_s = _held(), 0.0, 0.0
    for _ in range(cycles):
        started_s = time.perf_counter()
        link = open_link(spec, run="bench-link")
        opened_s = time.perf_counter()
        link.close()
        opening_s += opened_s - started_s
        closing_s += time.perf_counter() - opened_s
    left = sum(abs(after - earlier) for earlier, after in zip(before, _held(), strict=True))
    return [
        _row(context, backend, "open_s", opening_s / cycles, "s", cycles),
        _row(context, backend, "close_s", closing_s / cycles, "s", cycles),
        _row(context, backend, "left_behind", left, "1", cycles),
    ]


def _held() -> tuple[int, int, int, int, int]:
    """File descriptors, threads, children, interfaces of the host, processes of this one's links."""
    return (
        len(list(Path("/proc/self/fd").iterdir())),
        threading.active_count(),
        len(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()),
        len(list(Path("/sys/class/net").iterdir())),
        sum(member.owner == os.getpid() for member in leftovers.members()),
    )


def _row(context: Context, case: str, metric: str, value: float, unit: str, n: int = 1) -> Metric:
    return context.metric(case, metric, value, unit, "measured", n=n)


EXPERIMENT = Experiment("bench_link", reads={"emulate": ("options",)}, run=run, options=Options, timed=True)
