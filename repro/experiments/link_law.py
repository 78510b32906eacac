"""Does TCP's law hold on the emulated link? It says what loss and distance cost in simulated deployments (`repro.link.tcp_model`).

iperf3 crosses the emulated link under one condition after the other: round trip, loss, congestion control, connections. On the `fitted`
conditions the law's two constants are found anew, as whoever set them in the law found them; the `held_out` ones were never part of
that. Each is measured until its interval is narrow enough, or its time is up, and stands beside the law as it is in use. What slow
start costs is measured apart: how long bytes take that a new connection sends, without loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from repro.errors import UserError
from repro.experiments.base import Context, Experiment, Outcome
from repro.link import LinkSpec, iperf3, open_link
from repro.link.measurement import across
from repro.link.spec import TCP_HEADERS_BYTES
from repro.link.tcp_model import HOST_S, RECOVERY_ROUNDS, TcpPath, chain_bps, even_losses_bps
from repro.record.directory import Record
from repro.record.metrics import Metric, value
from repro.record.statistics import Estimate
from repro.report import style
from repro.settings import Settings

#: A sample lasts for so many of the times between two losses of a connection, or `_LEAST_S`; a stream runs in before the first.
_SAMPLE_CYCLES, _LEAST_S = 3.0, 1.0
_SAMPLES_AT_ONCE, _FEWEST_SAMPLES = 8, 5
#: Below this rate iperf3 hands over small blocks, so that a block is no large part of a sample.
_SLOW_BPS, _SMALL_BLOCK = 200e6, "16K"
#: What the fit tries: rounds without growth, and seconds that hosts add, between which the law is interpolated.
_ROUNDS, _HOSTS_S = (0, 1, 2, 3), (0.0, 0.0005, 0.001, 0.002)


@dataclass(frozen=True)
class Condition:
    """What is asked of the link and of TCP."""

    rtt_s: float
    loss: float
    congestion_control: str
    connections: int

    def __str__(self) -> str:
        return f"{self.connections} × {self.congestion_control}, {1e3 * self.rtt_s:g} ms, loss {self.loss:g}"


@dataclass(frozen=True)
class Options:
    """Conditions, and how well each is measured: until the 95 % interval's half width is so small a part of the mean, or for `limit_s`.

    New connections send `opening_bytes` over each of `opening_rtts_s`, `opening_repeats` times.
    """

    fitted: tuple[Condition, ...] = (
        Condition(0.005, 5e-3, "cubic", 8),
        Condition(0.01, 1e-3, "cubic", 8),
        Condition(0.01, 1e-2, "cubic", 8),
        Condition(0.04, 2e-2, "cubic", 8),
    )
    held_out: tuple[Condition, ...] = (
        Condition(0.01, 2e-2, "cubic", 1),
        Condition(0.015, 1.5e-2, "cubic", 4),
        Condition(0.02, 5e-3, "cubic", 8),
        Condition(0.03, 8e-3, "cubic", 16),
        Condition(0.06, 2e-2, "cubic", 16),
        Condition(0.02, 1e-2, "bbr", 1),
        Condition(0.05, 2e-2, "bbr", 4),
        Condition(0.03, 1e-3, "bbr", 16),
    )
    half_width: float = 0.05
    limit_s: float = 150.0
    opening_rtts_s: tuple[float, ...] = (0.03, 0.1)
    opening_bytes: tuple[int, ...] = (100_000, 1_000_000, 10_000_000)
    opening_repeats: int = 3

    def __post_init__(self) -> None:
        for condition in (*self.fitted, *self.held_out):
            if condition.rtt_s <= 0 or not 0 < condition.loss < 1:
                raise UserError(
                    f"options.held_out, options.fitted: {condition}; accepted: a round trip above 0, loss between 0 and 1"
                )
            TcpPath(**asdict(condition))
        if both := set(self.fitted) & set(self.held_out):
            raise UserError(f"options.held_out: {both.pop()} is fitted; accepted: conditions that the fit never sees")
        if any(condition.congestion_control == "bbr" for condition in self.fitted) or not self.held_out:
            raise UserError(
                "options.fitted: bbr has no constant to fit; accepted: cubic, reno; options.held_out: one or more"
            )
        if not (self.half_width > 0 and self.limit_s > 0 and self.opening_repeats >= 1):
            raise UserError("options.half_width, options.limit_s, options.opening_repeats: accepted: above 0")


def check(settings: Settings, _: object) -> None:
    """Conditions are laid over a link that has a rate. Raises UserError naming the key."""
    if settings.link.rate_bps is None:
        raise UserError("link.rate_bps: unlimited; experiment=link_law fills a link; accepted: bit/s above 0")
    if not iperf3.installed():
        raise UserError("experiment=link_law: iperf3 is not installed here; accepted: a machine that has it")


def run(context: Context) -> Outcome:
    """Measure every condition, fit anew, and lay the law beside what was measured."""
    options: Options = context.options
    link = context.settings.link
    rows: list[Metric] = []
    points: list[dict[str, Any]] = []
    for kind, conditions in (("fitted", options.fitted), ("held out", options.held_out)):
        for condition in conditions:
            found = _measured(context, condition)
            law_bps = _path(link, condition).goodput_bps
            ratio = Estimate(law_bps / found.value, law_bps / found.high, law_bps / found.low, found.n)
            context.progress(f"{condition}: {found.value / 1e6:.1f} Mbps, law ÷ measured {ratio.value:.3f}")
            points.append({
                **asdict(condition), "kind": kind, "measured_bps": found.value, "low_bps": found.low, "high_bps": found.high,
                "samples": found.n, "law_bps": law_bps,
            })  # fmt: skip
            if kind == "held out":
                case, within = str(condition), (found.low, found.high)
                rows += [
                    context.metric(case, "iperf3_bps", found.value, "bit/s", "measured", interval=within, n=found.n),
                    context.metric(case, "law_bps", law_bps, "bit/s", "computed"),
                    context.metric(
                        case,
                        "law_over_measured",
                        ratio.value,
                        "",
                        "computed",
                        interval=(ratio.low, ratio.high),
                        n=found.n,
                    ),
                ]
    table = pd.DataFrame(points)
    held = table[table["kind"] == "held out"]
    off = (held["law_bps"] / held["measured_bps"] - 1).abs()
    wide = (held["high_bps"] - held["low_bps"]) / 2 > options.half_width * held["measured_bps"]
    rows.append(context.metric("held out", "law_worst_error", float(off.max()), "1", "computed", n=len(held)))
    rows.append(context.metric("held out", "points_too_wide", int(wide.sum()), "points", "measured", n=len(held)))
    if options.fitted:
        rounds, host_s = fitted(link, table[table["kind"] == "fitted"])
        rows.append(context.metric("fit", "recovery_rounds", rounds, "1", "computed", n=len(options.fitted)))
        rows.append(context.metric("fit", "host_s", host_s, "s", "computed", n=len(options.fitted)))
    openings = _openings(context)
    for opening in openings:
        case = f"new connection, {1e3 * opening['rtt_s']:g} ms, {opening['size_bytes'] / 1e6:g} MB"
        rows.append(
            context.metric(case, "delivery_s", opening["measured_s"], "s", "measured", n=options.opening_repeats)
        )
        rows.append(context.metric(case, "law_delivery_s", opening["law_s"], "s", "computed"))
    law = {"recovery_rounds": RECOVERY_ROUNDS, "host_s": HOST_S}
    return Outcome(rows, {"points": table, "openings": pd.DataFrame(openings)}, provenance={"law": law})


def fitted(link: LinkSpec, points: pd.DataFrame) -> tuple[int, float]:
    """The constants with which the law is nearest to the measured goodput, by the squares of the logarithms of their ratios."""

    best = (math.inf, 0, 0.0)
    between = np.arange(0.0, _HOSTS_S[-1], 5e-5)
    for rounds in _ROUNDS:
        error = np.zeros(len(between))
        for row in points.to_dict("records"):
            path = _path(link, _condition(row))
            logs = [math.log(chain_bps(path, rounds, host_s) / row["measured_bps"]) for host_s in _HOSTS_S]
            error += np.interp(between, _HOSTS_S, logs) ** 2
        best = min(best, (float(error.min()), rounds, float(between[error.argmin()])))
    return best[1], best[2]


def _condition(row: Mapping[Any, Any]) -> Condition:
    return Condition(row["rtt_s"], row["loss"], row["congestion_control"], int(row["connections"]))


def _path(link: LinkSpec, condition: Condition) -> TcpPath:
    segment = link.mtu_bytes - TCP_HEADERS_BYTES
    return TcpPath(**asdict(condition), window_bytes=math.inf, segment_bytes=segment, link_bps=link.ideal_goodput_bps())


def _asked(link: LinkSpec, rtt_s: float, loss: float = 0.0, control: str | None = None) -> LinkSpec:
    """The configured link at one condition."""
    kept = {key: getattr(link, key) for key in ("rate_bps", "queue_s", "mtu_bytes", "seed", "backend")}
    return LinkSpec("law", rtt_s=rtt_s, loss=loss, congestion_control=control, **kept)


def _measured(context: Context, condition: Condition) -> Estimate:
    """iperf3's goodput under a condition: samples of some cycles of loss each, until their interval is narrow or the time is up."""
    options: Options = context.options
    link = context.settings.link
    path = _path(link, condition)
    loss_driven = condition.congestion_control != "bbr"
    window = min(even_losses_bps(path), path.goodput_bps / path.connections) * path.rtt_s / (8 * path.segment_bytes)
    cycle_s = condition.rtt_s / min(condition.loss * window, 1.0) if loss_driven else 0.0
    sample_s = max(_LEAST_S, math.ceil(_SAMPLE_CYCLES * cycle_s))
    omit_s = math.ceil(1 + 12 * condition.rtt_s + 2 * _SAMPLE_CYCLES * cycle_s)
    spec = _asked(link, condition.rtt_s, condition.loss)
    samples: list[float] = []
    with open_link(spec, run="link-law") as made:
        left_s = options.limit_s
        while left_s > 0:
            count = max(min(_SAMPLES_AT_ONCE, int(left_s / sample_s)), 2)
            extra = ["-i", f"{sample_s:g}", *(["-l", _SMALL_BLOCK] if path.goodput_bps < _SLOW_BPS else [])]
            told = iperf3.stream(
                made, condition.connections, condition.congestion_control, count * sample_s, omit_s, extra
            )
            sums = [interval["sum"] for interval in told.get("intervals", ())]
            samples += [
                one["bits_per_second"] for one in sums if not one["omitted"] and one["seconds"] > 0.9 * sample_s
            ]
            left_s -= count * sample_s
            if not told:
                raise UserError(
                    f"experiment=link_law: iperf3 failed under {condition}; accepted: a kernel that has the control"
                )
            found = Estimate.of(samples)
            if len(samples) >= _FEWEST_SAMPLES and (found.high - found.low) / 2 <= options.half_width * found.value:
                break
    return Estimate.of(samples)


