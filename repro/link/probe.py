"""The two programs that measure a link: one answers on one side, the other asks on the far side. Sides are processes
of their own.

Where real packets cross, datagrams measure: they are paced by us and not by congestion control, so rate, loss and
delay are the link's own, in a bounded time and at any loss. Through a relay there are no packets to count, so TCP
streams measure.

`python -m repro.link.probe` answers questions of the process that started it: `answer` with the port on which it serves until it is
told to stop; `ask`, given where that is and a Plan, with what it found; `watch` sends for some seconds, and answers what came when
and TCP_INFO.

Both ends read one clock, the machine's, so one-way delays are exact.
"""

from __future__ import annotations

import bisect
import contextlib
import io
import json
import math
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from repro.link import tcp_info
from repro.link.measurement import Plan
from repro.link.tcp_info import Sampler
from repro.processes import Message, Parent, run_first, run_worker, wake_precisely

# Not in Python's socket module.
_UDP_SEGMENT, _UDP_GRO, _SO_RCVBUFFORCE = 103, 104, 33

UDP_HEADERS_BYTES = 28
_STAMP = struct.Struct("!cdd")  # kind, sent_s, heard_s
_BUNDLE_BYTES = 63 << 10
_MARK_S = 0.005
_PING_AMONG_S = 0.01
_PING_SHARE = 5e-4  # pings among the data may take this much of the rate
_FILLED_UP_TO_BPS = 2e9  # beyond, filling a queue is more than this end can send
_SETTLE = 0.4  # the share of a rate measurement that is left out: slow start, filling the queue


@dataclass
class Tally:
    """What one receiver has got: bytes and datagrams, with marks (time, bytes) every few milliseconds."""

    bytes: int = 0
    datagrams: int = 0

    def __post_init__(self) -> None:
        self.marks: list[tuple[float, int]] = []

    def add(self, count: int, datagrams: int) -> None:
        """Count what was received now."""
        now_s = time.monotonic()
        self.bytes += count
        self.datagrams += datagrams
        if not self.marks or now_s - self.marks[-1][0] >= _MARK_S:
            self.marks.append((now_s, self.bytes))


def answer(host: str) -> int:
    """Serve in the background; returns the port."""
    wake_precisely()
    run_first()
    listener = socket.create_server((host, 0), backlog=64)
    threading.Thread(target=_accept, args=(listener, host), daemon=True).start()
    return int(listener.getsockname()[1])


def _accept(listener: socket.socket, host: str) -> None:
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_serve, args=(connection, host), daemon=True).start()


def _serve(connection: socket.socket, host: str) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with connection, connection.makefile("rwb") as stream:
        wanted = stream.readline().strip()
        if wanted == b"echo":
            while stamp := stream.read(_STAMP.size):
                stream.write(_heard(stamp))
                stream.flush()
        elif wanted == b"sink":
            tally, buffer = Tally(), bytearray(1 << 20)
            while count := stream.readinto1(buffer):
                tally.add(count, 0)
            _tell(stream, tally)
        else:
            _take_datagrams(stream, host)


def _take_datagrams(stream: io.BufferedRWPair, host: str) -> None:
    """Count datagrams and echo pings on a port of its own until the asker is done."""
    with _datagram_socket(host) as port:
        stream.write(f"{port.getsockname()[1]}\n".encode())
        stream.flush()
        tally = Tally()
        threading.Thread(target=_receive, args=(port, tally), daemon=True).start()
        while stream.readline():
            _tell(stream, tally)
            tally.bytes = tally.datagrams = 0
            tally.marks.clear()


def _receive(port: socket.socket, tally: Tally) -> None:
    buffer = bytearray(1 << 16)
    size = 0
    with contextlib.suppress(OSError):
        while True:
            count, sender = port.recvfrom_into(buffer)
            if buffer[0] == ord("p"):
                port.sendto(_heard(bytes(buffer[: _STAMP.size])), sender)
                continue
            size = max(size, _segment(buffer))
            tally.add(count, -(-count // size))


def _segment(buffer: bytearray) -> int:
    """The size of a datagram, which each one carries: the kernel may hand over several as one."""
    return int.from_bytes(buffer[1:5])


def _heard(stamp: bytes) -> bytes:
    kind, sent_s, _ = _STAMP.unpack(stamp)
    return _STAMP.pack(kind, sent_s, time.monotonic())


def _tell(stream: io.BufferedRWPair, tally: Tally) -> None:
    found = {"bytes": tally.bytes, "datagrams": tally.datagrams, "marks": tally.marks}
    stream.write(json.dumps(found).encode() + b"\n")
    stream.flush()


def _datagram_socket(host: str) -> socket.socket:
    port = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with contextlib.suppress(OSError):
        port.setsockopt(socket.IPPROTO_UDP, _UDP_GRO, 1)
    try:
        port.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 64 << 20)
    except PermissionError:
        port.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 20)
    port.bind((host, 0))
    return port


