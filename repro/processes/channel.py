"""Framed messages between two processes of one machine: JSON with bytes beside it, over one end of a socket pair.

JSON and not pickle, so that a message can do nothing but be read. A frame is the two sizes, then the JSON, then the bytes.
Both sizes are bounded, so that a broken peer cannot make this process allocate without end, and every wait can have a deadline.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import struct
import threading
import time
from typing import Any

try:
    import msgspec
except (
    ImportError
):  # the link and its helpers need the standard library alone, as an unprivileged user's Python may have no more
    msgspec = None  # type: ignore[assignment]

Message = dict[str, Any]

#: Of the JSON and of the bytes beside it, each. A prompt of a million tokens takes 7 MB.
MAX_FRAME_BYTES = 64 << 20

_SIZES = struct.Struct("<II")
_READ_BYTES = 64 << 10


def decoded(text: bytes) -> Any:
    """What a message says. Raises ValueError where it is not JSON."""
    if msgspec is None:
        return json.loads(text)
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return json.loads(text)  # knows the infinite and nan, which Python writes


class PeerGone(EOFError):  # noqa: N818 - the name says it
    """The process at the other end has closed the channel or ended, or what it sent is no frame."""


class Channel:
    """One end. `send` is safe from any thread, `receive` and `drain` are for one thread."""

    def __init__(self, sock: socket.socket, send_timeout_s: float | None = None) -> None:
        self._sock = sock
        if send_timeout_s is not None:
            seconds = int(send_timeout_s)
            timeval = struct.pack("ll", seconds, int((send_timeout_s - seconds) * 1e6))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
        self._lock = threading.Lock()
        self._closed = False
        self._buffer = bytearray()

    def fileno(self) -> int:
        """The socket, for a selector."""
        return self._sock.fileno()

    def send(self, message: Message, beside: bytes = b"") -> None:
        """Send one frame; waits while the peer does not read.

        Raises:
            OSError: where the peer has gone, or does not read within the send timeout; the channel is then closed.
            ValueError: for a frame beyond the bound.
        """
        self.send_text(json.dumps(message, separators=(",", ":")).encode(), beside)

    def send_text(self, text: bytes, beside: bytes = b"") -> None:
        """As `send`, of a message that is a JSON object already."""
        if max(len(text), len(beside)) > MAX_FRAME_BYTES:
            raise ValueError(
                f"a message of {max(len(text), len(beside))} bytes; at most {MAX_FRAME_BYTES} are accepted"
            )
        with self._lock:
            if self._closed:
                raise BrokenPipeError("the channel is closed")
            try:
                self._sock.sendall(_SIZES.pack(len(text), len(beside)) + text + beside)
            except BlockingIOError:
                # A part of the frame may have gone: nothing after it could be read.
                self._shutdown()
                raise TimeoutError("the peer does not read") from None

    def receive(self, timeout_s: float | None = None) -> tuple[Message, bytes]:
        """The next frame. Raises PeerGone when the peer has gone or sent no frame, TimeoutError after `timeout_s`."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while (frame := self._next()) is None:
            if deadline is not None:
                poller = select.poll()
                poller.register(self._sock, select.POLLIN)
                if not poller.poll(1000 * max(0.0, deadline - time.monotonic())):
                    raise TimeoutError(f"no message within {timeout_s:g} s")
            self._read(0)
        return frame

    def drain(self) -> list[tuple[Message, bytes]] | None:
        """Every frame that is complete by what has come, without waiting; None where nothing has come. Raises PeerGone."""
        try:
            self._read(socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        frames = []
        while (frame := self._next()) is not None:
            frames.append(frame)
        return frames

    def shutdown(self) -> None:
        """End both directions: the peer reads EOF, and a thread that waits in `receive` here does too."""
        with self._lock:
            self._shutdown()

    def close(self) -> None:
        """End both directions and give the socket back. No thread may be in `receive`."""
        with self._lock:
            self._shutdown()
            self._sock.close()

    def _shutdown(self) -> None:
        self._closed = True
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def _read(self, flags: int) -> None:
        try:
            part = self._sock.recv(_READ_BYTES, flags)
        except BlockingIOError:
            raise
        except OSError:
            part = b""
        if not part:
            raise PeerGone("the peer closed the channel")
        self._buffer += part

    def _next(self) -> tuple[Message, bytes] | None:
        if len(self._buffer) < _SIZES.size:
            return None
        text_bytes, beside_bytes = _SIZES.unpack_from(self._buffer)
        if max(text_bytes, beside_bytes) > MAX_FRAME_BYTES:
            raise PeerGone(f"a frame of {max(text_bytes, beside_bytes)} bytes, more than a frame may have")
        middle = _SIZES.size + text_bytes
        end = middle + beside_bytes
        if len(self._buffer) < end:
            return None
        text, beside = bytes(self._buffer[_SIZES.size : middle]), bytes(self._buffer[middle:end])
        del self._buffer[:end]
        try:
            message = decoded(text)
        except ValueError:
            raise PeerGone("a frame that is not JSON") from None
        if not isinstance(message, dict):
            raise PeerGone("a frame that is not an object")
        return message, beside
