"""The receiver's books of one sender: what has come, what is missing, and what was handed over, once.

A session outlives its connections: pieces that were acknowledged stay, so after an outage the sender goes on from
there. Transfers are numbered from 0 by the sender; every message says which is the oldest that it still cares for, so
that the receiver can forget the finished ones and still recognise anything late or replayed.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from repro.kvcache.frames import Assembly, FrameError, FrameHeader, Manifest, Piece
from repro.transport.arena import Arena, Block
from repro.transport.arriving import ArrivingPiece
from repro.transport.spec import MAX_SEGMENT_BYTES, ReceiverLimits
from repro.transport.wire import MAX_REASON_BYTES, Envelope, Kind, PeerError, sealed

log = logging.getLogger("repro.transport")

_ATTEMPTS = 3
_MAX_FINISHED = 1 << 16
_MAX_UNSAID = 4096  # answers that wait for a control connection which does not take them
Outbox: TypeAlias = "queue.SimpleQueue[bytes | None]"  # None: the control connection is to end


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


@dataclass(frozen=True, slots=True)
class Claim:
    """A segment's place in its piece. Whoever holds it calls `Session.filled`, whatever became of it."""

    transfer: _Transfer
    piece: ArrivingPiece
    blocks: range
    view: memoryview


@dataclass
class _Transfer:
    number: int
    began_s: float
    request_id: int | None = None
    assembly: Assembly | None = None
    pieces: dict[int, ArrivingPiece] = field(default_factory=dict)
    arrivals: list[PieceArrival] = field(default_factory=list)
    manifest: Manifest | None = None
    expected_bytes: int = 0
    dropped: bool = False
    completing: bool = False


