"""The link that needs no privilege at all: a TCP relay on loopback with the link's rate and delay.

Each connection is ended here and begun anew, so the byte stream sees the right capacity (shared by all connections),
delay, schedule and queue, but TCP never meets loss, slow start or congestion; what the backend gives up says so.
Headers that real packets would have had are charged to the rate, so its ideal goodput is that of the other backends.

Run as `python -m repro.link.relay` by the Link. The first question, `open`, brings the spec; then `dial` answers a port, `signals`
the counters, and `start` begins the schedule. It exits on `stop` and on EOF.
"""

from __future__ import annotations

import contextlib
import math
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from repro.configuration import build
from repro.link.capacity import Serialiser, capacity
from repro.link.impairment import jitter_of
from repro.link.spec import Condition, Direction, LinkSpec
from repro.processes import Message, Parent, run_first, run_worker, wake_precisely

_LARGEST_CHUNK_BYTES = 256 << 10
_SMALLEST_CHUNK_BYTES = 1448
_LAG_S = 0.005  # how late the receiver may be before the reader waits for it
_PATIENCE_S = 0.2  # how long a sleeping thread may take to notice that its connection is gone


class Way:
    """One direction, shared by all connections: its serialiser, its delay and its counters."""

    def __init__(self, spec: LinkSpec, direction: Direction) -> None:
        self._spec, self._direction = spec, direction
        self._share = spec.tcp_goodput_share
        self._lock = threading.Lock()
        self._jitter = jitter_of(spec, spec.seed * 2 + (direction == "reverse"))
        base = spec.base(direction)
        self._conditions: tuple[Condition, ...] = (base,)
        self._origin_s = time.monotonic()
        self._queue = Serialiser(capacity(self._conditions, (), self._origin_s), float("inf"))
        self._delay_s = base.delay_s
        self.forwarded_bytes = 0
        self.rate_bytes = None if base.rate_bps is None else base.rate_bps / 8
        #: At most a millisecond of serialisation at a time, so that connections share fairly and the stream is smooth.
        self.chunk_bytes = _LARGEST_CHUNK_BYTES
        if self.rate_bytes is not None:
            self.chunk_bytes = int(min(max(self.rate_bytes * 1e-3, _SMALLEST_CHUNK_BYTES), _LARGEST_CHUNK_BYTES))

    def start(self, at_s: float) -> None:
        """Begin the schedule."""
        with self._lock:
            self._conditions = self._spec.conditions(self._direction)
            self._origin_s = at_s
            self._queue.follow(capacity(self._conditions, self._spec.trace(self._direction), at_s), time.monotonic())

    def arrival(self, payload_bytes: int) -> float:
        """When a chunk read now is to come out at the other end."""
        with self._lock:
            now_s = time.monotonic()
            departure = self._queue.depart(now_s, payload_bytes / self._share)
            self.forwarded_bytes += payload_bytes
            elapsed_s = now_s - self._origin_s
            while len(self._conditions) > 1 and elapsed_s >= self._conditions[1].at_s:
                self._conditions = self._conditions[1:]
            self._delay_s = self._conditions[0].delay_s
            if self._jitter:
                return departure + max(0.0, self._delay_s + self._jitter.sample(now_s))
            return departure + self._delay_s

    def backlog_bytes(self) -> float:
        """What waits for capacity."""
        with self._lock:
            return self._queue.backlog_bytes(time.monotonic())

    def wait_for_room(self) -> None:
        """Leave bytes in the sender's socket while the queue before the link, which all connections share, is full."""
        while self.rate_bytes and (excess := self.backlog_bytes() - self._spec.queue_limit_bytes(self._direction)) > 0:
            time.sleep(min(max(excess / self.rate_bytes, 0.001), 0.05))


class Pair:
    """The two sockets of one relayed connection, closed when the last of the threads that use them is done."""

    def __init__(self, near: socket.socket, far: socket.socket, users: int) -> None:
        self._ends = (near, far)
        self._users = users
        self._lock = threading.Lock()

    def left(self) -> None:
        """One of the threads is done."""
        with self._lock:
            self._users -= 1
            if self._users == 0:
                for end in self._ends:
                    end.close()

    def reset(self) -> None:
        """One side is gone: wake every thread, and let the close reset the other side, which may be waiting to send."""
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


