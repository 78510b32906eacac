"""What the studies of the live system share: policies through the same requests, link and faults, live and simulated side by side.

Every case meets the same arrivals on a deployment of its own, whose link begins its schedule with the first of them. The simulator gets the
same requests, link and faults; what differs is what real clocks, messages, TCP and dying processes add. Every request must end exactly
once; a run in which one was lost, or answered twice, counts as failed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pandas as pd
from matplotlib.figure import Figure

from repro.errors import UserError, at_least
from repro.experiments import simulated, study_figures
from repro.experiments.base import SCHEDULER, SIMULATED, WIRE, Context, Outcome
from repro.experiments.live import Played, Wire, calibrated, deployed
from repro.experiments.study import run_once
from repro.record.directory import Record
from repro.record.metrics import Metric
from repro.record.request_metrics import UNITS, summarise
from repro.record.requests import ANSWERED
from repro.report import style
from repro.serving.faults import LiveFault
from repro.serving.scale import Scaling
from repro.settings import Settings
from repro.simulate.simulation import Summary
from repro.simulate.spec import Fault, SimulationSpec
from repro.workload.spec import ServiceLevel

#: What these studies read.
READS = (*SIMULATED, *SCHEDULER, *WIRE, "workload", "options")
METRICS = (
    "goodput", "good_fraction", "completed_fraction", "ttft_mean_s", "ttft_p50_s", "ttft_p90_s", "offload_fraction", "egress_bps",
)  # fmt: skip
_NAMES = {"live": "live", "simulate": "simulated"}


@dataclass(frozen=True)
class RunOptions(Scaling):
    """Which `cases` are run, for how long, requests counted from `warmup_s` on; `repeats` have seeds of their own."""

    KNOWN: ClassVar[tuple[str, ...]] = ()
    duration_s: float = 600.0
    warmup_s: float = 30.0
    repeats: int = 1
    cases: tuple[str, ...] = ()
    time_scale: float | None = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, "options", repeats=1)
        if not 0 <= self.warmup_s < self.duration_s:
            raise UserError(
                f"options.warmup_s: {self.warmup_s}; accepted: 0 to less than options.duration_s ({self.duration_s})"
            )
        if not self.cases or not set(self.cases) <= set(self.KNOWN):
            raise UserError(f"options.cases: {list(self.cases)}; accepted: some of {', '.join(self.KNOWN)}")


@dataclass(frozen=True)
class Options(RunOptions):
    """`cases` of the policies of the simulated studies, at `load` as a share of Λ_max by the model."""

    KNOWN: ClassVar[tuple[str, ...]] = ("static", "short_term", "two_timescale")
    load: float = 0.7
    cases: tuple[str, ...] = ("static", "two_timescale")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.load > 0:
            raise UserError(f"options.load: {self.load}; accepted: a positive load")


def check(settings: Settings, options: Any) -> None:
    """A deployment that can serve, and a workload whose arrivals do not hang on answers. Raises UserError naming the key."""
    simulated.check(settings, options)
    if settings.workload.sessions is not None or settings.workload.trace is not None:
        raise UserError(
            f"workload: {settings.workload.name} brings its own arrivals; accepted by experiment={settings.name}: arrivals at a rate"
        )


@dataclass(frozen=True)
class Pair:
    """One case under one seed, live and simulated."""

    case: str
    seed: int
    played: Played
    simulated: pd.DataFrame
    summary: Summary
    sent: int

    @property
    def lost(self) -> int:
        """Requests without an answer."""
        answered = self.played.requests["outcome"].isin(ANSWERED)
        return self.sent - int(self.played.requests.loc[answered, "id"].nunique())

    @property
    def why(self) -> str:
        """The outcomes of those that were lost, in brackets."""
        lost = self.played.requests["outcome"][~self.played.requests["outcome"].isin(ANSWERED)].value_counts()
        return f" ({', '.join(f'{number} {outcome}' for outcome, number in lost.items())})" if len(lost) else ""

    @property
    def ends(self) -> list[tuple[float, str]]:
        """When an instance was noticed to be dead or silent, and how."""
        return [(at_s, words) for at_s, words in self.played.events if words.startswith("instance ")]

    @property
    def twice(self) -> int:
        """Answers beyond the first to a request."""
        return int(self.played.requests["id"].duplicated().sum())


def run(context: Context, faults: Mapping[int, Sequence[LiveFault]] | None = None) -> Outcome:
    """The policies of `options.cases`, live and simulated; `faults` by seed."""
    setting = simulated.Setting.of(context)
    specs = setting.policies()
    cases = {case: specs[case] for case in context.options.cases}
    return outcome(context, *meet(context, cases, setting.rate(context.options.load), faults))


def meet(
    context: Context,
    cases: Mapping[str, SimulationSpec],
    rate_per_s: float,
    faults: Mapping[int, Sequence[LiveFault]] | None = None,
) -> tuple[list[Pair], dict[str, float]]:
    """Every case through the same requests, live and simulated, seed by seed; and how the emulation is scaled."""
    settings, options = context.settings, context.options
    scale, facts = calibrated(options, settings.link.rate_bps)
    context.progress(f"time runs {scale.time:g} times as fast, bytes are divided by {scale.bytes:g}")
    wire = Wire(settings.link, settings.transport, options.pieces, scale)
    logs = context.folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    pairs = []
    for seed in range(settings.seed, settings.seed + options.repeats):
        own = (faults or {}).get(seed, ())
        batches = list(settings.workload.stream(rate_per_s, options.duration_s, seed))
        sent = sum(len(batch.arrival_s) for batch in batches)
        for case, spec in cases.items():
            name = f"{settings.name}-{case}".replace("_", "-")
            with deployed(spec, wire, logs, name, seed) as live:
                played = live.play(batches, faults=own)
            table, summary = run_once(replace(spec, faults=simulated_faults(spec, own)), batches)
            pair = Pair(case, seed, played, table, summary, sent)
            pairs.append(pair)
            context.progress(f"{case}, seed {seed}: {sent} requests, {pair.lost} lost, {pair.twice} answered twice")
    return pairs, facts


def outcome(
    context: Context, pairs: Sequence[Pair], facts: Mapping[str, float], metrics: Sequence[str] = METRICS
) -> Outcome:
    """What became of all cases: those `metrics` live and simulated, what was lost, and both over time."""
    settings, options = context.settings, context.options
    window_s, slo = (options.warmup_s, options.duration_s), settings.workload.slo
    rows = [
        row
        for case in options.cases
        for row in _rows(context, case, pairs, metrics, window_s, slo, facts["time_scale"])
    ]
    bad = [pair for pair in pairs if pair.lost or pair.twice]
    failure = "; ".join(
        f"{pair.case}, seed {pair.seed}: {pair.lost} of {pair.sent} requests lost{pair.why}, {pair.twice} answered twice"
        for pair in bad
    )
    return Outcome(
        rows,
        _tables(pairs, settings.seed, slo, max(options.duration_s / 60, 1.0)),
        requests=pd.concat([pair.played.requests.assign(case=pair.case, seed=pair.seed) for pair in pairs]),
        provenance={
            "emulation": facts,
            "workers": {f"{pair.case}, seed {pair.seed}": pair.played.workers for pair in pairs},
        },
        failure=failure,
    )


def simulated_faults(spec: SimulationSpec, faults: Sequence[LiveFault]) -> tuple[Fault, ...]:
    """The same faults for the simulator: an instance that is stopped is as good as dead; it knows no others."""
    found = []
    for fault in faults:
        if fault.kind in ("kill", "stop"):
            cluster, _, index = fault.instance.partition(".")
            home = "pd_p" if int(index) < spec.pd[0].n_p else "pd_d"
            found.append(
                Fault("prfaas" if cluster == "prfaas0" else home, int(index), fault.at_s, fault.for_s)  # type: ignore[arg-type]
            )
    return tuple(found)


def _rows(
    context: Context,
    case: str,
    pairs: Sequence[Pair],
    metrics: Sequence[str],
    window_s: tuple[float, float],
    slo: ServiceLevel,
    time_scale: float,
) -> list[Metric]:
    own = [pair for pair in pairs if pair.case == case]
    rows = []
    for metric in metrics:
        for name, source, tables in (
            (case, "emulated", [pair.played.requests for pair in own]),
            (f"{case}.simulate", "simulated", [pair.simulated for pair in own]),
        ):
            values = [summarise(table, window_s, slo).values()[metric] for table in tables]
            rows.append(context.metric(name, metric, sum(values) / len(values), UNITS[metric], source, n=len(values)))
    requests = pd.concat([pair.played.requests for pair in own])
    counts = {
        "requests": len(requests),
        "requests_lost": sum(pair.lost for pair in own),
        "requests_answered_twice": sum(pair.twice for pair in own),
        "requests_tried_again": int((requests["attempts"] > 1).sum()),
        "requests_fell_back": int((requests["outcome"] == "fell_back").sum()),
        "instances_lost": sum(len(pair.ends) for pair in own),
    }
    rows += [
        context.metric(case, name, count, name.partition("_")[0], "emulated", n=len(own))
        for name, count in counts.items()
    ]
    late = {
        "timers_late_p99_s": max(pair.played.timer_p99_s for pair in own) * time_scale,
        "arrivals_late_p99_s": max(pair.played.late_p99_s for pair in own) * time_scale,
    }
    rows += [context.metric(case, name, value, "s", "measured", n=len(own)) for name, value in late.items()]
    return rows


def _tables(pairs: Sequence[Pair], seed: int, slo: ServiceLevel, bin_s: float) -> dict[str, pd.DataFrame]:
    series, controls, events = [], [], []
    for pair in pairs:
        for tier, table in (("live", pair.played.requests), ("simulate", pair.simulated)):
            series.append(simulated.over_time(table, bin_s, slo).assign(case=pair.case, tier=tier, seed=pair.seed))
        if pair.seed == seed:
            controls.append(pair.played.samples.assign(case=pair.case))
        events += [
            {"case": pair.case, "seed": pair.seed, "at_s": at_s, "event": words.split("; ")[0]}
            for at_s, words in pair.played.events
        ]
    return {
        "series": pd.concat(series),
        "controls": pd.concat(controls),
        "events": pd.DataFrame(events, columns=["case", "seed", "at_s", "event"]),
    }


def draw(record: Record) -> Figure:
    """Share of requests within the service level and mean TTFT by time of arrival, live and simulated; marks where instances were lost."""
    series, events = record.table("series"), record.table("events")
    figure, (top, bottom) = style.panels(1, 2, height_in=4.6, sharex=True)
    for index, case in enumerate(dict.fromkeys(series["case"])):
        colour = style.SERIES[index][0]
        for tier, dash in (("live", "-"), ("simulate", ":")):
            own = series[(series["case"] == case) & (series["tier"] == tier)]
            mean = own.groupby("at_s")[["arrived", "met", "ttft_s"]].mean()
            label = f"{study_figures.POLICY_NAMES.get(case, case)}, {_NAMES[tier]}"
            top.plot(mean.index, 100 * mean["met"] / mean["arrived"], dash, color=colour, label=label)
            bottom.plot(mean.index, mean["ttft_s"], dash, color=colour, label=label)
    if len(events):
        lost = events[events["event"].str.startswith("instance ")]
        for at_s in lost["at_s"]:
            top.axvline(at_s, color="0.75", lw=0.8, zorder=0)
            bottom.axvline(at_s, color="0.75", lw=0.8, zorder=0)
    top.set(ylabel="within SLO (%)", title="Requests that meet the service level, by time of arrival")
    top.set_ylim(-3, 103)
    bottom.set(ylabel="mean TTFT (s)", xlabel="time (s)")
    bottom.set_ylim(bottom=0)
    bottom.legend(fontsize=8)
    return figure


def value(record: Record, case: str, metric: str) -> float:
    """One number of a record."""
    table = record.metrics
    return float(table[(table["case"] == case) & (table["metric"] == metric)]["value"].iloc[0])


def goodputs(record: Record, through: str) -> str:
    """The sentence of a finding: goodput of the policies, live beside simulated."""
    cases = [case for case in dict.fromkeys(record.metrics["case"]) if "." not in case]
    words = [
        f"{study_figures.POLICY_NAMES.get(case, case)} {value(record, case, 'goodput'):.2f} req/s live and "
        f"{value(record, f'{case}.simulate', 'goodput'):.2f} simulated"
        for case in cases
    ]
    return f"Goodput through the {through}: {'; '.join(words)}."
