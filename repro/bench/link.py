"""What does the emulation itself cost: to make a link, to carry a gigabyte, and after fifty links that came and went?

The forwarder's ceiling is two copies per super-packet through the kernel plus some microseconds of Python, so CPU per
gigabyte falls with the rate until a core is full. What is left behind by links is counted in file descriptors,
threads, child processes and interfaces of this host, and must not grow.

    scripts/bench link --cycles 50 --rates 1e8,1e9,5e9,1e10
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import threading
import time
from pathlib import Path

from repro.errors import UserError
from repro.link import LinkSpec, leftovers, open_link
from repro.link.link import Unavailable
from repro.record.directory import RunDirectory, configuration_hash
from repro.record.metrics import Metric


def main(argv: list[str]) -> int:
    """Run, print what was found on stderr, save it, and end with the path of the record."""
    parser = argparse.ArgumentParser(prog="bench link", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cycles", type=int, default=50)
    parser.add_argument("--rates", default="1e8,1e9,5e9,1e10")
    parser.add_argument("--backends", default="netem,packet,tbf,relay")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--results", type=Path, default=Path("results"))
    arguments = parser.parse_args(argv)
    configuration = {name: str(value) for name, value in vars(arguments).items() if name != "results"}
    directory = RunDirectory(arguments.results / "bench_link" / configuration_hash(configuration))
    directory.begin(configuration, ["bench", "link", *argv], {})
    try:
        rows: list[Metric] = []
        for backend in arguments.backends.split(","):
            try:
                rates = [float(rate) for rate in arguments.rates.split(",")]
                rows += _carried(backend, rates, arguments.seconds)
                rows += _cycles(backend, arguments.cycles)
            except Unavailable as reason:
                print(reason, file=sys.stderr)
        if not rows:
            raise UserError(f"bench link: none of --backends {arguments.backends} can be used here")
        for row in rows:
            print(f"{row.case:32} {row.metric:24} {row.value:12.5g} {row.unit}", file=sys.stderr)
        directory.write_metrics(rows)
        record = directory.complete()
    except BaseException as error:
        directory.fail(error)
        raise
    print(record.path)
    return 0


def _carried(backend: str, rates: list[float], seconds: float) -> list[Metric]:
    """What is carried of each rate, what the probe finds of RTT, and what a gigabyte costs."""
    rows = []
    for rate in rates:
        rtt_s = 0.0 if backend == "tbf" else 0.01
        with open_link(LinkSpec(rate_bps=rate, rtt_s=rtt_s, backend=backend), run="bench-link") as link:
            found = link.measure(rate_s=seconds)
            signals = link.signals()
        case = f"{backend} {rate / 1e9:g} Gbps"
        rows += [
            _row(case, "rate_share", found.rate_share, "1"),
            _row(case, "rtt_error_s", found.rtt_s - rtt_s, "s"),
            _row(case, "rtt_p99_error_s", found.rtt_p99_s - rtt_s, "s"),
        ]
        cpu_s = signals.forward.cpu_s + signals.reverse.cpu_s
        if cpu_s:  # the kernel's own disciplines have no process to charge
            rows.append(_row(case, "cpu_s_per_gb", cpu_s / (signals.forward.forwarded_bytes / 1e9), "s/GB"))
    return rows


def _cycles(backend: str, cycles: int) -> list[Metric]:
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
        _row(backend, "open_s", opening_s / cycles, "s", cycles),
        _row(backend, "close_s", closing_s / cycles, "s", cycles),
        _row(backend, "left_behind", left, "1", cycles),
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


def _row(case: str, metric: str, value: float, unit: str, n: int = 1) -> Metric:
    return Metric("bench_link", "emulate", case, metric, value, unit, "measured", math.nan, math.nan, n)
