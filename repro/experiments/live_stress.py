"""A deployment that computes a real model, its instances killed one after the other while the link fails: every token must be right.

`live_faults` with nothing replayed. A request that was lost with an instance or a transfer is prefilled anew, perhaps elsewhere, so an
answer may come of state that crossed the link twice; it is held against the model unsplit, and that against its own `generate`. After
each repeat the processes of all instances, replaced ones included, must be gone.

    python -m repro experiment=live_stress options.repeats=20
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import pandas as pd
from matplotlib.figure import Figure

from repro.errors import UserError, at_least
from repro.experiments import tiers
from repro.experiments.base import MODEL, WIRE, Context, Experiment, Outcome
from repro.experiments.computed import Answers, Computing, measured_profile
from repro.experiments.deployment import profile_files
from repro.experiments.live import Wire, deployed
from repro.experiments.live_faults import drawn
from repro.experiments.split_model import engine_of, vocabulary_of
from repro.experiments.table3 import one_model
from repro.models.build import build
from repro.profiles.presets import load_profile
from repro.record.directory import Record
from repro.record.metrics import value
from repro.record.requests import ANSWERED
from repro.report import style
from repro.scheduling.search import search
from repro.scheduling.throughput import Deployment as Planned
from repro.serving.faults import Kind
from repro.serving.ray_launcher import RayLauncher
from repro.serving.scale import Scale
from repro.serving.torch_instance import TorchInstanceConfig
from repro.simulate.deployments import requests, shared_link, simulated
from repro.simulate.spec import SimulationSpec
from repro.workload.arrivals import Poisson


@dataclass(frozen=True)
class Options:
    """`requests` at `rate_per_s`, a fault every `every_s` that ends `for_s` later, all of it `repeats` times with seeds of their own.

    Requests of one length have one of `prompts` prompts, so that not every answer has to be computed twice. The rest is how to compute.
    """

    requests: int = 500
    rate_per_s: float = 4.0
    every_s: float = 5.0
    for_s: float = 1.0
    kinds: tuple[Kind, ...] = ("kill",)
    factor: float = 3.0
    repeats: int = 1
    prompts: int = 4
    drain_s: float = 120.0
    chunk_tokens: int = 128
    threads: int = 1
    pieces: int = 8

    def __post_init__(self) -> None:
        for key in ("rate_per_s", "every_s", "for_s", "factor", "drain_s"):
            if not getattr(self, key) > 0:
                raise UserError(f"options.{key}: {getattr(self, key)} is not positive")
        at_least(self, "options", requests=20, repeats=1, prompts=1, chunk_tokens=1, threads=1, pieces=1)
        if not self.kinds:
            raise UserError(f"options.kinds: none; accepted: some of {', '.join(get_args(Kind))}")

    @property
    def duration_s(self) -> float:
        """Of a repeat's arrivals, about."""
        return self.requests / self.rate_per_s


@dataclass(frozen=True)
class _Repeat:
    """What became of one repeat."""

    seed: int
    requests: pd.DataFrame
    events: tuple[tuple[float, str], ...]
    lost: int
    twice: int
    answers: int
    right: int
    processes_left: int
    link: Mapping[str, Any]
    workers: Mapping[str, Mapping[str, float]]

    @property
    def ends(self) -> int:
        return sum(words.startswith("instance ") for _, words in self.events)

    @property
    def failure(self) -> str:
        wrong = self.answers - self.right
        if not (self.lost or self.twice or wrong or self.processes_left):
            return ""
        return (
            f"seed {self.seed}: {self.lost} requests lost, {self.twice} answered twice, {wrong} with wrong tokens, "
            f"{self.processes_left} processes left"
        )


def run(context: Context) -> Outcome:
    """The deployment under its faults, once per repeat; a repeat in which anything is wrong fails the run."""
    options, settings = context.options, context.settings
    model = one_model(settings)
    if settings.profile is not None:
        profile = load_profile(settings.profile, Path(settings.results) / "profiles")
    else:
        profile = measured_profile(context, model, settings.workload.length_law(), 3)
    base = Planned(
        profile, settings.cluster.prfaas.instances, profile, settings.cluster.pd.instances, settings.link.rate_bps or float("inf"),
        settings.workload.length_law(), settings.workload.mean_output_tokens(),
    )  # fmt: skip
    point = search(base, replace(settings.policy, lengths="true_mean"))
    spec = simulated(base, point, shared_link(settings.link, settings.transport))
    computing = Computing(
        engine_of(model, options.chunk_tokens, options.threads), vocabulary_of(model), options.prompts
    )
    config = computing.config("reference", settings.transport, None, 1, settings.seed)
    assert isinstance(config, TorchInstanceConfig)
    answers = Answers(build(model, "cpu"), config, options.threads)
    repeats = []
    for seed in range(settings.seed, settings.seed + options.repeats):
        found = _repeat(context, spec, base, computing, answers, seed)
        repeats.append(found)
        context.progress(
            f"seed {seed}: {len(found.requests)} requests, {found.lost} lost, {found.twice} answered twice, {found.right} of "
            f"{found.answers} answers right, {found.ends} instances lost"
        )
    rows = [
        context.metric("execute", name, number, unit, "measured", n=len(repeats))
        for name, number, unit in _totals(repeats)
    ]
    events = [
        {"seed": one.seed, "at_s": at_s, "event": words.split("; ")[0]} for one in repeats for at_s, words in one.events
    ]
    return Outcome(
        rows,
        {"events": pd.DataFrame(events, columns=["seed", "at_s", "event"])},
        requests=pd.concat([one.requests.assign(case="execute", seed=one.seed) for one in repeats]),
        provenance={
            "link": {f"seed {one.seed}": one.link for one in repeats},
            "workers": {f"seed {one.seed}": one.workers for one in repeats},
        },
        failure="; ".join(one.failure for one in repeats if one.failure),
    )


