"""What each connection's TCP knows of the link, for the scheduler to difference (§3.4.3).

The change of `bytes_acked` is the goodput, `rtt_s − min_rtt_s` the queue, the change of `bytes_retransmitted` over that
of `bytes_sent` the loss, `notsent_bytes` the backlog. `repro.link.tcp_info` turns them into congestion signals.
"""

from __future__ import annotations

import socket
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
