"""The receiver's books of one sender: what has come, what is missing, and what was handed over, once.

A session outlives its connections: pieces that were acknowledged stay, so after an outage the sender goes on from
there. Transfers are numbered from 0 by the sender; every message says which is the oldest that it still cares for, so
that the receiver can forget the finished ones and still recognise anything late or replayed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import xxhash

from repro.kvcache.frames import Assembly, FrameError, FrameHeader, Manifest, Piece
from repro.transport.arena import Arena, Block
from repro.transport.spec import ReceiverLimits
from repro.transport.wire import Envelope, Kind, PeerError

log = logging.getLogger("repro.transport")

_ATTEMPTS = 3
_MAX_FINISHED = 1 << 16


@dataclass(frozen=True)
class PieceArrival:
    """When a piece's first byte was announced and when its last was there, monotonic seconds."""

    piece: int
    layer: int
    payload_bytes: int
    first_byte_s: float
    last_byte_s: float


@dataclass(frozen=True)
class Whole:
    """A complete request: its pieces in index order, views of the arena's blocks."""

    transfer: int
    manifest: Manifest
    pieces: tuple[Piece, ...]
    arrivals: tuple[PieceArrival, ...]
    completed_s: float
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Failure:
    """A request that will not be handed over, and why."""

    request_id: int
    reason: str


@dataclass
class _Incoming:
    """A piece of which some segments are here.

    The checksum is computed as the bytes come in, while they are in the processor's cache, as far as they come in
    order; the rest is added at the end. `hashed` is how far it has got.
    """

    header: FrameHeader
    raw_header: bytes
    block: Block
    view: memoryview
    segments: int
    first_byte_s: float
    got: set[int] = field(default_factory=set)
    claimed: set[int] = field(default_factory=set)  # ever, since the checksum was begun
    writers: int = 0
    hasher: xxhash.xxh3_128 = field(default_factory=xxhash.xxh3_128)
    hashed: int = 0
    attempts: int = 0
    sealed: bool = False  # complete: nobody may write any more
    acknowledged: bool = False


@dataclass(frozen=True, slots=True)
class _Arrived(Piece):
    """A piece whose checksum was computed on arrival."""

    computed: bytes

    def verify(self) -> None:
        """As `Piece.verify`, without reading the payload again."""
        if self.computed != self.header.checksum:
            raise FrameError(f"checksum of piece {self.header.piece}: does not match its payload")


@dataclass(frozen=True, slots=True)
class Claim:
    """Where a segment belongs. `first`: no other connection brings the same bytes at this time."""

    view: memoryview
    incoming: _Incoming
    offset: int
    first: bool

    def came(self, start: int, end: int) -> None:
        """Bytes [start, end) of the segment are in place: continue the checksum with them, if it is their turn."""
        if self.first and self.incoming.hashed == self.offset + start:
            self.incoming.hasher.update(self.view[start:end])
            self.incoming.hashed = self.offset + end


@dataclass
class _Transfer:
    number: int
    began_s: float
    request_id: int | None = None
    assembly: Assembly | None = None
    pieces: dict[int, _Incoming] = field(default_factory=dict)
    arrivals: list[PieceArrival] = field(default_factory=list)
    manifest: Manifest | None = None
    expected_bytes: int = 0
    dropped: bool = False
    assembling: threading.Lock = field(default_factory=threading.Lock)


