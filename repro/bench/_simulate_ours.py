"""One run of this project's simulator for `scripts/bench simulate`, in a process of its own, so that peak memory is the run's.

Table 6's PrfaaS-PD deployment with 1,024-token outputs, all queues, link sharing, the PrfaaS router and both control loops. The clock
covers drawing the requests, simulating them and summing up, from the first event to the last.
"""

from __future__ import annotations

import gc
import json
import resource
import sys
import time

from repro.processes import die_with_parent
from repro.profiles.presets import load_profile
from repro.scheduling.long_term import LongTermSpec
from repro.scheduling.policies import Prfaas
from repro.scheduling.search import search
from repro.scheduling.short_term import ShortTermSpec
from repro.scheduling.spec import PolicySpec
from repro.scheduling.throughput import Deployment, OperatingPoint
from repro.simulate.deployments import requests, simulated, with_scheduler
from repro.simulate.link_spec import SharedLinkSpec
from repro.simulate.records import Streaming
from repro.simulate.simulation import Simulation
from repro.workload.arrivals import Poisson
from repro.workload.lengths import TruncatedLogNormal
from repro.workload.spec import ServiceLevel
from repro.workload.stream import Independent


def deployment() -> tuple[Deployment, OperatingPoint]:
    """Table 6's PrfaaS-PD deployment and its best operating point."""
    law = TruncatedLogNormal(9.90, 1.00, 128, 131_072)
    base = Deployment(load_profile("paper_1t_h200"), 4, load_profile("paper_1t_h20"), 8, 100e9, law, 1024)
    return base, search(base, PolicySpec("bench", lengths="true_mean"))


def stream(count: int, load: float) -> Independent:
    """The requests that every simulator plays: Poisson at a share of Λ_max, log-normal inputs, 1,024 output tokens, seed 0."""
    base, point = deployment()
    return requests(base, Poisson(load * point.lambda_max), count, 0)


def measure(count: int, load: float, controllers: bool) -> dict[str, float]:
    """Play `count` requests: wall and processor seconds, this process's peak memory, and what was simulated."""
    base, point = deployment()
    spec = simulated(base, point, SharedLinkSpec(), Prfaas())
    if controllers:
        spec = with_scheduler(spec, short_term=ShortTermSpec(enabled=True), long_term=LongTermSpec(enabled=True))
    sink = Streaming(ServiceLevel())
    run, arriving = Simulation(spec, sink), stream(count, load)
    gc.collect()
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    summary = run.run(arriving)
    wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
    totals = sink.totals()
    return {
        "completed": summary.completed, "wall_s": wall_s, "cpu_s": cpu_s,
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "ttft_mean_s": totals.ttft_mean_s,
        "ttft_p99_s": totals.ttft_p99_s, "goodput": totals.goodput,
    }  # fmt: skip


if __name__ == "__main__":
    die_with_parent()
    print(json.dumps(measure(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3] == "controllers")))
