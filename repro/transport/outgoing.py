"""What a sender knows of a request on its way, and what it says of it at the end."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from repro.errors import UserError
from repro.kvcache.frames import Piece
from repro.transport.session import MAX_JOINED


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


@dataclass
class Outgoing:
    """A piece on its way. `sent_on` tells which connection each of its segments went out on."""

    piece: Piece
    raw_header: bytes
    queued_s: float
    first_byte_s: float = 0.0
    acked_s: float = 0.0
    sent_on: dict[int, int] = field(default_factory=dict)
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


@dataclass(frozen=True, slots=True)
class Segment:
    """What a connection sends in one go. `outgoing` is None for a manifest or a cancellation."""

    transfer: Transfer
    outgoing: Outgoing | None
    offset: int
    length: int


def joined(batch: list[Segment]) -> list[Segment]:
    """The batch with neighbouring segments of a piece made one, up to `MAX_JOINED` of them."""
    out: list[Segment] = []
    count = 0
    for segment in batch:
        last = out[-1] if out else None
        if (
            last is not None
            and segment.outgoing is not None
            and last.outgoing is segment.outgoing
            and last.offset + last.length == segment.offset
            and count < MAX_JOINED
        ):
            out[-1] = replace(last, length=last.length + segment.length)
            count += 1
        else:
            out.append(segment)
            count = 1
    return out