class Session:
    """One sender's transfers. Thread-safe: each connection's thread calls in here.

    `deliver` is called once per request, with the lock free; `report` with each failure.
    """

    def __init__(
        self,
        token: bytes,
        segment_bytes: int,
        arena: Arena,
        limits: ReceiverLimits,
        deliver: Callable[[Session, Whole], None],
        report: Callable[[Failure], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.token = token
        self.segment_bytes = segment_bytes
        self._outbox: deque[bytes] = deque()
        self._outbox_filled = threading.Condition()
        self._speaker: object = None
        self.connections = 0
        self.alone_since_s = clock()
        self._arena = arena
        self._limits = limits
        self._deliver = deliver
        self._report = report
        self._clock = clock
        self._lock = threading.Lock()
        self._transfers: dict[int, _Transfer] = {}
        self._finished: dict[int, list[bytes]] = {}  # what was said of it, to be said again after a lost connection
        self._held_bytes = 0
        self._oldest = 0

    @property
    def held_bytes(self) -> int:
        """Bytes of payload that lie here for this sender."""
        return self._held_bytes

    def heard(self, oldest: int) -> None:
        """The sender has no interest in transfers below `oldest` any more."""
        if oldest <= self._oldest:
            return
        with self._lock:
            self._oldest = oldest
            for number in [n for n in self._finished if n < oldest]:
                del self._finished[number]

    def claim(self, envelope: Envelope, raw_header: bytes | memoryview) -> Claim | None:
        """Where the segment belongs, or None where it is not wanted (late, repeated or refused).

        Whoever gets a view calls `filled` afterwards, whatever became of it. Raises PeerError where the peer cannot be
        trusted to keep to the protocol any more.
        """
        if envelope.length > self.segment_bytes:
            raise PeerError(f"a segment of {envelope.length} bytes, {self.segment_bytes} were agreed")
        with self._lock:
            transfer = self._open(envelope.transfer)
            if transfer is None:
                return None
            incoming = transfer.pieces.get(envelope.piece)
            if incoming is None:
                try:
                    incoming = self._admit(transfer, envelope, raw_header)
                except FrameError as error:
                    self._refuse(transfer, str(error))
                    return None
            elif incoming.raw_header != raw_header:
                self._refuse(transfer, f"piece {envelope.piece} came with two different headers")
                return None
            size = incoming.header.payload_bytes
            if envelope.offset % self.segment_bytes or envelope.length != min(
                self.segment_bytes, size - envelope.offset
            ):
                self._refuse(
                    transfer,
                    f"segment of {envelope.length} bytes at {envelope.offset} does not fit piece {envelope.piece} of "
                    f"{size} bytes",
                )
                return None
            if incoming.sealed or envelope.offset // self.segment_bytes in incoming.got:
                log.info("ignored a repeated segment of piece %d, transfer %d", envelope.piece, transfer.number)
                if incoming.acknowledged:
                    self._say(Envelope(Kind.ACK, transfer.number, envelope.piece))
                return None
            incoming.writers += 1
            index = envelope.offset // self.segment_bytes
            first = index not in incoming.claimed
            incoming.claimed.add(index)
            view = incoming.view[envelope.offset : envelope.offset + envelope.length]
            return Claim(view, incoming, envelope.offset, first)

    def filled(self, envelope: Envelope, whole: bool) -> None:
        """A claimed view has been written, wholly or not."""
        with self._lock:
            transfer = self._transfers.get(envelope.transfer)
            if transfer is None:
                return
            incoming = transfer.pieces[envelope.piece]
            incoming.writers -= 1
            if transfer.dropped:
                self._bury(transfer)
                return
            if whole:
                incoming.got.add(envelope.offset // self.segment_bytes)
            elif envelope.offset < incoming.hashed < envelope.offset + envelope.length:
                incoming.hasher, incoming.hashed = xxhash.xxh3_128(), 0  # its bytes come again: begin again
            if incoming.sealed or incoming.writers or len(incoming.got) < incoming.segments:
                return
            incoming.sealed = True
            incoming.writers += 1  # the checksum reads what must not be freed meanwhile
        self._assemble(transfer, incoming)

    def close_with(self, envelope: Envelope, packed: bytearray) -> None:
        """The manifest has come."""
        try:
            manifest = Manifest.unpack(packed, self._limits.frames)
        except FrameError as error:
            manifest, reason = None, str(error)
        with self._lock:
            transfer = self._open(envelope.transfer)
            if transfer is None or transfer.manifest is not None:
                return
            if manifest is None:
                self._refuse(transfer, reason)
            elif transfer.request_id not in (None, manifest.request_id):
                self._refuse(transfer, f"the manifest is of request {manifest.request_id}, not {transfer.request_id}")
            else:
                transfer.request_id = manifest.request_id
                transfer.manifest = manifest
        if manifest is not None:
            self._complete(transfer)

    def cancel(self, number: int) -> None:
        """The sender gives a transfer up."""
        with self._lock:
            transfer = self._open(number)
            if transfer is not None:
                self._refuse(transfer, "cancelled by the sender")

    def release(self, whole: Whole) -> None:
        """Decode has taken the request's bytes: its memory may be used again."""
        with self._lock:
            for block in whole.blocks:
                self._arena.free(block)
            self._held_bytes -= whole.manifest.payload_bytes
            self._say(Envelope(Kind.RELEASED, whole.transfer), remember=whole.transfer)

    def to_say(self, speaker: object, patience_s: float) -> bytes | None:
        """What a control connection carries next, a pulse where there is nothing; None once another speaks instead."""
        with self._outbox_filled:
            if not self._outbox and self._speaker is speaker:
                self._outbox_filled.wait(patience_s)
            if self._speaker is not speaker:
                return None
            said = b"".join(self._outbox)
            self._outbox.clear()
        return said or Envelope(Kind.PULSE).pack()

    def speak_through(self, speaker: object, oldest: int = 0) -> None:
        """A new control connection (None: no more): it says again all that may have been lost with the one before."""
        with self._outbox_filled:
            self._speaker = speaker
            self._outbox.clear()
            self._outbox_filled.notify_all()
        self.heard(oldest)
        with self._lock:
            for said in self._finished.values():
                self._post(said)
            for transfer in self._transfers.values():
                for piece, incoming in transfer.pieces.items():
                    if incoming.acknowledged:
                        self._say(Envelope(Kind.ACK, transfer.number, piece))
                    elif incoming.attempts and not (incoming.got or incoming.writers):
                        self._say(Envelope(Kind.AGAIN, transfer.number, piece))

    def abandon(self, reason: str) -> None:
        """The sender is gone for good: give its memory back."""
        with self._lock:
            for transfer in list(self._transfers.values()):
                if not transfer.dropped:
                    self._refuse(transfer, reason)

    # Below, the lock is held.

    def _open(self, number: int) -> _Transfer | None:
        transfer = self._transfers.get(number)
        if transfer is not None:
            return None if transfer.dropped else transfer
        if number < self._oldest or number in self._finished:
            log.info("ignored a late or replayed message of transfer %d", number)
            for said in self._finished.get(number, ()):
                self._post([said])
            return None
        if number > self._oldest + _MAX_FINISHED:
            raise PeerError(f"transfer {number} is too far ahead of the oldest, {self._oldest}")
        if len(self._transfers) >= self._limits.max_requests:
            raise PeerError(f"more than {self._limits.max_requests} requests at once")
        transfer = self._transfers[number] = _Transfer(number, self._clock())
        return transfer

    def _admit(self, transfer: _Transfer, envelope: Envelope, raw_header: bytes | memoryview) -> _Incoming:
        header = FrameHeader.unpack(raw_header, self._limits.frames)
        if header.piece != envelope.piece:
            raise FrameError(f"piece: the envelope says {envelope.piece}, the header {header.piece}")
        if transfer.request_id not in (None, header.request_id):
            raise FrameError(f"request_id: {header.request_id} in the transfer of request {transfer.request_id}")
        size = header.payload_bytes
        if transfer.expected_bytes + size > self._limits.max_request_bytes:
            raise FrameError(f"request {header.request_id}: more than {self._limits.max_request_bytes} bytes")
        if self._held_bytes + size > self._limits.window_bytes + self._limits.max_request_bytes:
            raise PeerError("more bytes than its window allows")
        block = self._arena.allocate(size)
        if block is None:
            raise FrameError(f"piece {header.piece}: no memory left for {size} bytes")
        transfer.request_id = header.request_id
        transfer.expected_bytes += size
        self._held_bytes += size
        incoming = transfer.pieces[header.piece] = _Incoming(
            header,
            bytes(raw_header),
            block,
            self._arena.view(block, size),
            max(1, -(-size // self.segment_bytes)),
            self._clock(),
        )
        return incoming

    def _refuse(self, transfer: _Transfer, reason: str) -> None:
        request_id = -1 if transfer.request_id is None else transfer.request_id
        log.warning("refused request %d (transfer %d): %s", request_id, transfer.number, reason)
        transfer.dropped = True
        text = reason.encode()[:1000]
        said = Envelope(Kind.REFUSED, transfer.number, length=len(text)).pack() + text
        self._finished[transfer.number] = [said]
        self._post([said])
        self._report(Failure(request_id, reason))
        self._bury(transfer)

    def _bury(self, transfer: _Transfer) -> None:
        """Give a dropped transfer's memory back once no connection writes into it."""
        if any(incoming.writers for incoming in transfer.pieces.values()):
            return
        for incoming in transfer.pieces.values():
            self._arena.free(incoming.block)
        self._held_bytes -= transfer.expected_bytes
        del self._transfers[transfer.number]
        self._say(Envelope(Kind.RELEASED, transfer.number), remember=transfer.number)

    def _say(self, envelope: Envelope, remember: int | None = None) -> None:
        packed = envelope.pack()
        if remember is not None and remember >= self._oldest:
            self._finished.setdefault(remember, []).append(packed)
        self._post([packed])

    def _post(self, said: list[bytes]) -> None:
        with self._outbox_filled:
            self._outbox.extend(said)
            self._outbox_filled.notify()

    # Below, it is free: checksums are computed without it.

    def _assemble(self, transfer: _Transfer, incoming: _Incoming) -> None:
        header = incoming.header
        problem = None
        incoming.hasher.update(incoming.view[incoming.hashed :])
        arrived = _Arrived(header, incoming.view, incoming.hasher.digest())
        with transfer.assembling:
            if transfer.assembly is None:
                transfer.assembly = Assembly(header.request_id, self._limits.frames)
            try:
                transfer.assembly.add(arrived)
            except FrameError as error:
                problem = str(error)
        with self._lock:
            incoming.writers -= 1
            if transfer.dropped:
                self._bury(transfer)
                return
            if problem is not None:
                incoming.attempts += 1
                log.warning("piece %d of request %d: %s", header.piece, header.request_id, problem)
                if incoming.attempts >= _ATTEMPTS:
                    self._refuse(transfer, problem)
                    return
                incoming.got.clear()
                incoming.claimed.clear()
                incoming.hasher, incoming.hashed = xxhash.xxh3_128(), 0
                incoming.sealed = False
                self._say(Envelope(Kind.AGAIN, transfer.number, header.piece))
                return
            incoming.acknowledged = True
            transfer.arrivals.append(
                PieceArrival(header.piece, header.layer, header.payload_bytes, incoming.first_byte_s, self._clock())
            )
            self._say(Envelope(Kind.ACK, transfer.number, header.piece))
        self._complete(transfer)

    def _complete(self, transfer: _Transfer) -> None:
        """Hand the request over if it is whole. The assembling lock makes sure that this happens once."""
        with transfer.assembling:
            manifest, assembly = transfer.manifest, transfer.assembly
            if manifest is None:
                return
            if assembly is None:
                assembly = transfer.assembly = Assembly(manifest.request_id, self._limits.frames)
            if len(assembly) < manifest.pieces:
                return
            with self._lock:
                if transfer.dropped or transfer.number not in self._transfers:
                    return
                try:
                    if len(transfer.pieces) > manifest.pieces:
                        raise FrameError(f"{len(transfer.pieces)} pieces came, the manifest says {manifest.pieces}")
                    pieces = assembly.complete(manifest)
                except FrameError as error:
                    self._refuse(transfer, str(error))
                    return
                blocks = tuple(transfer.pieces[index].block for index in range(manifest.pieces))
                arrivals = tuple(sorted(transfer.arrivals, key=lambda a: a.piece))
                whole = Whole(
                    transfer.number,
                    manifest,
                    tuple(Piece(p.header, p.payload) for p in pieces),
                    arrivals,
                    self._clock(),
                    blocks,
                )
                del self._transfers[transfer.number]
                self._say(Envelope(Kind.DELIVERED, transfer.number), remember=transfer.number)
        self._deliver(self, whole)