def _openings(context: Context) -> list[dict[str, Any]]:
    """When the first so many bytes of a new connection have arrived: median over connections, beside the law's round trips."""
    options: Options = context.options
    link = context.settings.link
    rows: list[dict[str, Any]] = []
    for rtt_s in options.opening_rtts_s:
        path = _path(link, Condition(rtt_s, 0.0, "cubic", 1))
        largest_s = path.delivery_s(max(options.opening_bytes))
        took: dict[int, list[float]] = {size: [] for size in options.opening_bytes}
        with open_link(_asked(link, rtt_s, control="cubic"), run="link-law") as made:
            for _ in range(options.opening_repeats):
                found = across(made, "forward", "watch", 60, duration_s=2 * largest_s + 0.5)
                marks = np.array(found["marks"])
                for (
                    size,
                    times,
                ) in took.items():  # the first bytes were on their way for half a round trip when they arrived
                    times.append(float(np.interp(size, marks[:, 1], marks[:, 0]) - marks[0, 0] + rtt_s / 2))
        rows += [
            {"rtt_s": rtt_s, "size_bytes": size, "measured_s": float(np.median(times)), "law_s": path.delivery_s(size)}
            for size, times in took.items()
        ]
    return rows


def finding(record: Record) -> str:
    """How far the law is from what was measured on conditions that its constants never saw."""
    table = record.metrics
    ratios = table[table["metric"] == "law_over_measured"]
    worst = value(table, "law_worst_error", "held out")
    wide = int(value(table, "points_too_wide", "held out"))
    width = 100 * record.configuration["options"]["half_width"]
    case = ratios["case"].iloc[int((ratios["value"] - 1).abs().argmax())]
    narrow = f"to ±{width:g} %" if not wide else f"{len(ratios) - wide} of them to ±{width:g} %"
    return (
        f"On {len(ratios)} conditions that its constants never saw, measured {narrow}, TCP's law is within {100 * worst:.1f} % of iperf3 "
        f"on the emulated link; furthest off is {case}."
    )


