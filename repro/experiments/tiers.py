"""All four tiers on one deployment: the equations, the simulator, the replayed live system and the live system with the real model.

The same requests at the same rate, the same profile (measured here, on this machine, of this model), the same scheduler object. The tiers
differ in what is real, so each step from one to the next shows what the step before left out: queues, then a real clock, messages and
TCP, then instances that share this machine's cores. Tokens of the computing tier are held against the model unsplit, and that against
its own `generate`.

An instance rests after every forward pass, in the profile as in service, so that all of them together need no more cores than a small
machine has: the profile was measured with the machine to itself, and at full speed the last step is mostly waiting for a core.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from repro.errors import UserError, at_least
from repro.experiments.base import MODEL, SIMULATED, WIRE, Context, Experiment, Outcome
from repro.experiments.computed import TOKENS_PER_S, Answers, Computing, measured_profile, prefill_over_profile
from repro.experiments.deployment import profile_files
from repro.experiments.live import Played, Wire, deployed
from repro.experiments.split_model import check_one, engine_of, vocabulary_of
from repro.experiments.study import run_once
from repro.experiments.table3 import one_model
from repro.models.build import build
from repro.models.spec import ModelSpec
from repro.profiles.base import PhaseProfile
from repro.profiles.presets import load_profile
from repro.record.directory import Record
from repro.record.metrics import Metric, value
from repro.record.request_metrics import UNITS, summarise
from repro.report import style
from repro.scheduling.latency import prefill_latency
from repro.scheduling.search import search
from repro.scheduling.throughput import Deployment
from repro.serving.cluster_caches import PD, PRFAAS
from repro.serving.ray_launcher import RayLauncher, check_placement
from repro.serving.scale import Scale
from repro.serving.torch_instance import TorchInstanceConfig
from repro.settings import Settings
from repro.simulate.deployments import requests, shared_link, simulated
from repro.workload.arrivals import Poisson

TIERS = ("model", "simulate", "emulate", "execute")
METRICS = (
    "ttft_mean_s", "ttft_p50_s", "ttft_p90_s", "tpot_mean_s", "goodput", "queue_mean_s", "transfer_exposed_s", "offload_fraction",
    "egress_bps",
)  # fmt: skip
_SOURCES = {"model": "computed", "simulate": "simulated", "emulate": "emulated", "execute": "measured"}


@dataclass(frozen=True)
class Options:
    """`requests` at `load` of the model's Λ_max; tokens of the first `compared` are held against the model's. The rest is how.

    An instance is `slowdown` times slower than this machine. With a profile that is given it must be 1: that one is of full speed.
    """

    requests: int = 60
    load: float = 0.5
    slowdown: float = 4.0
    compared: int = 12
    chunk_tokens: int = 128
    threads: int = 1
    repeats: int = 3
    pieces: int = 8

    def __post_init__(self) -> None:
        if not 0 < self.load < 1:
            raise UserError(f"options.load: {self.load}; accepted: between 0 and 1")
        if not self.slowdown >= 1:
            raise UserError(f"options.slowdown: {self.slowdown}; accepted: 1 (as fast as this machine) or more")
        at_least(self, "options", requests=20, compared=1, chunk_tokens=1, threads=1, repeats=3, pieces=1)

    def computing(self, model: ModelSpec) -> Computing:
        """Makes the instances."""
        engine = engine_of(model, self.chunk_tokens, self.threads)
        slowdowns = {PRFAAS: self.slowdown, PD: self.slowdown}
        return Computing(engine, vocabulary_of(model), self.requests, slowdowns=slowdowns)


def run(context: Context) -> Outcome:
    """Measure the profile, find the operating point, and ask every tier."""
    options, settings = context.options, context.settings
    model = one_model(settings)
    profile = own_profile(context, options.slowdown, settings.workload.slo.tokens_per_s)
    base = Deployment(
        profile, settings.cluster.prfaas.instances, profile, settings.cluster.pd.instances, settings.link.rate_bps or float("inf"),
        settings.workload.length_law(), settings.workload.mean_output_tokens(),
    )  # fmt: skip
    point = search(base, replace(settings.policy, lengths="true_mean"))
    rate = options.load * point.lambda_max
    spec = simulated(base, point, shared_link(settings.link, settings.transport))
    batches = list(requests(base, Poisson(rate), options.requests, settings.seed))
    window = (0.0, float(batches[-1].arrival_s[-1]) + 1e-9)
    context.progress(f"Λ_max {point.lambda_max:.2f} req/s by the equations; every tier gets {rate:.2f} req/s")
    latency = prefill_latency(base, point.threshold_tokens)
    values: dict[str, Mapping[str, float]] = {
        "model": {
            "ttft_mean_s": latency.mean_s, "ttft_p90_s": latency.p90_s, "offload_fraction": point.offload_fraction,
            "goodput": rate, "egress_bps": point.egress_bps * options.load,
        }
    }  # fmt: skip
    slo = settings.workload.slo
    values["simulate"] = summarise(run_once(spec, batches)[0], window, slo).values()
    computing = options.computing(model)
    wire = Wire(settings.link, settings.transport, options.pieces, Scale())
    logs = context.folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    launcher = RayLauncher(settings.ray, logs) if settings.ray is not None else None
    links, played = dict[str, Any](), dict[str, Played]()
    for tier in ("emulate", "execute"):
        context.progress(f"{tier}: {point.n_p + point.n_d + point.n_prfaas} instances")
        with deployed(
            spec, wire, logs, f"tiers-{tier}", settings.seed, computing if tier == "execute" else None, launcher
        ) as live:
            links[tier] = live.measured_link()
            played[tier] = live.play(batches)
        values[tier] = summarise(played[tier].requests, window, slo).values()
    rows = [
        context.metric("model", "lambda_max", point.lambda_max, "req/s", "computed"),
        context.metric("model", "threshold_tokens", point.threshold_tokens, "tokens", "computed"),
        context.metric("model", "n_p", point.n_p, "instances", "computed"),
        context.metric("model", "n_d", point.n_d, "instances", "computed"),
        *_rows(context, values),
        *_proofs(context, played["execute"], profile, computing, settings),
    ]
    kept = pd.concat([run.requests.assign(case=tier) for tier, run in played.items()])
    table = pd.DataFrame([{"tier": tier, **found} for tier, found in values.items()])
    workers = {tier: run.workers for tier, run in played.items()}
    return Outcome(rows, {"tiers": table}, requests=kept, provenance={"link": links, "workers": workers})


def own_profile(context: Context, slowdown: float = 1.0, tokens_per_s: float = TOKENS_PER_S) -> PhaseProfile:
    """The profile that was asked for, else the model's own, measured now in as many threads as an instance will have, and as slow."""
    settings = context.settings
    if settings.profile is not None:
        return load_profile(settings.profile, Path(settings.results) / "profiles")
    law, model = settings.workload.length_law(), one_model(settings)
    return measured_profile(context, model, law, context.options.repeats, slowdown, tokens_per_s)


