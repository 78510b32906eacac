"""Is the emulated link what it says? Every other result that crosses a link rests on this one.

Each backend that this machine has is asked for rates, round trips and losses; the link is measured by its own probe
(datagrams, so the answer is the link's and not TCP's), then iperf3 crosses the same link with 1 to 16 connections of
CUBIC and BBR. Sanity lines come from TCP
theory: the goodput that headers allow, and the rate at which loss holds a window, √(3/2) · MSS / (RTT · √p) (Mathis
et al.). A schedule and an outage are then followed by a receiver's clock and by the sender's TCP_INFO.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from repro.errors import UserError
from repro.experiments.base import Context, Experiment, Outcome
from repro.link import Link, LinkChange, LinkSpec, iperf3, open_link
from repro.link.backends import BY_NAME
from repro.link.link import Unavailable
from repro.link.measurement import LinkMeasurement, Plan, across
from repro.record.directory import Record
from repro.record.metrics import Metric
from repro.report import style
from repro.settings import Settings

CENTRE_CONNECTIONS = 4
#: The receiver's rate is taken over windows of this length: a change is seen no sooner.
WINDOW_S = 0.04


@dataclass(frozen=True)
class Options:
    """The axes. Without `whole_grid` each is varied alone around the centre."""

    backends: tuple[str, ...] = ("netem", "packet", "tbf", "relay")
    rates_bps: tuple[float, ...] = (10e6, 100e6, 1e9, 5e9, 10e9)
    rtts_s: tuple[float, ...] = (0.0, 0.002, 0.02, 0.2)
    losses: tuple[float, ...] = (0.0, 1e-4, 1e-3, 1e-2, 2e-2)
    connections: tuple[int, ...] = (1, 4, 16)
    congestion_controls: tuple[str, ...] = ("cubic", "bbr")
    whole_grid: bool = False
    rate_s: float = 1.0
    iperf3_s: float = 1.5

    def __post_init__(self) -> None:
        unknown = [name for name in self.backends if name not in BY_NAME]
        if unknown:
            raise UserError(f"options.backends: {unknown[0]!r} is unknown; accepted: {', '.join(BY_NAME)}")
        if self.rate_s <= 0 or self.iperf3_s <= 0:
            raise UserError("options.rate_s, options.iperf3_s: accepted: seconds above 0")


def check(settings: Settings, _: object) -> None:
    """The axes are varied around a link that has a rate. Raises UserError naming the key."""
    if settings.link.rate_bps is None:
        raise UserError(
            "link.rate_bps: unlimited; link_fidelity varies its axes around a rate; accepted: bit/s above 0"
        )


def run(context: Context) -> Outcome:
    """Every backend over the axes, then changes over time, then the most that each carries."""
    options: Options = context.options
    links: list[dict[str, Any]] = []
    streams: list[dict[str, Any]] = []
    limits: list[dict[str, Any]] = []
    missing: list[str] = []
    for name in options.backends:
        try:
            for spec in _specs(name, _centre(context.settings.link), options):
                links.append(_measure(context, spec, streams))
            limits.append(_limit(context, name))
        except Unavailable as reason:
            missing.append(str(reason))
            context.progress(str(reason))
    if not links:
        raise UserError(f"options.backends: none is available here: {'; '.join(missing)}")
    best = next((row["backend"] for row in links if row["backend"] in ("netem", "packet")), links[-1]["backend"])
    changes, signals = _changes(context, best)
    table = pd.DataFrame(links)
    rows = [
        *itertools.chain.from_iterable(_metrics(context, row) for row in links),
        *(
            context.metric(_stream_case(row), "iperf3_share", row["share"], "1", "measured")
            for row in streams
            if row["share"] == row["share"]
        ),
        *(context.metric(row["backend"], "limit_bps", row["limit_bps"], "bit/s", "measured") for row in limits),
        *(context.metric(best, name, value, "s", "measured") for name, value in changes.items()),
    ]
    tables = {"links": table, "iperf3": pd.DataFrame(streams), "limits": pd.DataFrame(limits), "signals": signals}
    return Outcome(rows, tables, provenance={"link": {"backends_missing": missing, "changes_by": best}})


def _centre(link: LinkSpec) -> LinkSpec:
    """The configured link without what the axes vary and what no measurement here could tell from an error."""
    kept = ("rate_bps", "rtt_s", "queue_s", "queue_bytes", "mtu_bytes", "seed")
    return LinkSpec(name="centre", **{key: getattr(link, key) for key in kept})


def _specs(backend: str, centre: LinkSpec, options: Options) -> Iterator[LinkSpec]:
    """The links to make with one backend: what it refuses or leaves out is not asked of it."""
    centre = replace(centre, backend=backend, rtt_s=0.0 if backend == "tbf" else centre.rtt_s)
    losses = options.losses if backend != "relay" else (0.0,)
    rtts = options.rtts_s if backend != "tbf" else (0.0,)
    if options.whole_grid:
        found = [
            replace(centre, rate_bps=rate, rtt_s=rtt, loss=loss)
            for rate, rtt, loss in itertools.product(options.rates_bps, rtts, losses)
        ]
    else:
        found = [
            *(replace(centre, rate_bps=rate) for rate in options.rates_bps),
            *(replace(centre, rtt_s=rtt) for rtt in rtts),
            *(replace(centre, loss=loss) for loss in losses),
        ]
    yield from dict.fromkeys(found)


def _measure(context: Context, spec: LinkSpec, streams: list[dict[str, Any]]) -> dict[str, Any]:
    """One link: measured by the probe, then crossed by iperf3 in every combination that is due."""
    options: Options = context.options
    with open_link(spec, run="link-fidelity") as link:
        found = link.measure(rate_s=options.rate_s)
        row = _row(link, found)
        share = found.rate_share
        context.progress(f"{_case(row)}: rate {share:.4f} of the ideal, RTT off by {row['rtt_error_s'] * 1e3:+.2f} ms")
        for connections, control in _combinations(spec, _centre(context.settings.link), options):
            streams.append(_iperf3(link, connections, control, options.iperf3_s))
    return row


def _row(link: Link, found: LinkMeasurement) -> dict[str, Any]:
    spec, now = link.spec, link.signals()
    assert spec.rate_bps is not None
    deviation = math.sqrt(spec.loss * (1 - spec.loss) / found.loss_segments) if found.loss_segments else math.nan
    carried = now.forward.forwarded_bytes + now.reverse.forwarded_bytes
    cpu_s = now.forward.cpu_s + now.reverse.cpu_s
    return {
        "backend": link.backend,
        "asked_rate_bps": spec.rate_bps,
        "asked_rtt_s": spec.rtt_s,
        "asked_loss": spec.loss,
        "rate_share": found.rate_share,
        "rtt_error_s": found.rtt_s - spec.rtt_s,
        "rtt_p99_error_s": found.rtt_p99_s - spec.rtt_s,
        "queue_share": found.queue_s / (8 * spec.queue_limit_bytes("forward") / spec.rate_bps),
        "loss": found.loss,
        "loss_segments": found.loss_segments,
        "loss_sigma": (found.loss - spec.loss) / deviation if found.loss_segments else math.nan,
        "cpu_s_per_gb": cpu_s / (carried / 1e9) if carried and cpu_s else math.nan,
        "overrun_packets": now.forward.overrun_packets + now.reverse.overrun_packets,
        "realtime": bool(link.facts.get("realtime", True)),
    }


def _combinations(spec: LinkSpec, centre: LinkSpec, options: Options) -> list[tuple[int, str]]:
    """Connections × congestion control: all at the centre, both controls under loss, else the first one alone."""
    whole = options.whole_grid or (spec.rate_bps, spec.loss) == (centre.rate_bps, 0.0)
    if spec.backend == "relay":  # TCP ends at the relay: neither number of connections nor control matters
        return [(CENTRE_CONNECTIONS, options.congestion_controls[0])]
    if whole and (options.whole_grid or spec.rtt_s == centre.rtt_s):
        return list(itertools.product(options.connections, options.congestion_controls))
    # Without delay a window recovers at once, so loss says nothing about the control.
    controls = options.congestion_controls if spec.loss and spec.rtt_s else options.congestion_controls[:1]
    return [(CENTRE_CONNECTIONS, control) for control in controls]


def _iperf3(link: Link, connections: int, control: str, seconds: float) -> dict[str, Any]:
    """Goodput of iperf3 from prefill to decode; nan where it is not installed or failed."""
    spec = link.spec
    goodput, retransmits = math.nan, math.nan
    # Left out at the start: slow start, which takes some round trips.
    omit_s = min(10, math.ceil(0.5 + 12 * spec.rtt_s))
    told = iperf3.stream(link, connections, None if link.backend == "relay" else control, seconds, omit_s)
    if told:
        goodput = told["end"]["sum_received"]["bits_per_second"]
        retransmits = told["end"]["sum_sent"].get("retransmits", math.nan)
    return {
        "backend": link.backend,
        "asked_rate_bps": spec.rate_bps,
        "asked_rtt_s": spec.rtt_s,
        "asked_loss": spec.loss,
        "connections": connections,
        "congestion_control": control,
        "goodput_bps": goodput,
        "share": goodput / spec.ideal_goodput_bps(),
        "retransmits": retransmits,
        "mathis_bps": mathis_bps(spec, connections),
    }


def mathis_bps(spec: LinkSpec, connections: int) -> float:
    """What loss leaves to as many windows: √(3/2) · MSS / (RTT · √p) each, at most the link's ideal."""
    if spec.loss == 0 or spec.rtt_s == 0:
        return spec.ideal_goodput_bps()
    segment_bits = 8 * spec.mtu_bytes * spec.tcp_goodput_share
    return min(
        connections * math.sqrt(1.5) * segment_bits / (spec.rtt_s * math.sqrt(spec.loss)), spec.ideal_goodput_bps()
    )


