"""A path that alters single bits of whatever crosses it, and traffic that must survive it."""

from __future__ import annotations

import contextlib
import math
import random
import socket
import threading
from collections import Counter
from dataclasses import dataclass, field

import psutil
from transport_rig import Path, assert_same, eventually, make_request, send_all

from repro.errors import UserError
from repro.kvcache.frames import Piece
from repro.transport import Receiver, Sender, TransferFailed, TransportSpec, open_receiver, open_sender

_UNDER_WAY = 4


class FlippingPath(Path):
    """Every so many bytes, geometrically distributed, one bit is flipped: towards the receiver and back, seeded."""

    def __init__(self, port: int, forward_bytes: float, back_bytes: float, seed: int) -> None:
        self.flips = 0
        self.flipping = threading.Event()
        self._means = {True: forward_bytes, False: back_bytes}
        self._random = random.Random(seed)
        self._left = {forward: self._distance(forward) for forward in (True, False)}
        super().__init__(port)

    def _distance(self, forward: bool) -> int:
        return int(-math.log(1 - self._random.random()) * self._means[forward])

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        forward = source.getsockname()[1] == self.port
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(self._altered(bytearray(data), forward) if self.flipping.is_set() else data)
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _altered(self, data: bytearray, forward: bool) -> bytearray:
        with self._lock:
            at = self._left[forward]
            while at < len(data):
                data[at] ^= 1 << self._random.randrange(8)
                self.flips += 1
                at += 1 + self._distance(forward)
            self._left[forward] = at - len(data)
        return data


class StretchingPath(Path):
    """Once armed, adds 12 KiB to the length that the next TLS record in one direction announces."""

    def __init__(self, port: int, *, forward: bool) -> None:
        self.armed = threading.Event()
        self._forward = forward
        super().__init__(port)

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        ours = (source.getsockname()[1] == self.port) == self._forward
        with contextlib.suppress(OSError):
            while data := bytearray(source.recv(1 << 16)):
                if ours and self.armed.is_set() and data[:3] == bytes((23, 3, 3)) and data[3] < 0x10:
                    data[3] += 0x30
                    self.armed.clear()
                sink.sendall(data)
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


@dataclass
class Tally:
    """What became of the requests. `most_*` are the largest values that were ever seen."""

    flips: int = 0
    delivered: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    lines: set[str] = field(default_factory=set)
    lost_connections: int = 0
    most_arena_bytes: int = 0
    most_threads: int = 0
    grown_bytes: int = 0


def sizes_of(request_id: int) -> list[int]:
    """Small pieces, so that much of what crosses is envelopes."""
    rng = random.Random(f"sizes/{request_id}")
    return [rng.choice([0, 16, 500, 3000]) for _ in range(rng.randint(1, 6))]


def survive(spec: TransportSpec, flips: int, forward_bytes: float, back_bytes: float, seed: int) -> Tally:
    """Requests one after another, a few at once, until `flips` bits were flipped; then a clean one. All promises are asserted."""
    tally = Tally()
    sent: dict[int, list[Piece]] = {}
    received: set[int] = set()
    process = psutil.Process()
    with open_receiver(spec, "127.0.0.1") as receiver:
        path = FlippingPath(receiver.port, forward_bytes, back_bytes, seed)
        problems: list[BaseException] = []
        taker = threading.Thread(target=_take, args=(receiver, sent, received, problems))
        taker.start()
        try:
            with open_sender(spec, ("127.0.0.1", path.port)) as sender:
                path.flipping.set()
                before_bytes = process.memory_info().rss
                request_id = 0
                while path.flips < flips and not problems:
                    pieces, manifest = make_request(request_id, sizes_of(request_id))
                    sent[request_id] = pieces
                    with contextlib.suppress(TransferFailed):  # said by `wait` as well
                        send_all(sender, pieces, manifest)
                    if request_id >= _UNDER_WAY:
                        _settle(sender, request_id - _UNDER_WAY, sent, received, tally)
                    state = receiver.stats()
                    tally.most_arena_bytes = max(tally.most_arena_bytes, state["arena_used_bytes"])
                    tally.most_threads = max(tally.most_threads, state["threads"])
                    request_id += 1
                path.flipping.clear()
                for last in range(max(0, request_id - _UNDER_WAY), request_id):
                    _settle(sender, last, sent, received, tally)
                pieces, manifest = make_request(request_id, [1000, 300_000])
                sent[request_id] = pieces
                send_all(sender, pieces, manifest)
                sender.wait(request_id, 10)
                assert eventually(lambda: request_id in received)
                assert eventually(lambda: receiver.stats()["arena_used_bytes"] == 0), receiver.stats()
                assert sender.stats()["unacked_bytes"] == 0
                assert eventually(lambda: sender.stats()["held_bytes"] == 0), sender.stats()
                tally.lost_connections = sender.stats()["lost"]
                tally.grown_bytes = process.memory_info().rss - before_bytes
        finally:
            path.close()
            receiver.close()
            taker.join()
    assert not problems, problems[0]
    tally.flips = path.flips
    return tally


def _settle(sender: Sender, request_id: int, sent: dict[int, list[Piece]], received: set[int], tally: Tally) -> None:
    try:
        sender.wait(request_id, 30)
    except TransferFailed as failure:
        tally.failed[failure.reason] += 1
        tally.lines.add(failure.detail)
    else:
        assert eventually(lambda: request_id in received), f"request {request_id} was confirmed and never came"
        tally.delivered += 1
        del sent[request_id]  # should it come again, it is a stranger


def _take(receiver: Receiver, sent: dict[int, list[Piece]], received: set[int], problems: list[BaseException]) -> None:
    """Take all that comes; an altered request, or one that comes twice, is a problem."""
    try:
        while True:
            with receiver.receive() as request:
                assert request.request_id not in received, f"request {request.request_id} came twice"
                assert_same(request, sent[request.request_id])
                received.add(request.request_id)
    except OSError:
        return  # closed
    except UserError as error:
        problems.append(error)
    except (AssertionError, KeyError) as error:
        problems.append(error)
