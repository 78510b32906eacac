"""How long the exhaustive grid search takes: thresholds from end to end in steps of 100 tokens, times every split N_p : N_d.

The short-term controller searches t again whenever the link changes (§3.4.3), so a search must cost less than the requests that arrive
while it runs. `cold` is the first search over a deployment, whose curves are still to be built; the others repeat it.

    scripts/bench search --repeats 200
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any, get_args

import numpy as np
from scipy.stats import quantile_test

from repro.bench._record import recorded
from repro.errors import UserError
from repro.paper import text
from repro.profiles.presets import PaperInputs
from repro.record.metrics import Metric
from repro.scheduling.search import grid_search, threshold_grid
from repro.scheduling.throughput import Deployment, Lengths


def main(argv: list[str]) -> int:
    """Time both readings of T_prefill's mean, print one line each, write a record; its path is the last line."""
    parser = argparse.ArgumentParser(prog="bench search", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--step-tokens", type=int, default=100)
    parser.add_argument("--results", type=Path, default=Path("results"))
    arguments = parser.parse_args(argv)
    if arguments.repeats < 10:
        raise UserError(f"--repeats: {arguments.repeats}; accepted: 10 or more, for an interval of the median")
    with recorded("search", f"step_{arguments.step_tokens}", arguments, argv, {}) as directory:
        directory.write_metrics([row for lengths in get_args(Lengths) for row in _rows(lengths, arguments)])
    return 0


def _rows(lengths: Lengths, arguments: argparse.Namespace) -> list[Metric]:
    deployment = _deployment()
    cold = _seconds(deployment, arguments.step_tokens, lengths)
    times = [_seconds(deployment, arguments.step_tokens, lengths) for _ in range(arguments.repeats)]
    median = float(np.median(times))
    between: Any = quantile_test(times, q=median, p=0.5).confidence_interval(confidence_level=0.95)
    points = len(threshold_grid(deployment, arguments.step_tokens)) * deployment.n_pd
    print(
        f"{lengths}: {points:,} points in {1e3 * median:.2f} ms (median of {len(times)}; "
        f"95 %: {1e3 * between.low:.2f} to {1e3 * between.high:.2f}), cold {1e3 * cold:.1f} ms",
        file=sys.stderr,
    )

    where = ("bench_search", "model", lengths)
    return [
        Metric(*where, "search_s", median, "s", "measured", between.low, between.high, len(times)),
        Metric(*where, "search_cold_s", cold, "s", "measured"),
        Metric(*where, "grid_points", points, "", "computed"),
    ]


def _deployment() -> Deployment:
    """§4.1's, built from nothing, so that no curve or bin is cached yet."""
    inputs = PaperInputs.draw()
    return Deployment(
        prfaas=inputs.h200(),
        n_prfaas=text.PRFAAS_GPUS // text.GPUS_PER_INSTANCE,
        pd=inputs.h20(),
        n_pd=text.PD_GPUS // text.GPUS_PER_INSTANCE,
        egress_bps=text.LINK.value * 1e9,
        lengths=inputs.lengths,
        output_tokens=text.OUTPUT_TOKENS,
    )


def _seconds(deployment: Deployment, step_tokens: int, lengths: Lengths) -> float:
    start = time.perf_counter()
    grid_search(deployment, step_tokens, lengths)
    return time.perf_counter() - start