def _limit(context: Context, backend: str) -> dict[str, Any]:
    """The most that a backend carries here: no rate asked, several TCP connections, no delay."""
    spec = LinkSpec(name="limit", backend=backend)
    with open_link(spec, run="link-fidelity-limit") as link:
        found = link.measure(rate_s=2.0, pings=20)
    context.progress(f"{backend}: carries {found.rate_bps / 1e9:.1f} Gbps at most")
    return {"backend": backend, "limit_bps": found.rate_bps, "floor_rtt_s": found.rtt_s}


def _changes(context: Context, backend: str) -> tuple[dict[str, float], pd.DataFrame]:
    """How soon a changed rate is the rate, and what an outage of 5 s does to TCP and to its signals."""
    before_bps, after_bps = 200e6, 50e6
    spec = LinkSpec(rate_bps=before_bps, rtt_s=0.02, queue_s=0.05, backend=backend)
    drop = LinkChange(0.5, for_s=1.0, rate_bps=after_bps)
    packets = backend != "relay"
    with open_link(replace(spec, schedule=(drop,)), run="link-fidelity-schedule") as link:
        plan = Plan(before_bps, 0.0, spec.rtt_s, spec.queue_s, spec.mtu_bytes, datagrams=packets, pings=10, rate_s=5.0)
        action, asked = ("ask", {"plan": asdict(plan)}) if packets else ("watch", {"duration_s": 6.0})
        found, started_s = _started_meanwhile(link, 2.0, lambda: across(link, "forward", action, 60, **asked))
        marks = np.array(found["marks"])
    share = 1.0 if not packets else spec.mtu_bytes / (spec.mtu_bytes - 28)
    if not packets:
        before_bps, after_bps = before_bps * spec.tcp_goodput_share, after_bps * spec.tcp_goodput_share
    delay_s = spec.rtt_s / 2
    lags = {
        "schedule_lag_down_s": _lag(marks, started_s + drop.at_s + delay_s, after_bps / share),
        "schedule_lag_up_s": _lag(marks, started_s + drop.at_s + 1.0 + delay_s, before_bps / share),
    }
    context.progress(f"{backend}: a new rate is followed after {max(lags.values()) * 1e3:.0f} ms")

    changes = (LinkChange(1.0, for_s=2.0, rate_bps=after_bps), LinkChange(4.0, for_s=5.0, rate_bps=0.0))
    with open_link(replace(spec, schedule=changes, congestion_control="cubic"), run="link-fidelity-outage") as link:
        found, started_s = _started_meanwhile(link, 1.5, lambda: across(link, "forward", "watch", 60, duration_s=12.5))
    arrivals = np.array(found["marks"])[:, 0] - started_s
    gap = int(np.argmax(np.diff(arrivals)))
    lags["outage_stall_s"] = float(np.diff(arrivals)[gap])
    lags["outage_resumed_after_s"] = float(arrivals[gap + 1] - (changes[1].at_s + 5.0))
    signals = pd.DataFrame(found["samples"])
    signals["at_s"] -= started_s
    lags["signal_lag_s"] = _signal_lag(signals, changes[0].at_s, spec.ideal_goodput_bps() * 0.6)
    capacity = np.select(
        [signals["at_s"].between(1.0, 3.0), signals["at_s"].between(4.0, 9.0)], [after_bps, 0.0], before_bps
    )
    signals["capacity_bps"] = capacity
    return lags, signals


