"""The link goes down for a few seconds again and again: does the scheduler route around outages, and what do they cost?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from repro.errors import UserError
from repro.experiments import simulated, study_figures, study_findings
from repro.experiments.base import SCHEDULER, SIMULATED, Context, Experiment, Outcome
from repro.experiments.deployment import profile_files
from repro.simulate.deployments import requests
from repro.simulate.link_spec import CapacityChange
from repro.workload.arrivals import Poisson


@dataclass(frozen=True)
class Options(simulated.Options):
    """The link is down for `down_s` every `every_s`."""

    load: float = 0.7
    duration_s: float = 900.0
    down_s: float = 15.0
    every_s: float = 90.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.down_s < self.every_s:
            raise UserError(f"options.down_s: {self.down_s} must lie between 0 and options.every_s ({self.every_s})")


def run(context: Context) -> Outcome:
    """All policies on the same flapping link."""
    options: Options = context.options
    setting = simulated.Setting.of(context)
    changes = []
    for outage in outages(vars(options)):
        changes += [CapacityChange(outage.start_s, 0.0), CapacityChange(outage.end_s, setting.link.rate_bps)]
    link = replace(setting.link, changes=tuple(changes))
    arrivals = Poisson(setting.rate(options.load))
    count = round(setting.rate(options.load) * options.duration_s)
    stream = partial(requests, setting.base, arrivals, count)
    window_s = (options.warmup_s, options.duration_s)
    return simulated.compare(
        context, [simulated.Comparison(setting.policies(link), stream)], window_s, setting.slo, options.seeds
    )


def outages(options: Mapping[str, Any]) -> list[study_figures.Span]:
    """When the link is down."""
    found, at_s = [], options["every_s"]
    while at_s + options["down_s"] < options["duration_s"]:
        found.append(study_figures.Span(at_s, at_s + options["down_s"], "link down"))
        at_s += options["every_s"]
    return found


EXPERIMENT = Experiment(
    "link_flap",
    {"simulate": (*SIMULATED, *SCHEDULER, "options")},
    run,
    study_figures.figures(outages),
    Options,
    simulated.check,
    profile_files,
    finding=study_findings.goodput,
)
