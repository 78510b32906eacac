"""A link as a value: what lies between the prefill and the decode cluster (§2.1, §3.3), and how it changes over time.

"Forward" is prefill → decode, the way of the KVCache. A rate counts what an IP router would count: IP headers and
payload, without Ethernet framing. So the best that TCP can do is `tcp_goodput_share` of it (0.965 at an MTU of 1500),
on every backend alike.

Nothing here knows how a link is made; `conditions` flattens a spec into the piecewise-constant form that every
backend follows.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from repro.errors import UserError

Side = Literal["prefill", "decode"]
Direction = Literal["forward", "reverse"]

BACKENDS = ("auto", "netem", "packet", "tbf", "relay", "none")
JITTER_DISTRIBUTIONS = ("normal", "uniform", "exponential")
CONGESTION_CONTROLS = ("cubic", "bbr", "reno")

#: IPv4 header and TCP header with timestamps, as Linux sends them.
TCP_HEADERS_BYTES = 52
#: Trace lines are opportunities to send this much (Mahimahi's convention).
MAHIMAHI_BYTES = 1500
#: What Linux waits at least before it sends again; a route or a namespace may say otherwise.
KERNEL_RTO_MIN_S = 0.2
#: A queue of a single millisecond at 1 Gbps holds one super-packet; less than this many bytes and TCP cannot even
#: keep two in it.
SMALLEST_QUEUE_BYTES = 16 * 1500


@dataclass(frozen=True)
class LinkChange:
    """From `at_s` after the start of the load, the values that are not None replace the link's.

    `for_s` gives the change an end, after which the link is as it was before; rate 0 is an outage: the queue holds
    what it can.
    """

    at_s: float
    for_s: float | None = None
    rate_bps: float | None = None
    reverse_rate_bps: float | None = None
    rtt_s: float | None = None
    loss: float | None = None

    def __post_init__(self) -> None:
        _at_least(0, "link.schedule.at_s", self.at_s)
        if self.for_s is not None and self.for_s <= 0:
            raise UserError(f"link.schedule.for_s: {self.for_s:g}; accepted: seconds above 0, or null for good")
        for name in ("rate_bps", "reverse_rate_bps", "rtt_s"):
            if (value := getattr(self, name)) is not None:
                _at_least(0, f"link.schedule.{name}", value)
        if self.loss is not None:
            _probability("link.schedule.loss", self.loss)
        if all(getattr(self, name) is None for name in ("rate_bps", "reverse_rate_bps", "rtt_s", "loss")):
            raise UserError(f"link.schedule: nothing changes at {self.at_s:g} s; accepted: with a rate, rtt_s or loss")


@dataclass(frozen=True)
class Condition:
    """One direction of the link from `at_s` on; `rate_bps` None is unlimited, 0 an outage."""

    at_s: float
    rate_bps: float | None
    delay_s: float
    loss: float


@dataclass(frozen=True)
class LinkSpec:
    """What is asked of a link.

    Attributes:
        rate_bps: capacity forward, IP bytes on the wire; None is unlimited. `reverse_rate_bps` None means the same.
        rtt_s: round trip of an idle link, half of it each way.
        jitter_s: standard deviation of each one-way delay around its mean. Packets stay in order, so it changes
            smoothly, over some 2π deviations (see `impairment.Jitter`); `jitter_correlation_s` is the time over which it
            forgets, where that is longer. The mean RTT is the asked one; so is the median where the distribution is
            symmetric, while an exponential one has it 0.61 deviations lower.
        loss: probability that a segment is lost, each way. With `loss_burst_segments` above 1 losses come in bursts
            of that mean length (Gilbert–Elliott: in a burst each segment is lost with `loss_in_burst`, outside none).
        queue_s: drop-tail buffer before the link, in time at the link's first rate; `queue_bytes` replaces it.
        schedule: changes relative to `Link.start`. `capacity_trace` is a file that replaces the forward rate from
            then on, repeated for ever: Mahimahi's format (one millisecond timestamp per 1500 bytes) or CSV with the
            header `at_s,rate_bps`.
        congestion_control: of TCP on both sides; None leaves the kernel's.
        rto_min_s: TCP's smallest retransmission timeout on both sides; None leaves the kernel's, which an emulation scales as any
            other time.
        mtu_bytes: of the IP packets on the link.
        source: where the numbers come from.
    """

    name: str = "link"
    rate_bps: float | None = None
    reverse_rate_bps: float | None = None
    rtt_s: float = 0.0
    jitter_s: float = 0.0
    jitter_distribution: str = "normal"
    jitter_correlation_s: float = 0.0
    loss: float = 0.0
    loss_burst_segments: float = 1.0
    loss_in_burst: float = 1.0
    queue_s: float = 0.1
    queue_bytes: int | None = None
    schedule: tuple[LinkChange, ...] = field(default_factory=tuple)
    capacity_trace: str | None = None
    reverse_capacity_trace: str | None = None
    congestion_control: str | None = None
    rto_min_s: float | None = None
    mtu_bytes: int = 1500
    seed: int = 0
    backend: str = "auto"
    source: str = ""

    def __post_init__(self) -> None:
        for name in ("rate_bps", "reverse_rate_bps"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise UserError(f"link.{name}: {value:g}; accepted: bits per second above 0, or null for unlimited")
        for name in ("rtt_s", "jitter_s", "jitter_correlation_s"):
            _at_least(0, f"link.{name}", getattr(self, name))
        _probability("link.loss", self.loss)
        _probability("link.loss_in_burst", self.loss_in_burst)
        if self.rto_min_s is not None and not self.rto_min_s > 0:
            raise UserError(f"link.rto_min_s: {self.rto_min_s:g}; accepted: seconds above 0, or null for the kernel's")
        _at_least(1, "link.loss_burst_segments", self.loss_burst_segments)
        if self.loss_burst_segments > 1 and self.loss >= self.loss_in_burst:
            raise UserError(f"link.loss: {self.loss:g}; accepted: less than loss_in_burst, {self.loss_in_burst:g}")
        if not self.queue_s > 0:
            raise UserError(f"link.queue_s: {self.queue_s:g}; accepted: seconds above 0")
        if self.queue_bytes is not None:
            _at_least(1, "link.queue_bytes", self.queue_bytes)
        if not 576 <= self.mtu_bytes <= 65000:
            raise UserError(f"link.mtu_bytes: {self.mtu_bytes}; accepted: 576 to 65000")
        _one_of("link.backend", self.backend, BACKENDS)
        _one_of("link.jitter_distribution", self.jitter_distribution, JITTER_DISTRIBUTIONS)
        if self.congestion_control is not None:
            _one_of("link.congestion_control", self.congestion_control, CONGESTION_CONTROLS)
        starts = [change.at_s for change in self.schedule]
        if starts != sorted(set(starts)):
            raise UserError("link.schedule: changes must be in order of at_s, one per moment")
        for earlier, later in itertools.pairwise(self.schedule):
            if earlier.for_s is not None and earlier.at_s + earlier.for_s > later.at_s:
                raise UserError(
                    f"link.schedule: the change at {earlier.at_s:g} s lasts beyond the next at {later.at_s:g} s"
                )
        if self.rate_bps is None and any(
            c.rate_bps is not None or c.reverse_rate_bps is not None for c in self.schedule
        ):
            raise UserError("link.schedule: changes the rate of an unlimited link; accepted: with link.rate_bps set")
        for name in ("capacity_trace", "reverse_capacity_trace"):
            if (path := getattr(self, name)) is not None and not Path(path).is_file():
                raise UserError(f"link.{name}: {path} is not a file; accepted: a Mahimahi or CSV capacity trace")

    @property
    def tcp_goodput_share(self) -> float:
        """TCP payload ÷ IP bytes for full segments: the ideal goodput as a share of the rate."""
        return (self.mtu_bytes - TCP_HEADERS_BYTES) / self.mtu_bytes

    def ideal_goodput_bps(self, direction: Direction = "forward") -> float:
        """The most that TCP can deliver at the first rate; infinite where the rate is unlimited."""
        rate = self.base_rate_bps(direction)
        return math.inf if rate is None else rate * self.tcp_goodput_share

    def base_rate_bps(self, direction: Direction) -> float | None:
        """The rate before `Link.start`: the trace's mean where there is a trace."""
        trace = self.capacity_trace if direction == "forward" else self.reverse_capacity_trace
        if trace is not None:
            return mean_rate_bps(read_trace(trace))
        return self.reverse_rate_bps if direction == "reverse" and self.reverse_rate_bps is not None else self.rate_bps

    def bdp_bytes(self) -> float:
        """Bandwidth-delay product of the faster direction; 0 where the rate is unlimited."""
        rates = [self.base_rate_bps("forward") or 0.0, self.base_rate_bps("reverse") or 0.0]
        return max(rates) * self.rtt_s / 8

    def queue_limit_bytes(self, direction: Direction) -> float:
        """The buffer before the link; infinite where the rate is."""
        if self.queue_bytes is not None:
            return float(self.queue_bytes)
        rate = self.base_rate_bps(direction)
        return math.inf if rate is None else max(rate * self.queue_s / 8, SMALLEST_QUEUE_BYTES)

    def base(self, direction: Direction) -> Condition:
        """One direction as it is before `Link.start`."""
        return Condition(0.0, self.base_rate_bps(direction), self.rtt_s / 2, self.loss)

    def conditions(self, direction: Direction) -> tuple[Condition, ...]:
        """One direction as piecewise-constant conditions from time 0, each until the next; without the trace."""
        found = [self.base(direction)]
        for change in self.schedule:
            before = found[-1]
            rate = change.rate_bps
            if direction == "reverse":
                # A change of rate_bps alone hits both directions of a symmetric link.
                symmetric = self.reverse_rate_bps is None and self.reverse_capacity_trace is None
                rate = (
                    change.reverse_rate_bps
                    if change.reverse_rate_bps is not None
                    else (change.rate_bps if symmetric else None)
                )
            after = Condition(
                change.at_s,
                before.rate_bps if rate is None else rate,
                before.delay_s if change.rtt_s is None else change.rtt_s / 2,
                before.loss if change.loss is None else change.loss,
            )
            if before.at_s == change.at_s:  # replaces the base, or the end of the change before it
                found.pop()
            found.append(after)
            if change.for_s is not None:
                found.append(replace(before, at_s=change.at_s + change.for_s))
        return tuple(found)

    def trace(self, direction: Direction) -> tuple[tuple[float, float], ...]:
        """The capacity trace as (duration_s, rate_bps) pieces; empty without one."""
        path = self.capacity_trace if direction == "forward" else self.reverse_capacity_trace
        return () if path is None else read_trace(path)

    def scaled(self, time_scale: float, byte_scale: float) -> LinkSpec:
        """The link of an emulation with time divided by `time_scale`, bytes by `byte_scale`: every ratio stays."""
        if time_scale <= 0 or byte_scale <= 0:
            raise UserError(f"link: scales of time {time_scale:g} and bytes {byte_scale:g}; accepted: above 0")
        if time_scale == 1 and byte_scale == 1:
            return self
        if self.capacity_trace is not None or self.reverse_capacity_trace is not None:
            raise UserError(
                "link.capacity_trace: a trace cannot be scaled; accepted: time_scale and byte_scale of 1 with it"
            )
        rate = time_scale / byte_scale

        def times(value: float | None, factor: float) -> float | None:
            return None if value is None else value * factor

        return replace(
            self,
            rate_bps=times(self.rate_bps, rate),
            reverse_rate_bps=times(self.reverse_rate_bps, rate),
            rtt_s=self.rtt_s / time_scale,
            jitter_s=self.jitter_s / time_scale,
            jitter_correlation_s=self.jitter_correlation_s / time_scale,
            queue_s=self.queue_s / time_scale,
            rto_min_s=(self.rto_min_s or KERNEL_RTO_MIN_S) / time_scale,
            queue_bytes=None if self.queue_bytes is None else max(1, round(self.queue_bytes / byte_scale)),
            schedule=tuple(
                LinkChange(
                    change.at_s / time_scale,
                    times(change.for_s, 1 / time_scale),
                    times(change.rate_bps, rate),
                    times(change.reverse_rate_bps, rate),
                    times(change.rtt_s, 1 / time_scale),
                    change.loss,
                )
                for change in self.schedule
            ),
        )


