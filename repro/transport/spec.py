"""How KVCache is sent (§3.3: several TCP connections at once), and what a receiver is willing to take, as values."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from repro.errors import UserError
from repro.kvcache.frames import CHECKSUM_BLOCK_BYTES, FrameLimits

BACKENDS = ("tcp", "mooncake", "nixl")
MAX_SEGMENT_BYTES = 64 << 20  # of a piece, in one message


@dataclass(frozen=True)
class ReceiverLimits:
    """What a receiver lends to its peers. Whoever asks for more is refused, and the refusal is logged.

    `window_bytes` bounds what one sender may have lying at the receiver before decode has taken it; a single request
    may exceed it up to `max_request_bytes`, so that the oldest request can always be finished.
    """

    window_bytes: int = 256 << 20
    max_request_bytes: int = 8 << 30
    max_piece_bytes: int = 1 << 30
    max_pieces: int = 1 << 18
    max_manifest_bytes: int = 1 << 20
    max_requests: int = 1024
    max_sessions: int = 16
    max_connections: int = 64
    prefault_bytes: int = 64 << 20
    handshake_timeout_s: float = 5.0
    segment_timeout_s: float = 60.0
    session_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 0 or (value == 0 and name != "prefault_bytes"):
                raise UserError(f"transport limits: {name} is {value}, a positive number is accepted")

    @property
    def frames(self) -> FrameLimits:
        """The same limits in the terms of the wire format."""
        return FrameLimits(
            max_payload_bytes=self.max_piece_bytes, max_pieces=self.max_pieces, max_meta_bytes=self.max_manifest_bytes
        )


@dataclass(frozen=True)
class TransportSpec:
    """One way of sending KVCache.

    `secret` is shared by both sides: the text itself, or `env:NAME` or `file:PATH`, which keep it out of records.
    `tls` is a folder written by `scripts/make_certificates`: mutual TLS 1.3. `segment_bytes` is what one connection
    carries at a time at least (several times that where the link is fast), `turn_bytes` what a request may send before
    another has its turn. `rate_cap_bps` and the socket buffers are left to the kernel where None, but for paths within
    a machine (see `wire.hold_buffer`); buffers must hold bandwidth × RTT ÷ connections to fill the link.
    `stall_s` without an acknowledgement from the peer's TCP gives a connection up; a new one takes its place.
    """

    backend: str = "tcp"
    connections: int = 4
    secret: str | None = None
    tls: str | None = None
    segment_bytes: int = 1 << 20
    turn_bytes: int = 8 << 20
    max_in_flight_bytes: int = 256 << 20
    deadline_s: float = 30.0
    heartbeat_s: float = 1.0
    stall_s: float = 3.0
    connect_timeout_s: float = 10.0
    congestion_control: str | None = None
    send_buffer_bytes: int | None = None
    receive_buffer_bytes: int | None = None
    rate_cap_bps: float | None = None
    limits: ReceiverLimits = field(default_factory=ReceiverLimits)

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise UserError(f"transport.backend: {self.backend!r} is unknown, accepted are {', '.join(BACKENDS)}")
        if not 1 <= self.connections <= 64:
            raise UserError(f"transport.connections: {self.connections}, accepted are 1 to 64")
        if self.segment_bytes % CHECKSUM_BLOCK_BYTES or not 0 < self.segment_bytes <= MAX_SEGMENT_BYTES:
            raise UserError(
                f"transport.segment_bytes: {self.segment_bytes}, accepted are multiples of {CHECKSUM_BLOCK_BYTES} "
                f"up to {MAX_SEGMENT_BYTES}"
            )
        for name in ("turn_bytes", "max_in_flight_bytes", "deadline_s", "heartbeat_s", "stall_s", "connect_timeout_s"):
            if getattr(self, name) <= 0:
                raise UserError(f"transport.{name}: {getattr(self, name)}, a positive number is accepted")
        for name in ("send_buffer_bytes", "receive_buffer_bytes", "rate_cap_bps"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise UserError(f"transport.{name}: {value}, a positive number or null is accepted")

    @property
    def silence_s(self) -> float:
        """A connection that says nothing for so long, though heartbeats are due on it, is given up."""
        return 3 * self.heartbeat_s + self.stall_s

    def secret_bytes(self) -> bytes:
        """The shared secret itself; empty where none is asked for. Raises UserError where it cannot be read."""
        if self.secret is None:
            return b""
        source, _, name = self.secret.partition(":")
        if source == "env":
            if not os.environ.get(name):
                raise UserError(f"transport.secret: the environment variable {name} is not set")
            return os.environ[name].encode()
        if source == "file":
            try:
                return Path(name).read_bytes().strip()
            except OSError as error:
                raise UserError(f"transport.secret: {name} cannot be read ({error.strerror})") from None
        return self.secret.encode()
