"""The decode side: accepts connections, reads pieces straight into prefaulted memory, hands over whole requests.

One thread per connection, because a blocking `recv_into` of a large segment leaves Python's lock alone while the kernel
copies. Nothing a peer sends is believed before it has passed the handshake, nothing is allocated before its header has
passed the limits, and whatever a peer does wrong ends that peer's connection with a line in the log, and no more.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType

from repro.kvcache.frames import Manifest, Piece, block_digests
from repro.transport.arena import Arena, Block
from repro.transport.handshake import (
    Hello,
    Refusal,
    RefusedError,
    Role,
    Welcome,
    encrypt,
    examine,
    tls_context,
    turn_away,
    welcome,
)
from repro.transport.remote_memory import Target, open_target, send_description
from repro.transport.session import Claim, Failure, Outbox, PieceArrival, Session, Whole
from repro.transport.spec import BACKENDS, TransportSpec
from repro.transport.wire import (
    ENVELOPE_BYTES,
    HEAD_BYTES,
    Envelope,
    Kind,
    PeerError,
    close,
    hang_up,
    hold_buffer,
    read_exactly,
    read_into,
    read_sealed,
    set_timeouts,
)

log = logging.getLogger("repro.transport")

_MAX_STRANGERS = 64
_MAX_FAILURES = 10_000
_BITE_BYTES = 1 << 20  # read, then checksummed while the processor's cache still holds it


@dataclass(frozen=True)
class Received:
    """A whole request. Its payloads lie in the receiver's memory until `release`; copy or restore them before that.

    A context manager: leaving it releases. Times are seconds of the monotonic clock, `arrivals` per piece;
    `blocks` say where in the receiver's arena the payloads lie.
    """

    request_id: int
    manifest: Manifest
    pieces: tuple[Piece, ...]
    arrivals: tuple[PieceArrival, ...]
    completed_s: float
    _release: Callable[[], None]
    blocks: tuple[Block, ...] = ()

    @property
    def first_byte_s(self) -> float:
        """When the first piece began to arrive."""
        return min((a.first_byte_s for a in self.arrivals), default=self.completed_s)

    @property
    def last_byte_s(self) -> float:
        """When the last piece's last byte was there."""
        return max((a.last_byte_s for a in self.arrivals), default=self.completed_s)

    def release(self) -> None:
        """Give the memory back, and with it the sender's window. More than once does no harm."""
        self._release()

    def __enter__(self) -> Received:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def once(action: Callable[[], None]) -> Callable[[], None]:
    """`action`, of which only the first call does anything."""
    left = [action]

    def call() -> None:
        with contextlib.suppress(IndexError):
            left.pop()()

    return call


