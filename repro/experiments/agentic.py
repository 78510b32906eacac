"""Agents: sessions of many turns whose prompts share their beginning. What prefix caches are worth, and which rule uses them best.

`static` gets the best it can have: its t is searched by simulation, for each workload with its caches, on sessions of a seed that is not
measured. The paper's search knows nothing of caches, and its t would leave most of what they save to the link.

Compared are caches that are off, attention-only (what a dense model could reuse at any block) and hybrid, and, with the hybrid cache, the
routers: each cluster's own cache, the best cache wherever it is, and the paper's rule that switches between the two by bandwidth. Hot-spot
rebalancing is added to a router that uses own caches and to the full policy, here and (`shared_context`) where it has most to do: two PD
clusters behind one PrfaaS cluster, and agents that start from a few long contexts which were prefilled once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from matplotlib.figure import Figure

from repro.errors import UserError
from repro.experiments import simulated, study_figures, study_findings
from repro.experiments.base import CACHES, REBALANCE, SCHEDULER, SIMULATED, Context, Experiment, Outcome
from repro.experiments.deployment import profile_files
from repro.experiments.scale import multiplied
from repro.experiments.study import Point, run_points
from repro.record.directory import Record
from repro.report import style
from repro.scheduling.policies import LengthAware
from repro.scheduling.rebalance import RebalanceSpec
from repro.settings import Settings
from repro.simulate.deployments import with_scheduler
from repro.simulate.spec import SimulationSpec
from repro.workload.sessions import SessionSpec, draw_sessions

#: Far from the seeds that are measured: the configured one and those that follow.
_TUNING_SEED = 1_000_000
#: Cases with two PD clusters and shared contexts begin so.
SHARED = "shared_context."


@dataclass(frozen=True)
class Options(simulated.StudyOptions):
    """`sessions` are drawn anew for each seed, and so is `shared_context` for both its PD clusters together. `static_thresholds` are the t,
    in tokens, of which `static` takes the best.
    """

    duration_s: float = 1200.0
    seeds: int = 3
    warmup_s: float = 120.0
    static_thresholds: tuple[float, ...] = (500.0, 1000.0, 2000.0, 3000.0, 5000.0, 8000.0, 12_000.0, 20_000.0)
    sessions: SessionSpec = field(default_factory=lambda: SessionSpec(0.55))
    shared_context: SessionSpec = field(
        default_factory=lambda: SessionSpec(
            1.2, mean_turns=2.0, families=16, system_tokens=32_768, first_tokens=4_000.0, primed=True
        )
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.static_thresholds or min(self.static_thresholds) < 0:
            raise UserError(
                f"options.static_thresholds: {list(self.static_thresholds)}; accepted: one or more numbers of tokens, 0 or more"
            )


def check(settings: Settings, options: Options) -> None:
    """A deployment that can serve, and caches with the sessions' blocks. Raises UserError naming the key."""
    simulated.check(settings, options)
    enabled = replace(settings, policy=replace(settings.policy, cache=replace(settings.policy.cache, enabled=True)))
    names = {"options.sessions": options.sessions, "options.shared_context": options.shared_context}
    simulated.check_blocks(enabled, {name: sessions.block_tokens for name, sessions in names.items()})


def run(context: Context) -> Outcome:
    """All cases on the same sessions, then rebalancing where contexts are shared."""
    options: Options = context.options
    setting = simulated.Setting.of(context)
    policy = context.settings.policy
    hybrid = policy.cache.spec(setting.base.prfaas)
    rebalance = replace(policy.rebalance, enabled=True)
    attention = replace(hybrid, groups=tuple(group for group in hybrid.groups if group.kind == "block"))
    often = replace(hybrid, checkpoint_blocks=policy.cache.checkpoint_blocks or 8)
    policies = setting.policies()
    both = policies["two_timescale"]
    sessions = partial(draw_sessions, options.sessions, options.duration_s)
    contexts = partial(draw_sessions, options.shared_context, options.duration_s)
    warm = replace(policies["static"], cache=hybrid)
    static, shared_static = _best_static(context, {"": (warm, sessions), SHARED: (_two_pd_clusters(warm), contexts)})
    cases = _rebalanced(static, replace(both, cache=hybrid), rebalance) | {
        "no_cache": both,
        "attention_only": replace(both, cache=attention),
        "checkpoints_every_8_blocks": replace(both, cache=often),
        "best_cache_always": replace(with_scheduler(both, router=LengthAware()), cache=hybrid),
        "length_aware_eviction": replace(both, cache=replace(hybrid, eviction="length_aware")),
    }
    window = (options.warmup_s, options.duration_s)
    against = {"two_timescale_rebalanced": "two_timescale"}
    alone = simulated.Comparison(cases, sessions, against=against)
    shared = simulated.Comparison(
        _rebalanced(shared_static, _two_pd_clusters(replace(both, cache=hybrid)), rebalance),
        contexts,
        prefix=SHARED,
        against=against,
    )
    outcome = simulated.compare(context, [alone, shared], window, setting.slo, options.seeds)
    own = {name: table[~table["case"].str.startswith(SHARED)] for name, table in outcome.tables.items()}
    searched = [
        context.metric(f"{prefix}static", "threshold_tokens", spec.scheduler.threshold_tokens, "tokens", "simulated")
        for prefix, spec in (("", static), (SHARED, shared_static))
    ]
    return replace(outcome, metrics=[*outcome.metrics, *searched], tables=own)


