"""What a connection's TCP knows of the link (TCP_INFO): counters and times for the scheduler to difference (§3.4.3).

The change of `bytes_acked` is the goodput, `rtt_s − min_rtt_s` the queue, the change of `bytes_retrans` over that of
`bytes_sent` the loss, `notsent_bytes` the backlog. The delivery rate counts only where the sender kept the link busy.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass

_STATE_BYTES = 8
_U32 = struct.Struct("<24I")  # rto … total_retrans
_U64 = struct.Struct("<4Q")  # pacing_rate, max_pacing_rate, bytes_acked, bytes_received
# segs_out … | delivery_rate | busy, rwnd_limited, sndbuf_limited | delivered, delivered_ce | sent, retrans
_TAIL = struct.Struct("<6I Q 3Q 2I 2Q")


@dataclass(frozen=True)
class ConnectionSignal:
    """One connection at one moment. Byte counts are cumulative over the connection's life."""

    slot: int
    at_s: float
    bytes_acked: int
    bytes_sent: int
    bytes_retrans: int
    rtt_s: float
    min_rtt_s: float
    notsent_bytes: int
    delivery_rate_bps: float
    app_limited: bool


def read_signal(slot: int, sock: socket.socket, at_s: float) -> ConnectionSignal | None:
    """The signal of an open TCP connection, or None where it has just been closed."""
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    except OSError:
        return None
    words = _U32.unpack_from(info, _STATE_BYTES)
    at = _STATE_BYTES + _U32.size
    bytes_acked = _U64.unpack_from(info, at)[2]
    tail = _TAIL.unpack_from(info, at + _U64.size)
    return ConnectionSignal(
        slot=slot,
        at_s=at_s,
        bytes_acked=bytes_acked,
        bytes_sent=tail[12],
        bytes_retrans=tail[13],
        rtt_s=words[15] / 1e6,
        min_rtt_s=tail[3] / 1e6,
        notsent_bytes=tail[2],
        delivery_rate_bps=tail[6] * 8.0,
        app_limited=bool(info[7] & 1),
    )
