"""How long the exhaustive grid search takes: thresholds from end to end in steps of 100 tokens, times every split N_p : N_d.

The short-term controller searches t again whenever the link changes (§3.4.3), so a search must cost less than the requests that arrive
while it runs. `cold` is the first search over a deployment, whose curves are still to be built; the others repeat it.

    scripts/bench search options.repeats=200
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from scipy.stats import quantile_test

from repro.errors import UserError
from repro.experiments.base import Context, Experiment, Outcome
from repro.paper import text
from repro.profiles.presets import PaperInputs
from repro.record.metrics import Metric
from repro.scheduling.search import grid_search, threshold_grid
from repro.scheduling.throughput import Deployment, Lengths


@dataclass(frozen=True)
class Options:
    """So many timed searches after the cold one, over thresholds `step_tokens` apart."""

    repeats: int = 200
    step_tokens: int = 100

    def __post_init__(self) -> None:
        if self.repeats < 10:
            raise UserError(f"options.repeats: {self.repeats}; accepted: 10 or more, for an interval of the median")
        if self.step_tokens < 1:
            raise UserError(f"options.step_tokens: {self.step_tokens}; accepted: 1 or more")


def run(context: Context) -> Outcome:
    """Time both readings of T_prefill's mean."""
    return Outcome([row for lengths in get_args(Lengths) for row in _rows(context, lengths)])


def _rows(context: Context, lengths: Lengths) -> list[Metric]:
    options = context.options
    assert isinstance(options, Options)
    deployment = _deployment()
    cold = _seconds(deployment, options.step_tokens, lengths)
    times = [_seconds(deployment, options.step_tokens, lengths) for _ in range(options.repeats)]
    median = float(np.median(times))
    between: Any = quantile_test(times, q=median, p=0.5).confidence_interval(confidence_level=0.95)
    points = len(threshold_grid(deployment, options.step_tokens)) * deployment.n_pd
    context.progress(
        f"{lengths}: {points:,} points in {1e3 * median:.2f} ms (median of {len(times)}; "
        f"95 %: {1e3 * between.low:.2f} to {1e3 * between.high:.2f}), cold {1e3 * cold:.1f} ms"
    )
    interval = (between.low, between.high)
    return [
        context.metric(lengths, "search_s", median, "s", "measured", interval=interval, n=len(times)),
        context.metric(lengths, "search_cold_s", cold, "s", "measured"),
        context.metric(lengths, "grid_points", points, "1", "computed"),
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


EXPERIMENT = Experiment("bench_search", reads={"model": ("options",)}, run=run, options=Options, timed=True)
