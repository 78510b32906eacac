"""One deployment under the configured policy and the configured workload: what its requests meet, with intervals over seeds.

Policies and workloads are values of the configuration, so a sweep over both compares them:

    python -m repro -m experiment=simulation policy=static,paper workload=paper,diurnal
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from repro.errors import UserError
from repro.experiments import simulated, study_figures
from repro.experiments.base import DECODE, SCHEDULER, SIMULATED, Context, Experiment, Outcome
from repro.experiments.deployment import check_decoding, decoding, deployment, profile_files, within_memory
from repro.settings import Settings
from repro.simulate.deployments import simulated as deployed

_USUAL_LOAD = 0.8


@dataclass(frozen=True)
class Options:
    """`load` is the mean arrival rate as a share of Λ_max by the model with true means, 0.8 if null. Sessions and traces bring their own
    rate; a trace also its own duration. Requests count from `warmup_s` on; null cuts each run where MSER-5 says that it has settled.
    """

    load: float | None = None
    duration_s: float = 1200.0
    seeds: int = 5
    warmup_s: float | None = simulated.USUAL_WARMUP_S

    def __post_init__(self) -> None:
        simulated.check_effort(self.duration_s, self.seeds, self.warmup_s or 0.0)
        if self.load is not None and not self.load > 0:
            raise UserError(f"options.load: {self.load} is not positive")


def check(settings: Settings, options: Options) -> None:
    """A deployment that can serve, and no load beside a workload that has its own. Raises UserError naming the key."""
    simulated.check(settings, options)
    check_decoding(settings)
    workload = settings.workload
    if options.load is not None and (workload.sessions is not None or workload.trace is not None):
        raise UserError(f"options.load: workload={workload.name} brings its own arrivals; accepted: null")
    simulated.check_blocks(settings, {f"workload={workload.name}": workload.block_tokens()})
    router = settings.policy.router
    if router in ("naive", "homogeneous"):
        raise UserError(
            f"policy.router: {router} needs a deployment of its own (experiment=table6); accepted: threshold, prfaas, "
            "length_aware, random_split"
        )


def run(context: Context) -> Outcome:
    """The deployment, seed by seed."""
    options, settings = context.options, context.settings
    setting = simulated.Setting.of(context, decoding(deployment(settings), settings))
    placed = within_memory(deployed(setting.base, setting.point, setting.link), settings)
    spec = simulated.scheduled(placed, settings.policy, setting.point)
    rate = setting.rate(_USUAL_LOAD if options.load is None else options.load)
    duration_s = options.duration_s if settings.workload.trace is None else settings.workload.recorded.end_s
    comparison = simulated.Comparison(
        {"deployment": simulated.cached(spec, settings.policy)},
        partial(settings.workload.stream, rate, duration_s),
        baseline="deployment",
    )
    warmup_s = None if options.warmup_s is None else min(options.warmup_s, duration_s / 2)
    window_s = (warmup_s, duration_s)
    return simulated.compare(context, [comparison], window_s, setting.slo, options.seeds)


EXPERIMENT = Experiment(
    "simulation",
    {"simulate": (*SIMULATED, *SCHEDULER, DECODE, "policy.cache", "policy.rebalance", "workload", "options")},
    run,
    {"over_time": study_figures.draw_over_time},
    Options,
    check,
    profile_files,
)
