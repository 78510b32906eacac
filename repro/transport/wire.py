"""What crosses a connection: heads of fixed size, each followed by exactly the bytes that it announces.

A head is an envelope and room for the frame header of the piece that it speaks of, so that one read fetches both.

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

from repro.kvcache.frames import HEADER_BYTES

_MAGIC: Final = b"PKT1"
# magic, kind, reserved | transfer | oldest | offset | piece, length
_ENVELOPE: Final = struct.Struct("<4sHHQQQII")
ENVELOPE_BYTES: Final = _ENVELOPE.size
HEAD_BYTES: Final = ENVELOPE_BYTES + HEADER_BYTES
LOCAL_BUFFER_BYTES: Final = 64 << 10  # of payload; Linux keeps as much again for its own books
NO_HEADER: Final = bytes(HEADER_BYTES)


class PeerError(Exception):
    """The peer did what it must not do, or went away in the middle. The message is what the log will say."""


class Kind(IntEnum):
    """What an envelope announces. The first group goes to the receiver, the second comes back from it."""

    SEGMENT = 1  # `length` bytes of the piece's payload from `offset`
    MANIFEST = 2  # `length` bytes of a packed manifest
    CANCEL = 3
    HEARTBEAT = 4
    RESERVE = 5  # asks where a backend that writes memory remotely may write the piece
    WRITTEN = 6  # such a piece is written
    ACK = 16  # the piece is here and its checksum holds
    AGAIN = 17  # the piece came altered: send it again
    DELIVERED = 18  # the request is whole and handed over
    REFUSED = 19  # `length` bytes of reason
    RELEASED = 20  # the request's memory is free again
    PULSE = 21
    PLACE = 22  # the answer to RESERVE: write at `offset`


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
        return _ENVELOPE.pack(_MAGIC, self.kind, 0, self.transfer, self.oldest, self.offset, self.piece, self.length)

    def head(self, raw_header: bytes = NO_HEADER) -> bytes:
        """The `HEAD_BYTES` bytes that go to the receiver."""
        return self.pack() + raw_header

    @staticmethod
    def unpack(buf: bytes | bytearray | memoryview) -> Envelope:
        """Raises PeerError where this is not an envelope."""
        magic, kind, reserved, transfer, oldest, offset, piece, length = _ENVELOPE.unpack_from(buf)
        if magic != _MAGIC or reserved:
            raise PeerError(f"garbage where an envelope should begin ({bytes(buf[:8])!r})")
        try:
            return Envelope(Kind(kind), transfer, piece, offset, length, oldest)
        except ValueError:
            raise PeerError(f"an envelope of unknown kind {kind}") from None


def read_into(sock: socket.socket, view: memoryview, deadline: float | None = None) -> bool:
    """Fill `view`. False where the peer closed before the first byte; PeerError where it closed or idled after it.

    The socket's own receive timeout (`SO_RCVTIMEO`) bounds each wait; `deadline` (monotonic) bounds the whole.
    """
    flags = 0 if isinstance(sock, ssl.SSLSocket) else socket.MSG_WAITALL
    done, size = 0, len(view)
    while done < size:
        if deadline is not None and time.monotonic() > deadline:
            raise PeerError(f"too slow: {done} of {size} bytes came in time")
        try:
            count = sock.recv_into(view[done:], size - done, flags)
        except (BlockingIOError, TimeoutError, ssl.SSLWantReadError):
            if deadline is None:
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
    """Kernel timeouts on a blocking socket: unlike `settimeout` they cost no extra system call per message."""
    for option, seconds in ((socket.SO_RCVTIMEO, receive_s), (socket.SO_SNDTIMEO, send_s)):
        whole = int(seconds or 0)
        micro = int(((seconds or 0) - whole) * 1e6)
        sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", whole, micro))
