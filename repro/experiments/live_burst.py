"""A minute of arrivals above Λ_max, on the live system: what each policy makes of it, live and simulated. The burst is the workload's."""

from __future__ import annotations

from repro.experiments import live_study
from repro.experiments.base import Experiment
from repro.experiments.deployment import profile_files
from repro.record.directory import Record


def finding(record: Record) -> str:
    """Goodput of the policies through the burst, live beside simulated."""
    return live_study.goodputs(record, "burst")


EXPERIMENT = Experiment(
    "live_burst",
    {"emulate": live_study.READS},
    live_study.run,
    {"live_burst": live_study.draw},
    live_study.Options,
    live_study.check,
    profile_files,
    finding=finding,
)
