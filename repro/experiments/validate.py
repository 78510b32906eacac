"""How far the simulator is from the live system, on deployments that nobody chose: drawn at random, simulated, and served.

Each draw has its own number of instances, threshold t, link, load and length distribution. The live system (tier `emulate`: processes, a
router, sockets, the emulated link, phases replayed) and the simulator get the very same requests; the error of a metric is
simulated ÷ measured − 1. A draw is kept if the equations of §3.4.1 say that it can serve, so the draws differ in everything but
that their queues are stable. What both read is not put to the test: the profiles, and with them T_prefill, T_decode and S_kv.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from repro.errors import UserError, at_least
from repro.experiments.base import Context, Experiment, Outcome
from repro.experiments.deployment import profile_files, profiles
from repro.experiments.live import Played, Wire, calibrated, deployed, scale_of
from repro.experiments.study import run_once
from repro.link import LinkSpec
from repro.record.directory import Record
from repro.record.metrics import Metric, value
from repro.record.request_metrics import UNITS, summarise
from repro.report import style
from repro.scheduling.throughput import Deployment, OperatingPoint, evaluate
from repro.serving.scale import Scale, Scaling
from repro.settings import Settings
from repro.simulate.deployments import requests, shared_link, simulated
from repro.workload.arrivals import Poisson
from repro.workload.lengths import TruncatedLogNormal

METRICS = ("ttft_mean_s", "ttft_p90_s", "tpot_mean_s", "egress_bps", "goodput")
#: Of them, those whose errors are the result, as they are called in a figure.
NAMES = {
    "ttft_mean_s": "mean TTFT",
    "ttft_p90_s": "P90 TTFT",
    "egress_bps": "egress",
    "completed_per_s": "completed rate",
}
_UNITS = {**UNITS, "completed_per_s": "req/s"}
#: Of the arrivals of a run, the first of which are warm-up.
_WARMUP = 0.1
#: Deployments in a row that may be drawn and cannot serve.
_PATIENCE = 200
#: Arrivals that are later than this part of the mean TTFT make a live run's TTFT one of the machine and not of the deployment.
_LATE = 0.1
#: Errors up to here are inside the band of the figure.
BAND = 0.1


@dataclass(frozen=True)
class Options(Scaling):
    """How many `deployments` are drawn and how many `requests` each serves; the rest are the bounds that are drawn between, both included.

    `threshold_shares` is the share of requests that t leaves in the PD cluster, `loads` is of Λ_max by the equations with true means;
    `rates_bps` and `rtts_s` are drawn evenly on a logarithmic scale, `mus` and `sigmas` are of the log-normal of lengths.
    """

    deployments: int = 6
    requests: int = 600
    prfaas_instances: tuple[int, ...] = (1, 4)
    pd_instances: tuple[int, ...] = (2, 8)
    threshold_shares: tuple[float, ...] = (0.3, 0.9)
    rates_bps: tuple[float, ...] = (3e9, 1e11)
    rtts_s: tuple[float, ...] = (0.002, 0.1)
    loads: tuple[float, ...] = (0.3, 0.85)
    mus: tuple[float, ...] = (9.0, 10.2)
    sigmas: tuple[float, ...] = (0.5, 1.1)

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, "options", deployments=1, requests=100)
        for name, least, most in (
            ("prfaas_instances", 1, 1000), ("pd_instances", 2, 1000), ("threshold_shares", 0.01, 0.99), ("rates_bps", 1e6, 1e13),
            ("rtts_s", 1e-4, 10.0), ("loads", 0.01, 0.95), ("mus", 5.0, 11.5), ("sigmas", 0.01, 3.0),
        ):  # fmt: skip
            bounds = getattr(self, name)
            if len(bounds) != 2 or not least <= bounds[0] <= bounds[1] <= most:
                raise UserError(
                    f"options.{name}: {list(bounds)}; accepted: two rising numbers between {least:g} and {most:g}"
                )


@dataclass(frozen=True)
class Draw:
    """A deployment with its load, as drawn."""

    number: int
    base: Deployment
    lengths: TruncatedLogNormal
    point: OperatingPoint
    link: LinkSpec
    rate_per_s: float
    load: float

    @property
    def case(self) -> str:
        """Its name in the record."""
        return f"deployment_{self.number}"

    def drawn(self) -> dict[str, Any]:
        """What was drawn."""
        return {
            "case": self.case, "n_prfaas": self.base.n_prfaas, "n_p": self.point.n_p, "n_d": self.point.n_d,
            "threshold_tokens": self.point.threshold_tokens, "link_bps": self.link.rate_bps, "rtt_s": self.link.rtt_s,
            "mu": self.lengths.mu, "sigma": self.lengths.sigma, "load": self.load, "rate_per_s": self.rate_per_s,
        }  # fmt: skip


def draws(settings: Settings, options: Options) -> Iterator[Draw]:
    """Deployments without end, the same for the same seed; those that cannot serve by the equations are passed over.

    Raises UserError where so many in a row cannot that the bounds must be to blame.
    """
    rng = np.random.default_rng(settings.seed)
    prfaas, pd_ = profiles(settings)
    least, most = settings.workload.lengths.minimum_tokens, settings.workload.lengths.maximum_tokens
    number, passed_over = 0, 0

    def between(bounds: Sequence[float]) -> float:
        return float(rng.uniform(bounds[0], bounds[1]))

    while True:
        n_prfaas = int(rng.integers(options.prfaas_instances[0], options.prfaas_instances[1] + 1))
        n_pd = int(rng.integers(options.pd_instances[0], options.pd_instances[1] + 1))
        n_p = int(rng.integers(1, n_pd))
        rate_bps, rtt_s = (
            math.exp(between([math.log(bound) for bound in bounds])) for bounds in (options.rates_bps, options.rtts_s)
        )
        mu, sigma, share, load = map(between, (options.mus, options.sigmas, options.threshold_shares, options.loads))
        lengths = TruncatedLogNormal(mu, sigma, least, most)
        own = Deployment(prfaas, n_prfaas, pd_, n_pd, rate_bps, lengths, settings.workload.output_tokens)
        threshold = float(np.quantile(lengths.sample(rng, 4000), share))
        point = evaluate(own, threshold, n_p, n_pd - n_p, "true_mean")
        if not 0 < point.offload_fraction < 1 or not point.lambda_max > 0:
            if (passed_over := passed_over + 1) == _PATIENCE:
                raise UserError(
                    f"options.mus, options.sigmas, options.threshold_shares: none of {_PATIENCE} deployments drawn between them serves "
                    "requests on both sides of t; accepted: bounds within which some do"
                )
            continue
        number, passed_over = number + 1, 0
        asked = replace(settings.link, name=f"validate-{number}", rate_bps=rate_bps, rtt_s=rtt_s)
        yield Draw(number, own, lengths, point, asked, load * point.lambda_max, load)


def run(context: Context) -> Outcome:
    """Every deployment, served and simulated."""
    options, settings = context.options, context.settings
    scale, facts = calibrated(options, max(options.rates_bps))
    context.progress(f"time runs {scale.time:g} times as fast")
    logs = context.folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    rows: list[Metric] = []
    drawn, kept = list[dict[str, Any]](), list[pd.DataFrame]()
    found = draws(settings, options)
    for _ in range(options.deployments):
        draw_ = next(found)
        values, played = _both(draw_, settings, options, scale, logs)
        rows += [
            context.metric(draw_.case, "arrivals_late_p99_s", played.late_p99_s * scale.time, "s", "measured"),
            context.metric(draw_.case, "timers_late_mean_s", played.timer_mean_s * scale.time, "s", "measured"),
        ]
        for metric in (*METRICS, "completed_per_s"):
            measured, sim = (values[tier][metric] for tier in ("emulate", "simulate"))
            error = sim / measured - 1 if measured else float("nan")
            rows += [
                context.metric(draw_.case, metric, measured, _UNITS[metric], "emulated"),
                context.metric(f"{draw_.case}.simulate", metric, sim, _UNITS[metric], "simulated"),
            ]
            drawn.append({**draw_.drawn(), "metric": metric, "measured": measured, "simulated": sim, "error": error})
        kept.append(played.requests.assign(case=draw_.case))
        context.progress(
            f"{draw_.case} at {100 * draw_.load:.0f} % of Λ_max: mean TTFT {values['emulate']['ttft_mean_s']:.2f} s, simulated "
            f"{values['simulate']['ttft_mean_s']:.2f} s"
        )
    table = pd.DataFrame(drawn)
    for metric in (*METRICS, "completed_per_s"):
        errors = table.loc[table["metric"] == metric, "error"].dropna()
        rows += [
            context.metric("all", f"{metric}_error_mean", float(errors.abs().mean()), "", "simulated", n=len(errors)),
            context.metric("all", f"{metric}_error_worst", float(errors.abs().max()), "", "simulated", n=len(errors)),
        ]
    return Outcome(rows, {"validation": table}, requests=pd.concat(kept), provenance={"emulation": facts})


def _both(
    draw_: Draw, settings: Settings, options: Options, scale: Scale, logs: Path
) -> tuple[Mapping[str, Mapping[str, float]], Played]:
    """What the live system and the simulator make of the same requests."""
    link = replace(
        shared_link(draw_.link, settings.transport), pieces=options.pieces
    )  # as many as the live system sends
    spec = simulated(draw_.base, draw_.point, link)
    count = options.requests
    batches = list(requests(draw_.base, Poisson(draw_.rate_per_s), count, settings.seed + draw_.number))
    last_s = float(batches[-1].arrival_s[-1])
    window = (_WARMUP * last_s, last_s + 1e-9)
    own = scale_of(draw_.base, options, scale.time)
    wire = Wire(draw_.link, settings.transport, options.pieces, own)
    with deployed(spec, wire, logs, draw_.link.name, settings.seed) as live:
        played = live.play(batches)
    if played.overloaded or played.unfinished:
        raise UserError(
            f"options.time_scale: {draw_.case} did not finish ({played.unfinished} requests left); this machine does not keep up with "
            f"{scale.time:g} times real time; accepted: a smaller number"
        )
    tables = {"emulate": played.requests, "simulate": run_once(spec, batches)[0]}
    slo = settings.workload.slo
    return {
        tier: {**summarise(table, window, slo).values(), "completed_per_s": _completed_per_s(table, window)}
        for tier, table in tables.items()
    }, played


def _completed_per_s(table: pd.DataFrame, window: tuple[float, float]) -> float:
    """Answers that ended while requests arrived, per second: what queues that grow hold back is missing from it."""
    ended = table["finish_s"].between(*window)
    return float(ended.sum()) / (window[1] - window[0])


def check(settings: Settings, options: Options) -> None:
    """Lengths to draw within, and a deployment among the draws that can serve. Raises UserError naming the key."""
    next(draws(settings, options))


def finding(record: Record) -> str:
    """How far the simulator is from the live system, on average and at worst."""
    table, rows = record.metrics, record.table("validation")
    words = [
        f"{name} {100 * value(table, f'{metric}_error_mean', 'all'):.1f} % (at worst "
        f"{100 * value(table, f'{metric}_error_worst', 'all'):.1f} %)"
        for metric, name in NAMES.items()
    ]
    said = (
        f"Over {rows['case'].nunique()} deployments drawn at random the simulator differs from the live system by, on average, "
        f"{', '.join(words)}."
    )
    late = [
        f"{case} (arrivals up to {late_s:.1f} s late)"
        for case in rows["case"].unique()
        if (late_s := value(table, "arrivals_late_p99_s", case)) > _LATE * value(table, "ttft_mean_s", case)
    ]
    return f"{said} This machine did not hold the clock in {', '.join(late)}." if late else said


def draw(record: Record) -> Figure:
    """Simulated against measured, one panel per metric, each deployment a point; the grey band is ±10 %."""
    rows = record.table("validation")
    figure, axes = style.panels(len(NAMES), width_in=2.6 * len(NAMES), height_in=2.9)
    for axis, (metric, name) in zip(axes, NAMES.items(), strict=True):
        own = rows[rows["metric"] == metric]
        factor, unit = style.scaled(_UNITS[metric], float(own[["measured", "simulated"]].max().max()))
        ends = np.array([0.0, 1.08 * float(own[["measured", "simulated"]].max().max())]) / factor
        axis.fill_between(ends, ends * (1 - BAND), ends * (1 + BAND), color="0.88", label=f"±{100 * BAND:.0f} %")
        axis.plot(ends, ends, color="0.5", lw=0.8)
        axis.plot(own["measured"] / factor, own["simulated"] / factor, "o", color=style.BLUE, ms=5)
        axis.set(xlabel=f"live ({unit})", title=name, xlim=ends, ylim=ends)
    axes[0].set_ylabel("simulated")
    axes[0].legend(loc="upper left")
    return figure


_CLUSTER = ("profile", "cluster.prfaas.profile", "cluster.pd.profile")
_WORKLOAD = (
    "workload.lengths.minimum_tokens", "workload.lengths.maximum_tokens", "workload.output_tokens", "workload.slo",
)  # fmt: skip
#: Rate and RTT are drawn, so what changes them over time is not read.
_DRAWN = ("rate_bps", "reverse_rate_bps", "rtt_s", "schedule", "capacity_trace", "reverse_capacity_trace")
_LINK = tuple(f"link.{item.name}" for item in fields(LinkSpec) if item.name not in _DRAWN)
EXPERIMENT = Experiment(
    name="validate",
    reads={"emulate": (*_CLUSTER, *_WORKLOAD, *_LINK, "transport", "seed", "options")},
    run=run,
    figures={"validate": draw},
    options=Options,
    check=check,
    inputs=profile_files,
    effort=("seed", "options"),
    finding=finding,
    hinges_on=(
        "both read the same profiles, so an error of T_prefill, T_decode or S_kv shows on neither side; and the live system's instances "
        "replay these times instead of computing. Late timers of a busy machine count as the simulator's errors: how late they were stands "
        "beside each deployment."
    ),
)
