"""The link loses most of its capacity for a minute, on the live system: what a moving threshold saves, live and simulated.

The simulator knows the link's capacity; the live router has it from what its senders see acknowledged (`repro.serving.egress`), so here the
fast loop is shown with its real eyes. The drop is `link.schedule`.
"""

from __future__ import annotations

from repro.errors import UserError
from repro.experiments import live_study
from repro.experiments.base import Experiment
from repro.experiments.deployment import profile_files
from repro.record.directory import Record
from repro.settings import Settings


def check(settings: Settings, options: live_study.Options) -> None:
    """As for every live study, and a link that changes. Raises UserError naming the key."""
    live_study.check(settings, options)
    if not settings.link.schedule:
        raise UserError(
            "link.schedule: empty; accepted by experiment=live_bandwidth_drop: one change of rate_bps or more"
        )


def finding(record: Record) -> str:
    """Goodput of the policies through the drop, live beside simulated."""
    return live_study.goodputs(record, "drop")


EXPERIMENT = Experiment(
    "live_bandwidth_drop",
    {"emulate": live_study.READS},
    live_study.run,
    {"live_bandwidth_drop": live_study.draw},
    live_study.Options,
    check,
    profile_files,
    finding=finding,
    hinges_on=(
        "The time scale: TCP finds the new rate in timeouts of this machine, each of which counts as many times as time is scaled."
    ),
)
