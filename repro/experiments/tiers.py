"""All four tiers on one deployment: the equations, the simulator, the replayed live system and the live system with the real model.

The same requests at the same rate, the same profile (measured here, on this machine, of this model), the same scheduler object. The tiers
differ in what is real, so each step from one to the next shows what the step before left out: queues, then a real clock, messages and
TCP, then instances that share this machine's cores. Tokens of the computing tier are held against the model unsplit, and that against
its own `generate`.

On a machine with fewer cores than instances the last step is large, and that is the finding: the profile was measured with the machine
to itself.
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
from repro.experiments.computed import Answers, Computing, measured_profile
from repro.experiments.deployment import profile_files
from repro.experiments.live import Played, Wire, deployed
from repro.experiments.split_model import check_one, engine_of, vocabulary_of
from repro.experiments.study import run_once
from repro.experiments.table3 import one_model
from repro.models.build import build
from repro.profiles.base import PhaseProfile
from repro.profiles.presets import load_profile
from repro.record.directory import Record
from repro.record.metrics import Metric
from repro.record.request_metrics import UNITS, summarise
from repro.report import style
from repro.scheduling.latency import prefill_latency
from repro.scheduling.search import search
from repro.scheduling.throughput import Deployment
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
    """`requests` at `load` of the model's Λ_max; tokens of the first `compared` are held against the model's. The rest is how."""

    requests: int = 60
    load: float = 0.5
    compared: int = 12
    chunk_tokens: int = 128
    threads: int = 1
    repeats: int = 3
    pieces: int = 8

    def __post_init__(self) -> None:
        if not 0 < self.load < 1:
            raise UserError(f"options.load: {self.load}; accepted: between 0 and 1")
        at_least(self, "options", requests=20, compared=1, chunk_tokens=1, threads=1, repeats=3, pieces=1)


def run(context: Context) -> Outcome:
    """Measure the profile, find the operating point, and ask every tier."""
    options, settings = context.options, context.settings
    model = one_model(settings)
    profile = own_profile(context)
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
    engine = engine_of(model, options.chunk_tokens, options.threads)
    computing = Computing(engine, vocabulary_of(model), options.requests)
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


def own_profile(context: Context) -> PhaseProfile:
    """The profile that was asked for, else the model's own, measured now in as many threads as an instance will have."""
    settings, options = context.settings, context.options
    if settings.profile is not None:
        return load_profile(settings.profile, Path(settings.results) / "profiles")
    return measured_profile(context, one_model(settings), settings.workload.length_law(), options.repeats)


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
    """That the computing tier did the work: tokens as the model gives them unsplit, bytes as the layout says, all requests answered."""
    config = computing.config("reference", settings.transport, None, 1, settings.seed)
    assert isinstance(config, TorchInstanceConfig)
    answers = Answers(build(one_model(settings), "cpu"), config, context.options.threads)
    same, compared = answers.right(played, context.options.compared)
    remote = played.requests[played.requests["route"] == "prfaas"]
    sent, layout_bytes = float(remote["payload_bytes"].sum()), float(profile.kv_bytes(remote["input_tokens"] - 1).sum())
    return [
        context.metric("execute", "tokens_match", same / compared if compared else float("nan"), "", "measured", n=compared),
        context.metric("execute", "kv_bytes_over_layout", sent / layout_bytes if layout_bytes else float("nan"), "", "measured"),
        context.metric("execute", "wire_overhead", played.wire_overhead, "", "measured"),
    ]  # fmt: skip


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
    left.legend(fontsize=8)
    right.set(ylabel="egress (Mbit/s)", title="What crosses the link")
    return figure


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
    check=check,
    inputs=profile_files,
)  # fmt: skip
