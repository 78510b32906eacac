"""What a link turned out to be, and whether that is what was asked.

No run believes its link: it measures it first, and a link that is off by more than a little says so; one that is off
by much does not run, because every figure behind it would be about another network.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median, stdev
from typing import Any, Protocol

from repro.errors import UserError
from repro.link.impairment import JITTER_STEP
from repro.link.spec import Direction, LinkSpec, Side
from repro.processes import Child, ChildEndedError

_START_TIMEOUT_S = 20.0
RATE_WARNING, RATE_REFUSAL = 0.01, 0.10
RTT_WARNING_S, RTT_WARNING, RTT_REFUSAL = 0.6e-3, 0.015, 0.10


@dataclass(frozen=True)
class Plan:
    """What a probe is to measure: `rate_bps` of IP bytes, None for as fast as TCP goes, within `pings` and `rate_s`."""

    rate_bps: float | None
    loss: float
    rtt_s: float
    queue_s: float
    mtu_bytes: int
    datagrams: bool
    pings: int = 100
    ping_gap_s: float = 0.004
    loss_s: float = 1.0
    rate_s: float = 1.0
    connections: int = 4

    @property
    def duration_s(self) -> float:
        """About how long it takes."""
        waits = 3 * (self.rtt_s + self.queue_s)
        return self.pings * self.ping_gap_s + (self.loss_s if self.loss else 0.0) + self.rate_s + waits


class Crossing(Protocol):
    """What a measurement needs of a link."""

    spec: LinkSpec
    backend: str

    def command(self, side: Side, argv: Sequence[str]) -> list[str]:
        """`argv` on that side."""

    def listen_host(self, side: Side) -> str:
        """Where a server binds."""

    def dial(self, port: int, side: Side = "prefill") -> tuple[str, int]:
        """Where a client connects."""


@dataclass(frozen=True)
class LinkMeasurement:
    """One direction of a link as it was found. Rates are TCP goodput: what was measured, and the most the asked rate
    allows.

    `rtt_s` is the median, `queue_s` what a full queue adds to it (nan where it was not filled), `jitter_s` the
    standard deviation of the one-way delay, `loss` is nan where it was not measured and `loss_segments` what it was
    measured on. `probe` is datagrams or streams.
    """

    backend: str
    probe: str
    rate_bps: float
    ideal_rate_bps: float
    rtt_s: float
    rtt_p99_s: float
    queue_s: float
    jitter_s: float
    loss: float
    loss_segments: int
    duration_s: float

    @property
    def rate_share(self) -> float:
        """Measured ÷ ideal; nan where the rate is unlimited."""
        return self.rate_bps / self.ideal_rate_bps if math.isfinite(self.ideal_rate_bps) else math.nan

    def warnings(self, spec: LinkSpec) -> list[str]:
        """Where the link is off by more than it should be, a line each."""
        found = []
        if abs(self.rate_share - 1) > RATE_WARNING:
            found.append(f"rate: {_rate(self.rate_bps)} of TCP goodput where {_rate(self.ideal_rate_bps)} was asked")
        allowed = max(RTT_WARNING_S, RTT_WARNING * spec.rtt_s) + 2 * spec.jitter_s
        if spec.rtt_s > 0 and abs(self.rtt_s - spec.rtt_s) > allowed:
            found.append(f"rtt: {self.rtt_s * 1e3:.3g} ms where {spec.rtt_s * 1e3:.3g} ms was asked")
        if self.loss_segments and abs(self.loss - spec.loss) > 3 * self._loss_deviation(spec):
            found.append(f"loss: {self.loss:.3g} of {self.loss_segments} segments where {spec.loss:.3g} was asked")
        return found

    def refusals(self, spec: LinkSpec) -> list[str]:
        """Why a run must not use the link: what was asked for is beyond this machine, a line each."""
        found = []
        if abs(self.rate_share - 1) > RATE_REFUSAL:
            limit = self.rate_bps / spec.tcp_goodput_share
            found.append(
                f"link.rate_bps: {self.ideal_rate_bps / spec.tcp_goodput_share:g}; accepted: what {self.backend} was measured to carry "
                f"here, {_rate(limit)} on the wire"
            )
        off_s = self.rtt_s - spec.rtt_s
        allowed_s = RTT_WARNING_S + RTT_REFUSAL * spec.rtt_s + 2 * spec.jitter_s
        if spec.rtt_s > 0 and (off_s > spec.rtt_s or abs(off_s) > allowed_s):
            found.append(
                f"link.rtt_s: {spec.rtt_s:g}; accepted: more than the floor of {self.backend} measured here, "
                f"{max(off_s, 0) * 1e3:.3g} ms (it held {self.rtt_s * 1e3:.3g} ms)"
            )
        return found

    def _loss_deviation(self, spec: LinkSpec) -> float:
        """The standard deviation of a loss count's share; losses in bursts come together, so there are fewer to count."""
        return math.sqrt(spec.loss * (1 - spec.loss) / self.loss_segments * 2 * spec.loss_burst_segments)


