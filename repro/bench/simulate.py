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
from pathlib import Path

from repro.bench._record import recorded
from repro.errors import UserError
from repro.profiles.presets import load_profile
from repro.record.metrics import Metric
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

UNITS = {
    "requests": "", "completed": "", "requests_per_s": "req/s", "requests_per_cpu_s": "req/s", "peak_memory_mb": "MB", "ttft_mean_s": "s",
    "ttft_p99_s": "s", "goodput": "req/s",
}  # fmt: skip
#: What depends on the machine; the others are the simulation's own.
MEASURED = ("requests_per_s", "requests_per_cpu_s", "peak_memory_mb")
SOURCES = ("simulated", "measured")


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
    """A table of sizes on stderr, and a record; its path is the last line."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench simulate", description=__doc__.split("\n\n")[0] if __doc__ else None
    )
    parser.add_argument("--requests", type=int, nargs="+", default=[100_000, 300_000])
    parser.add_argument("--load", type=float, default=0.9, help="share of Λ_max at which requests arrive (default 0.9)")
    parser.add_argument("--static", action="store_true", help="leave both control loops off")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args(argv)
    if options.here:
        print(json.dumps(measure(options.requests[0], options.load, not options.static)))
        return 0
    name = ("static" if options.static else "two_timescale") + f"_{max(options.requests)}"
    with recorded("simulate", name, options, argv, {"requests": 0}) as directory:
        rows = [row for count in options.requests for row in _rows(count, options)]
        directory.write_metrics(rows)
    return 0


def _rows(count: int, options: argparse.Namespace) -> list[Metric]:
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
        raise UserError(f"{count:,} requests: {' '.join(done.stderr.split()[-40:])}")
    values: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{count:>10,} requests: {values['requests_per_s']:,.0f} req/s, {values['requests_per_cpu_s']:,.0f} per CPU second, "
        f"peak {values['peak_memory_mb']:.0f} MB",
        file=sys.stderr,
    )
    case = f"{count} requests"
    return [
        Metric("bench_simulate", "simulate", case, metric, value, UNITS[metric], SOURCES[metric in MEASURED])
        for metric, value in values.items()
    ]