def _rows(context: Context, values: Mapping[str, Mapping[str, float]]) -> list[Metric]:
    """Every metric of every tier, and each tier over the simulator."""
    rows = []
    for tier, found in values.items():
        for metric in METRICS:
            if metric in found:
                rows.append(context.metric(tier, metric, found[metric], UNITS[metric], _SOURCES[tier]))
        if tier not in ("model", "simulate"):
            for metric in ("ttft_mean_s", "ttft_p90_s", "egress_bps"):
                if base := values["simulate"][metric]:
                    rows.append(
                        context.metric(tier, f"{metric}_over_simulated", found[metric] / base, "", _SOURCES[tier])
                    )
    return rows


def _proofs(
    context: Context, played: Played, profile: PhaseProfile, computing: Computing, settings: Settings
) -> list[Metric]:
    """That the computing tier did the work, tokens and bytes, and what its prefills took by the profile that all tiers had."""
    config = computing.config("reference", settings.transport, None, 1, settings.seed)
    assert isinstance(config, TorchInstanceConfig)
    answers = Answers(build(one_model(settings), "cpu"), config, context.options.threads)
    same, compared = answers.right(played, context.options.compared)
    remote = played.requests[played.requests["route"] == "prfaas"]
    sent, layout_bytes = float(remote["payload_bytes"].sum()), float(profile.kv_bytes(remote["input_tokens"] - 1).sum())
    took = prefill_over_profile(played.requests, profile)
    return [
        context.metric("execute", "tokens_match", same / compared if compared else float("nan"), "", "measured", n=compared),
        context.metric("execute", "kv_bytes_over_layout", sent / layout_bytes if layout_bytes else float("nan"), "", "measured"),
        context.metric("execute", "wire_overhead", played.wire_overhead, "", "measured"),
        context.metric("execute", "prefill_over_profile", took, "", "measured", n=len(played.requests)),
    ]  # fmt: skip


