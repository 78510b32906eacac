"""Requests to send, and a path between the ends that can be cut, reset and bent at will."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from repro.kvcache.frames import DType, Manifest, Piece, StateKind
from repro.transport import Received, Receiver, ReceiverLimits, Sender, TransportSpec


def make_request(request_id: int, sizes: list[int], seed: int = 0) -> tuple[list[Piece], Manifest]:
    """One piece per size, each a layer of its own, with bytes that depend on the seed."""
    rng = random.Random(f"{request_id}/{seed}")
    pieces = [
        Piece.seal(
            rng.randbytes(size),
            request_id=request_id,
            piece=index,
            layer=index,
            kind=StateKind.RECURRENT,
            dtype=DType.UINT8,
            shape=(size,),
            tokens=(0, 8),
        )
        for index, size in enumerate(sizes)
    ]
    return pieces, Manifest.of(request_id, [piece.header for piece in pieces], {"seed": seed})


def send_all(sender: object, pieces: list[Piece], manifest: Manifest, **begin: float) -> None:
    sender.begin(manifest.request_id, **begin)  # type: ignore[attr-defined]
    for piece in pieces:
        sender.send(piece)  # type: ignore[attr-defined]
    sender.finish(manifest)  # type: ignore[attr-defined]


def assert_same(received: Received, pieces: list[Piece]) -> None:
    assert [p.header for p in received.pieces] == [p.header for p in pieces]
    assert all(got.payload == sent.payload for got, sent in zip(received.pieces, pieces, strict=True))


def eventually(condition: Callable[[], bool], patience_s: float = 10.0) -> bool:
    """Wait for something that another thread is about to do."""
    until = time.monotonic() + patience_s
    while time.monotonic() < until:
        if condition():
            return True
        time.sleep(0.01)
    return condition()


@dataclass
class HonestTraffic:
    """A receiver and an honest sender of it, which must be served whatever others do; `log` is the transport's."""

    spec: TransportSpec
    receiver: Receiver
    honest: Sender
    log: pytest.LogCaptureFixture
    size: int = 50_000
    served: int = 0

    def still_serves(self) -> None:
        self.served += 1
        pieces, manifest = make_request(self.served, [self.size, 7])
        send_all(self.honest, pieces, manifest)
        with self.receiver.receive(10) as received:
            assert_same(received, pieces)
        self.honest.wait(self.served, 10)

    def refused_for(self, words: str) -> None:
        assert eventually(lambda: words in self.log.text), f"{words!r} is not in the log:\n{self.log.text}"
        self.still_serves()


class Path:
    """A relay between two ports, thread per direction: it can reset its connections and stop carrying bytes."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.open = threading.Event()
        self.open.set()
        self.carried = 0
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                if not self.open.is_set():
                    near.close()
                    continue
                far = socket.create_connection(("127.0.0.1", self._target))
                with self._lock:
                    self._pairs.append((near, far))
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=(source, sink), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self.open.wait()
                sink.sendall(data)
                with self._lock:
                    self.carried += len(data)
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    @property
    def connections(self) -> int:
        with self._lock:
            return len(self._pairs)

    def reset(self, which: int | None = None) -> None:
        """End all connections, or one, with a TCP reset at both ends."""
        with self._lock:
            pairs, self._pairs = (self._pairs, []) if which is None else ([self._pairs.pop(which)], self._pairs)
        for pair in pairs:
            for sock in pair:
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    sock.shutdown(socket.SHUT_RD)
                    sock.close()

    def close(self) -> None:
        self._listener.close()
        self.open.set()
        self.reset()


def small_spec() -> TransportSpec:
    """Small segments and short patience, so that a test sees in a moment what a link shows in a minute."""
    return TransportSpec(
        connections=4,
        secret="open sesame",
        segment_bytes=256 << 10,
        turn_bytes=1 << 20,
        heartbeat_s=0.1,
        stall_s=0.5,
        deadline_s=20,
        connect_timeout_s=5,
        limits=ReceiverLimits(
            window_bytes=4 << 20,
            prefault_bytes=1 << 20,
            handshake_timeout_s=0.5,
            segment_timeout_s=2,
            session_timeout_s=5,
        ),
    )
