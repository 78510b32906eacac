"""One deployment under the configured policy and the configured workload: what its requests meet, with intervals over seeds.

Policies and workloads are values of the configuration, so a sweep over both compares them:

    python -m repro -m experiment=simulation policy=static,paper workload=paper,diurnal
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from repro.errors import UserError
from repro.experiments import simulated, study_figures
from repro.experiments.base import DECODE, FAILURES, SCHEDULER, SIMULATED, SITES, Context, Experiment, Outcome
from repro.experiments.deployment import (
    check_decoding,
    decoding,
    deployment,
    profile_files,
    site_links,
    within_memory,
)
from repro.experiments.study import seeds_of
from repro.record.metrics import Metric
from repro.record.statistics import Estimate
from repro.settings import Settings
from repro.simulate.deployments import simulated as deployed
from repro.simulate.failures import Pool, available_fraction, faults
from repro.simulate.spec import Fault

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
    for outage in settings.cluster.failures.schedule:
        count = _instances(settings)[outage.pool]
        if outage.instance >= count:
            raise UserError(
                f"cluster.failures.schedule: instance {outage.instance} of {outage.pool} does not exist; accepted: below {count}"
            )
    simulated.cache_of(settings.policy, deployment(settings).pd)
    workload = settings.workload
    if settings.cluster.also_prfaas and settings.policy.cache.enabled:
        # A prefix is fetched from the cluster that holds it, while the scheduler asks for it where the request would be done first.
        raise UserError("cluster.also_prfaas: has no prefix caches; accepted: with policy.cache.enabled=false")
    if options.load is not None and (workload.sessions is not None or workload.trace is not None):
        raise UserError(f"options.load: workload={workload.name} brings its own arrivals; accepted: null")
    simulated.check_blocks(settings, {f"workload={workload.name}": workload.block_tokens()})
    router = settings.policy.router
    if router in ("naive", "homogeneous"):
        raise UserError(
            f"policy.router: {router} needs a deployment of its own (experiment=table6); accepted: threshold, prfaas, "
            "length_aware, random_split"
        )


def _instances(settings: Settings) -> Mapping[Pool, int]:
    return {"prfaas": settings.cluster.prfaas.instances, "pd": settings.cluster.pd.instances}


def run(context: Context) -> Outcome:
    """The deployment, seed by seed."""
    options, settings = context.options, context.settings
    setting = simulated.Setting.of(context, decoding(deployment(settings), settings))
    placed = within_memory(
        deployed(setting.base, setting.point, setting.link, site_links=site_links(settings)), settings
    )
    spec = simulated.scheduled(placed, settings.policy, setting.point)
    rate = setting.rate(_USUAL_LOAD if options.load is None else options.load)
    duration_s = options.duration_s if settings.workload.trace is None else settings.workload.recorded.end_s
    failures, instances = settings.cluster.failures, _instances(settings)
    failing = {
        seed: faults(failures, instances, duration_s, seed) if failures.enabled else ()
        for seed in seeds_of(context, options.seeds)
    }
    comparison = simulated.Comparison(
        {"deployment": simulated.cached(spec, settings.policy)},
        partial(settings.workload.stream, rate, duration_s),
        baseline="deployment",
        faults=failing,
    )
    warmup_s = None if options.warmup_s is None else min(options.warmup_s, duration_s / 2)
    window_s = (warmup_s, duration_s)
    outcome = simulated.compare(context, [comparison], window_s, setting.slo, options.seeds)
    rows = list(outcome.metrics)
    if failures.enabled:
        rows += _availability(context, failing, instances, duration_s)
    if settings.cluster.also_prfaas:
        rows += _capacity(context, setting)
    return replace(outcome, metrics=rows)


def _capacity(context: Context, setting: simulated.Setting) -> Iterable[Metric]:
    """Of several PrfaaS clusters together, what the model gives them at the operating point."""
    point = setting.point
    yield context.metric("deployment", "lambda_max", point.lambda_max, "req/s", "computed")
    yield context.metric("deployment", "threshold_tokens", point.threshold_tokens, "tokens", "computed")
    yield context.metric("deployment", "n_prfaas", point.n_prfaas, "instances", "computed")
    yield context.metric("deployment", "theta_prfaas", point.stages.prfaas, "req/s", "computed")


def _availability(
    context: Context, failing: Mapping[int, tuple[Fault, ...]], instances: Mapping[Pool, int], duration_s: float
) -> Iterable[Metric]:
    for pool, count in instances.items():
        share = Estimate.of([available_fraction(own, pool, count, duration_s) for own in failing.values()], 1.0)
        yield context.metric(
            pool, "available_fraction", share.value, "", "simulated", interval=(share.low, share.high), n=share.n
        )


EXPERIMENT = Experiment(
    "simulation",
    {
        "simulate": (
            *SIMULATED,
            *SCHEDULER,
            SITES,
            DECODE,
            FAILURES,
            "policy.cache",
            "policy.rebalance",
            "workload",
            "options",
        )
    },
    run,
    {"over_time": study_figures.draw_over_time},
    Options,
    check,
    profile_files,
)