def _started_meanwhile(link: Link, after_s: float, work: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any], float]:
    """Do `work` and start the link's schedule in its midst; what it yields, and when the schedule started."""
    moments: list[float] = []
    timer = threading.Timer(after_s, lambda: moments.append(link.start()))
    timer.start()
    try:
        return work(), moments[0]
    finally:
        timer.cancel()


def _lag(marks: np.ndarray[Any, Any], change_s: float, expected_bps: float) -> float:
    """How long after a change the received rate is within a tenth of the new one and stays for three windows; nan if never."""
    edges = np.arange(change_s, change_s + 0.8, 0.005)
    received = np.interp([edges, edges + WINDOW_S], marks[:, 0], marks[:, 1])
    rates = 8 * (received[1] - received[0]) / WINDOW_S
    fits = np.abs(rates / expected_bps - 1) < 0.1
    held = np.array([fits[i : i + 24].all() for i in range(len(fits) - 24)])
    return float(edges[int(np.argmax(held))] - change_s) if held.any() else math.nan


def _signal_lag(signals: pd.DataFrame, change_s: float, below_bps: float) -> float:
    """When the average of acknowledged bytes fell below a level, after the capacity did."""
    later = signals[(signals["at_s"] > change_s) & (signals["acked_bps"] < below_bps)]
    return float(later["at_s"].iloc[0] - change_s) if len(later) else math.nan


