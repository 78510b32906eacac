"""Conversations with instances that compute: a turn goes on from state that a prefix cache holds, and gets the tokens that it gets without.

`live_sessions` with nothing replayed. Every instance that prefills has a pool of its own for real state (§3.2); the router knows what each
holds from what it says, and sends a turn to the one that holds most of it. `own_caches` and `best_cache` are the two rules of §3.4.3; by
the latter a prefix that the other cluster has crosses the link first. All cases get the same prompts, whose answers are held against each
other and against the model's own `generate`.

The simulator's PD cluster keeps what was delivered to decode and the answers too; here only prefill leaves anything, so less is found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from repro.errors import UserError, at_least
from repro.experiments import tiers
from repro.experiments.base import CACHES, MODEL, WIRE, Context, Experiment, Outcome
from repro.experiments.computed import Answers, Computing, check_pools, measured_profile, pools
from repro.experiments.deployment import profile_files
from repro.experiments.live import Played, Wire, deployed
from repro.experiments.split_model import engine_of, vocabulary_of
from repro.experiments.study import run_once
from repro.experiments.table3 import one_model
from repro.models.build import build
from repro.profiles.presets import load_profile
from repro.record.directory import Record
from repro.record.metrics import Metric, value
from repro.record.request_metrics import UNITS, summarise
from repro.report import style
from repro.scheduling.policies import LengthAware
from repro.scheduling.search import search
from repro.scheduling.throughput import Deployment as Planned
from repro.serving.scale import Scale
from repro.serving.torch_instance import TorchInstanceConfig
from repro.settings import Settings
from repro.simulate.deployments import shared_link, simulated, with_scheduler
from repro.simulate.spec import SimulationSpec
from repro.workload.sessions import draw_prompts
from repro.workload.stream import Chains, RequestBatch

CASES = {"no_cache": "no caches", "own_caches": "own caches", "best_cache": "best cache"}
_METRICS = ("cached_fraction", "ttft_mean_s", "offload_fraction", "egress_bps")


@dataclass(frozen=True)
class Options:
    """Sessions arrive for `duration_s`; tokens of the first `compared` requests are held against `generate`. The rest is how to compute."""

    duration_s: float = 60.0
    compared: int = 60
    drain_s: float = 120.0
    chunk_tokens: int = 32
    threads: int = 1
    repeats: int = 3
    pieces: int = 8

    def __post_init__(self) -> None:
        for key in ("duration_s", "drain_s"):
            if not getattr(self, key) > 0:
                raise UserError(f"options.{key}: {getattr(self, key)} is not positive")
        at_least(self, "options", compared=1, chunk_tokens=1, threads=1, repeats=3, pieces=1)


def check(settings: Settings, options: Options) -> None:
    """As for all tiers on one deployment, with open-loop sessions and caches that instances can have. Raises UserError naming the key."""
    tiers.check(settings, options)
    sessions, cache = settings.workload.sessions, settings.policy.cache
    if sessions is None:
        raise UserError(f"workload.sessions: null; experiment={settings.name} needs sessions")
    if sessions.closed_loop:
        raise UserError("workload.sessions.closed_loop: the load generator does not wait for answers; accepted: false")
    if cache.block_tokens != sessions.block_tokens:
        raise UserError(
            f"policy.cache.block_tokens: {cache.block_tokens}, but workload.sessions names blocks of {sessions.block_tokens} tokens; "
            f"accepted: {sessions.block_tokens}"
        )
    check_pools(settings, options.chunk_tokens, "options.chunk_tokens")


def run(context: Context) -> Outcome:
    """The same conversations without caches, and by both rules; a run in which a token differs counts as failed."""
    options, settings = context.options, context.settings
    sessions, policy, model = settings.workload.sessions, settings.policy, one_model(settings)
    assert sessions is not None
    law = settings.workload.length_law()
    if settings.profile is not None:
        profile = load_profile(settings.profile, Path(settings.results) / "profiles")
    else:
        profile = measured_profile(context, model, law, options.repeats)
    base = Planned(
        profile, settings.cluster.prfaas.instances, profile, settings.cluster.pd.instances, settings.link.rate_bps or float("inf"),
        law, settings.workload.mean_output_tokens(),
    )  # fmt: skip
    point = search(base, replace(policy, lengths="true_mean"))
    plain = simulated(base, point, shared_link(settings.link, settings.transport))
    own = replace(plain, cache=policy.cache.spec(profile))
    specs = {"no_cache": plain, "own_caches": own, "best_cache": with_scheduler(own, router=LengthAware())}
    computing = Computing(
        engine_of(model, options.chunk_tokens, options.threads), vocabulary_of(model), 1, pools(settings, point.n_p)
    )
    prompts = draw_prompts(sessions, options.duration_s, settings.seed, computing.vocabulary)
    batches = list(settings.workload.stream(1.0, options.duration_s, settings.seed))
    named = _named(batches, [computing.named(prompt, policy.cache.block_tokens) for prompt in prompts])
    played = {case: _played(context, case, spec, computing, named, prompts) for case, spec in specs.items()}
    config = computing.config("reference", settings.transport, None, 1, settings.seed)
    assert isinstance(config, TorchInstanceConfig)
    answers = Answers(build(model, "cpu"), config, options.threads)
    rows, failures = list[Metric](), list[str]()
    window = (0.0, options.duration_s)
    for case, run_ in played.items():
        right, compared = answers.right(run_, options.compared, prompts)
        same = sum(run_.tokens.get(number) == found for number, found in played["no_cache"].tokens.items())
        answered = len(played["no_cache"].tokens)
        simulated_, _ = run_once(specs[case], batches)
        for name, table, source in ((case, run_.requests, "measured"), (f"{case}.simulate", simulated_, "simulated")):
            found = summarise(table, window, settings.workload.slo).values()
            rows += [context.metric(name, metric, found[metric], UNITS[metric], source) for metric in _METRICS]
        rows += [
            context.metric(case, "requests", len(prompts), "requests", "measured"),
            context.metric(case, "requests_lost", len(prompts) - len(run_.tokens), "requests", "measured"),
            context.metric(case, "tokens_match", right / compared if compared else float("nan"), "", "measured", n=compared),
            context.metric(case, "tokens_as_uncached", same / answered if answered else float("nan"), "", "measured", n=answered),
            context.metric(case, "copied_bytes", run_.copied_bytes, "bytes", "measured"),
        ]  # fmt: skip
        if right < compared or same < answered or len(run_.tokens) < len(prompts):
            failures.append(
                f"{case}: {compared - right} of {compared} answers are not the model's own, {answered - same} differ from those without "
                f"caches, {len(prompts) - len(run_.tokens)} requests lost"
            )
        context.progress(f"{case}: {right} of {compared} answers right, {same} of {answered} as without caches")
    return Outcome(
        rows,
        requests=pd.concat([run_.requests.assign(case=case) for case, run_ in played.items()]),
        provenance={"workers": {case: run_.workers for case, run_ in played.items()}},
        failure="; ".join(failures),
    )


def _named(batches: Sequence[RequestBatch], chains: Sequence[Chains]) -> list[RequestBatch]:
    """The same requests, their blocks by the names that instances give them."""
    named, at = [], 0
    for batch in batches:
        own = list(chains[at : at + len(batch.arrival_s)])
        named.append(batch._replace(chains=own))
        at += len(own)
    return named


def _played(
    context: Context,
    case: str,
    spec: SimulationSpec,
    computing: Computing,
    batches: Sequence[RequestBatch],
    prompts: Sequence[tuple[int, ...]],
) -> Played:
    settings, options = context.settings, context.options
    wire = Wire(settings.link, settings.transport, options.pieces, Scale())
    logs = context.folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    engines = computing if spec.cache is not None else replace(computing, caches={})
    with deployed(spec, wire, logs, f"live-reuse-{case}".replace("_", "-"), settings.seed, engines) as live:
        return live.play(batches, prompts=prompts, drain_s=options.drain_s)


def finding(record: Record) -> str:
    """What was found cached, and whether the tokens are those without."""
    words = [
        f"{CASES[case]} {100 * value(record.metrics, 'cached_fraction', case):.1f} % of input tokens and a mean TTFT of "
        f"{value(record.metrics, 'ttft_mean_s', case):.2f} s"
        for case in CASES
    ]
    same = min(value(record.metrics, "tokens_as_uncached", case) for case in CASES)
    return f"Computed conversations found cached: {'; '.join(words)}. {100 * same:g} % of answers are those without caches, token by token."


def draw(record: Record) -> Figure:
    """T_prefill over prompt length, with what was cached taken off: each request of each case."""
    table = record.requests
    figure, (left, right) = style.panels(2, height_in=2.8)
    for (case, name), (colour, marker, _) in zip(CASES.items(), style.SERIES, strict=False):
        own = table[table["case"] == case]
        for axis, x in ((left, own["input_tokens"]), (right, own["input_tokens"] - own["cached_tokens"])):
            axis.plot(x, own["prefill_s"], marker, color=colour, ms=3, label=name)
    left.set(xlabel="prompt (tokens)", ylabel="prefill (s)", title="What a prompt costs")
    right.set(xlabel="of it not cached (tokens)", title="What is left to compute")
    left.legend(fontsize=8)
    return figure


EXPERIMENT = Experiment(
    "live_reuse",
    {
        "execute": (
            *MODEL, *tiers.READS, *CACHES, "workload.sessions", "cluster.prfaas.instances", "cluster.pd.instances", *WIRE, "options",
        )
    },
    run,
    {"live_reuse": draw},
    Options,
    check,
    profile_files,
    finding=finding,
)  # fmt: skip
