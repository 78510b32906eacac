"""What each connection's TCP knows of the link, for the scheduler to difference (§3.4.3).

The change of `bytes_acked` is the goodput, `rtt_s − min_rtt_s` the queue, the change of `bytes_retransmitted` over that
of `bytes_sent` the loss, `notsent_bytes` the backlog. `repro.link.tcp_info` turns them into congestion signals.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass

from repro.link.tcp_info import TcpInfo, read


@dataclass(frozen=True)
class ConnectionSignal:
    """One connection's TCP at one moment (monotonic seconds)."""

    slot: int
    at_s: float
    tcp: TcpInfo


def read_signal(slot: int, sock: socket.socket, at_s: float) -> ConnectionSignal | None:
    """The signal of an open connection, or None where it has just been closed."""
    try:
        return ConnectionSignal(slot, at_s, read(sock))
    except OSError:
        return None


class Laggards:
    """Which connections are stuck while their siblings go on.

    TCP doubles its patience with every repeat. So after an outage, or the loss of a flight's last segments, a connection
    may wait for seconds on a link that is open again, and a whole request with it. Giving such a connection up lets the
    others carry what it had; its siblings' progress is the evidence that not the link is to blame.
    """

    def __init__(self, patience_s: float = 1.0, patience_rtts: float = 8.0) -> None:
        self._patience_s = patience_s
        self._patience_rtts = patience_rtts
        # Per connection: bytes acknowledged, when these last grew, and since when it has waited for that in vain.
        self._seen: dict[int, tuple[int, float, float]] = {}

    def update(self, readings: Mapping[int, ConnectionSignal]) -> list[int]:
        """The keys of those that lag; `readings` are of all connections, at one moment."""
        seen = {}
        for key, signal in readings.items():
            acked, grew_s, waits_s = self._seen.get(key, (-1, signal.at_s, signal.at_s))
            if signal.tcp.bytes_acked != acked:
                grew_s = waits_s = signal.at_s
            elif not signal.tcp.unacked_segments:
                waits_s = signal.at_s
            seen[key] = signal.tcp.bytes_acked, grew_s, waits_s
        self._seen = seen
        latest = max((grew_s for _, grew_s, _ in seen.values()), default=0.0)
        return [
            key
            for key, (_, _, waits_s) in seen.items()
            if latest - waits_s > self._patience_s + self._patience_rtts * readings[key].tcp.rtt_s
        ]