def _metrics(context: Context, row: dict[str, Any]) -> list[Metric]:
    units = {
        "rate_share": "1",
        "rtt_error_s": "s",
        "rtt_p99_error_s": "s",
        "queue_share": "1",
        "loss": "1",
        "loss_sigma": "1",
        "cpu_s_per_gb": "s/GB",
    }
    return [
        context.metric(
            _case(row), name, row[name], unit, "measured", n=max(1, row["loss_segments"] if "loss" in name else 1)
        )
        for name, unit in units.items()
        if row[name] == row[name]
    ]


def _case(row: dict[str, Any]) -> str:
    rate = row["asked_rate_bps"]
    text = f"{rate / 1e9:g} Gbps" if rate >= 1e9 else f"{rate / 1e6:g} Mbps"
    return f"{row['backend']}, {text}, {row['asked_rtt_s'] * 1e3:g} ms, loss {row['asked_loss']:g}"


def _stream_case(row: dict[str, Any]) -> str:
    return f"{_case(row)}, {row['connections']} × {row['congestion_control']}"


def draw(record: Record) -> Figure:
    """Rate, RTT and loss against what was asked, and TCP across the link against theory."""
    links, streams, limits = record.table("links"), record.table("iperf3"), record.table("limits")
    figure, (rate, rtt, loss, theory) = style.panels(2, 2, height_in=5.6)
    centre = links[(links["asked_loss"] == 0)]
    for (name, rows), (colour, marker, dash) in zip(centre.groupby("backend", sort=False), style.SERIES, strict=False):
        # Each axis is varied alone, so the value that most links have is the centre's.
        centre_rtt_s, centre_rate_bps = rows["asked_rtt_s"].mode()[0], rows["asked_rate_bps"].mode()[0]
        at = rows[rows["asked_rtt_s"] == centre_rtt_s].sort_values("asked_rate_bps")
        limit = limits.loc[limits["backend"] == name, "limit_bps"].max() / 1e9
        look: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": dash}
        rate.plot(
            at["asked_rate_bps"], 100 * (at["rate_share"] - 1), label=f"{name} (at most {limit:.0f} Gbps)", **look
        )
        if name != "tbf":
            by_rtt = rows[rows["asked_rate_bps"] == centre_rate_bps].sort_values("asked_rtt_s")
            rtt.plot(1e3 * by_rtt["asked_rtt_s"], 1e3 * by_rtt["rtt_error_s"], label=f"{name}, median", **look)
            rtt.plot(1e3 * by_rtt["asked_rtt_s"], 1e3 * by_rtt["rtt_p99_error_s"], alpha=0.4, **look)
    rate.axhspan(-1, 1, color=style.GREY, alpha=0.15, linewidth=0)
    rate.set(
        xscale="log", xlabel="asked rate (bit/s)", ylabel="off the ideal (%)", title="Is the rate the one asked for?"
    )
    _draw_allowed_rtt(rtt, centre)
    _draw_loss(loss, links)
    _draw_theory(theory, streams)
    for axis in (rate, rtt, loss, theory):
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
    return figure