def draw(record: Record) -> Figure:
    """Law against measurement, and slow start in time."""
    points, openings = record.table("points"), record.table("openings")
    figure, (goodput, opening) = style.panels(2, height_in=3.8, width_in=7.0)
    groups = points.groupby(["kind", "congestion_control"], sort=False)
    for ((kind, control), rows), (colour, marker, _) in zip(groups, style.SERIES, strict=False):
        ratio = rows["law_bps"] / rows["measured_bps"]
        spread = [ratio - rows["law_bps"] / rows["high_bps"], rows["law_bps"] / rows["low_bps"] - ratio]
        goodput.errorbar(
            rows["measured_bps"] / 1e6, 100 * (ratio - 1), yerr=[100 * side for side in spread], color=colour, marker=marker,
            linestyle="none", label=f"{control}, {kind}",
        )  # fmt: skip
    goodput.axhspan(-10, 10, color=style.GREY, alpha=0.15, linewidth=0)
    goodput.axhline(0, color="black", lw=0.8)
    goodput.set(xscale="log", xlabel="iperf3 (Mbps)", ylabel="law off by (%)", title="Goodput under loss (band: 10 %)")
    goodput.legend(fontsize=7)
    for (rtt_s, rows), (colour, marker, dash) in zip(openings.groupby("rtt_s", sort=False), style.SERIES, strict=False):
        label = f"{1e3 * float(str(rtt_s)):g} ms"
        opening.plot(rows["size_bytes"] / 1e6, rows["law_s"], color=colour, linestyle=dash, label=f"law, {label}")
        opening.plot(rows["size_bytes"] / 1e6, rows["measured_s"], marker, color=colour, label=f"measured, {label}")
    opening.set(
        xscale="log", xlabel="bytes of a new connection (MB)", ylabel="until they arrived (s)", title="Slow start"
    )
    opening.legend(fontsize=7)
    return figure


EXPERIMENT = Experiment(
    name="link_law",
    reads={"emulate": ("link.rate_bps", "link.queue_s", "link.mtu_bytes", "link.seed", "link.backend", "options")},
    run=run,
    figures={"link_law": draw},
    options=Options,
    check=check,
    effort=("link.seed", "options.limit_s", "options.half_width"),
    finding=finding,
    hinges_on="losses are independent of each other and of what is sent; a queue that overflows loses in bursts.",
)
