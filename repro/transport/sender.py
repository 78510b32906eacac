"""The prefill side: pieces go out while later layers are still being computed (§3.3, layer-wise prefill pipelining).

One thread per connection takes the next segment from the schedule and writes it, so a faster connection simply takes
more. Nothing is copied: a payload is sent from where it lies and must stay there until it is acknowledged. Memory is
bounded at both ends by bytes in flight: `send` waits when the sender has too much outstanding, and a segment waits when
the receiver holds a full window. The oldest request is exempt from both, up to its own size, so that a queue of younger
ones can never keep it from being finished.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from types import TracebackType

from repro.errors import UserError
from repro.kvcache.frames import Manifest, Piece
from repro.transport.handshake import Hello, Role, encrypt, introduce, tls_context
from repro.transport.outgoing import Delivery, Outgoing, PieceDelivery, Segment, Transfer, TransferFailed, joined
from repro.transport.remote_memory import Origin, open_origin, read_description
from repro.transport.schedule import Schedule
from repro.transport.session import MAX_JOINED
from repro.transport.signals import ConnectionSignal, read_signal
from repro.transport.spec import BACKENDS, TransportSpec
from repro.transport.wire import (
    ENVELOPE_BYTES,
    Envelope,
    Kind,
    PeerError,
    close,
    hang_up,
    read_exactly,
    read_into,
    set_timeouts,
    write_all,
)

log = logging.getLogger("repro.transport")

_TCP_NOTSENT_LOWAT = 25
_SO_MAX_PACING_RATE = 47
_UNLIMITED = (1 << 64) - 1
_BATCH = 32
_QUICK_S = 0.005
_LAST = 1 << 62  # the manifest's place in the order: after every layer
_RETRY_S = (0.0, 0.05, 0.1, 0.25, 0.5)


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
        self._address = address
        self._clock = clock
        self._secret = spec.secret_bytes()
        self._tls: ssl.SSLContext | None = tls_context(spec.tls, receiver=False) if spec.tls else None
        self._session = os.urandom(16)
        self._backend = BACKENDS.index(spec.backend)
        self._origins: dict[int, Origin] = {}  # by slot, for backends that write remote memory
        self._registered: list[memoryview] = []
        self._token: bytes | None = None
        self._window_bytes = 0
        self._rate_cap_bps = spec.rate_cap_bps
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._room = threading.Condition(self._lock)
        self._done = threading.Condition(self._lock)
        self._schedule: Schedule[Segment] = Schedule(spec.turn_bytes)
        self._transfers: dict[int, Transfer] = {}  # in order of age, until the receiver has released them
        self._by_request: dict[int, Transfer] = {}
        self._next_transfer = 0
        self._unacked_bytes = 0
        self._held_bytes = 0
        self._sockets: dict[int, socket.socket] = {}  # by slot; the control connection is slot -1
        self._carriers: dict[int, int] = {}  # connection number -> slot, while it lives
        self._next_carrier = 0
        self._counts = {"sent_bytes": 0, "resent_bytes": 0, "acked_pieces": 0, "acked_bytes": 0, "opened": 0, "lost": 0}
        self._slot_bytes = [0] * spec.connections
        self._closed = False
        self._last_problem = "no answer"
        self._threads = [
            threading.Thread(target=self._run_slot, args=(slot,), name=f"send-{slot}", daemon=True)
            for slot in range(spec.connections)
        ]
        self._threads.append(threading.Thread(target=self._run_control, name="send-control", daemon=True))
        self._threads.append(threading.Thread(target=self._keep, name="send-keep", daemon=True))
        for thread in self._threads:
            thread.start()
        self._await_connections()

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
            self._push_piece(transfer, outgoing)

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
        with self._lock:
            self._registered.append(memory)
            origins = list(self._origins.values())
        for origin in origins:
            origin.register(memory)

    def set_priority(self, request_id: int, priority: int) -> None:
        """From now on; higher goes first."""
        with self._lock:
            self._schedule.set_priority(self._find(request_id).number, priority)

    def set_rate_cap(self, bps: float | None) -> None:
        """Cap the rate over all connections, or lift the cap. Paced by the kernel, at once."""
        with self._lock:
            self._rate_cap_bps = bps
            for slot, sock in self._sockets.items():
                if slot >= 0:
                    self._pace(sock)

    def signals(self) -> list[ConnectionSignal]:
        """TCP's view of each data connection now."""
        with self._lock:
            sockets = [(slot, sock) for slot, sock in sorted(self._sockets.items()) if slot >= 0]
        signals = (read_signal(slot, sock, self._clock()) for slot, sock in sockets)
        return [signal for signal in signals if signal is not None]

    def stats(self) -> dict[str, int | list[int]]:
        """Counts since the start, and what is outstanding now."""
        with self._lock:
            return {
                **self._counts,
                "unacked_bytes": self._unacked_bytes,
                "held_bytes": self._held_bytes,
                "transfers": len(self._transfers),
                "connections": sum(slot >= 0 for slot in self._sockets),
                "bytes_by_connection": list(self._slot_bytes),
            }

    def close(self) -> None:
        """End all connections and threads; what was not delivered has failed."""
        with self._lock:
            self._closed = True
            for transfer in list(self._transfers.values()):
                if transfer.outcome is None:
                    self._fail(transfer, "closed", "the sender was closed")
            sockets = list(self._sockets.values())
            self._work.notify_all()
        for sock in sockets:
            hang_up(sock)
        for thread in self._threads:
            thread.join(timeout=5)

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

    def _may_take(self, request: int, segment: Segment) -> bool:
        outgoing = segment.outgoing
        if outgoing is None or outgoing.sent_on or request == self._oldest():
            return True
        return self._held_bytes + outgoing.piece.payload.nbytes <= self._window_bytes

    def _push_piece(self, transfer: Transfer, outgoing: Outgoing, only: list[int] | None = None) -> None:
        size = outgoing.piece.payload.nbytes
        step = self._spec.segment_bytes
        offsets = range(0, max(size, 1), step) if only is None else only
        header = outgoing.piece.header
        for offset in offsets:
            length = min(step, size - offset)
            order = (header.layer, header.piece, offset)
            self._schedule.push(transfer.number, order, Segment(transfer, outgoing, offset, length), length)
        self._work.notify(len(offsets))

    def _push_closing(self, transfer: Transfer) -> None:
        self._schedule.push(transfer.number, (_LAST,), Segment(transfer, None, 0, 0), 0)
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

    def _take(self, carrier: int, quantum_bytes: int) -> list[Segment] | None:
        """What the connection sends next; empty for a heartbeat, None when it should end."""
        batch: list[Segment] = []
        total = 0
        with self._lock:
            until = self._clock() + self._spec.heartbeat_s
            while carrier in self._carriers and not self._closed:
                while total < quantum_bytes and len(batch) < _BATCH:
                    segment = self._schedule.pop(self._may_take)
                    if segment is None:
                        break
                    self._dispatch(segment, carrier)
                    batch.append(segment)
                    total += segment.length
                if batch:
                    return batch
                left = until - self._clock()
                if left <= 0:
                    return batch
                self._work.wait(left)
        return None

    def _dispatch(self, segment: Segment, carrier: int) -> None:
        transfer, outgoing = segment.transfer, segment.outgoing
        transfer.touched = True
        if outgoing is None:
            transfer.closing_on = carrier
            return
        now = self._clock()
        if not outgoing.sent_on:
            outgoing.first_byte_s = now
            transfer.first_byte_s = transfer.first_byte_s or now
            transfer.held_bytes += outgoing.piece.payload.nbytes
            self._held_bytes += outgoing.piece.payload.nbytes
        if segment.offset in outgoing.sent_on:
            transfer.resent_bytes += segment.length
            self._counts["resent_bytes"] += segment.length
        outgoing.sent_on[segment.offset] = carrier

    def _lost(self, carrier: int, problem: str) -> None:
        """A data connection is gone: what it carried and nobody acknowledged goes out again on the others."""
        if self._carriers.pop(carrier, None) is None:
            return
        self._counts["lost"] += 1
        self._last_problem = problem
        for transfer in self._transfers.values():
            if transfer.closing_on == carrier:
                transfer.closing_on = None
                if not isinstance(transfer.outcome, Delivery):
                    self._push_closing(transfer)
            for outgoing in transfer.pieces.values():
                again = [offset for offset, on in outgoing.sent_on.items() if on == carrier and not outgoing.acked]
                if again:
                    self._push_piece(transfer, outgoing, again)
        self._work.notify_all()

    def _heard(self, envelope: Envelope, text: str) -> None:
        with self._lock:
            transfer = self._transfers.get(envelope.transfer)
            if transfer is None:
                return
            kind = envelope.kind
            if kind is Kind.ACK:
                self._acked(transfer, envelope.piece)
            elif kind is Kind.AGAIN and envelope.piece in transfer.pieces:
                outgoing = transfer.pieces[envelope.piece]
                if not outgoing.acked:
                    self._push_piece(transfer, outgoing, list(outgoing.sent_on))
            elif kind is Kind.DELIVERED and transfer.outcome is None:
                self._delivered(transfer)
            elif kind is Kind.REFUSED and transfer.outcome is None:
                self._fail(transfer, "refused", text)
            elif kind is Kind.RELEASED:
                self._forget(transfer)

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
        self._counts["acked_pieces"] += 1
        self._counts["acked_bytes"] += size
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

    # Connections: the lock is free in all of these.

    def _await_connections(self) -> None:
        until = time.monotonic() + self._spec.connect_timeout_s
        with self._lock:
            while not (-1 in self._sockets and len(self._sockets) > 1):
                left = until - time.monotonic()
                if left <= 0:
                    break
                self._done.wait(left)
            else:
                return
            problem = self._last_problem
        self.close()
        host, port = self._address
        raise UserError(f"transport: no connection to {host}:{port} within {self._spec.connect_timeout_s} s: {problem}")

    def _dial(self, role: Role, slot: int) -> socket.socket:
        spec = self._spec
        family = socket.AF_INET6 if ":" in self._address[0] else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(spec.stall_s * 1000))
            if spec.send_buffer_bytes:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, spec.send_buffer_bytes)
            if spec.congestion_control and role is Role.DATA:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, spec.congestion_control.encode())
            # A lost SYN is repeated by the kernel after 1, 3, 7 s: asking afresh finds an open link sooner.
            sock.settimeout(min(spec.stall_s, spec.connect_timeout_s, 2.0))
            sock.connect(self._address)
            sock.settimeout(None)
        except OSError as error:
            sock.close()
            raise PeerError(f"cannot connect: {error.strerror or error}") from None
        if self._tls is not None:
            sock = encrypt(sock, self._tls, receiver=False, timeout_s=spec.limits.handshake_timeout_s)
        try:
            timeout_s = spec.limits.handshake_timeout_s
            set_timeouts(sock, timeout_s, timeout_s)
            hello = Hello(role, slot & 0xFFFF, spec.segment_bytes, self._session, self._oldest_now(), self._backend)
            answer = introduce(sock, hello, self._secret, timeout_s)
            set_timeouts(sock, 3 * spec.heartbeat_s + spec.stall_s if role is Role.CONTROL else None, None)
        except (PeerError, OSError):
            close(sock)
            raise
        with self._lock:
            if self._token not in (None, answer.token):
                # A receiver that started again, or let us go: it has nothing of what it acknowledged.
                for transfer in list(self._transfers.values()):
                    if transfer.touched and transfer.outcome is None:
                        self._fail(transfer, "lost", "the receiver has lost what it had of it")
                    elif transfer.touched:
                        self._forget(transfer)
            self._token = answer.token
            self._window_bytes = answer.window_bytes
        return sock

    def _connect(self, role: Role, slot: int) -> socket.socket | None:
        """A connection, however long it takes; None when the sender is closed."""
        attempt = 0
        while not self._closed:
            try:
                sock = self._dial(role, slot)
            except (PeerError, OSError) as error:
                with self._lock:
                    self._last_problem = str(error)
                    self._work.wait(_RETRY_S[min(attempt, len(_RETRY_S) - 1)])
                attempt += 1
                continue
            with self._lock:
                if self._closed:
                    close(sock)
                    return None
                self._sockets[slot] = sock
                self._counts["opened"] += 1
                if role is Role.DATA:
                    self._pace(sock)
                self._done.notify_all()
            return sock
        return None

    def _pace(self, sock: socket.socket) -> None:
        cap = self._rate_cap_bps
        rate = _UNLIMITED if cap is None else max(1, int(cap / 8 / self._spec.connections))
        sock.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, struct.pack("Q", rate))

    def _run_slot(self, slot: int) -> None:
        while (sock := self._connect(Role.DATA, slot)) is not None:
            with self._lock:
                carrier = self._next_carrier
                self._next_carrier += 1
                self._carriers[carrier] = slot
            problem = "closed"
            origin: Origin | None = None
            try:
                if self._backend:
                    origin = self._open_origin(sock, slot)
                # Little unsent data in the kernel: what is needed earliest can still overtake.
                sock.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, self._spec.segment_bytes)
                quantum = smallest = self._spec.segment_bytes
                while (batch := self._take(carrier, quantum)) is not None:
                    began = time.monotonic()
                    self._write(sock, slot, batch, origin)
                    # A fast link is served in larger bites, which cost less; on a slow one, what comes must overtake.
                    took = time.monotonic() - began
                    quantum = (
                        min(2 * quantum, MAX_JOINED * smallest) if took < _QUICK_S else max(quantum // 2, smallest)
                    )
            except (OSError, PeerError, UserError) as error:
                problem = str(getattr(error, "strerror", None) or error)
            with self._lock:
                if self._sockets.get(slot) is sock:
                    del self._sockets[slot]
                if not self._closed:
                    log.info("connection %d lost: %s", slot, problem)
                self._lost(carrier, problem)
            close(sock)
            if origin is not None:
                with self._lock:
                    self._origins.pop(slot, None)
                origin.close()

    def _open_origin(self, sock: socket.socket, slot: int) -> Origin:
        description = read_description(sock, self._spec.limits.handshake_timeout_s)
        origin = open_origin(self._spec.backend, description, sock.getsockname()[0], 2 * self._spec.segment_bytes)
        with self._lock:
            self._origins[slot] = origin
            registered = list(self._registered)
        for memory in registered:
            origin.register(memory)
        return origin

    def _write_remotely(self, sock: socket.socket, origin: Origin, batch: list[Segment]) -> list[bytes | memoryview]:
        """Ask for places, have the engine write, and return what tells the receiver of it."""
        oldest = self._oldest_now()
        asked: list[tuple[Envelope, memoryview, bytes]] = []
        for segment in batch:
            if (out := segment.outgoing) is None:
                continue
            payload = out.piece.payload[segment.offset : segment.offset + segment.length]
            if payload.nbytes == segment.length:
                envelope = Envelope(
                    Kind.RESERVE,
                    segment.transfer.number,
                    out.piece.header.piece,
                    segment.offset,
                    segment.length,
                    oldest,
                )
                asked.append((envelope, payload, out.raw_header))
        if not asked:
            return []
        write_all(sock, [envelope.head(raw_header) for envelope, _, raw_header in asked])
        deadline = time.monotonic() + self._spec.deadline_s
        answers = [Envelope.unpack(read_exactly(sock, ENVELOPE_BYTES, deadline)) for _ in asked]
        wanted = [(entry, place) for entry, place in zip(asked, answers, strict=True) if place.length]
        writes = [(payload, place.offset) for (_, payload, _), place in wanted if payload.nbytes]
        if writes:
            origin.write(writes)
        return [envelope._replace(kind=Kind.WRITTEN).head() for (envelope, _, _), _ in wanted]

    def _write(self, sock: socket.socket, slot: int, batch: list[Segment], origin: Origin | None) -> None:
        oldest = self._oldest_now()
        buffers: list[bytes | memoryview] = []
        total = 0
        if origin is not None:
            buffers += self._write_remotely(sock, origin, batch)
            total = sum(segment.length for segment in batch)
        for segment in joined(batch):
            transfer, out = segment.transfer, segment.outgoing
            if out is not None and origin is None:
                piece = out.piece
                payload = piece.payload[segment.offset : segment.offset + segment.length]
                if payload.nbytes != segment.length:
                    continue  # acknowledged or given up in the meantime
                envelope = Envelope(
                    Kind.SEGMENT, transfer.number, piece.header.piece, segment.offset, segment.length, oldest
                )
                buffers += (envelope.head(out.raw_header), payload)
                total += segment.length
            elif out is None and transfer.outcome is not None:
                buffers.append(Envelope(Kind.CANCEL, transfer.number, oldest=oldest).head())
            elif out is None and transfer.manifest is not None:
                length = len(transfer.manifest)
                buffers += (
                    Envelope(Kind.MANIFEST, transfer.number, length=length, oldest=oldest).head(),
                    transfer.manifest,
                )
        if not buffers:
            buffers.append(Envelope(Kind.HEARTBEAT, oldest=oldest).head())
        write_all(sock, buffers)
        now = self._clock()
        with self._lock:
            self._counts["sent_bytes"] += total
            self._slot_bytes[slot] += total
            for segment in batch:
                if segment.outgoing is not None:
                    segment.transfer.last_byte_s = now

    def _oldest_now(self) -> int:
        with self._lock:
            return self._oldest()

    def _run_control(self) -> None:
        head = memoryview(bytearray(ENVELOPE_BYTES))
        while (sock := self._connect(Role.CONTROL, -1)) is not None:
            try:
                while read_into(sock, head):
                    envelope = Envelope.unpack(head)
                    text = ""
                    if envelope.kind is Kind.REFUSED:
                        text = read_exactly(sock, min(envelope.length, 1000)).decode(errors="replace")
                    self._heard(envelope, text)
            except (PeerError, OSError) as error:
                if not self._closed:
                    log.info("control connection lost: %s", error)
            with self._lock:
                self._sockets.pop(-1, None)
            close(sock)

    def _keep(self) -> None:
        """Watch for connections that die while nothing is written to them, and for deadlines."""
        while not self._closed:
            poll = select.poll()
            with self._lock:
                watched = {sock.fileno(): slot for slot, sock in self._sockets.items() if slot >= 0}
            # A data connection says nothing until it ends, except for a remote-memory backend's answers.
            events = select.POLLRDHUP | (select.POLLIN if self._spec.backend == "tcp" else 0)
            for fd in watched:
                if fd >= 0:
                    poll.register(fd, events)
            ended = [watched[fd] for fd, _ in poll.poll(50)]
            now = self._clock()
            with self._lock:
                for slot in ended:
                    if (sock := self._sockets.pop(slot, None)) is not None:
                        for carrier in [c for c, s in self._carriers.items() if s == slot]:
                            self._lost(carrier, "ended by the receiver")
                        hang_up(sock)
                for transfer in list(self._transfers.values()):
                    if transfer.outcome is None and now > transfer.deadline_s:
                        acked = sum(out.acked for out in transfer.pieces.values())
                        state = f"{acked} of {len(transfer.pieces)} pieces acknowledged"
                        self._fail(transfer, "deadline", f"{state}; last problem: {self._last_problem}")
