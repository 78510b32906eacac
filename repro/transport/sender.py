"""The prefill side: pieces go out while later layers are still being computed (§3.3, layer-wise prefill pipelining).

Here are the books: what waits, what is out on which connection, what the receiver has. Nothing is copied: a payload is
sent from where it lies and must stay there until it is acknowledged. Memory is bounded at both ends by bytes in flight:
`send` waits when the sender has too much outstanding, and a piece waits when the receiver holds a full window. The
oldest request is exempt from both, up to its own size, so that a queue of younger ones can never keep it from being
finished.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType

from repro.kvcache.frames import CHECKSUM_BLOCK_BYTES, Manifest, Piece
from repro.transport.connections import Connections
from repro.transport.handshake import Welcome
from repro.transport.outgoing import (
    Batch,
    Delivery,
    Outgoing,
    Part,
    PieceDelivery,
    Segment,
    SenderStats,
    Transfer,
    TransferFailed,
)
from repro.transport.schedule import Schedule
from repro.transport.signals import ConnectionSignal
from repro.transport.spec import TransportSpec
from repro.transport.wire import FROM_RECEIVER, Envelope, Kind, PeerError

log = logging.getLogger("repro.transport")

_MAX_SEGMENTS = 32
_LAST = 1 << 62  # the manifest's place in the order: after every layer


class Sender:
    """Sends requests to one receiver. Thread-safe.

    `observer` hears of each acknowledged (request, piece) and of each outcome; it must neither wait nor call back.
    """

    def __init__(
        self,
        spec: TransportSpec,
        address: tuple[str, int],
        *,
        observer: Callable[[tuple[int, int] | Delivery | TransferFailed], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._observe = observer or (lambda _event: None)
        self._spec = spec
        self._clock = clock
        self._token: bytes | None = None
        self._window_bytes = 0
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._room = threading.Condition(self._lock)
        self._done = threading.Condition(self._lock)
        self._schedule: Schedule[Part] = Schedule(spec.turn_bytes)
        self._transfers: dict[int, Transfer] = {}  # in order of age, until the receiver has released them
        self._by_request: dict[int, Transfer] = {}
        self._next_transfer = 0
        self._unacked_bytes = 0
        self._held_bytes = 0
        self._carriers: set[int] = set()
        self._next_carrier = 0
        self._sent_bytes = self._resent_bytes = self._acked_bytes = self._acked_pieces = self._lost_connections = 0
        self._slot_bytes = [0] * spec.connections
        self._closed = False
        self._connections = Connections(spec, address, self)
        try:
            self._connections.open()
        except BaseException:
            self.close()
            raise

    def begin(self, request_id: int, *, deadline_s: float | None = None, priority: int = 0) -> None:
        """Announce a request; its age counts from here. It fails where it is not delivered `deadline_s` from now."""
        with self._lock:
            self._check_open(request_id)
            if request_id in self._by_request and self._by_request[request_id].outcome is None:
                raise ValueError(f"request {request_id} is under way already")
            now = self._clock()
            patience = self._spec.deadline_s if deadline_s is None else deadline_s
            transfer = Transfer(self._next_transfer, request_id, priority, now + patience, now)
            self._next_transfer += 1
            self._transfers[transfer.number] = transfer
            self._by_request[request_id] = transfer
            self._schedule.add(transfer.number, priority)

    def send(self, piece: Piece) -> None:
        """Queue a piece of a request that has begun. Waits for room; raises TransferFailed where there is no use in it.

        The payload is not copied: leave it as it is until the piece is acknowledged, which `wait` implies.
        """
        size = piece.payload.nbytes
        raw_header = piece.header.pack()
        with self._lock:
            transfer = self._find(piece.header.request_id)
            if transfer.manifest is not None:
                raise ValueError(f"request {transfer.request_id} is finished: no piece may follow its manifest")
            if piece.header.piece in transfer.pieces:
                raise ValueError(f"piece {piece.header.piece} of request {transfer.request_id} was sent already")
            while not self._has_room(transfer, size):
                self._room.wait()
                self._raise_if_over(transfer)
            outgoing = Outgoing(piece, raw_header, self._clock())
            transfer.pieces[piece.header.piece] = outgoing
            transfer.unacked_bytes += size
            transfer.payload_bytes += size
            self._unacked_bytes += size
            self._push(transfer, outgoing, 0, size)

    def finish(self, manifest: Manifest) -> None:
        """Close a request: the decode side may start once all that the manifest lists is there."""
        packed = manifest.pack()
        with self._lock:
            transfer = self._find(manifest.request_id)
            if transfer.manifest is not None:
                raise ValueError(f"request {manifest.request_id} is finished already")
            transfer.manifest = packed
            self._push_closing(transfer)

    def wait(self, request_id: int, timeout_s: float | None = None) -> Delivery:
        """Wait until the request is delivered. Raises TransferFailed, or TimeoutError after `timeout_s`.

        The outcome is kept until it has been waited for once.
        """
        until = None if timeout_s is None else self._clock() + timeout_s
        with self._lock:
            transfer = self._by_request.get(request_id)
            if transfer is None:
                raise ValueError(f"request {request_id} has not begun, or was waited for already")
            while transfer.outcome is None:
                left = None if until is None else until - self._clock()
                if left is not None and left <= 0:
                    raise TimeoutError(f"request {request_id} is not delivered after {timeout_s} s")
                self._done.wait(left)
            if self._by_request.get(request_id) is transfer:
                del self._by_request[request_id]
            if isinstance(transfer.outcome, TransferFailed):
                raise transfer.outcome
            return transfer.outcome

    def cancel(self, request_id: int) -> None:
        """Give a request up. Nothing happens where it is over already."""
        with self._lock:
            transfer = self._by_request.get(request_id)
            if transfer is not None and transfer.outcome is None:
                self._fail(transfer, "cancelled", "by the sender")

    def register(self, memory: memoryview) -> None:
        """Memory that payloads will lie in: backends that write remotely send from it without a copy. TCP needs none."""
        self._connections.register(memory)

    def set_priority(self, request_id: int, priority: int) -> None:
        """From now on; higher goes first."""
        with self._lock:
            self._schedule.set_priority(self._find(request_id).number, priority)

    def set_rate_cap(self, bps: float | None) -> None:
        """Cap the rate over all connections, or lift the cap. Paced by the kernel, at once."""
        self._connections.set_rate_cap(bps)

    def signals(self) -> list[ConnectionSignal]:
        """TCP's view of each data connection now."""
        return self._connections.signals()

    def stats(self) -> SenderStats:
        """Counts since the start, and what is outstanding now."""
        with self._lock:
            return SenderStats(
                sent_bytes=self._sent_bytes,
                resent_bytes=self._resent_bytes,
                wire_bytes=self._connections.wire_bytes,
                acked_pieces=self._acked_pieces,
                acked_bytes=self._acked_bytes,
                opened=self._connections.opened,
                lost=self._lost_connections,
                connections=len(self._connections),
                bytes_by_connection=list(self._slot_bytes),
                transfers=len(self._transfers),
                unacked_bytes=self._unacked_bytes,
                held_bytes=self._held_bytes,
            )

    def close(self) -> None:
        """End all connections and threads; what was not delivered has failed."""
        with self._lock:
            self._closed = True
            for transfer in list(self._transfers.values()):
                if transfer.outcome is None:
                    self._fail(transfer, "closed", "the sender was closed")
            self._work.notify_all()
        self._connections.close()

    def __enter__(self) -> Sender:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # Bookkeeping: the lock is held in all of these.

    def _check_open(self, request_id: int) -> None:
        if self._closed:
            raise TransferFailed(request_id, "closed", "the sender was closed")

    def _find(self, request_id: int) -> Transfer:
        self._check_open(request_id)
        transfer = self._by_request.get(request_id)
        if transfer is None:
            raise ValueError(f"request {request_id} has not begun")
        self._raise_if_over(transfer)
        return transfer

    def _raise_if_over(self, transfer: Transfer) -> None:
        if isinstance(transfer.outcome, TransferFailed):
            raise transfer.outcome

    def _oldest(self) -> int:
        return next(iter(self._transfers), self._next_transfer)

    def _has_room(self, transfer: Transfer, size: int) -> bool:
        if self._unacked_bytes + size <= self._spec.max_in_flight_bytes:
            return True
        if transfer.number != self._oldest():
            return False
        return transfer.unacked_bytes == 0 or transfer.unacked_bytes + size <= self._spec.max_in_flight_bytes

    def _may_take(self, request: int, part: Part) -> bool:
        outgoing = part.outgoing
        if outgoing is None or outgoing.first_byte_s or request == self._oldest():
            return True
        return self._held_bytes + outgoing.piece.payload.nbytes <= self._window_bytes

    def _push(self, transfer: Transfer, outgoing: Outgoing, offset: int, length: int, *, again: bool = False) -> None:
        header = outgoing.piece.header
        order = (header.layer, header.piece, offset)
        self._schedule.push(transfer.number, order, Part(transfer, outgoing, again), offset, length)
        self._work.notify(max(1, length // self._spec.segment_bytes))

    def _push_closing(self, transfer: Transfer) -> None:
        self._schedule.push(transfer.number, (_LAST,), Part(transfer, None), 0, 0)
        self._work.notify()

    def _fail(self, transfer: Transfer, reason: str, detail: str) -> None:
        transfer.outcome = TransferFailed(transfer.request_id, reason, detail)
        transfer.closing_on = None
        log.warning("%s", transfer.outcome)
        self._observe(transfer.outcome)
        self._drop_payloads(transfer)
        self._schedule.remove(transfer.number)
        if transfer.touched and reason not in ("refused", "lost"):
            # The receiver holds some of it: it must be told, and will say when it is free.
            self._schedule.add(transfer.number, transfer.priority)
            self._push_closing(transfer)
        elif not transfer.touched or reason == "lost":
            self._forget(transfer)
        self._done.notify_all()
        self._room.notify_all()

    def _drop_payloads(self, transfer: Transfer) -> None:
        self._unacked_bytes -= transfer.unacked_bytes
        transfer.unacked_bytes = 0
        transfer.pieces.clear()

    def _forget(self, transfer: Transfer) -> None:
        """The receiver has nothing of it any more."""
        if self._transfers.pop(transfer.number, None) is None:
            return
        self._held_bytes -= transfer.held_bytes
        self._schedule.remove(transfer.number)
        self._room.notify_all()
        self._work.notify_all()

    def _dispatch(self, part: Part, offset: int, length: int, carrier: int) -> Segment:
        transfer, outgoing, again = part
        transfer.touched = True
        if outgoing is None:
            transfer.closing_on = carrier
            return Segment(transfer, None, 0, 0)
        if not outgoing.first_byte_s:
            outgoing.first_byte_s = self._clock()
            transfer.first_byte_s = transfer.first_byte_s or outgoing.first_byte_s
            transfer.held_bytes += outgoing.piece.payload.nbytes
            self._held_bytes += outgoing.piece.payload.nbytes
        if again:
            transfer.resent_bytes += length
            self._resent_bytes += length
        outgoing.sent.append((offset, length, carrier))
        return Segment(transfer, outgoing, offset, length)

    def _acked(self, transfer: Transfer, piece: int) -> None:
        outgoing = transfer.pieces.get(piece)
        if outgoing is None or outgoing.acked:
            return
        outgoing.acked = True
        outgoing.acked_s = self._clock()
        size = outgoing.piece.payload.nbytes
        outgoing.piece = Piece(outgoing.piece.header, memoryview(b""))  # the caller may have its memory back
        transfer.unacked_bytes -= size
        self._unacked_bytes -= size
        self._observe((transfer.request_id, piece))
        self._acked_pieces += 1
        self._acked_bytes += size
        self._room.notify_all()

    def _delivered(self, transfer: Transfer) -> None:
        now = self._clock()
        transfer.outcome = Delivery(
            transfer.request_id,
            transfer.payload_bytes,
            transfer.resent_bytes,
            transfer.begun_s,
            transfer.first_byte_s or now,
            transfer.last_byte_s or now,
            now,
            tuple(
                PieceDelivery(
                    index,
                    out.piece.header.layer,
                    out.piece.header.payload_bytes,
                    out.queued_s,
                    out.first_byte_s,
                    out.acked_s or now,
                )
                for index, out in sorted(transfer.pieces.items())
            ),
        )
        self._observe(transfer.outcome)
        self._drop_payloads(transfer)
        self._schedule.remove(transfer.number)
        self._done.notify_all()
        self._room.notify_all()

    # What the connections call: see `connections.Traffic`.

    def greeted(self, answer: Welcome) -> None:
        """A receiver that started again, or let us go, has nothing of what it acknowledged."""
        with self._lock:
            if self._token not in (None, answer.token):
                for transfer in list(self._transfers.values()):
                    if transfer.touched and transfer.outcome is None:
                        self._fail(transfer, "lost", "the receiver has lost what it had of it")
                    elif transfer.touched:
                        self._forget(transfer)
            self._token = answer.token
            self._window_bytes = answer.window_bytes

    def oldest(self) -> int:
        """The oldest transfer that still matters."""
        with self._lock:
            return self._oldest()

    def enlist(self) -> int:
        """A data connection is open: its number."""
        with self._lock:
            self._next_carrier += 1
            self._carriers.add(self._next_carrier)
            return self._next_carrier

    def take(self, carrier: int, limit_bytes: int) -> Batch | None:
        """What the connection sends next: empty where a heartbeat is due, None when it should end."""
        segments: list[Segment] = []
        left = limit_bytes
        with self._lock:
            until = self._clock() + self._spec.heartbeat_s
            while carrier in self._carriers and not self._closed:
                while left > 0 and len(segments) < _MAX_SEGMENTS:
                    # A segment is of whole blocks, so that whoever receives it can checksum it.
                    whole = max(CHECKSUM_BLOCK_BYTES, left - left % CHECKSUM_BLOCK_BYTES)
                    taken = self._schedule.pop(whole, self._may_take)
                    if taken is None:
                        break
                    segments.append(self._dispatch(*taken, carrier))
                    left -= segments[-1].length
                patience_s = until - self._clock()
                if segments or patience_s <= 0:
                    return Batch(tuple(segments), self._oldest())
                self._work.wait(patience_s)
        return None

    def sent(self, slot: int, batch: Batch) -> None:
        """The kernel has the batch."""
        now, size = self._clock(), sum(segment.length for segment in batch.segments)
        with self._lock:
            self._sent_bytes += size
            self._slot_bytes[slot] += size
            for segment in batch.segments:
                if segment.outgoing is not None:
                    segment.transfer.last_byte_s = now

    def lost(self, carrier: int) -> None:
        """What the connection carried and nobody acknowledged goes out again on the others."""
        with self._lock:
            if carrier not in self._carriers:
                return
            self._carriers.remove(carrier)
            self._lost_connections += 1
            for transfer in self._transfers.values():
                if transfer.closing_on == carrier:
                    transfer.closing_on = None
                    if not isinstance(transfer.outcome, Delivery):
                        self._push_closing(transfer)
                for outgoing in transfer.pieces.values():
                    gone = [sent for sent in outgoing.sent if sent[2] == carrier and not outgoing.acked]
                    for offset, length, _ in gone:
                        self._push(transfer, outgoing, offset, length, again=True)
                    if gone:
                        outgoing.sent = [sent for sent in outgoing.sent if sent[2] != carrier]
            self._work.notify_all()

    def heard(self, envelope: Envelope, text: str) -> None:
        """The receiver said something. Raises PeerError for what it cannot mean: the control connection ends."""
        kind = envelope.kind
        if kind not in FROM_RECEIVER:
            raise PeerError(f"{kind.name} is not for a sender")
        with self._lock:
            transfer = self._transfers.get(envelope.transfer)
            if transfer is None or kind is Kind.PULSE:
                return
            over = transfer.outcome is not None
            if not over and (kind is Kind.RELEASED or (kind is Kind.DELIVERED and transfer.manifest is None)):
                raise PeerError(f"{kind.name} of request {transfer.request_id}, which is still on its way")
            if kind is Kind.ACK:
                self._acked(transfer, envelope.piece)
            elif kind is Kind.AGAIN and envelope.piece in transfer.pieces:
                outgoing = transfer.pieces[envelope.piece]
                if not outgoing.acked:
                    outgoing.sent.clear()
                    self._push(transfer, outgoing, 0, outgoing.piece.payload.nbytes, again=True)
            elif kind is Kind.DELIVERED and not over:
                self._delivered(transfer)
            elif kind is Kind.REFUSED and not over:
                self._fail(transfer, "refused", text)
            elif kind is Kind.RELEASED:
                self._forget(transfer)

    def tick(self) -> None:
        """Requests whose deadline has passed fail."""
        now = self._clock()
        with self._lock:
            for transfer in list(self._transfers.values()):
                if transfer.outcome is None and now > transfer.deadline_s:
                    acked = sum(out.acked for out in transfer.pieces.values())
                    state = f"{acked} of {len(transfer.pieces)} pieces acknowledged"
                    self._fail(transfer, "deadline", f"{state}; last problem: {self._connections.last_problem}")
