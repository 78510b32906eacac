"""What a sender knows of a request on its way, and what it says of it at the end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, NotRequired, TypedDict

from repro.errors import UserError
from repro.kvcache.frames import Piece


class TransferFailed(UserError):  # noqa: N818 - an outcome that the router acts on, named as such
    """A request that the decode side will not get. `reason`: deadline, refused, cancelled, lost or closed."""

    def __init__(self, request_id: int, reason: str, detail: str) -> None:
        self.request_id = request_id
        self.reason = reason
        self.detail = detail
        super().__init__(f"transfer of request {request_id} failed ({reason}): {detail}")


@dataclass(frozen=True)
class PieceDelivery:
    """When a piece was given to `send`, when its first segment went out, and when it was acknowledged (monotonic s)."""

    piece: int
    layer: int
    payload_bytes: int
    queued_s: float
    first_byte_s: float
    acked_s: float


@dataclass(frozen=True)
class Delivery:
    """A request that the decode side has, whole and checked. Times are seconds of the monotonic clock."""

    request_id: int
    payload_bytes: int
    resent_bytes: int
    begun_s: float
    first_byte_s: float
    last_byte_s: float
    acked_s: float
    pieces: tuple[PieceDelivery, ...]


class SenderStats(TypedDict):
    """Counts since a sender began, and what is outstanding now.

    `wire_bytes` is what TCP sent on all data connections there ever were, each byte once: payload, heads, repeats.
    `arena_used_bytes` is what pieces under way occupy on this side, where the transport is a process of its own.
    """

    sent_bytes: int
    resent_bytes: int
    wire_bytes: int
    acked_pieces: int
    acked_bytes: int
    opened: int
    lost: int
    connections: int
    bytes_by_connection: list[int]
    transfers: int
    unacked_bytes: int
    held_bytes: int
    arena_used_bytes: NotRequired[int]


@dataclass
class Outgoing:
    """A piece on its way. `sent` tells which ranges went out, each as (offset, length, connection)."""

    piece: Piece
    raw_header: bytes
    queued_s: float
    first_byte_s: float = 0.0
    acked_s: float = 0.0
    sent: list[tuple[int, int, int]] = field(default_factory=list)
    acked: bool = False


@dataclass
class Transfer:
    """One request on its way; `number` is its age within the session."""

    number: int
    request_id: int
    priority: int
    deadline_s: float
    begun_s: float
    pieces: dict[int, Outgoing] = field(default_factory=dict)
    unacked_bytes: int = 0
    held_bytes: int = 0  # dispatched, and not yet known to be free at the receiver
    payload_bytes: int = 0
    resent_bytes: int = 0
    first_byte_s: float = 0.0
    last_byte_s: float = 0.0
    manifest: bytes | None = None
    closing_on: int | None = None  # the connection that carried the manifest or the cancellation
    touched: bool = False  # the receiver may know of it
    outcome: Delivery | TransferFailed | None = None


class Part(NamedTuple):
    """What waits to be sent: of a piece, or (None) a manifest or a cancellation. `again` where it went out before."""

    transfer: Transfer
    outgoing: Outgoing | None
    again: bool = False


class Segment(NamedTuple):
    """What a connection sends in one message; `outgoing` is None for a manifest or a cancellation."""

    transfer: Transfer
    outgoing: Outgoing | None
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Batch:
    """What a connection sends in one go; empty for a heartbeat. `oldest`: transfers below it are over."""

    segments: tuple[Segment, ...]
    oldest: int
