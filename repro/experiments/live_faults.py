"""Instances killed, stopped and slowed one after the other while the link fails twice: no request lost, none answered twice.

Faults are done to the processes from outside. Who held a request that was lost is asked nothing: the router notices the end of a process or
its silence, and has the request prefilled anew. What it costs is in TTFT beside the simulator's, whose instances fail at the same moments.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count, cycle
from typing import Any, get_args

import numpy as np

from repro.errors import UserError
from repro.experiments import live_study
from repro.experiments.base import Context, Experiment, Outcome
from repro.experiments.deployment import profile_files
from repro.experiments.live_study import value
from repro.experiments.simulated import Setting
from repro.record.directory import Record
from repro.serving.faults import ROUTER, Kind, LiveFault


@dataclass(frozen=True)
class Options(live_study.Options):
    """`faults` is the whole schedule. Where it is empty, an instance drawn by the seed has one of `kinds` in turn every `every_s`.

    It is well again, or its successor is started, `for_s` later; one that is stopped is taken for dead after 3 s of this machine. A
    slow one takes `factor` times as long. Of `kinds`, out_of_memory is drawn for PD instances only, and restart is the router's.
    Seconds are the deployment's.
    """

    cases: tuple[str, ...] = ("two_timescale",)
    every_s: float = 50.0
    for_s: float = 45.0
    kinds: tuple[Kind, ...] = ("kill", "stop", "kill", "slow")
    factor: float = 3.0
    faults: tuple[LiveFault, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.every_s > 0 and self.for_s > 0 and self.factor > 0):
            raise UserError("options.every_s, for_s, factor: must be positive")
        if not self.kinds:
            raise UserError(f"options.kinds: none; accepted: some of {', '.join(get_args(Kind))}")


def run(context: Context) -> Outcome:
    """The deployment under its faults, once per repeat."""
    options, setting = context.options, Setting.of(context)
    point = setting.point
    names = [f"prfaas0.{index}" for index in range(point.n_prfaas)]
    names += [f"pd0.{index}" for index in range(point.n_p + point.n_d)]
    seeds = range(context.settings.seed, context.settings.seed + options.repeats)
    return live_study.run(context, {seed: options.faults or drawn(options, names, seed) for seed in seeds})


def drawn(options: Any, names: list[str], seed: int) -> tuple[LiveFault, ...]:
    """A fault every `every_s` up to `duration_s`, of `kinds` in turn, at an instance that has none at that time."""
    rng, kinds, found = np.random.default_rng(seed), cycle(options.kinds), list[LiveFault]()
    for number in count(1):
        at_s = number * options.every_s
        if at_s >= options.duration_s:
            break
        kind = next(kinds)
        ill = {fault.instance for fault in found if at_s < fault.at_s + 2 * fault.for_s}
        able = (
            [ROUTER]
            if kind == "restart"
            else [name for name in names if kind != "out_of_memory" or name.startswith("pd")]
        )
        well = [name for name in able if name not in ill]
        if well:
            name = well[int(rng.integers(len(well)))]
            found.append(LiveFault(name, at_s, options.for_s, kind, options.factor))
    return tuple(found)


def finding(record: Record) -> str:
    """What was asked and what became of it."""
    case = record.metrics["case"].iloc[0]
    requests, lost, twice, again = (
        int(value(record, case, name))
        for name in ("requests", "requests_lost", "requests_answered_twice", "requests_tried_again")
    )
    return (
        f"Of {requests} requests {lost} were lost and {twice} answered twice, while "
        f"{int(value(record, case, 'instances_lost'))} instances were lost and replaced; {again} were tried again."
    )


EXPERIMENT = Experiment(
    "live_faults",
    {"emulate": live_study.READS},
    run,
    {"live_faults": live_study.draw},
    Options,
    live_study.check,
    profile_files,
    finding=finding,
    hinges_on=(
        "The time scale: processes start, silence is noticed and TCP retransmits in times of this machine, each of which counts as many "
        "times as time is scaled."
    ),
)
