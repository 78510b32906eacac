"""Agents: sessions of many turns whose prompts share their beginning. What prefix caches are worth, and which rule uses them best.

Compared are caches that are off, attention-only (what a dense model could reuse at any block) and hybrid, and, with the hybrid cache, the
routers: each cluster's own cache, the best cache wherever it is, and the paper's rule that switches between the two by bandwidth.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from repro.experiments import simulated
from repro.experiments.base import Context, Experiment, Outcome
from repro.experiments.caches import CacheOptions
from repro.experiments.deployment import profile_files
from repro.scheduling.policies import LengthAware
from repro.simulate.deployments import with_scheduler
from repro.workload.sessions import SessionSpec, draw_sessions


@dataclass(frozen=True)
class Options(simulated.Options):
    """`sessions` are drawn anew for each seed; `load` is not used."""

    duration_s: float = 1200.0
    seeds: int = 3
    warmup_s: float = 120.0
    sessions: SessionSpec = field(default_factory=lambda: SessionSpec(0.55))
    cache: CacheOptions = field(default_factory=CacheOptions)


def run(context: Context) -> Outcome:
    """All cases on the same sessions."""
    options: Options = context.options
    setting = simulated.Setting.of(context)
    hybrid = options.cache.spec(setting.base.prfaas)
    attention = replace(hybrid, groups=tuple(group for group in hybrid.groups if group.kind == "block"))
    often = replace(hybrid, checkpoint_blocks=options.cache.checkpoint_blocks or 8)
    policies = setting.policies(options)
    both = policies["two_timescale"]
    cases = {
        "static": replace(policies["static"], cache=hybrid),
        "no_cache": both,
        "attention_only": replace(both, cache=attention),
        "two_timescale": replace(both, cache=hybrid),
        "checkpoints_every_8_blocks": replace(both, cache=often),
        "best_cache_always": replace(with_scheduler(both, router=LengthAware()), cache=hybrid),
        "length_aware_eviction": replace(both, cache=replace(hybrid, eviction="length_aware")),
    }
    return simulated.compare(
        context, cases, lambda seed: draw_sessions(options.sessions, options.duration_s, seed),
        (options.warmup_s, options.duration_s), setting.slo, options.seeds,
    )  # fmt: skip


EXPERIMENT = Experiment("agentic", ("simulate",), run, simulated.FIGURES, Options, profile_files)
