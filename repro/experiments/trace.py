"""Replay of a public trace: real bursts, real prefixes, and the hit rates of both kinds of cache.

The kit carries no trace: `options.trace` names a file in any format of `repro.workload.traces`. Caches have the trace's own blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from repro.errors import UserError
from repro.experiments import simulated, study_figures
from repro.experiments.base import CACHES, SCHEDULER, SIMULATED, Context, Experiment, Outcome
from repro.experiments.deployment import profile_files
from repro.kvcache.pool import CacheSpec, HybridPool
from repro.record.metrics import Metric
from repro.settings import Settings
from repro.workload.stream import RequestBatch
from repro.workload.traces import Trace, TraceSpec, read_trace


@dataclass(frozen=True)
class Options:
    """`trace` is a file, and the keys after it say how to read it (`repro.workload.traces.TraceSpec`). Requests count from `warmup_s` on.

    A trace is the same for every seed, so `seeds` only repeats the policies' own choices.
    """

    trace: str | None = None
    format: Literal["auto", "mooncake", "bailian", "burstgpt", "azure", "csv"] = "auto"
    speed: float = 1.0
    time_unit: Literal["auto", "s", "ms", "us", "ns"] = "auto"
    block_tokens: int | None = None
    start_s: float = 0.0
    duration_s: float | None = None
    requests: int | None = None
    columns: dict[str, str] = field(default_factory=dict)
    seeds: int = 2
    warmup_s: float = 0.0

    def __post_init__(self) -> None:
        if self.seeds < 2:
            raise UserError(f"options.seeds: {self.seeds} is below 2, which an interval needs")
        if not self.warmup_s >= 0:
            raise UserError(f"options.warmup_s: {self.warmup_s} is negative")

    @cached_property
    def recorded(self) -> Trace:
        """The trace, read once. Raises UserError naming the key, or the line of the file."""
        assert self.trace is not None
        spec = TraceSpec(
            self.trace, self.format, self.speed, self.time_unit, self.block_tokens, self.start_s, self.duration_s, self.requests,
            self.columns,
        )  # fmt: skip
        return read_trace(spec, "options.trace", "options")


def hit_rates(batch: RequestBatch, cache: CacheSpec) -> dict[str, float]:
    """Share of all blocks that an unlimited cache would serve: attention alone, and every layer group.

    A prompt's last key names a block that it does not fill. Attention-only rates count it, as those published for the traces do; a
    checkpoint is taken at the end of the last full block, since nobody else's prompt ends where this one does.
    """
    attention = replace(
        cache, groups=tuple(group for group in cache.groups if group.kind == "block"), capacity_bytes=float("inf")
    )
    pools = {"attention_only": HybridPool(attention), "hybrid": HybridPool(replace(cache, capacity_bytes=float("inf")))}
    hits, blocks = dict.fromkeys(pools, 0), 0
    for tokens, (keys, _) in zip(batch.input_tokens.tolist(), batch.chains or [], strict=False):
        blocks += len(keys)
        for name, pool in pools.items():
            part = keys if name == "attention_only" else keys[: (tokens - 1) // cache.block_tokens]
            hits[name] += pool.match_blocks(part)
            pool.insert(part)
    return {name: count / blocks for name, count in hits.items()} if blocks else {}


def run(context: Context) -> Outcome:
    """All policies on the whole trace, with hybrid caches where it names prefixes."""
    options: Options = context.options
    setting = simulated.Setting.of(context)
    recorded = options.recorded
    batch = recorded.batch
    cache = context.settings.policy.cache.spec(setting.base.prfaas)
    if recorded.block_tokens is not None:
        cache = replace(cache, block_tokens=recorded.block_tokens)
    rows: list[Metric] = [
        context.metric(name, "block_hit_rate", rate, "", "simulated", n=len(batch.arrival_s))
        for name, rate in hit_rates(batch, cache).items()
    ]
    policies = setting.policies()
    cases = {name: replace(spec, cache=cache if batch.chains else None) for name, spec in policies.items()}
    end = recorded.end_s
    outcome = simulated.compare(
        context,
        [simulated.Comparison(cases, lambda _: recorded)],
        (min(options.warmup_s, end / 2), end),
        setting.slo,
        options.seeds,
        bin_s=60.0,
    )
    metrics = [*rows, *map(_without_repeats, outcome.metrics)]
    return replace(
        outcome,
        metrics=metrics,
        provenance={
            "trace": Path(str(options.trace)).name,
            "format": recorded.format,
            "requests": len(batch.arrival_s),
        },
    )


def _without_repeats(metric: Metric) -> Metric:
    """A policy that draws nothing gives the same value for every seed of one trace: that is one sample, and no interval."""
    return replace(metric, ci_low=math.nan, ci_high=math.nan, n=1) if metric.ci_low == metric.ci_high else metric


def check(settings: Settings, options: Options) -> None:
    """A deployment that can serve, and a trace for it. Raises UserError naming the key."""
    simulated.check(settings, options)
    if options.trace is None:
        raise UserError("options.trace: no file given; accepted: the path of a request trace")
    _ = options.recorded  # every line is looked at before anything runs


def files(settings: Settings) -> Sequence[Path]:
    """The profiles' files and the trace."""
    trace = settings.options.get("trace")
    return [*profile_files(settings), *([Path(trace)] if trace and Path(trace).is_file() else [])]


#: The trace has its own lengths, arrivals and block size; the workload's are those that threshold and split were chosen for.
_READS = (*SIMULATED, *SCHEDULER, *(key for key in CACHES if key != "policy.cache.block_tokens"))
EXPERIMENT = Experiment(
    "trace",
    {"simulate": (*_READS, "options")},
    run,
    study_figures.FIGURES,
    Options,
    check,
    files,
)