def ask(host: str, port: int, plan: Plan) -> dict[str, Any]:
    """Measure the link to an answering probe."""
    wake_precisely()
    run_first()
    started_s = time.monotonic()
    found = _by_datagrams(host, port, plan) if plan.datagrams else _by_streams(host, port, plan)
    return found | {"duration_s": time.monotonic() - started_s}


def _by_datagrams(host: str, port: int, plan: Plan) -> dict[str, Any]:
    with (
        socket.create_connection((host, port)) as connection,
        connection.makefile("rwb") as stream,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out,
    ):
        stream.write(b"datagrams\n")
        stream.flush()
        out.connect((host, int(stream.readline())))
        found: dict[str, Any] = {"pings": _ping(out, plan, lambda: out.recv(_STAMP.size))}

        def tally() -> dict[str, Any]:
            time.sleep(plan.rtt_s + 0.05)
            stream.write(b"tally\n")
            stream.flush()
            return dict(json.loads(stream.readline()))

        if plan.loss > 0 and plan.rate_bps is not None:
            found["sent"] = _send_paced(out, plan, 0.7 * plan.rate_bps, plan.loss_s)
            found["received"] = tally()["datagrams"]
        if plan.rate_bps is not None:
            fill = plan.rate_bps * plan.queue_s / 8 if plan.rate_bps <= _FILLED_UP_TO_BPS else 0.0
            began_s = time.monotonic()
            _send_paced(out, plan, 1.1 * plan.rate_bps, plan.rate_s, fill)
            time.sleep(plan.queue_s)
            payload = plan.mtu_bytes - UDP_HEADERS_BYTES
            found["marks"] = tally()["marks"]
            found["wire_bps"] = _rate(found["marks"]) * plan.mtu_bytes / payload
            if fill:
                found["loaded_s"] = [
                    heard_s - sent_s for sent_s, heard_s in _echoes(out) if sent_s > began_s + plan.rate_s / 2
                ]
    return found


