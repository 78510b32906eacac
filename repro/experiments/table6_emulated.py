"""Table 6 on the live system: the three deployments with every instance a process, real sockets and the emulated link, phases replayed.

Λ_max is searched on the running system, from the model's value; TTFT is measured at 70 and 85 % of it, over `requests` requests each.
The simulator gets the very same requests at the same rates, and its values stand beside: what differs is what a real clock, real messages
and real TCP add. Time runs α times as fast and bytes are divided by β; results are unscaled, and lateness is reported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pandas as pd

from repro.errors import UserError, at_least
from repro.experiments.base import Context, Outcome
from repro.experiments.deployment import CASES, deployment, operating_points
from repro.experiments.live import Played, Wire, calibrated, deployed
from repro.experiments.table6_live import Case, Effort, measured, name_of
from repro.paper import tables
from repro.record.metrics import Metric
from repro.serving.scale import Scale, Scaling
from repro.simulate.deployments import shared_link, simulated

LOADS = (0.7, 0.85)


@dataclass(frozen=True)
class Emulated(Scaling):
    """Which deployments, and the effort: `requests` are counted per rate, `search_requests` sent per rate that the search tries."""

    NODE: ClassVar[str] = "options.emulate"
    cases: tuple[str, ...] = CASES
    requests: int = 2000
    search_requests: int = 1000
    search_width: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.cases or not set(self.cases) <= set(CASES):
            raise UserError(f"options.emulate.cases: {list(self.cases)}; accepted: some of {', '.join(CASES)}")
        at_least(self, "options.emulate", requests=100, search_requests=100)
        if not self.search_width > 0:
            raise UserError(f"options.emulate.search_width: {self.search_width} is not positive")


def run(context: Context, options: Emulated) -> Outcome:
    """The three deployments, one after the other on the same machine."""
    settings = context.settings
    base = deployment(settings)
    true_mean = replace(settings, policy=replace(settings.policy, lengths="true_mean"))
    points = {case: point for case, point in operating_points(base, true_mean).items() if case in options.cases}
    scale, facts = calibrated(options, settings.link.rate_bps)
    context.progress(f"time runs {scale.time:g} times as fast, bytes are divided by {scale.bytes:g}")
    wire = Wire(settings.link, settings.transport, options.pieces, scale)
    logs = context.folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    effort = Effort(
        LOADS, options.requests, options.search_requests, options.search_width, 0.04, "options.emulate.time_scale",
        f"this machine does not keep up with {scale.time:g} times real time; accepted: a smaller number",
    )  # fmt: skip
    rows: list[Metric] = []
    drawn: list[dict[str, Any]] = []
    kept: list[pd.DataFrame] = []
    best: dict[str, float] = {}
    workers: dict[str, Any] = {}
    for name, point in points.items():
        spec = simulated(base, point, shared_link(settings.link, settings.transport))
        case, paper = Case(name, spec, base, point, settings.seed), tables.TABLE_6[name]["lambda_max"].value
        with deployed(spec, wire, logs, f"table6-{name.replace('_', '-')}", settings.seed) as live:
            found = measured(context, live, case, effort, "emulated", paper)
            workers[name] = live.fleet.clocks.record()
        best[name] = found.lambda_max
        rows += found.metrics
        drawn += found.loads
        for load, played in found.runs.items():
            rows += _lateness(context, name_of(name, load), played, scale)
            kept.append(played.requests.assign(case=name, load=load))
    for name, value in best.items():
        if "homogeneous_pd" in best:
            paper = tables.TABLE_6[name]["ratio"].value
            rows.append(context.metric(name, "ratio", value / best["homogeneous_pd"], "", "emulated", paper=paper))
    facts_ = {"emulation": facts, "workers": workers}
    return Outcome(rows, {"loads": pd.DataFrame(drawn)}, requests=pd.concat(kept), provenance=facts_)


def _lateness(context: Context, name: str, played: Played, scale: Scale) -> list[Metric]:
    """How late this machine was, unscaled, and what it cost: the error bars of an emulation."""
    count = max(len(played.requests), 1)
    values: Mapping[str, tuple[float, str]] = {
        "arrivals_late_p99_s": (played.late_p99_s * scale.time, "s"),
        "timers_late_mean_s": (played.timer_mean_s * scale.time, "s"),
        "timers_late_p99_s": (played.timer_p99_s * scale.time, "s"),
        "cpu_per_request_s": (played.cpu_s / count, "s"),
        "wire_overhead": (played.wire_overhead, ""),
    }
    return [context.metric(name, metric, value, unit, "measured") for metric, (value, unit) in values.items()]