def measure(link: Crossing, direction: Direction = "forward", rate_s: float = 1.0, pings: int = 100) -> LinkMeasurement:
    """Measure one direction of a link with a probe on each side, in about `rate_s` and two seconds more, and four
    round trips.

    Raises:
        UserError: if a probe fails.
    """
    spec = link.spec
    rate = spec.base_rate_bps(direction)
    packets = link.backend in ("netem", "packet", "tbf")
    plan = Plan(
        rate_bps=rate,
        loss=spec.loss if packets else 0.0,
        rtt_s=spec.rtt_s,
        queue_s=0.0 if rate is None else min(spec.queue_limit_bytes(direction) * 8 / rate, 2.0),
        mtu_bytes=spec.mtu_bytes,
        datagrams=packets and rate is not None,
        pings=pings,
        ping_gap_s=max(Plan.ping_gap_s, JITTER_STEP * spec.jitter_s),  # closer ones would see the same jitter
        rate_s=max(rate_s, 400 * spec.jitter_s),  # arrivals at both ends of the window are off by the jitter
    )
    found = across(link, direction, "ask", 10 + 4 * plan.duration_s, plan=asdict(plan))
    return _evaluate(link, direction, plan, found)


def across(link: Crossing, direction: Direction, action: str, timeout_s: float, **asked: Any) -> dict[str, Any]:
    """Run a probe's `action` (`ask` or `watch`) against an answering probe on the far side; returns what it found.

    Raises:
        UserError: if a probe fails or takes longer than `timeout_s`.
    """
    near: Side = "prefill" if direction == "forward" else "decode"
    far: Side = "decode" if direction == "forward" else "prefill"
    with _probe(link, far, "answering") as answering:
        port = int(answering.ask("answer", _START_TIMEOUT_S, host=link.listen_host(far))["port"])
        host, dialled = link.dial(port, near)
        with _probe(link, near, "asking") as asking:
            try:
                return dict(asking.ask(action, timeout_s, host=host, port=dialled, **asked)["found"])
            except ChildEndedError as error:
                raise UserError(f"the link carries nothing: {error}") from None


def _probe(link: Crossing, side: Side, name: str) -> Child:
    return Child(f"{name} link probe", link.command(side, [sys.executable, "-m", "repro.link.probe"]))


def _evaluate(link: Crossing, direction: Direction, plan: Plan, found: dict[str, Any]) -> LinkMeasurement:
    share = link.spec.tcp_goodput_share
    trips = sorted(there_and_back for there_and_back, _ in found["pings"])
    if len(trips) < 2:
        raise UserError("link: no ping came back; the link carries nothing")
    sent = found.get("sent", 0)
    return LinkMeasurement(
        backend=link.backend,
        probe="datagrams" if plan.datagrams else "streams",
        rate_bps=found["wire_bps"] * share if "wire_bps" in found else found["goodput_bps"],
        ideal_rate_bps=link.spec.ideal_goodput_bps(direction),
        rtt_s=median(trips),
        queue_s=median(found["loaded_s"]) - median(there for _, there in found["pings"])
        if found.get("loaded_s")
        else math.nan,
        rtt_p99_s=trips[min(len(trips) - 1, int(0.99 * len(trips)))],
        jitter_s=stdev(there for _, there in found["pings"]),
        loss=1 - found["received"] / sent if sent else math.nan,
        loss_segments=sent,
        duration_s=found["duration_s"],
    )


def _rate(bps: float) -> str:
    return f"{bps / 1e9:.4g} Gbps" if bps >= 1e9 else f"{bps / 1e6:.4g} Mbps"