class Receiver:
    """Listens for senders of one secret. Thread-safe."""

    def __init__(self, spec: TransportSpec, host: str, port: int = 0, *, arena: Arena | None = None) -> None:
        self._spec = spec
        self._limits = spec.limits
        self._secret = spec.secret_bytes()
        self._tls: ssl.SSLContext | None = tls_context(spec.tls, receiver=True) if spec.tls else None
        if not self._secret and self._tls is None:
            log.warning("the receiver on %s takes KVCache from anybody: neither a secret nor TLS is set", host)
        self._arena = arena or receive_arena(spec)
        self._target: Target | None = (
            None if spec.backend == "tcp" else open_target(spec.backend, self._arena.whole, host)
        )
        self._ready: queue.SimpleQueue[tuple[Session, Whole] | None] = queue.SimpleQueue()
        self._failures: list[Failure] = []
        self._sessions: dict[bytes, Session] = {}
        self._slots: dict[tuple[bytes, Role, int], socket.socket] = {}
        self._sockets: set[socket.socket] = set()
        self._strangers = 0
        self._refused_peers = 0
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._listener = socket.create_server((host, port), backlog=128)
        if spec.receive_buffer_bytes:
            # On the listener, so that it stands before the window scale is agreed.
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, spec.receive_buffer_bytes)
        self._threads: set[threading.Thread] = set()
        for work in (self._accept, self._tend):
            self._start(work)

    @property
    def memory(self) -> memoryview:
        """Where payloads lie at first, used again and again: whoever copies them to a device page-locks it once."""
        return self._arena.kept

    @property
    def port(self) -> int:
        """The TCP port that senders dial."""
        return int(self._listener.getsockname()[1])

    @property
    def arena(self) -> Arena:
        """Where payloads lie."""
        return self._arena

    def receive(self, timeout_s: float | None = None) -> Received:
        """The next whole request, each exactly once. Raises TimeoutError, or OSError once closed."""
        try:
            entry = self._ready.get(timeout=timeout_s)
        except queue.Empty:
            raise TimeoutError(f"no request arrived within {timeout_s} s") from None
        if entry is None:
            self._ready.put(None)
            raise OSError("the receiver is closed")
        session, whole = entry
        return Received(
            whole.manifest.request_id,
            whole.manifest,
            whole.pieces,
            whole.arrivals,
            whole.completed_s,
            once(lambda: session.release(whole)),
            whole.blocks,
        )

    def failures(self) -> list[Failure]:
        """Requests that were refused, cancelled or abandoned since the last call."""
        with self._lock:
            failures, self._failures = self._failures, []
        return failures

    def stats(self) -> dict[str, int]:
        """Counts at this moment: sessions, connections, bytes held, peers refused since the start, threads."""
        with self._lock:
            return {
                "sessions": len(self._sessions),
                "connections": len(self._slots),
                "held_bytes": sum(session.held_bytes for session in self._sessions.values()),
                "arena_used_bytes": self._arena.used_bytes,
                "refused_peers": self._refused_peers,
                "threads": len(self._threads),
            }

    def close(self) -> None:
        """End all connections and threads. Requests that were not yet received are lost."""
        self._closed.set()
        hang_up(self._listener)
        with self._lock:
            sockets, sessions = list(self._sockets), list(self._sessions.values())
        for sock in sockets:
            hang_up(sock)
        for session in sessions:
            session.speak_through(None)
        for thread in list(self._threads):
            if thread is not threading.current_thread():
                thread.join(timeout=5)
        close(self._listener)
        if self._target is not None:
            self._target.close()
        self._ready.put(None)
        self._arena.close()

    def __enter__(self) -> Receiver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _start(self, work: Callable[[], None]) -> None:
        def run() -> None:
            try:
                work()
            finally:
                with self._lock:
                    self._threads.discard(threading.current_thread())

        thread = threading.Thread(target=run, name=f"receive-{work.__name__}", daemon=True)
        with self._lock:
            self._threads.add(thread)
            thread.start()  # with the lock, so that `close` never joins what has not begun

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                sock, address = self._listener.accept()
            except OSError:
                if self._closed.is_set():
                    return
                time.sleep(0.05)  # out of descriptors, most likely: those that are here go on
                continue
            with self._lock:
                if self._closed.is_set():
                    close(sock)
                    return
                welcome_to_try = self._strangers < _MAX_STRANGERS
                self._strangers += welcome_to_try
                if welcome_to_try:
                    self._sockets.add(sock)
            if not welcome_to_try:
                self._refuse_peer(address, f"{_MAX_STRANGERS} connections are in their handshake already")
                turn_away(sock, Refusal.BUSY, before_tls=self._tls is not None)
                close(sock)
                continue
            self._start(lambda sock=sock, address=address: self._serve(sock, address))  # type: ignore[misc]

    def _refuse_peer(self, address: object, reason: str) -> None:
        with self._lock:
            self._refused_peers += 1
        log.warning("refused peer %s: %s", address, reason)

    def _serve(self, sock: socket.socket, address: object) -> None:
        """A connection from its first byte to its last."""
        current = sock
        session: Session | None = None
        stranger = True
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            set_timeouts(sock, self._limits.handshake_timeout_s, self._limits.handshake_timeout_s)
            if self._tls is not None:
                current = encrypt(sock, self._tls, receiver=True, timeout_s=self._limits.handshake_timeout_s)
                with self._lock:
                    self._sockets.discard(sock)
                    self._sockets.add(current)
                set_timeouts(current, self._limits.handshake_timeout_s, self._limits.handshake_timeout_s)
            hello, said = examine(current, self._secret, self._limits.handshake_timeout_s)
            session = self._enrol(hello, current)
            welcome(current, Welcome(session.token, self._limits.window_bytes), self._secret, said)
            with self._lock:
                self._strangers -= 1
            stranger = False
            if hello.role is Role.CONTROL:
                set_timeouts(current, None, 4 * self._spec.stall_s)
                outbox: Outbox = queue.SimpleQueue()
                session.speak_through(outbox, hello.oldest)
                self._speak(current, outbox)
            else:
                set_timeouts(current, self._patience_s(current), None)
                if not self._spec.receive_buffer_bytes:
                    hold_buffer(current, socket.SO_RCVBUF, self._spec.connections)
                self._read(current, session, hello.slot)
        except PeerError as error:
            if isinstance(error, RefusedError):
                turn_away(current, error.refusal)
            if not self._closed.is_set():
                self._refuse_peer(address, str(error))
        except OSError as error:
            if not self._closed.is_set():
                log.info("connection from %s lost: %s", address, error)
        except Exception:
            # A mistake of ours in one connection must not take the others down.
            log.exception("connection from %s dropped", address)
        finally:
            close(current)
            with self._lock:
                self._strangers -= stranger
                self._sockets.discard(current)
                self._sockets.discard(sock)
                for key in [key for key, taken in self._slots.items() if taken is current]:
                    del self._slots[key]
                if session is not None:
                    session.connections -= 1
                    session.alone_since_s = time.monotonic()

    def _patience_s(self, sock: socket.socket) -> float:
        """How long a wait for more bytes of a data connection may take; of a whole record, which has 16 KiB, under TLS."""
        patience_s = self._limits.segment_timeout_s
        if isinstance(sock, ssl.SSLSocket) and self._target is None:
            patience_s = min(patience_s, self._spec.silence_s)
        return patience_s

    def _speak(self, sock: socket.socket, outbox: Outbox) -> None:
        """Carry what the session has to say, and a pulse where there is nothing, until another connection does."""
        while True:
            try:
                words = [outbox.get(timeout=self._spec.heartbeat_s)]
                while not outbox.empty():
                    words.append(outbox.get_nowait())
            except queue.Empty:
                words = [Envelope(Kind.PULSE).pack()]
            if None in words:
                return
            sock.sendall(b"".join(word for word in words if word is not None))

    def _enrol(self, hello: Hello, sock: socket.socket) -> Session:
        """The connection's session; a connection that takes another's slot ends that one."""
        if hello.backend != BACKENDS.index(self._spec.backend):
            raise RefusedError(Refusal.BACKEND, f"sends by another backend than {self._spec.backend}")
        key = (hello.session, hello.role, hello.slot)
        gone: Session | None = None
        with self._lock:
            session = self._sessions.get(hello.session)
            if session is None:
                if len(self._sessions) >= self._limits.max_sessions and (gone := self._make_room()) is None:
                    raise RefusedError(Refusal.SENDERS, f"{self._limits.max_sessions} senders are here already")
                session = self._sessions[hello.session] = Session(
                    os.urandom(16),
                    self._arena,
                    self._limits,
                    lambda session, whole: self._ready.put((session, whole)),
                    self._report,
                )
            previous = self._slots.pop(key, None)
            if previous is None and session.connections > self._limits.max_connections:
                raise RefusedError(Refusal.CONNECTIONS, f"more than {self._limits.max_connections} connections")
            self._slots[key] = sock
            session.connections += 1
        if gone is not None:
            gone.abandon("the sender was away, and others needed its place")
        if previous is not None:
            hang_up(previous)
        return session

    def _make_room(self) -> Session | None:
        """Let go of the sender that has been away longest, if for longer than an outage is noticed in; the lock is held."""
        key, session = min(
            ((key, one) for key, one in self._sessions.items() if one.connections == 0),
            key=lambda item: item[1].alone_since_s,
            default=(b"", None),
        )
        if session is None or time.monotonic() - session.alone_since_s < self._spec.silence_s:
            return None
        return self._sessions.pop(key)

    def _report(self, failure: Failure) -> None:
        with self._lock:
            self._failures.append(failure)
            del self._failures[:-_MAX_FAILURES]

    def _read(self, sock: socket.socket, session: Session, slot: int) -> None:
        reserved: dict[tuple[int, int, int], Claim] = {}
        generation = session.opened(slot)
        try:
            if self._target is not None:
                send_description(sock, self._target)
            self._read_messages(sock, session, reserved)
        finally:
            session.broken_off(slot, generation, reserved.values())

    def _read_messages(
        self, sock: socket.socket, session: Session, reserved: dict[tuple[int, int, int], Claim]
    ) -> None:
        """`reserved` is what a remote writer has a place for and has not written yet."""
        head = memoryview(bytearray(HEAD_BYTES))
        patience = self._limits.segment_timeout_s
        while read_into(sock, head):
            envelope = Envelope.unpack(head)
            session.heard(envelope.oldest)
            if envelope.kind is Kind.SEGMENT:
                deadline = time.monotonic() + patience
                claim = session.claim(envelope, head[ENVELOPE_BYTES:])
                if claim is None:
                    for size in _bites(envelope.length):
                        read_exactly(sock, size, deadline)
                    continue
                digests = None
                try:
                    digests = _fill(sock, claim.view, deadline)
                finally:
                    session.filled(claim, digests)
            elif envelope.kind is Kind.MANIFEST:
                limit = self._limits.max_manifest_bytes + 4096
                if not 0 < envelope.length <= limit:
                    raise PeerError(f"a manifest of {envelope.length} bytes, {limit} are accepted")
                packed = read_sealed(sock, envelope.length, time.monotonic() + patience)
                session.close_with(envelope, packed)
            elif envelope.kind is Kind.CANCEL:
                session.cancel(envelope.transfer)
            elif envelope.kind is Kind.RESERVE and self._target is not None:
                key = (envelope.transfer, envelope.piece, envelope.offset)
                if key in reserved:
                    raise PeerError("reserves a place twice")
                claim = session.claim(envelope, head[ENVELOPE_BYTES:])
                if claim is None:
                    sock.sendall(Envelope(Kind.PLACE).pack())
                else:
                    reserved[key] = claim
                    place = claim.piece.block.offset + envelope.offset
                    sock.sendall(Envelope(Kind.PLACE, offset=place, length=1).pack())
            elif envelope.kind is Kind.WRITTEN:
                written = reserved.pop((envelope.transfer, envelope.piece, envelope.offset), None)
                if written is None:
                    raise PeerError("says it has written where no place was reserved")
                session.filled(written, block_digests(written.view))
            elif envelope.kind is not Kind.HEARTBEAT:
                raise PeerError(f"{envelope.kind.name} is not for a receiver")

    def _tend(self) -> None:
        """Let go of senders that do not come back, and of requests that do not end."""
        while not self._closed.wait(0.5):
            now = time.monotonic()
            with self._lock:
                gone = {
                    key: session
                    for key, session in self._sessions.items()
                    if session.connections == 0 and now - session.alone_since_s > self._limits.session_timeout_s
                }
                for key in gone:
                    del self._sessions[key]
            for session in gone.values():
                session.abandon("the sender has gone")


def _bites(size: int) -> Iterator[int]:
    for at in range(0, size, _BITE_BYTES):
        yield min(_BITE_BYTES, size - at)


def _fill(sock: socket.socket, view: memoryview, deadline: float) -> list[bytes]:
    """Read a segment to where it belongs, and return the digests of its blocks."""
    digests: list[bytes] = []
    at = 0
    for size in _bites(len(view)):
        bite = view[at : at + size]
        if not read_into(sock, bite, deadline):
            raise PeerError("closed in the middle of a segment")
        digests += block_digests(bite)
        at += size
    return digests or block_digests(view)


def receive_arena(spec: TransportSpec) -> Arena:
    """Memory for what the limits allow; only what is used is ever backed by pages."""
    limits = spec.limits
    per_session = limits.window_bytes + limits.max_request_bytes
    return Arena(
        2 * per_session * min(limits.max_sessions, 4),
        retain_bytes=2 * limits.window_bytes,
        prefault_bytes=limits.prefault_bytes,
    )