def read_trace(path: str) -> tuple[tuple[float, float], ...]:
    """A capacity trace as (duration_s, rate_bps) pieces.

    Raises:
        UserError: naming the file and line that is neither Mahimahi's nor `at_s,rate_bps`.
    """
    lines = [line.strip() for line in Path(path).read_text().splitlines()]
    if lines and lines[0].replace(" ", "") == "at_s,rate_bps":
        return _csv_trace(path, lines[1:])
    return _mahimahi_trace(path, lines)


def mean_rate_bps(trace: tuple[tuple[float, float], ...]) -> float:
    """What a whole round of the trace carries, in bits per second."""
    return sum(duration * rate for duration, rate in trace) / sum(duration for duration, _ in trace)


def _mahimahi_trace(path: str, lines: list[str]) -> tuple[tuple[float, float], ...]:
    moments: list[int] = []
    for number, line in enumerate(lines, 1):
        if not line or line.startswith("#"):
            continue
        if not line.isdigit() or (moments and int(line) < moments[-1]):
            raise UserError(
                f"{path}:{number}: {line!r}; accepted: milliseconds in order, one per 1500 bytes, or CSV at_s,rate_bps"
            )
        moments.append(int(line))
    if not moments or moments[-1] == 0:
        raise UserError(f"{path}: an empty capacity trace; accepted: at least one millisecond above 0")
    # Mahimahi repeats a trace with the period of its last timestamp; opportunities stamped m are used up during (m −
    # 1, m].
    counts = [0] * moments[-1]
    for moment in moments:
        counts[max(moment - 1, 0)] += 1
    return _merged([(1e-3, count * MAHIMAHI_BYTES * 8 / 1e-3) for count in counts])


