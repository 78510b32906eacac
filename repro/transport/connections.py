"""The sender's connections: opened once, kept warm, opened again when they are lost, and dropped when the peer's TCP is silent.

One thread per data connection takes the next batch from the traffic and writes it, so a faster connection simply takes
more; one reads the control connection, and one watches for connections that end while nothing is written to them, or
that fall behind for good.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import ssl
import struct
import threading
import time
from typing import Protocol

from repro.errors import UserError
from repro.transport.handshake import Hello, Role, Welcome, encrypt, introduce, tls_context
from repro.transport.outgoing import Batch
from repro.transport.remote_memory import Origin, open_origin, read_description
from repro.transport.signals import ConnectionSignal, Laggards, read_signal
from repro.transport.spec import BACKENDS, TransportSpec
from repro.transport.wire import (
    ENVELOPE_BYTES,
    MAX_REASON_BYTES,
    AwayError,
    Envelope,
    Kind,
    PeerError,
    close,
    hang_up,
    hold_buffer,
    read_exactly,
    read_into,
    read_sealed,
    sealed,
    set_timeouts,
    write_all,
)

log = logging.getLogger("repro.transport")

_TCP_NOTSENT_LOWAT = 25
_SO_MAX_PACING_RATE = 47
_UNLIMITED = (1 << 64) - 1
_MAX_BATCH_BYTES = 16 << 20
_QUICK_S = 0.02
_WATCH_S = 0.05
_RETRY_S = (0.0, 0.05, 0.1, 0.25, 0.5)


class Traffic(Protocol):
    """What the connections carry, and who hears of it. Every method takes its own lock; only `take` waits."""

    def greeted(self, answer: Welcome) -> None:
        """A connection's handshake is done."""

    def oldest(self) -> int:
        """The oldest transfer that still matters."""

    def enlist(self) -> int:
        """A data connection is open: its number."""

    def take(self, carrier: int, limit_bytes: int) -> Batch | None:
        """What the connection sends next; None when it should end."""

    def sent(self, slot: int, batch: Batch) -> None:
        """The kernel has the batch."""

    def lost(self, carrier: int) -> None:
        """A data connection is gone, and with it whatever of its bytes was not acknowledged."""

    def heard(self, envelope: Envelope, text: str) -> None:
        """The receiver said something. Raises PeerError for what it cannot mean."""

    def tick(self) -> None:
        """A little time has passed."""


class ReceiverAwayError(UserError):
    """No receiver answers at an address, or it has no room; a later one may."""