def finding(record: Record) -> str:
    """TTFT and egress of every tier, and what of it is queue and how far the profile holds, which is where they differ."""
    table = record.metrics
    ttft, queue_s = (
        {tier: value(table, metric, tier) for tier in TIERS if tier != "model"}
        for metric in ("ttft_mean_s", "queue_mean_s")
    )
    crossed = "Nothing crosses the link."
    if (table["metric"] == "egress_bps_over_simulated").any():
        replayed, computed = (value(table, "egress_bps_over_simulated", tier) for tier in ("emulate", "execute"))
        crossed = f"Egress is {replayed:.3f} (replayed) and {computed:.3f} (computed) of the simulated."
    return (
        f"The same requests have a mean TTFT of {value(table, 'ttft_mean_s', 'model'):.2f} s by the equations, which know no queue; "
        f"{ttft['simulate']:.2f} s simulated, of it queue {queue_s['simulate']:.2f} s; {ttft['emulate']:.2f} s replayed live, queue "
        f"{queue_s['emulate']:.2f} s; and {ttft['execute']:.2f} s computed live, queue {queue_s['execute']:.2f} s, where prefills take "
        f"{value(table, 'prefill_over_profile', 'execute'):.2f} times what their profile says. {crossed}"
    )


def draw(record: Record) -> Figure:
    """TTFT of the four tiers, taken apart where a tier can: queue, prefill and the rest, with P90 above."""
    table = record.metrics
    figure, (left, right) = style.panels(2, height_in=3.2)
    tiers = [tier for tier in TIERS if tier in set(table["case"])]

    def of(tier: str, metric: str) -> float:
        rows = table[(table["case"] == tier) & (table["metric"] == metric)]["value"]
        return float(rows.iloc[0]) if len(rows) else float("nan")

    names = {
        "model": "equations\n(no queues)",
        "simulate": "simulated",
        "emulate": "live,\nreplayed",
        "execute": "live,\ncomputed",
    }
    for index, tier in enumerate(tiers):
        mean, queue = of(tier, "ttft_mean_s"), of(tier, "queue_mean_s")
        left.bar(index, mean, 0.6, color=style.BLUE, label="prefill, transfer, first step" if index == 0 else None)
        if queue == queue:
            left.bar(index, queue, 0.6, color=style.ORANGE, label="of it: queue" if tier == "simulate" else None)
        left.plot(index, of(tier, "ttft_p90_s"), "k_", ms=20, label="P90" if index == 0 else None)
        right.bar(index, of(tier, "egress_bps") / 1e6, 0.6, color=style.BLUE)
    for axis in (left, right):
        axis.set_xticks(range(len(tiers)), [names[tier] for tier in tiers])
        axis.grid(axis="x", visible=False)
    left.set(ylabel="TTFT (s)", title="The same requests on four tiers")
    left.set_ylim(top=1.4 * left.get_ylim()[1])
    left.legend(fontsize=8, loc="upper left")
    right.set(ylabel="egress (Mbit/s)", title="What crosses the link")
    return figure


def _check(settings: Settings, options: Options) -> None:
    """As `check`, and a speed that the profile is of. Raises UserError naming the key."""
    check(settings, options)
    if settings.profile is not None and options.slowdown != 1:
        raise UserError(
            f"options.slowdown: {options.slowdown:g}; accepted with a profile that is given (profile={settings.profile}): 1, since it is "
            "of instances at full speed"
        )


def check(settings: Settings, options: Any) -> None:
    """One model that can be built, prompts that it can take, and a place for it. Raises UserError naming the key."""
    check_one(settings, options)
    check_placement(settings.ray, settings.link)
    if settings.cluster.prfaas.instances < 1 or settings.cluster.pd.instances < 2:
        raise UserError("cluster: prfaas.instances must be 1 or more and pd.instances 2 or more, one for each phase")
    longest = settings.workload.length_law().maximum_tokens
    if not 1 <= settings.policy.threshold_step_tokens <= longest:
        raise UserError(
            f"policy.threshold_step_tokens: {settings.policy.threshold_step_tokens}; accepted: 1 to the longest request, {longest:g}"
        )
    if settings.workload.length_law().minimum_tokens < 2:
        raise UserError(
            "workload.lengths.minimum_tokens: accepted: 2 or more, since prefill leaves the last token to decode"
        )


READS = tuple(
    key
    for key in SIMULATED
    if not key.startswith(("cluster.", "workload.trace", "transport."))
    and (key == "link.rate_bps" or not key.startswith("link."))
)
EXPERIMENT = Experiment(
    name="tiers",
    reads={
        "execute": (
            *MODEL, *READS, "cluster.prfaas.instances", "cluster.pd.instances", *WIRE, "ray", "options",
        ),
    },
    run=run,
    figures={"tiers": draw},
    options=Options,
    check=_check,
    inputs=profile_files,
    finding=finding,
)  # fmt: skip