def _send_paced(out: socket.socket, plan: Plan, rate_bps: float, duration_s: float, at_once_bytes: float = 0.0) -> int:
    """Send datagrams that fill the MTU at a rate of IP bytes, a ping among them now and then; returns how many.

    `at_once_bytes` go first and unpaced, to fill a queue. Bundles never exceed a millisecond.
    """
    size = plan.mtu_bytes - UDP_HEADERS_BYTES
    largest = min(_BUNDLE_BYTES // size, 64)
    each = max(1, min(largest, int(rate_bps / 8 * 1e-3 / plan.mtu_bytes)))
    out.setsockopt(socket.IPPROTO_UDP, _UDP_SEGMENT, size)
    bundle = (b"d" + size.to_bytes(4)).ljust(size, b"\0") * each
    gap_s = each * plan.mtu_bytes * 8 / rate_bps
    ahead = int(at_once_bytes / (each * plan.mtu_bytes))
    started_s = time.monotonic()
    ping_gap_s = max(_PING_AMONG_S, 8 * (_STAMP.size + UDP_HEADERS_BYTES) / (_PING_SHARE * rate_bps))
    ping_s = 0.0
    sent = 0
    for i in range(ahead + max(2, int(duration_s / gap_s))):
        now_s = time.monotonic()
        wait_s = started_s + max(0, i - ahead) * gap_s - now_s
        if wait_s > 0:
            time.sleep(wait_s)
        elif wait_s < -duration_s:  # this machine cannot send so fast: the answer will tell
            break
        with contextlib.suppress(BlockingIOError, ConnectionRefusedError):
            out.send(bundle)
            sent += each
            if now_s - ping_s > ping_gap_s:
                out.send(_STAMP.pack(b"p", time.monotonic(), 0.0))
                ping_s = now_s
    out.setsockopt(socket.IPPROTO_UDP, _UDP_SEGMENT, 0)
    return sent


def _echoes(out: socket.socket) -> list[tuple[float, float]]:
    """The answers that lie in the socket: (sent, heard)."""
    found = []
    with contextlib.suppress(BlockingIOError):
        while True:
            found.append(_STAMP.unpack(out.recv(_STAMP.size, socket.MSG_DONTWAIT))[1:])
    return found


def _by_streams(host: str, port: int, plan: Plan) -> dict[str, Any]:
    with socket.create_connection((host, port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(b"echo\n")
        found: dict[str, Any] = {"pings": _ping(connection, plan, lambda: _exactly(connection, _STAMP.size))}
    tallies: list[dict[str, Any]] = []
    begin_s = time.monotonic() + plan.rtt_s
    stop_s = begin_s + plan.rate_s + plan.rtt_s
    threads = [
        threading.Thread(target=lambda: tallies.append(_stream(host, port, stop_s))) for _ in range(plan.connections)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    begin_s += _SETTLE * plan.rate_s
    # One window for all: connections take turns, so windows of their own would add up to more than the link.
    marks = [tally["marks"] for tally in tallies]
    found["goodput_bps"] = 8 * sum(_at(m, stop_s) - _at(m, begin_s) for m in marks) / (stop_s - begin_s)
    return found


def _at(marks: list[list[float]], moment_s: float) -> float:
    """Bytes received by a moment, between marks along a straight line."""
    i = bisect.bisect(marks, moment_s, key=lambda mark: mark[0])
    if i == 0 or i == len(marks):
        return marks[i - 1][1] if i else 0.0
    (before_s, before), (after_s, after) = marks[i - 1], marks[i]
    return before + (after - before) * (moment_s - before_s) / (after_s - before_s)


def watch(host: str, port: int, duration_s: float, interval_s: float = 0.02) -> dict[str, Any]:
    """Send over one connection and sample its TCP_INFO meanwhile; the receiver's marks and the samples, with their times."""
    found: dict[str, Any] = {}
    ready = threading.Event()
    connections: list[socket.socket] = []

    def opened(connection: socket.socket) -> None:
        connections.append(connection)
        ready.set()

    def send() -> None:
        found.update(_stream(host, port, time.monotonic() + duration_s, opened))

    sender = threading.Thread(target=send)
    sender.start()
    ready.wait()
    sampler, samples = Sampler(), []
    while sender.is_alive():
        with contextlib.suppress(OSError):  # closed between the question and the reading
            samples.append(asdict(sampler.sample(time.monotonic(), tcp_info.read(connections[0]))))
        time.sleep(interval_s)
    return {"marks": found["marks"], "samples": samples}


def _stream(
    host: str, port: int, stop_s: float, opened: Callable[[socket.socket], None] = lambda _: None
) -> dict[str, Any]:
    chunk = bytes(1 << 16)
    with socket.create_connection((host, port)) as connection, connection.makefile("rb") as answers:
        opened(connection)
        connection.sendall(b"sink\n")
        while time.monotonic() < stop_s:
            connection.sendall(chunk)
        connection.shutdown(socket.SHUT_WR)
        return dict(json.loads(answers.readline()))


def _ping(out: socket.socket, plan: Plan, receive: Any) -> list[tuple[float, float]]:
    """Pings at even gaps, many under way at once: (round trip, one way there), seconds."""
    found: list[tuple[float, float]] = []
    started_s = time.monotonic()
    sent, deadline_s = 0, started_s + plan.pings * plan.ping_gap_s + 3 * plan.rtt_s + 0.5
    while len(found) < plan.pings and (now_s := time.monotonic()) < deadline_s:
        due_s = started_s + sent * plan.ping_gap_s if sent < plan.pings else math.inf
        if now_s >= due_s:
            out.send(_STAMP.pack(b"p", time.monotonic(), 0.0))
            sent += 1
            continue
        # The last stretch is polled: waking up must not count as round trip.
        wait_s = min(due_s, deadline_s) - now_s
        if select.select([out], [], [], wait_s)[0]:
            _, sent_s, heard_s = _STAMP.unpack(receive())
            found.append((time.monotonic() - sent_s, heard_s - sent_s))
    return found


def _exactly(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = connection.recv(count - len(data))
        if not part:
            raise ConnectionError("the answering probe is gone")
        data += part
    return data


def _rate(marks: list[list[float]]) -> float:
    """Bits per second of a receiver's marks, without the first part."""
    if len(marks) < 3:
        return 0.0
    begin_s = marks[0][0] + _SETTLE * (marks[-1][0] - marks[0][0])
    first = next(mark for mark in marks if mark[0] >= begin_s)
    if first is marks[-1]:
        first = marks[0]
    return 8 * (marks[-1][1] - first[1]) / (marks[-1][0] - first[0])


def work(parent: Parent, asked: Message) -> None:
    """Answer, ask or watch, as the module's docstring says, until told to stop."""
    while asked["kind"] != "stop":
        match asked["kind"]:
            case "answer":
                parent.reply(asked, port=answer(asked["host"]))
            case "watch":
                parent.reply(asked, found=watch(asked["host"], asked["port"], asked["duration_s"]))
            case _:
                parent.reply(asked, found=ask(asked["host"], asked["port"], Plan(**asked["plan"])))
        asked = parent.read()


if __name__ == "__main__":
    run_worker(work)
