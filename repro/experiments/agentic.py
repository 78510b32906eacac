"""Agents: sessions of many turns whose prompts share their beginning. What prefix caches are worth, and which rule uses them best.

Compared are caches that are off, attention-only (what a dense model could reuse at any block) and hybrid, and, with the hybrid cache, the
routers: each cluster's own cache, the best cache wherever it is, and the paper's rule that switches between the two by bandwidth. Hot-spot
rebalancing is added to a router that uses own caches and to the full policy, here and (`shared_context`) where it has most to do: two PD
clusters behind one PrfaaS cluster, and agents that start from a few long contexts which were prefilled once.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial

from matplotlib.figure import Figure

from repro.experiments import simulated, study_figures
from repro.experiments.base import CACHES, REBALANCE, SCHEDULER, SIMULATED, Context, Experiment, Outcome
from repro.experiments.deployment import profile_files
from repro.experiments.scale import multiplied
from repro.kvcache.pool import CacheSpec
from repro.record.directory import Record
from repro.report import style
from repro.scheduling.policies import LengthAware
from repro.scheduling.rebalance import RebalanceSpec
from repro.settings import Settings
from repro.simulate.deployments import with_scheduler
from repro.simulate.spec import SimulationSpec
from repro.workload.sessions import SessionSpec, draw_sessions

#: Cases with two PD clusters and shared contexts begin so.
SHARED = "shared_context."


@dataclass(frozen=True)
class Options(simulated.StudyOptions):
    """`sessions` are drawn anew for each seed, and so is `shared_context` for both its PD clusters together."""

    duration_s: float = 1200.0
    seeds: int = 3
    warmup_s: float = 120.0
    sessions: SessionSpec = field(default_factory=lambda: SessionSpec(0.55))
    shared_context: SessionSpec = field(
        default_factory=lambda: SessionSpec(
            1.2, mean_turns=2.0, families=16, system_tokens=32_768, first_tokens=4_000.0, primed=True
        )
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
    static, both = policies["static"], policies["two_timescale"]
    cases = _rebalanced(static, both, hybrid, rebalance) | {
        "no_cache": both,
        "attention_only": replace(both, cache=attention),
        "checkpoints_every_8_blocks": replace(both, cache=often),
        "best_cache_always": replace(with_scheduler(both, router=LengthAware()), cache=hybrid),
        "length_aware_eviction": replace(both, cache=replace(hybrid, eviction="length_aware")),
    }
    window = (options.warmup_s, options.duration_s)
    against = {"two_timescale_rebalanced": "two_timescale"}
    alone = simulated.Comparison(cases, partial(draw_sessions, options.sessions, options.duration_s), against=against)
    shared = simulated.Comparison(
        _rebalanced(_two_pd_clusters(static), _two_pd_clusters(both), hybrid, rebalance),
        partial(draw_sessions, options.shared_context, options.duration_s),
        prefix=SHARED,
        against=against,
    )
    outcome = simulated.compare(context, [alone, shared], window, setting.slo, options.seeds)
    own = {name: table[~table["case"].str.startswith(SHARED)] for name, table in outcome.tables.items()}
    return replace(outcome, tables=own)


def _rebalanced(
    static: SimulationSpec, both: SimulationSpec, cache: CacheSpec, rebalance: RebalanceSpec
) -> dict[str, SimulationSpec]:
    """Own caches and the full policy, each without and with rebalancing."""
    warm = {"static": replace(static, cache=cache), "two_timescale": replace(both, cache=cache)}
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
)
