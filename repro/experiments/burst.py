"""Bursts of arrivals: what each policy's goodput is while the rate exceeds Λ_max for a minute at a time.

Static thresholds split a burst as they split everything; the fast loop sends to whichever stage has room, the slow loop can move nodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from repro.errors import UserError
from repro.experiments import simulated, study_figures, study_findings
from repro.experiments.base import SCHEDULER, SIMULATED, Context, Experiment, Outcome
from repro.experiments.deployment import profile_files
from repro.simulate.deployments import requests
from repro.workload.arrivals import Piecewise


@dataclass(frozen=True)
class Options(simulated.Options):
    """Every `every_s`, arrivals come at `burst_load` for `burst_s`, at `load` otherwise."""

    load: float = 0.7
    burst_load: float = 1.4
    burst_s: float = 60.0
    every_s: float = 300.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.burst_s < self.every_s:
            raise UserError(f"options.burst_s: {self.burst_s} must lie between 0 and options.every_s ({self.every_s})")


def run(context: Context) -> Outcome:
    """All policies through the same bursts."""
    options: Options = context.options
    setting = simulated.Setting.of(context)
    calm_s = options.every_s - options.burst_s
    arrivals = Piecewise((setting.rate(options.load), setting.rate(options.burst_load)), (calm_s, options.burst_s))
    mean_load = (options.load * calm_s + options.burst_load * options.burst_s) / options.every_s
    count = round(setting.rate(mean_load) * options.duration_s)
    stream = partial(requests, setting.base, arrivals, count)
    window_s = (options.warmup_s, options.duration_s)
    return simulated.compare(
        context, [simulated.Comparison(setting.policies(), stream)], window_s, setting.slo, options.seeds
    )


def bursts(options: Mapping[str, Any]) -> list[study_figures.Span]:
    """When arrivals come faster."""
    return study_figures.every(options["every_s"], options["burst_s"], options["duration_s"], "burst of arrivals")


EXPERIMENT = Experiment(
    "burst",
    {"simulate": (*SIMULATED, *SCHEDULER, "options")},
    run,
    study_figures.figures(bursts),
    Options,
    simulated.check,
    profile_files,
    finding=study_findings.goodput,
)