def _draw_allowed_rtt(axis: Any, links: pd.DataFrame) -> None:
    """Scales of the round trips, from none at all to hundreds of milliseconds, and the error that a median may have."""
    asked_ms = sorted(1e3 * links["asked_rtt_s"].unique())
    milliseconds = np.linspace(0, max(300.0, *asked_ms), 400)
    allowed = np.maximum(0.6, 0.015 * milliseconds)
    axis.plot(milliseconds, allowed, color=style.GREY, linestyle=":", label="allowed median")
    axis.set_xscale("symlog", linthresh=1.0)
    axis.set_yscale("symlog", linthresh=0.1)
    axis.set_xticks(asked_ms, [f"{value:g}" for value in asked_ms])
    ticks = [-10, -1, -0.1, 0, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50]
    low, high = axis.get_ylim()
    axis.set_ylim(low, high := 4 * high)  # room for the legend
    axis.set_yticks([tick for tick in ticks if low <= tick <= high])
    axis.set_yticklabels([f"{tick:g}" for tick in ticks if low <= tick <= high])
    axis.minorticks_off()
    axis.set(xlabel="asked RTT (ms)", ylabel="error (ms)", title="Round trip (faint: P99)")


def _draw_loss(axis: Any, links: pd.DataFrame) -> None:
    lossy = links[(links["asked_loss"] > 0) & (links["loss_segments"] > 0)]
    for (name, rows), (colour, marker, _) in zip(lossy.groupby("backend", sort=False), style.SERIES, strict=False):
        deviation = np.sqrt(rows["asked_loss"] * (1 - rows["asked_loss"]) / rows["loss_segments"])
        axis.errorbar(
            rows["asked_loss"],
            rows["loss"],
            yerr=3 * deviation,
            color=colour,
            marker=marker,
            linestyle="none",
            label=f"{name}, 3σ",
        )
    ends = [5e-5, 3e-2]
    axis.plot(ends, ends, color=style.GREY, linestyle=":", label="asked")
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="asked loss per segment",
        ylabel="measured",
        title="Is the loss, per segment?",
    )


def _draw_theory(axis: Any, streams: pd.DataFrame) -> None:
    lossy = streams[(streams["asked_loss"] > 0) & (streams["asked_rtt_s"] > 0)]
    lossy = lossy[lossy["connections"] == CENTRE_CONNECTIONS].sort_values("asked_loss")
    groups = lossy.groupby("congestion_control", sort=False)
    for (name, rows), (colour, marker, dash) in zip(groups, style.SERIES[3:], strict=False):
        label = f"iperf3, {CENTRE_CONNECTIONS} × {name}"
        axis.plot(
            rows["asked_loss"], rows["goodput_bps"] / 1e6, color=colour, marker=marker, linestyle=dash, label=label
        )
    axis.set_title("TCP meets the link")
    theory = lossy.drop_duplicates("asked_loss")
    if theory.empty:
        axis.text(
            0.5, 0.5, "no link with loss and delay was asked for", transform=axis.transAxes, ha="center", fontsize=8
        )
        return
    axis.plot(
        theory["asked_loss"], theory["mathis_bps"] / 1e6, color="black", linestyle=":", label="Mathis, at most the link"
    )
    axis.set(
        xscale="log", yscale="log", xlabel="loss per segment", ylabel="goodput (Mbit/s)", title="TCP meets the link"
    )


def draw_signals(record: Record) -> Figure:
    """What the sender's TCP_INFO shows of a capacity that falls, recovers and vanishes."""
    signals = record.table("signals")
    figure, (rate, queue) = style.panels(1, 2, height_in=4.2, sharex=True)
    rate.step(
        signals["at_s"], signals["capacity_bps"] / 1e6, color=style.GREY, where="post", label="capacity of the link"
    )
    rate.plot(signals["at_s"], signals["acked_bps"] / 1e6, color=style.BLUE, label="acknowledged, moving average")
    rate.set(ylabel="Mbit/s", title="The sender sees the link change within a few hundred milliseconds")
    rate.legend(loc="center", bbox_to_anchor=(0.58, 0.6))
    queue.plot(signals["at_s"], 1e3 * signals["queue_delay_s"].clip(lower=1e-4), color=style.RED)
    queue.set(
        yscale="log", xlabel="time since the schedule began (s)", ylabel="rtt − min_rtt (ms)", title="and its queue"
    )
    return figure


EXPERIMENT = Experiment(
    name="link_fidelity",
    reads={
        "emulate": (
            "link.rate_bps",
            "link.rtt_s",
            "link.queue_s",
            "link.queue_bytes",
            "link.mtu_bytes",
            "link.seed",
            "options",
        )
    },
    check=check,
    run=run,
    figures={"link_fidelity": draw, "link_signals": draw_signals},
    options=Options,
)
