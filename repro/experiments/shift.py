"""The length distribution moves under a running system: prompts grow longer, and a threshold searched for the old ones is wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from repro.errors import UserError
from repro.experiments import simulated, study_figures, study_findings
from repro.experiments.base import SCHEDULER, SIMULATED, Context, Experiment, Outcome
from repro.experiments.deployment import profile_files
from repro.scheduling.throughput import Deployment
from repro.simulate.deployments import requests
from repro.workload.arrivals import Poisson
from repro.workload.lengths import TruncatedLogNormal
from repro.workload.stream import Independent


@dataclass(frozen=True)
class Options(simulated.Options):
    """From `at_s` on, μ of the log-normal lengths is `mu_shift` higher."""

    load: float = 0.7
    duration_s: float = 1500.0
    at_s: float = 300.0
    mu_shift: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.at_s < self.duration_s:
            raise UserError(f"options.at_s: {self.at_s} must lie within options.duration_s ({self.duration_s})")


def run(context: Context) -> Outcome:
    """All policies through the same shift, measured from it on."""
    options: Options = context.options
    setting = simulated.Setting.of(context)
    lengths = context.settings.workload.lengths
    after = replace(lengths, mu=lengths.mu + options.mu_shift)
    rate = setting.rate(options.load)
    count = round(rate * options.duration_s)

    stream = partial(_shifted, setting.base, Poisson(rate), count, after, options.at_s)
    return simulated.compare(
        context,
        [simulated.Comparison(setting.policies(), stream)],
        (options.at_s, options.duration_s),
        setting.slo,
        options.seeds,
    )


def _shifted(
    base: Deployment, arrivals: Poisson, count: int, after: TruncatedLogNormal, at_s: float, seed: int
) -> Independent:
    return replace(requests(base, arrivals, count, seed), shifted=after, shift_at_s=at_s)


def longer(options: Mapping[str, Any]) -> list[study_figures.Span]:
    """When prompts are longer."""
    return [study_figures.Span(options["at_s"], math.inf, "longer prompts")]


#: Requests count from the shift on, which moves μ of the log-normal lengths: a mixture or a trace has none.
_READS = tuple(
    key for key in (*SIMULATED, *SCHEDULER) if key != "workload.mixture" and not key.startswith("workload.trace")
)
EXPERIMENT = Experiment(
    "shift",
    {"simulate": (*_READS, *(f"options.{key}" for key in ("load", "duration_s", "seeds", "at_s", "mu_shift")))},
    run,
    study_figures.figures(longer),
    Options,
    simulated.check,
    profile_files,
    finding=study_findings.goodput,
)
