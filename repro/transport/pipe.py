"""Messages between a worker and its transport's process: JSON with bytes beside it, over one end of a socket pair."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
from typing import Any

Message = dict[str, Any]

_SIZES = struct.Struct("<II")


class Pipe:
    """Messages with bytes beside them, over one end of a socket pair. `send` is safe from any thread."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lock = threading.Lock()

    def send(self, message: Message, beside: bytes = b"") -> None:
        """Raises OSError when the other process has gone."""
        text = json.dumps(message, separators=(",", ":")).encode()
        with self._lock:
            self._sock.sendall(_SIZES.pack(len(text), len(beside)) + text + beside)

    def receive(self) -> tuple[Message, bytes]:
        """Raises EOFError when the other process has gone."""
        text_bytes, beside_bytes = _SIZES.unpack(self._exactly(_SIZES.size))
        message: Message = json.loads(self._exactly(text_bytes))
        return message, self._exactly(beside_bytes)

    def close(self) -> None:
        """The other process takes this as the order to end."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def _exactly(self, size: int) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            try:
                part = self._sock.recv(min(size - len(parts), 1 << 20))
            except OSError:
                part = b""
            if not part:
                raise EOFError
            parts += part
        return bytes(parts)