def _best_static(
    context: Context, workloads: Mapping[str, tuple[SimulationSpec, simulated.Stream]]
) -> list[SimulationSpec]:
    """Each deployment at the threshold with the most goodput, and among equals the shortest TTFT, on a seed that is not measured."""
    options: Options = context.options
    measuring = simulated.Measuring(
        (options.warmup_s, options.duration_s), context.settings.workload.slo, options.duration_s, -1, ""
    )
    points = {
        f"{prefix}static, t {tokens:g}": Point(
            prefix, _TUNING_SEED, with_scheduler(spec, threshold_tokens=tokens), stream
        )
        for prefix, (spec, draw) in workloads.items()
        for stream in (draw(_TUNING_SEED + context.settings.seed),)
        for tokens in options.static_thresholds
    }
    found = run_points(context, measuring, points)
    best = []
    for prefix in workloads:
        own = [
            (point.spec, run.values) for point, run in zip(points.values(), found, strict=True) if point.case == prefix
        ]
        best.append(max(own, key=lambda one: (one[1]["goodput"], -one[1]["ttft_mean_s"]))[0])
    return best


def _rebalanced(static: SimulationSpec, both: SimulationSpec, rebalance: RebalanceSpec) -> dict[str, SimulationSpec]:
    """Own caches and the full policy, each without and with rebalancing."""
    warm = {"static": static, "two_timescale": both}
    return warm | {f"{name}_rebalanced": with_scheduler(spec, rebalance=rebalance) for name, spec in warm.items()}


def _two_pd_clusters(spec: SimulationSpec) -> SimulationSpec:
    """The deployment twice, with one PrfaaS cluster and one link of double size for both PD clusters."""
    return replace(multiplied(spec, 2), pd=spec.pd * 2)


def draw_rebalancing(record: Record) -> Figure:
    """What left PrfaaS where contexts are shared, and what rebalancing changed in it, in pairs."""
    table = record.metrics[record.metrics["case"].str.startswith(SHARED)]
    rows = table.assign(case=table["case"].str.removeprefix(SHARED))
    for column in ("value", "ci_low", "ci_high"):
        rows[column] = rows[column].where(rows["unit"] != "bit/s", rows[column] / 1e9)
    figure, (left, right) = style.panels(2, height_in=2.6)
    study_figures.bars(left, rows[rows["metric"] == "link_egress_bps"].reset_index(drop=True))
    left.set(xlabel="egress (Gbps)", title="All that left PrfaaS")
    changed = rows["metric"].str.startswith("link_egress_bps_minus") & rows["case"].str.endswith("_rebalanced")
    study_figures.bars(right, rows[changed].reset_index(drop=True))
    right.axvline(0, color="black", lw=0.8)
    right.set(xlabel="paired difference (Gbps)", title="Against the same, not rebalanced")
    return figure


def draw_goodput(record: Record) -> Figure:
    """Goodput of the cases with one PD cluster."""
    return study_figures.draw_goodput(record, SHARED)


FIGURES = {"over_time": study_figures.draw_over_time, "goodput": draw_goodput, "rebalancing": draw_rebalancing}
EXPERIMENT = Experiment(
    "agentic",
    {"simulate": (*SIMULATED, *SCHEDULER, *CACHES, *REBALANCE, "options")},
    run,
    FIGURES,
    Options,
    check,
    profile_files,
    finding=study_findings.goodput,
)
