"""Conversations on the live system: prefix caches of both clusters, the paper's two rules for them, and what they are worth (§3.2, §3.4.3).

A conversation's next turn goes on from what a cluster still holds of it. `own_caches` is the rule for scarce bandwidth (each cluster's
cache counts alone), `best_cache` the one for abundant bandwidth (the longest prefix counts, and crosses the link to where it is needed),
both at a t that nothing moves; `policy` is the configured scheduler, which for `policy.router=prfaas` switches between the two. The
simulator gets the same requests. Of what is cached it says the same, request by request, but where a loop looks at a clock, or two prompts
end so close together that the other is evicted first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from matplotlib.figure import Figure

from repro.errors import UserError
from repro.experiments import live_study, simulated
from repro.experiments.base import CACHES, SCHEDULER, SIMULATED, WIRE, Context, Experiment, Outcome
from repro.experiments.deployment import profile_files
from repro.experiments.live_study import Pair, value
from repro.record.directory import Record
from repro.record.metrics import Metric
from repro.report import style
from repro.scheduling.policies import LengthAware
from repro.settings import Settings
from repro.simulate.deployments import with_scheduler
from repro.simulate.spec import SimulationSpec

CASES = {
    "no_cache": "no caches",
    "own_caches": "own caches",
    "best_cache": "best cache",
    "policy": "configured policy",
}
_METRICS = (*live_study.METRICS, "cached_fraction")


@dataclass(frozen=True)
class Options(live_study.RunOptions):
    """How long sessions arrive, and which `cases` meet them."""

    KNOWN: ClassVar[tuple[str, ...]] = tuple(CASES)
    cases: tuple[str, ...] = tuple(CASES)


def check(settings: Settings, options: Options) -> None:
    """A deployment that can serve, open-loop sessions, and caches with their blocks. Raises UserError naming the key."""
    simulated.check(settings, options)
    sessions, policy = settings.workload.sessions, settings.policy
    if sessions is None:
        raise UserError(
            f"workload.sessions: null; experiment={settings.name} needs sessions (workload=agentic has some)"
        )
    if sessions.closed_loop:
        raise UserError("workload.sessions.closed_loop: the load generator does not wait for answers; accepted: false")
    cached = replace(settings, policy=replace(policy, cache=replace(policy.cache, enabled=True)))
    simulated.check_blocks(cached, {"workload.sessions": sessions.block_tokens})
    if policy.router in ("naive", "homogeneous"):
        raise UserError(
            f"policy.router: {policy.router} needs a deployment of its own (experiment=table6); accepted: threshold, prfaas, "
            "length_aware, random_split"
        )


def run(context: Context) -> Outcome:
    """The same sessions through every case, live and simulated."""
    settings = context.settings
    setting = simulated.Setting.of(context)
    policies = setting.policies()
    cache = settings.policy.cache.spec(setting.base.prfaas)
    own = replace(policies["static"], cache=cache)
    every: dict[str, SimulationSpec] = {
        "no_cache": policies["static"],
        "own_caches": own,
        "best_cache": with_scheduler(own, router=LengthAware()),
        "policy": replace(policies["two_timescale"], cache=cache),
    }
    # Sessions bring their own rate.
    pairs, facts = live_study.meet(context, {case: every[case] for case in context.options.cases}, 1.0)
    outcome = live_study.outcome(context, pairs, facts, _METRICS)
    rows = [row for case in context.options.cases for row in _rows(context, case, pairs, facts["byte_scale"])]
    return replace(outcome, metrics=[*outcome.metrics, *rows])


def _rows(context: Context, case: str, pairs: list[Pair], byte_scale: float) -> list[Metric]:
    """What crossed the link with prefixes that went ahead, and how many requests found as much cached as in the simulator."""
    own = [pair for pair in pairs if pair.case == case]
    same = [
        (pair.played.requests["cached_tokens"].to_numpy() == pair.simulated["cached_tokens"].to_numpy()).mean()
        for pair in own
    ]
    live_bps = [
        8 * byte_scale * pair.played.payload_bytes / float(pair.played.requests["finish_s"].max()) for pair in own
    ]
    simulated_bps = [8 * pair.summary.egress_bytes / pair.summary.last_finish_s for pair in own]
    copied = [byte_scale * pair.played.copied_bytes for pair in own]
    found = (
        (case, "link_egress_bps", live_bps, "bit/s", "emulated"),
        (f"{case}.simulate", "link_egress_bps", simulated_bps, "bit/s", "simulated"),
        (case, "copied_bytes", copied, "bytes", "emulated"),
        (case, "cached_as_simulated", same, "", "emulated"),
    )
    return [
        context.metric(name, metric, float(np.mean(values)), unit, source, n=len(own))
        for name, metric, values, unit, source in found
    ]


def finding(record: Record) -> str:
    """What was cached and what that did to TTFT, live beside simulated, and whether both agree on every request."""
    cases = [case for case in dict.fromkeys(record.metrics["case"]) if "." not in case]
    words = [
        f"{CASES[case]} {100 * value(record, case, 'cached_fraction'):.1f} % of input tokens cached (simulated "
        f"{100 * value(record, f'{case}.simulate', 'cached_fraction'):.1f} %), mean TTFT {value(record, case, 'ttft_mean_s'):.2f} s "
        f"({value(record, f'{case}.simulate', 'ttft_mean_s'):.2f} s)"
        for case in cases
    ]
    return f"Conversations on the live system: {'; '.join(words)}."


def draw(record: Record) -> Figure:
    """Cached share of input tokens and mean TTFT of each case, live and simulated."""
    cases = [case for case in dict.fromkeys(record.metrics["case"]) if "." not in case]
    figure, axes = style.panels(2, height_in=2.6)
    at = np.arange(len(cases))
    for axis, metric, factor in zip(axes, ("cached_fraction", "ttft_mean_s"), (100, 1), strict=True):
        for shift, suffix, colour, label in (
            (-0.2, "", style.BLUE, "live"),
            (0.2, ".simulate", style.SKY, "simulated"),
        ):
            heights = [factor * value(record, case + suffix, metric) for case in cases]
            axis.barh(at + shift, heights, 0.38, color=colour, label=label)
        axis.set_yticks(at, [CASES[case] for case in cases])
        axis.invert_yaxis()
        axis.grid(axis="y", visible=False)
    axes[0].set(xlabel="input tokens found cached (%)", title="What the caches serve")
    axes[1].set(xlabel="mean TTFT (s)", title="What that is worth")
    axes[1].legend(fontsize=8)
    return figure


EXPERIMENT = Experiment(
    "live_sessions",
    {"emulate": (*SIMULATED, *SCHEDULER, *CACHES, "workload.sessions", *WIRE, "options")},
    run,
    {"live_sessions": draw, "over_time": live_study.draw},
    Options,
    check,
    profile_files,
    finding=finding,
)
