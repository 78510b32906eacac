"""What crosses a connection: heads of fixed size, each followed by exactly the bytes that it announces.

A head is an envelope and room for the frame header of the piece that it speaks of, so that one read fetches both. Heads,
answers and texts carry checksums: TCP's own lets an altered segment pass now and then, and a middlebox computes a new
one. Where a checksum does not hold nothing on that connection can be believed, so it ends, and its session resumes on
the next: pieces that were acknowledged stay, the others are sent again. A payload has its piece's checksum.

After its handshake a connection runs in one direction only. Data connections carry segments of pieces, manifests and
cancellations to the decode side; one control connection per session carries acknowledgements back. So no thread ever
reads and writes one TLS stream at once, and a reset on one connection costs only what that connection carried.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import time
from enum import IntEnum
from typing import Final, NamedTuple

import xxhash

from repro.kvcache.frames import HEADER_BYTES

_MAGIC: Final = b"PKT2"
# magic, kind, reserved | transfer | oldest | offset | piece, length | padding: a head has 160 bytes, so that the payload
# which follows lies as the kernel copies it fastest (152 bytes cost 7 % of the goodput of 8 connections)
_ENVELOPE: Final = struct.Struct("<4sHHQQQII8x")
_SEAL: Final = struct.Struct("<Q")  # xxh3_64 of all that follows it
ENVELOPE_BYTES: Final = _SEAL.size + _ENVELOPE.size
HEAD_BYTES: Final = ENVELOPE_BYTES + HEADER_BYTES
LOCAL_BUFFER_BYTES: Final = 64 << 10  # of payload; Linux keeps as much again for its own books
MAX_REASON_BYTES: Final = 1000
NO_HEADER: Final = bytes(HEADER_BYTES)


class PeerError(Exception):
    """The peer did what it must not do, or went away in the middle. The message is what the log will say."""


class AwayError(PeerError):
    """Nobody is there, or there is no room: it may be otherwise a moment later."""


class Kind(IntEnum):
    """What an envelope announces. The first group goes to the receiver, the second comes back from it."""

    SEGMENT = 1  # `length` bytes of the piece's payload from `offset`
    MANIFEST = 2  # `length` bytes of a packed manifest, and their checksum
    CANCEL = 3
    HEARTBEAT = 4
    RESERVE = 5  # asks where a backend that writes memory remotely may write the piece
    WRITTEN = 6  # such a piece is written
    ACK = 16  # the piece is here and its checksum holds
    AGAIN = 17  # the piece came altered: send it again
    DELIVERED = 18  # the request is whole and handed over
    REFUSED = 19  # `length` bytes of reason, and their checksum
    RELEASED = 20  # the request's memory is free again
    PULSE = 21
    PLACE = 22  # the answer to RESERVE: write at `offset`


FROM_RECEIVER: Final = frozenset((Kind.ACK, Kind.AGAIN, Kind.DELIVERED, Kind.REFUSED, Kind.RELEASED, Kind.PULSE))


class Envelope(NamedTuple):
    """`transfer` numbers the requests of a session from 0; every one below `oldest` is over and done with."""

    kind: Kind
    transfer: int = 0
    piece: int = 0
    offset: int = 0
    length: int = 0
    oldest: int = 0

    def pack(self) -> bytes:
        """The `ENVELOPE_BYTES` bytes of an answer. To the receiver goes a whole head: see `head`."""
        return self.head(b"")

    def head(self, raw_header: bytes = NO_HEADER) -> bytes:
        """The `HEAD_BYTES` bytes that go to the receiver."""
        _, transfer, piece, offset, length, oldest = self
        body = _ENVELOPE.pack(_MAGIC, self.kind, 0, transfer, oldest, offset, piece, length) + raw_header
        return _SEAL.pack(xxhash.xxh3_64_intdigest(body)) + body

    @staticmethod
    def unpack(buf: bytes | bytearray | memoryview) -> Envelope:
        """Read a whole answer or head. Raises PeerError where it is none, or was altered on its way."""
        magic, kind, reserved, transfer, oldest, offset, piece, length = _ENVELOPE.unpack_from(buf, _SEAL.size)
        if magic != _MAGIC or reserved:
            raise PeerError(f"garbage where an envelope should begin ({bytes(buf[:16])!r})")
        if _SEAL.unpack_from(buf)[0] != xxhash.xxh3_64_intdigest(memoryview(buf)[_SEAL.size :]):
            raise PeerError("an envelope whose checksum does not hold: it was altered on its way")
        try:
            return Envelope(Kind(kind), transfer, piece, offset, length, oldest)
        except ValueError:
            raise PeerError(f"an envelope of unknown kind {kind}") from None


def sealed(text: bytes) -> bytes:
    """A text (a manifest, a reason) as it follows its envelope: with its checksum before it."""
    return _SEAL.pack(xxhash.xxh3_64_intdigest(text)) + text


def read_sealed(sock: socket.socket, size: int, deadline: float | None = None) -> bytes:
    """A text of `size` bytes that `sealed` wrote. Raises PeerError as `read_exactly`, or where it was altered."""
    raw = bytes(read_exactly(sock, _SEAL.size + size, deadline))
    text = raw[_SEAL.size :]
    if raw != sealed(text):
        raise PeerError("a text whose checksum does not hold: it was altered on its way")
    return text


def read_into(sock: socket.socket, view: memoryview, deadline: float | None = None) -> bool:
    """Fill `view`. False where the peer closed before the first byte; PeerError where it closed or idled after it.

    The socket's own receive timeout (`set_timeouts`) bounds each wait; `deadline` (monotonic) bounds the whole.
    """
    encrypted = isinstance(sock, ssl.SSLSocket)
    flags = 0 if encrypted else socket.MSG_WAITALL
    done, size = 0, len(view)
    while done < size:
        if deadline is not None and time.monotonic() > deadline:
            raise PeerError(f"too slow: {done} of {size} bytes came in time")
        try:
            count = sock.recv_into(view[done:], size - done, flags)
        except (BlockingIOError, TimeoutError, ssl.SSLWantReadError):
            if deadline is None or encrypted:
                raise PeerError(f"silent: {done} of {size} bytes came in time") from None
            continue
        except OSError as error:
            raise PeerError(f"connection lost ({error.strerror or error})") from None
        if count == 0:
            if done == 0:
                return False
            raise PeerError(f"closed in the middle of a message, after {done} of {size} bytes")
        done += count
    return True


def read_exactly(sock: socket.socket, size: int, deadline: float | None = None) -> bytearray:
    """`size` bytes; PeerError where the peer closes, idles or drips."""
    buf = bytearray(size)
    if not read_into(sock, memoryview(buf), deadline):
        raise PeerError("closed where a message should follow")
    return buf


def write_all(sock: socket.socket, buffers: list[bytes | memoryview]) -> None:
    """Send all buffers, gathered without copying them (TLS copies as it encrypts). Raises OSError."""
    if isinstance(sock, ssl.SSLSocket):
        small = bytearray()
        for buf in buffers:
            # Short buffers share a TLS record, long ones are encrypted from where they lie.
            if len(buf) <= 4096:
                small += buf
                continue
            if small:
                sock.sendall(small)
                small = bytearray()
            sock.sendall(buf)
        if small:
            sock.sendall(small)
        return
    total = sum(len(buf) for buf in buffers)
    sent = sock.sendmsg(buffers)
    if sent == total:
        return
    for buf in buffers:
        if sent >= len(buf):
            sent -= len(buf)
        else:
            sock.sendall(memoryview(buf)[sent:])
            sent = 0


def hang_up(sock: socket.socket) -> None:
    """End a connection that another thread uses: it wakes, and closes what is its own.

    Only the owner closes, because a closed descriptor's number may be another connection's a moment later. The plain
    socket's shutdown is meant, even under TLS: the other one would let a thread go on in clear text.
    """
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def close(sock: socket.socket) -> None:
    """Close a connection of one's own."""
    hang_up(sock)
    with contextlib.suppress(OSError):
        sock.close()