def _csv_trace(path: str, lines: list[str]) -> tuple[tuple[float, float], ...]:
    points: list[tuple[float, float]] = []
    for number, line in enumerate(lines, 2):
        if not line:
            continue
        try:
            at_s, rate_bps = (float(part) for part in line.split(","))
        except ValueError:
            raise UserError(f"{path}:{number}: {line!r}; accepted: at_s,rate_bps") from None
        if rate_bps < 0 or (points and at_s <= points[-1][0]) or (not points and at_s != 0):
            raise UserError(
                f"{path}:{number}: {line!r}; accepted: at_s from 0 in increasing order, rate_bps of 0 or more"
            )
        points.append((at_s, rate_bps))
    if len(points) < 2 or not any(rate for _, rate in points[:-1]):
        raise UserError(
            f"{path}: accepted: two rows or more (the last one ends the round), one of them with a rate above 0"
        )
    return _merged([(later - at_s, rate) for (at_s, rate), (later, _) in itertools.pairwise(points)])


def _merged(pieces: list[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    found: list[tuple[float, float]] = []
    for duration, rate in pieces:
        if found and found[-1][1] == rate:
            found[-1] = (found[-1][0] + duration, rate)
        else:
            found.append((duration, rate))
    return tuple(found)


def _at_least(least: float, key: str, value: float) -> None:
    if not (math.isfinite(value) and value >= least):
        raise UserError(f"{key}: {value:g}; accepted: {least:g} or more")


def _probability(key: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise UserError(f"{key}: {value:g}; accepted: a probability from 0 to 1")


def _one_of(key: str, value: str, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise UserError(f"{key}: {value!r} is unknown; accepted: {', '.join(accepted)}")
