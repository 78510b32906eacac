"""The link loses most of its capacity for a minute (100 → 10 Gbps): what each policy makes of it.

Offloading needs about 12 Gbps at full load, so a link of 10 Gbps is just too thin, and one of 2 Gbps, the second case, far too thin.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from repro.errors import UserError
from repro.experiments import simulated
from repro.experiments.base import Context, Experiment, Outcome
from repro.experiments.deployment import profile_files
from repro.simulate.deployments import requests
from repro.simulate.link import CapacityChange
from repro.workload.arrivals import Poisson


@dataclass(frozen=True)
class Options(simulated.Options):
    """From `at_s` on, for `for_s`, the link carries `dropped_bps`; every value of it is a study of its own."""

    load: float = 0.85
    duration_s: float = 600.0
    at_s: float = 240.0
    for_s: float = 60.0
    dropped_bps: tuple[float, ...] = (10e9, 2e9)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.at_s < self.at_s + self.for_s <= self.duration_s:
            raise UserError(f"options.at_s, for_s: {self.at_s} and {self.for_s} must lie within options.duration_s ({self.duration_s})")
        if not self.dropped_bps:
            raise UserError("options.dropped_bps: empty; accepted: one rate or more")


def run(context: Context) -> Outcome:
    """All policies through the same drop, measured from the drop to a minute after it."""
    options: Options = context.options
    setting = simulated.Setting.of(context)
    arrivals = Poisson(setting.rate(options.load))
    count = round(setting.rate(options.load) * options.duration_s)
    window = (options.at_s, min(options.at_s + options.for_s + 60.0, options.duration_s))
    outcomes = []
    for dropped in options.dropped_bps:
        back = CapacityChange(options.at_s + options.for_s, setting.link.rate_bps)
        link = replace(setting.link, changes=(CapacityChange(options.at_s, dropped), back))
        outcomes.append(
            simulated.compare(
                context, setting.policies(options, link), lambda seed: requests(setting.base, arrivals, count, seed),
                window, setting.slo, options.seeds, prefix=f"{dropped / 1e9:g}_gbps." if len(options.dropped_bps) > 1 else "",
            )
        )  # fmt: skip
    return simulated.merge(outcomes)


EXPERIMENT = Experiment("bandwidth_drop", ("simulate",), run, simulated.FIGURES, Options, profile_files)