def _repeat(
    context: Context, spec: SimulationSpec, base: Planned, computing: Computing, answers: Answers, seed: int
) -> _Repeat:
    options, settings = context.options, context.settings
    wire = Wire(settings.link, settings.transport, options.pieces, Scale())
    logs = context.folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    batches = list(requests(base, Poisson(options.rate_per_s), options.requests, seed))
    launcher = RayLauncher(settings.ray, logs) if settings.ray is not None else None
    # Prompts are the same in every repeat, lengths and arrivals are not.
    with deployed(spec, wire, logs, f"live-stress-{seed}", settings.seed, computing, launcher) as live:
        link = live.measured_link()
        faults = drawn(options, live.fleet.names, seed)
        played = live.play(batches, faults=faults, drain_s=options.drain_s)
        pids = live.fleet.pids
    found = played.requests
    answered = found["outcome"].isin(ANSWERED)
    right, checked = answers.right(played)
    left = _alive(pids) + (launcher.left() if launcher is not None else 0)
    return _Repeat(
        seed, found, played.events, options.requests - int(found.loc[answered, "id"].nunique()), int(found["id"].duplicated().sum()),
        checked, right, left, link, played.workers,
    )  # fmt: skip


def _alive(pids: Iterable[int]) -> int:
    return sum(Path(f"/proc/{pid}").exists() for pid in pids)


def _totals(repeats: list[_Repeat]) -> list[tuple[str, float, str]]:
    table = pd.concat([one.requests for one in repeats])
    answers = sum(one.answers for one in repeats)
    return [
        ("requests", len(table), "requests"),
        ("requests_lost", sum(one.lost for one in repeats), "requests"),
        ("requests_answered_twice", sum(one.twice for one in repeats), "requests"),
        ("requests_tried_again", int((table["attempts"] > 1).sum()), "requests"),
        ("requests_fell_back", int((table["outcome"] == "fell_back").sum()), "requests"),
        ("instances_lost", sum(one.ends for one in repeats), "instances"),
        ("tokens_match", sum(one.right for one in repeats) / answers if answers else float("nan"), ""),
        ("processes_left", sum(one.processes_left for one in repeats), "processes"),
        ("ttft_mean_s", float(table["ttft_s"].mean()), "s"),
    ]


def finding(record: Record) -> str:
    """What was asked and what became of it."""
    sent, lost, twice, again, ends = (
        int(value(record.metrics, name))
        for name in ("requests", "requests_lost", "requests_answered_twice", "requests_tried_again", "instances_lost")
    )
    return (
        f"Of {sent} requests to instances that compute, {lost} were lost and {twice} answered twice while {ends} instances were lost and "
        f"replaced; {again} were tried again, and {100 * value(record.metrics, 'tokens_match'):g} % of the answers are the model's own."
    )


def draw(record: Record) -> Figure:
    """TTFT by arrival in the first repeat, second attempts marked; lines where an instance was lost, bands where the link was down."""
    table, events = record.requests, record.table("events")
    first = table["seed"].min()
    own, lost = (
        table[table["seed"] == first],
        events[(events["seed"] == first) & events["event"].str.startswith("instance ")],
    )
    figure, (axis,) = style.panels(1, height_in=3.2)
    for at_s in lost["at_s"]:
        axis.axvline(at_s, color="0.8", lw=0.8, zorder=0)
    outages = [one for one in record.configuration["link"]["schedule"] if one.get("rate_bps") == 0]
    for index, one in enumerate(outages):
        end_s = one["at_s"] + one["for_s"]
        axis.axvspan(one["at_s"], end_s, color=style.SKY, alpha=0.5, lw=0, label="link down" if index == 0 else None)
    for words, rows, colour, marker in (
        ("first attempt", own[own["attempts"] == 1], style.BLUE, "."),
        ("tried again", own[own["attempts"] > 1], style.RED, "x"),
    ):
        axis.plot(rows["arrival_s"], rows["ttft_s"], marker, color=colour, label=words)
    axis.set(
        xlabel="arrival (s)",
        ylabel="TTFT (s)",
        yscale="log",
        title="Instances that compute, killed one after the other (lines)",
    )
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def check(settings: Any, options: Any) -> None:
    """As for all tiers on one deployment. Raises UserError naming the key."""
    tiers.check(settings, options)


_READS = tuple(key for key in tiers.READS if key != "workload.slo")
EXPERIMENT = Experiment(
    "live_stress",
    {"execute": (*MODEL, *_READS, "cluster.prfaas.instances", "cluster.pd.instances", *WIRE, "ray", "options")},
    run,
    {"live_stress": draw},
    Options,
    check,
    profile_files,
    effort=("seed", "options.repeats", "options.requests"),
    finding=finding,
)