def hold_buffer(sock: socket.socket, option: int, connections: int) -> bool:
    """Keep a buffer (`SO_SNDBUF`, `SO_RCVBUF`) small on one of several connections within this machine; whether it is.

    Left alone, TCP lets it grow to megabytes, as a long path needs. Within a machine there is no path to fill, and what
    lies between the two copies should still lie in the processor's cache when the second is made: `tuned` beside
    `sockets` in `scripts/bench transport` is what that is worth. A connection alone needs more, to keep both ends busy.
    """
    if connections == 1 or sock.getpeername()[0] != sock.getsockname()[0]:
        return False
    sock.setsockopt(socket.SOL_SOCKET, option, LOCAL_BUFFER_BYTES)
    return True


def set_timeouts(sock: socket.socket, receive_s: float | None, send_s: float | None = None) -> None:
    """Kernel timeouts on a blocking socket: unlike `settimeout` they cost no extra system call per message.

    Under TLS it is `settimeout` for both directions, the receiving one's where it is given: it bounds how long one *record*
    takes. A kernel's timeout starts anew with every byte, so an altered length of a record would have the reader wait
    for as many heartbeats as fill it.
    """
    if isinstance(sock, ssl.SSLSocket):
        sock.settimeout(receive_s or send_s)
        return
    for option, seconds in ((socket.SO_RCVTIMEO, receive_s), (socket.SO_SNDTIMEO, send_s)):
        whole = int(seconds or 0)
        micro = int(((seconds or 0) - whole) * 1e6)
        sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", whole, micro))
