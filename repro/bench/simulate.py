"""How many requests the simulator plays per second on Table 6's PrfaaS-PD deployment, and how time and memory grow with their number.

`scripts/bench simulate` plays 1,024-token outputs at 90 % load with every queue, link sharing, the PrfaaS router and both control loops
on; `--requests 10000 100000 1000000 10000000` shows growth. Each size runs in a process of its own, so that peak memory is its own.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import subprocess
import sys
import time

from repro.profiles.presets import load_profile
from repro.scheduling.long_term import LongTermSpec
from repro.scheduling.policies import Prfaas
from repro.scheduling.search import search
from repro.scheduling.short_term import ShortTermSpec
from repro.scheduling.spec import PolicySpec
from repro.scheduling.throughput import Deployment
from repro.simulate.deployments import requests, simulated, with_scheduler
from repro.simulate.link import SharedLinkSpec
from repro.simulate.records import Streaming
from repro.simulate.simulation import Simulation
from repro.workload.arrivals import Poisson
from repro.workload.lengths import TruncatedLogNormal
from repro.workload.spec import ServiceLevel


def measure(count: int, load: float, controllers: bool) -> dict[str, float]:
    """One run: requests per second of wall and of processor time, and this process's peak memory."""
    law = TruncatedLogNormal(9.90, 1.00, 128, 131_072)
    base = Deployment(load_profile("paper_1t_h200"), 4, load_profile("paper_1t_h20"), 8, 100e9, law, 1024)
    point = search(base, PolicySpec("bench", lengths="true_mean"))
    spec = simulated(base, point, SharedLinkSpec(), Prfaas())
    if controllers:
        spec = with_scheduler(spec, short_term=ShortTermSpec(enabled=True), long_term=LongTermSpec(enabled=True))
    sink = Streaming(ServiceLevel())
    run, stream = Simulation(spec, sink), requests(base, Poisson(load * point.lambda_max), count, 0)
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    summary = run.run(stream)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    totals = sink.totals()
    return {
        "requests": count, "completed": summary.completed, "requests_per_s": count / wall, "requests_per_cpu_s": count / cpu,
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "ttft_mean_s": totals.ttft_mean_s,
        "ttft_p99_s": totals.ttft_p99_s, "goodput": totals.goodput,
    }  # fmt: skip


def main(argv: list[str]) -> int:
    """A table of sizes; the last line is the same as JSON."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench simulate", description=__doc__.split("\n\n")[0] if __doc__ else None
    )
    parser.add_argument("--requests", type=int, nargs="+", default=[100_000, 300_000])
    parser.add_argument("--load", type=float, default=0.9, help="share of Λ_max at which requests arrive (default 0.9)")
    parser.add_argument("--static", action="store_true", help="leave both control loops off")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.here:
        print(json.dumps(measure(options.requests[0], options.load, not options.static)))
        return 0
    rows = []
    print(
        f"{'requests':>10} {'req/s':>10} {'req/CPU s':>10} {'peak MB':>8} {'TTFT mean':>10} {'P99':>7}", file=sys.stderr
    )
    for count in options.requests:
        command = [
            sys.executable,
            "-m",
            "repro.bench",
            "simulate",
            "--here",
            "--requests",
            str(count),
            "--load",
            str(options.load),
        ]
        done = subprocess.run(command + ["--static"] * options.static, capture_output=True, text=True, check=False)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            return done.returncode
        row = json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        print(
            f"{row['requests']:>10,} {row['requests_per_s']:>10,.0f} {row['requests_per_cpu_s']:>10,.0f} {row['peak_memory_mb']:>8.0f} "
            f"{row['ttft_mean_s']:>10.3f} {row['ttft_p99_s']:>7.2f}",
            file=sys.stderr,
        )
    print(json.dumps(rows))
    return 0