class Session:
    """One sender's transfers. Thread-safe: each connection's thread calls in here.

    `deliver` is called once per request, with the lock free; `report` with each failure.
    """

    def __init__(
        self,
        token: bytes,
        arena: Arena,
        limits: ReceiverLimits,
        deliver: Callable[[Session, Whole], None],
        report: Callable[[Failure], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.token = token
        # What the control connection has to say. Without one nothing is kept: a new one says it all again.
        self._outbox: Outbox | None = None
        self.connections = 0
        self.alone_since_s = clock()
        self._arena = arena
        self._limits = limits
        self._frame_limits = limits.frames
        self._deliver = deliver
        self._report = report
        self._clock = clock
        self._lock = threading.Lock()
        self._transfers: dict[int, _Transfer] = {}
        self._finished: dict[int, list[bytes]] = {}  # what was said of it, to be said again after a lost connection
        self._held_bytes = 0
        self._oldest = 0
        # Blocks that a write by a remote-memory backend may still reach: by the slot whose connection broke off, and how
        # many such writes each has; those that nobody needs any more but for that.
        self._generations: dict[int, int] = {}
        self._reachable: dict[int, list[Block]] = {}
        self._writes: Counter[Block] = Counter()
        self._unneeded: set[Block] = set()

    @property
    def held_bytes(self) -> int:
        """Bytes of payload that lie here for this sender."""
        return self._held_bytes

    def heard(self, oldest: int) -> None:
        """The sender has no interest in transfers below `oldest` any more."""
        if oldest > self._oldest:
            with self._lock:
                self._forget_below(oldest)

    def claim(self, envelope: Envelope, raw_header: bytes | memoryview) -> Claim | None:
        """Where the segment belongs, or None where it is not wanted (late, repeated or refused).

        Raises PeerError where the peer cannot be trusted to keep to the protocol any more.
        """
        if envelope.length > MAX_SEGMENT_BYTES:
            raise PeerError(f"a segment of {envelope.length} bytes, {MAX_SEGMENT_BYTES} are accepted")
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
            blocks = incoming.blocks(envelope.offset, envelope.length)
            if blocks is None:
                where = f"{envelope.length} bytes at {envelope.offset}"
                size = incoming.header.payload_bytes
                self._refuse(transfer, f"segment of {where} does not fit piece {envelope.piece} of {size} bytes")
                return None
            if not incoming.wants(blocks):
                log.info("ignored a repeated segment of piece %d, transfer %d", envelope.piece, transfer.number)
                if incoming.acknowledged:
                    self._say(Envelope(Kind.ACK, transfer.number, envelope.piece))
                return None
            return Claim(transfer, incoming, blocks, incoming.open(blocks))

    def filled(self, claim: Claim, digests: Sequence[bytes] | None) -> None:
        """A claimed view has been written: the digests of its blocks, or None where it was broken off."""
        transfer, piece = claim.transfer, claim.piece
        with self._lock:
            sealed = piece.put(claim.blocks, digests)
            if transfer.dropped:
                self._bury(transfer)
                return
            if not sealed:
                return
            self._arrived(transfer, piece)
            complete = self._is_complete(transfer)
        if complete:
            self._complete(transfer)

    def opened(self, slot: int) -> int:
        """A data connection of that slot is here: its sender's writes on the one before have returned. Its generation."""
        with self._lock:
            for block in self._reachable.pop(slot, ()):
                self._writes[block] -= 1
                if self._writes[block]:
                    continue
                del self._writes[block]
                if block in self._unneeded:
                    self._unneeded.remove(block)
                    self._arena.free(block)
            self._generations[slot] = generation = self._generations.get(slot, 0) + 1
        return generation

    def broken_off(self, slot: int, generation: int, claims: Iterable[Claim]) -> None:
        """The connection ended with places reserved that somebody may write to until the slot's next connection is here."""
        claims = tuple(claims)
        with self._lock:
            if self._generations.get(slot) == generation:
                blocks = [claim.piece.block for claim in claims]
                self._reachable[slot] = blocks
                self._writes.update(blocks)
        for claim in claims:
            self.filled(claim, None)

    def close_with(self, envelope: Envelope, packed: bytes) -> None:
        """The manifest has come."""
        try:
            manifest = Manifest.unpack(packed, self._frame_limits)
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
            complete = self._is_complete(transfer)
        if complete:
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
                self._free(block)
            self._held_bytes -= whole.manifest.payload_bytes
            self._say(Envelope(Kind.RELEASED, whole.transfer), remember=whole.transfer)

    def speak_through(self, outbox: Outbox | None, oldest: int = 0) -> None:
        """A new control connection (None: no more): it says again all that may have been lost with the one before."""
        with self._lock:
            previous, self._outbox = self._outbox, outbox
            self._forget_below(oldest)
            # As one entry that comes before all others. It may be long, but not longer than what the limits let us hold.
            if outbox is not None and (known := self._all_that_was_said()):
                outbox.put(known)
        if previous is not None:
            previous.put(None)

    def abandon(self, reason: str) -> None:
        """The sender is gone for good: give its memory back."""
        with self._lock:
            for transfer in list(self._transfers.values()):
                if not transfer.dropped:
                    self._refuse(transfer, reason)
        for slot in list(self._reachable):
            self.opened(slot)

    # Below, the lock is held.

    def _forget_below(self, oldest: int) -> None:
        if oldest > self._oldest:
            self._oldest = oldest
            for number in [n for n in self._finished if n < oldest]:
                del self._finished[number]

    def _all_that_was_said(self) -> bytes:
        said = [words for finished in self._finished.values() for words in finished]
        for transfer in self._transfers.values():
            for piece, incoming in transfer.pieces.items():
                if incoming.acknowledged:
                    said.append(Envelope(Kind.ACK, transfer.number, piece).pack())
                elif incoming.attempts:
                    said.append(Envelope(Kind.AGAIN, transfer.number, piece).pack())
        return b"".join(said)

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

    def _admit(self, transfer: _Transfer, envelope: Envelope, raw_header: bytes | memoryview) -> ArrivingPiece:
        header = FrameHeader.unpack(raw_header, self._frame_limits)
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
        view = self._arena.view(block, size)
        incoming = transfer.pieces[header.piece] = ArrivingPiece(header, bytes(raw_header), block, view, self._clock())
        return incoming

    def _refuse(self, transfer: _Transfer, reason: str) -> None:
        request_id = -1 if transfer.request_id is None else transfer.request_id
        log.warning("refused request %d (transfer %d): %s", request_id, transfer.number, reason)
        transfer.dropped = True
        text = reason.encode()[:MAX_REASON_BYTES]
        said = Envelope(Kind.REFUSED, transfer.number, length=len(text)).pack() + sealed(text)
        self._finished[transfer.number] = [said]
        self._post([said])
        self._report(Failure(request_id, reason))
        self._bury(transfer)

    def _bury(self, transfer: _Transfer) -> None:
        """Give a dropped transfer's memory back once no connection writes into it."""
        if any(incoming.users for incoming in transfer.pieces.values()):
            return
        for incoming in transfer.pieces.values():
            self._free(incoming.block)
        self._held_bytes -= transfer.expected_bytes
        del self._transfers[transfer.number]
        self._say(Envelope(Kind.RELEASED, transfer.number), remember=transfer.number)

    def _free(self, block: Block) -> None:
        if self._writes[block]:
            self._unneeded.add(block)
        else:
            self._arena.free(block)

    def _say(self, envelope: Envelope, remember: int | None = None) -> None:
        packed = envelope.pack()
        if remember is not None and remember >= self._oldest:
            self._finished.setdefault(remember, []).append(packed)
        self._post([packed])

    def _post(self, said: list[bytes]) -> None:
        outbox = self._outbox
        if outbox is None:
            return
        if outbox.qsize() >= _MAX_UNSAID:
            log.warning("ended a control connection whose sender did not take %d answers", _MAX_UNSAID)
            self._outbox = None
            outbox.put(None)
            return
        for words in said:
            outbox.put(words)

    def _arrived(self, transfer: _Transfer, incoming: ArrivingPiece) -> None:
        """A piece is sealed: keep it, or have it sent again where its checksum does not hold."""
        header = incoming.header
        if transfer.assembly is None:
            transfer.assembly = Assembly(header.request_id, self._frame_limits)
        try:
            transfer.assembly.add(incoming.arrived())
        except FrameError as error:
            incoming.attempts += 1
            log.warning("piece %d of request %d: %s", header.piece, header.request_id, error)
            if incoming.attempts >= _ATTEMPTS:
                self._refuse(transfer, str(error))
                return
            incoming.restart()
            self._say(Envelope(Kind.AGAIN, transfer.number, header.piece))
            return
        incoming.acknowledged = True
        transfer.arrivals.append(
            PieceArrival(header.piece, header.layer, header.payload_bytes, incoming.first_byte_s, self._clock())
        )
        self._say(Envelope(Kind.ACK, transfer.number, header.piece))

    def _is_complete(self, transfer: _Transfer) -> bool:
        """Whether the caller is the one to hand the request over: true once for each."""
        manifest = transfer.manifest
        if transfer.dropped or transfer.completing or manifest is None or len(transfer.arrivals) < manifest.pieces:
            return False
        transfer.completing = True
        return True

    # Below, it is free: the digest of a large request takes a while.

    def _complete(self, transfer: _Transfer) -> None:
        """Hand a request over that is whole."""
        manifest = transfer.manifest
        assert manifest is not None
        problem, pieces = None, []
        try:
            assembly = transfer.assembly or Assembly(manifest.request_id, self._frame_limits)
            pieces = assembly.complete(manifest)
        except FrameError as error:
            problem = str(error)
        with self._lock:
            if transfer.dropped:
                return
            if len(transfer.pieces) > manifest.pieces:
                problem = f"{len(transfer.pieces)} pieces came, the manifest says {manifest.pieces}"
            if problem is not None:
                self._refuse(transfer, problem)
                return
            whole = Whole(
                transfer.number,
                manifest,
                tuple(Piece(p.header, p.payload) for p in pieces),
                tuple(sorted(transfer.arrivals, key=lambda a: a.piece)),
                self._clock(),
                tuple(transfer.pieces[index].block for index in range(manifest.pieces)),
            )
            del self._transfers[transfer.number]
            self._say(Envelope(Kind.DELIVERED, transfer.number), remember=transfer.number)
        self._deliver(self, whole)