class Pump:
    """One direction of one connection: a thread that reads, and one that writes when the time has come.

    A receiver that lags stops the reader, as a closed TCP window would; so what is under way is bounded by delay and queue.
    """

    def __init__(self, source: socket.socket, sink: socket.socket, pair: Pair, way: Way) -> None:
        self._source, self._sink, self._pair, self._way = source, sink, pair, way
        self._line: deque[tuple[float, bytearray, int]] = deque()
        self._oldest_due_s = math.inf
        self._changed = threading.Condition()
        self._over = False
        self._spare: list[bytearray] = []
        for work in (self._read, self._write):
            threading.Thread(target=self._until_done, args=(work,), daemon=True).start()

    def _until_done(self, work: Callable[[], None]) -> None:
        try:
            work()
        finally:
            self._pair.left()

    def _read(self) -> None:
        last_s = 0.0
        while not self._over:
            self._way.wait_for_room()
            with self._changed:
                while time.monotonic() - self._oldest_due_s > _LAG_S and not self._over:
                    self._changed.wait(_PATIENCE_S)
            chunk = self._spare.pop() if self._spare else bytearray(self._way.chunk_bytes)
            try:
                count = self._source.recv_into(chunk)
            except OSError:
                count = 0
            last_s = max(last_s, self._way.arrival(count))
            with self._changed:
                self._line.append((last_s, chunk, count))
                self._oldest_due_s = min(self._oldest_due_s, last_s)
                self._changed.notify_all()
            if count == 0:
                return

    def _write(self) -> None:
        while True:
            with self._changed:
                self._oldest_due_s = self._line[0][0] if self._line else math.inf
                self._changed.notify_all()
                while not self._line:
                    self._changed.wait()
                due_s, chunk, count = self._line.popleft()
            while (wait_s := due_s - time.monotonic()) > 0 and not self._over:
                time.sleep(min(wait_s, _PATIENCE_S))
            try:
                if count == 0:
                    self._sink.shutdown(socket.SHUT_WR)
                    return
                self._sink.sendall(memoryview(chunk)[:count])
            except OSError:
                self._over = True
                self._pair.reset()
                return
            self._spare.append(chunk)


class Relay:
    """Listeners that lead to targets through the two ways."""

    def __init__(self, spec: LinkSpec) -> None:
        self._ways: dict[Direction, Way] = {"forward": Way(spec, "forward"), "reverse": Way(spec, "reverse")}

    def dial(self, host: str, port: int, direction: Direction) -> int:
        """A port on loopback from which connections reach host:port; what the client sends goes in `direction`."""
        listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        rate = self._ways[direction].rate_bytes
        if rate is not None and rate * 0.02 < 200_000:
            # At low rates the kernel's own buffer in front of us would be seconds of hidden queue.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, max(8192, int(rate * 0.02)))
        threading.Thread(target=self._accept, args=(listener, host, port, direction), daemon=True).start()
        return int(listener.getsockname()[1])

    def start(self, at_s: float) -> None:
        """Begin the schedule in both directions."""
        for way in self._ways.values():
            way.start(at_s)

    def signals(self) -> dict[str, Any]:
        """Counters of both directions."""
        counters: dict[str, Any] = {
            name: {
                "queue_bytes": way.backlog_bytes(),
                "dropped_segments": 0,
                "lost_segments": 0,
                "forwarded_bytes": way.forwarded_bytes,
                # Both directions share a process; half of it is as good as any other division.
                "cpu_s": time.process_time() / 2,
            }
            for name, way in self._ways.items()
        }
        return {"at_s": time.monotonic(), **counters}

    def _accept(self, listener: socket.socket, host: str, port: int, direction: Direction) -> None:
        back: Direction = "reverse" if direction == "forward" else "forward"
        while True:
            near, _ = listener.accept()
            try:
                far = socket.create_connection((host, port))
            except OSError:
                near.close()
                continue
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            pair = Pair(near, far, users=4)
            Pump(near, far, pair, self._ways[direction])
            Pump(far, near, pair, self._ways[back])


def work(parent: Parent, asked: Message) -> None:
    """Serve until told to stop."""
    wake_precisely()
    first = run_first()
    relay = Relay(build(LinkSpec, asked["spec"], "link"))
    parent.reply(asked, facts={"realtime": first})
    while (asked := parent.read())["kind"] != "stop":
        match asked["kind"]:
            case "dial":
                parent.reply(asked, port=relay.dial(asked["host"], asked["port"], asked["direction"]))
            case "start":
                relay.start(asked["at_s"])
                parent.reply(asked)
            case _:
                parent.reply(asked, **relay.signals())


if __name__ == "__main__":
    run_worker(work)
