"""Congestion as the sender's own TCP sees it (§3.3: loss and retransmissions are fed to the scheduler).

TCP_INFO is read per connection at a set interval and turned into signals that were found to follow the link:
acknowledged bytes give the rate, rtt − min_rtt the queue, retransmitted bytes the loss, unsent bytes the backlog. The
congestion window is left out (it says what TCP hopes, not what the link does), and the kernel's delivery rate counts
only while the application keeps TCP busy.
"""

from __future__ import annotations

import math
import socket
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# struct tcp_info of linux/tcp.h, as far as it is used here; the kernel only ever appends to it.
_FIELDS = struct.Struct("=8B24I4Q6I4Q2I2Q")
_APP_LIMITED = 7  # low bit of this byte
_SEGMENT, _UNACKED, _RTT = 8 + 2, 8 + 4, 8 + 15
_ACKED, _NOTSENT, _MIN_RTT, _DELIVERY_RATE, _SENT, _RETRANSMITTED = 34, 38, 39, 42, 48, 49
_NO_RTT = 0xFFFFFFFF


@dataclass(frozen=True)
class TcpInfo:
    """One reading. Rates in bit/s, counters since the connection began."""

    rtt_s: float
    min_rtt_s: float
    bytes_sent: int
    bytes_acked: int
    bytes_retransmitted: int
    notsent_bytes: int
    unacked_segments: int
    segment_bytes: int
    delivery_rate_bps: float
    app_limited: bool


def read(connection: socket.socket) -> TcpInfo:
    """TCP_INFO of a connected socket. Raises OSError on anything else."""
    return parse(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _FIELDS.size))


def parse(raw: bytes) -> TcpInfo:
    """A reading from the kernel's bytes; an older kernel's shorter answer reads as zeros at its end."""
    fields = _FIELDS.unpack(raw.ljust(_FIELDS.size, b"\0"))
    min_rtt_us = fields[_RTT] if fields[_MIN_RTT] == _NO_RTT else fields[_MIN_RTT]
    return TcpInfo(
        rtt_s=fields[_RTT] * 1e-6,
        min_rtt_s=min_rtt_us * 1e-6,
        bytes_sent=fields[_SENT],
        bytes_acked=fields[_ACKED],
        bytes_retransmitted=fields[_RETRANSMITTED],
        notsent_bytes=fields[_NOTSENT],
        unacked_segments=fields[_UNACKED],
        segment_bytes=fields[_SEGMENT],
        delivery_rate_bps=fields[_DELIVERY_RATE] * 8.0,
        app_limited=bool(fields[_APP_LIMITED] & 1),
    )


@dataclass(frozen=True)
class Congestion:
    """What one connection, or several together, showed at a moment (monotonic seconds).

    `acked_bps` is a moving average over the sampler's memory, `queue_delay_s` is rtt − min_rtt, `loss` the
    retransmitted share of what was sent since the last sample, `backlog_bytes` what waits in this host's socket,
    `delivery_rate_bps` nan while TCP is app-limited.
    """

    at_s: float
    acked_bps: float
    queue_delay_s: float
    min_rtt_s: float
    loss: float
    retransmitted_bytes: int
    backlog_bytes: int
    delivery_rate_bps: float


class Sampler:
    """Turns readings of one connection into signals; call it at an even interval of some 50 ms or more."""

    def __init__(self, memory_s: float = 0.25) -> None:
        self._memory_s = memory_s
        self._last: tuple[float, TcpInfo] | None = None
        self._acked_bps = 0.0

    def sample(self, now_s: float, info: TcpInfo) -> Congestion:
        """The signals at `now_s`, from this reading and the one before."""
        loss, retransmitted = 0.0, 0
        if self._last is not None and now_s > self._last[0]:
            elapsed_s, before = now_s - self._last[0], self._last[1]
            rate = 8 * (info.bytes_acked - before.bytes_acked) / elapsed_s
            self._acked_bps += (1 - math.exp(-elapsed_s / self._memory_s)) * (rate - self._acked_bps)
            retransmitted = info.bytes_retransmitted - before.bytes_retransmitted
            sent = info.bytes_sent - before.bytes_sent
            loss = retransmitted / sent if sent > 0 else 0.0
        self._last = (now_s, info)
        return Congestion(
            at_s=now_s,
            acked_bps=self._acked_bps,
            queue_delay_s=max(0.0, info.rtt_s - info.min_rtt_s),
            min_rtt_s=info.min_rtt_s,
            loss=loss,
            retransmitted_bytes=retransmitted,
            backlog_bytes=info.notsent_bytes,
            delivery_rate_bps=math.nan if info.app_limited else info.delivery_rate_bps,
        )


def together(samples: Sequence[Congestion]) -> Congestion:
    """Connections that share a link as one: rates and backlogs add, delays and losses average by rate, the smallest
    min_rtt counts.

    Raises:
        ValueError: without a sample.
    """
    if not samples:
        raise ValueError("no connection to sample")
    weights = [max(sample.acked_bps, 1.0) for sample in samples]
    total = sum(weights)

    def mean(values: Iterable[float]) -> float:
        return sum(weight * value for weight, value in zip(weights, values, strict=True)) / total

    return Congestion(
        at_s=max(sample.at_s for sample in samples),
        acked_bps=sum(sample.acked_bps for sample in samples),
        queue_delay_s=mean(sample.queue_delay_s for sample in samples),
        min_rtt_s=min(sample.min_rtt_s for sample in samples),
        loss=mean(sample.loss for sample in samples),
        retransmitted_bytes=sum(sample.retransmitted_bytes for sample in samples),
        backlog_bytes=sum(sample.backlog_bytes for sample in samples),
        delivery_rate_bps=sum(sample.delivery_rate_bps for sample in samples),  # nan if any of them is
    )