class Connections:
    """`spec.connections` data connections to one receiver and a control connection, until `close`."""

    def __init__(self, spec: TransportSpec, address: tuple[str, int], traffic: Traffic) -> None:
        self._spec = spec
        self._address = address
        self._traffic = traffic
        self._secret = spec.secret_bytes()
        self._tls: ssl.SSLContext | None = tls_context(spec.tls, receiver=False) if spec.tls else None
        self._session = os.urandom(16)
        self._rate_cap_bps = spec.rate_cap_bps
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._control: socket.socket | None = None
        self._data: dict[int, tuple[socket.socket, int]] = {}  # by slot, with the connection's number
        self._origins: dict[int, Origin] = {}  # by slot, for backends that write remote memory
        self._registered: list[memoryview] = []
        self._closed = threading.Event()
        self._acked_bytes = 0  # by the peer's TCP, on connections that are gone
        self.opened = 0
        self.last_problem = "no answer"
        self._is_away = True  # as far as was seen when it was dialled last
        self._threads = [
            threading.Thread(target=self._run_slot, args=(slot,), name=f"send-{slot}", daemon=True)
            for slot in range(spec.connections)
        ]
        self._threads.append(threading.Thread(target=self._run_control, name="send-control", daemon=True))
        self._threads.append(threading.Thread(target=self._watch, name="send-watch", daemon=True))

    def open(self) -> None:
        """Dial, and wait for the control connection and one other.

        Raises:
            ReceiverAwayError: where nobody answers in time, or has room; UserError where what answers refuses.
        """
        for thread in self._threads:
            thread.start()
        patience_s = self._spec.connect_timeout_s
        with self._lock:
            if self._changed.wait_for(lambda: self._control is not None and self._data, patience_s):
                return
        host, port = self._address
        why = f"transport: no connection to {host}:{port} within {patience_s} s: {self.last_problem}"
        raise ReceiverAwayError(why) if self._is_away else UserError(why)

    def register(self, memory: memoryview) -> None:
        """See `Sender.register`."""
        with self._lock:
            self._registered.append(memory)
            origins = list(self._origins.values())
        for origin in origins:
            origin.register(memory)

    def set_rate_cap(self, bps: float | None) -> None:
        """See `Sender.set_rate_cap`."""
        with self._lock:
            self._rate_cap_bps = bps
            for sock, _ in self._data.values():
                self._pace(sock)

    def signals(self) -> list[ConnectionSignal]:
        """TCP's view of each data connection now."""
        with self._lock:
            socks = [(slot, sock) for slot, (sock, _) in sorted(self._data.items())]
        signals = (read_signal(slot, sock, time.monotonic()) for slot, sock in socks)
        return [signal for signal in signals if signal is not None]

    @property
    def wire_bytes(self) -> int:
        """What TCP has sent on all data connections there ever were, each byte once: payload, heads, repeats.

        Of connections that have ended, what the peer had acknowledged. Of others that would be too little: TCP may acknowledge the last
        segment of a request after the receiver has.
        """
        open_now = (signal.tcp for signal in self.signals())
        return self._acked_bytes + sum(tcp.bytes_sent - tcp.bytes_retransmitted for tcp in open_now)

    def __len__(self) -> int:
        """Data connections that are open now."""
        return len(self._data)

    def close(self) -> None:
        """End all connections and threads. The traffic's `take` must return by itself."""
        self._closed.set()
        with self._lock:
            socks = [sock for sock, _ in self._data.values()]
            if self._control is not None:
                socks.append(self._control)
        for sock in socks:
            hang_up(sock)
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(timeout=5)

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
            raise AwayError(f"cannot connect: {error.strerror or error}") from None
        timeout_s = spec.limits.handshake_timeout_s
        if self._tls is not None:
            sock = encrypt(sock, self._tls, receiver=False, timeout_s=timeout_s)
        try:
            set_timeouts(sock, timeout_s, timeout_s)
            backend = BACKENDS.index(spec.backend)
            hello = Hello(role, slot, self._session, self._traffic.oldest(), backend)
            answer = introduce(sock, hello, self._secret, timeout_s)
            set_timeouts(sock, spec.silence_s if role is Role.CONTROL else None, None)
        except (PeerError, OSError):
            close(sock)
            raise
        self._traffic.greeted(answer)
        return sock

    def _connect(self, role: Role, slot: int) -> socket.socket | None:
        """A connection, however long it takes; None when all is over."""
        attempt = 0
        while not self._closed.is_set():
            try:
                return self._dial(role, slot)
            except (PeerError, OSError) as error:
                self.last_problem = str(error)
                self._is_away = isinstance(error, AwayError)
                self._closed.wait(_RETRY_S[min(attempt, len(_RETRY_S) - 1)])
                attempt += 1
        return None

    def _admit(self, sock: socket.socket, slot: int | None, carrier: int = 0) -> bool:
        """Count a connection in (slot None: the control connection), unless all is over."""
        with self._lock:
            if self._closed.is_set():
                return False
            if slot is None:
                self._control = sock
            else:
                self._data[slot] = sock, carrier
                self._pace(sock)
            self.opened += 1
            self._changed.notify_all()
        return True

    def _pace(self, sock: socket.socket) -> None:
        cap = self._rate_cap_bps
        rate = _UNLIMITED if cap is None else max(1, int(cap / 8 / self._spec.connections))
        sock.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, struct.pack("Q", rate))

    def _run_slot(self, slot: int) -> None:
        while (sock := self._connect(Role.DATA, slot)) is not None:
            carrier = self._traffic.enlist()
            problem = "closed"
            try:
                if self._admit(sock, slot, carrier):
                    self._carry(sock, slot, carrier)
            except (OSError, PeerError, UserError) as error:
                problem = str(getattr(error, "strerror", None) or error)
            last = read_signal(slot, sock, time.monotonic())
            with self._lock:
                if (held := self._data.get(slot)) is not None and held[0] is sock:
                    del self._data[slot]
                origin = self._origins.pop(slot, None)
                self._acked_bytes += last.tcp.bytes_acked if last is not None else 0
            if not self._closed.is_set():
                self.last_problem = problem
                log.info("connection %d lost: %s", slot, problem)
                _renounce(sock)
            self._traffic.lost(carrier)
            close(sock)
            if origin is not None:
                origin.close()

    def _carry(self, sock: socket.socket, slot: int, carrier: int) -> None:
        """Write batch after batch until there are none."""
        origin = self._open_origin(sock, slot) if self._spec.backend != "tcp" else None
        # Little unsent data in the kernel: what is needed earliest can still overtake.
        if self._spec.send_buffer_bytes or not hold_buffer(sock, socket.SO_SNDBUF, self._spec.connections):
            sock.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, self._spec.segment_bytes)
        limit = smallest = self._spec.segment_bytes
        largest = max(smallest, _MAX_BATCH_BYTES) if origin is None else smallest
        while (batch := self._traffic.take(carrier, limit)) is not None:
            began = time.monotonic()
            buffers = [] if origin is None else _write_remotely(sock, origin, batch, self._spec.deadline_s)
            buffers += _encoded(batch, with_payload=origin is None)
            write_all(sock, buffers or [Envelope(Kind.HEARTBEAT, oldest=batch.oldest).head()])
            # A fast link is served in larger bites, which cost less; on a slow one, what comes must overtake.
            took = time.monotonic() - began
            limit = min(2 * limit, largest) if took < _QUICK_S else max(limit // 2, smallest)
            self._traffic.sent(slot, batch)

    def _open_origin(self, sock: socket.socket, slot: int) -> Origin:
        description = read_description(sock, self._spec.limits.handshake_timeout_s)
        origin = open_origin(self._spec.backend, description, sock.getsockname()[0], 2 * self._spec.segment_bytes)
        with self._lock:
            self._origins[slot] = origin
            registered = list(self._registered)
        for memory in registered:
            origin.register(memory)
        return origin

    def _run_control(self) -> None:
        head = memoryview(bytearray(ENVELOPE_BYTES))
        while (sock := self._connect(Role.CONTROL, 0)) is not None:
            try:
                open_now = self._admit(sock, None)
                while open_now and read_into(sock, head):
                    envelope = Envelope.unpack(head)
                    text = ""
                    if envelope.kind is Kind.REFUSED:
                        if envelope.length > MAX_REASON_BYTES:
                            raise PeerError(f"a reason of {envelope.length} bytes, {MAX_REASON_BYTES} are accepted")
                        text = read_sealed(sock, envelope.length).decode(errors="replace")
                    self._traffic.heard(envelope, text)
            except (PeerError, OSError) as error:
                if not self._closed.is_set():
                    self.last_problem = f"control connection: {error}"
                    log.info("control connection lost: %s", error)
            with self._lock:
                self._control = None
            close(sock)

    def _watch(self) -> None:
        """Notice connections that the receiver ends while nothing is written to them, and those that lag behind."""
        # A data connection says nothing until it ends, except for a remote-memory backend's answers.
        events = select.POLLRDHUP | (select.POLLIN if self._spec.backend == "tcp" else 0)
        laggards = Laggards()
        while not self._closed.is_set():
            poll = select.poll()
            with self._lock:
                watched = {sock.fileno(): (slot, carrier, sock) for slot, (sock, carrier) in self._data.items()}
            for fd in watched:
                if fd >= 0:
                    poll.register(fd, events)
            ended = {watched[fd][1]: "ended by the receiver" for fd, _ in poll.poll(1000 * _WATCH_S)}
            now = time.monotonic()
            signals = {carrier: read_signal(slot, sock, now) for slot, carrier, sock in watched.values()}
            for carrier in laggards.update({c: signal for c, signal in signals.items() if signal is not None}):
                ended.setdefault(carrier, "stuck while the others went on")
            for slot, carrier, sock in watched.values():
                if carrier not in ended:
                    continue
                with self._lock:
                    if self._data.get(slot) == (sock, carrier):
                        del self._data[slot]
                self.last_problem = ended[carrier]
                self._traffic.lost(carrier)
                hang_up(sock)
            self._traffic.tick()


def _renounce(sock: socket.socket) -> None:
    """Have `close` reset the connection: the receiver must learn at once that no more will come on it."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _encoded(batch: Batch, *, with_payload: bool) -> list[bytes | memoryview]:
    """A batch as buffers to write."""
    buffers: list[bytes | memoryview] = []
    oldest = batch.oldest
    for transfer, out, offset, length in batch.segments:
        if out is not None:
            payload = out.piece.payload[offset : offset + length]
            if with_payload and payload.nbytes == length:  # else acknowledged or given up in the meantime
                envelope = Envelope(Kind.SEGMENT, transfer.number, out.piece.header.piece, offset, length, oldest)
                buffers += (envelope.head(out.raw_header), payload)
        elif transfer.outcome is not None:
            buffers.append(Envelope(Kind.CANCEL, transfer.number, oldest=oldest).head())
        elif (manifest := transfer.manifest) is not None:
            envelope = Envelope(Kind.MANIFEST, transfer.number, length=len(manifest), oldest=oldest)
            buffers += (envelope.head(), sealed(manifest))
    return buffers


def _write_remotely(sock: socket.socket, origin: Origin, batch: Batch, deadline_s: float) -> list[bytes | memoryview]:
    """Ask for places, have the engine write, and return what tells the receiver of it."""
    asked: list[tuple[Envelope, memoryview, bytes]] = []
    for transfer, out, offset, length in batch.segments:
        if out is None:
            continue
        payload = out.piece.payload[offset : offset + length]
        if payload.nbytes == length:
            piece = out.piece.header.piece
            envelope = Envelope(Kind.RESERVE, transfer.number, piece, offset, length, batch.oldest)
            asked.append((envelope, payload, out.raw_header))
    if not asked:
        return []
    write_all(sock, [envelope.head(raw_header) for envelope, _, raw_header in asked])
    deadline = time.monotonic() + deadline_s
    answers = [Envelope.unpack(read_exactly(sock, ENVELOPE_BYTES, deadline)) for _ in asked]
    wanted = [(entry, place) for entry, place in zip(asked, answers, strict=True) if place.length]
    writes = [(payload, place.offset) for (_, payload, _), place in wanted if payload.nbytes]
    if writes:
        origin.write(writes)
    return [envelope._replace(kind=Kind.WRITTEN).head() for (envelope, _, _), _ in wanted]
