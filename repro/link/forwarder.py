"""One direction of an emulated wire: packets from one AF_PACKET socket to another, late, shaped, and some of them
never.

One code path serves every link: a packet's segments pass the loss process, wait in the drop-tail queue for capacity,
take the one-way delay, and leave in order. Real TCP stacks run end to end on both sides and see nothing but this.
Each direction is a process of its own, because two in one interpreter would wait for each other.

The loop owes its speed to doing nothing per segment, only per super-packet, and its accuracy to deadlines computed
from arrival, so that an oversleep delays one packet and never accumulates.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import socket
import struct
import time
from collections import deque

from repro.link.capacity import Serialiser, capacity
from repro.link.impairment import jitter_of, loss_of
from repro.link.segments import LARGEST_BYTES, carve, kept_runs, shape
from repro.link.spec import Condition, Direction, LinkSpec
from repro.processes.kernel import run_first, wake_precisely

# Not in Python's socket module.
_SOL_PACKET, _PACKET_STATISTICS, _PACKET_VNET_HDR, _PACKET_IGNORE_OUTGOING = 263, 6, 15, 23
_ETH_P_ALL = 3
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33
_BUFFER_BYTES = 64 << 20

#: Timers wake some 50 µs late, so the last moments before a deadline are spun away; but only while packets are
#: sparse. In a dense stream nobody can tell, and the core is needed.
_SPIN_S = 80e-6
_SPARSE_S = 2e-3
#: No piece occupies the wire longer than this, so that a slow link delivers smoothly and not 64 KB at a time.
_LONGEST_PIECE_S = 1e-3
_BATCH = 32
_IDLE_S = 0.25
_ANY = 1 << 16


class Board:
    """Cells of memory, doubles, shared between a forwarder and its keeper; one writer each, so no lock."""

    CELLS = 9
    START, QUEUE, DROPPED, LOST, FORWARDED, OVERRUN, CPU, LATEST, FIRST = range(CELLS)


def wire_end(interface: str) -> socket.socket:
    """A raw socket on an interface of the current namespace that reads and writes super-packets."""
    end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    end.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
    end.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
    for forced, plain in ((_SO_RCVBUFFORCE, socket.SO_RCVBUF), (_SO_SNDBUFFORCE, socket.SO_SNDBUF)):
        try:
            end.setsockopt(socket.SOL_SOCKET, forced, _BUFFER_BYTES)
        except PermissionError:  # rootless: as much as the machine allows
            end.setsockopt(socket.SOL_SOCKET, plain, _BUFFER_BYTES)
    end.bind((interface, _ETH_P_ALL))
    end.setblocking(False)
    return end


def forward(
    source: socket.socket, sink: socket.socket, spec: LinkSpec, direction: Direction, board: memoryview[float]
) -> None:
    """Forward until killed."""
    wake_precisely()
    board[Board.FIRST] = run_first()
    gc.disable()
    _Forwarder(source, sink, spec, direction, board).run()


class _Forwarder:
    def __init__(
        self, source: socket.socket, sink: socket.socket, spec: LinkSpec, direction: Direction, board: memoryview[float]
    ) -> None:
        self._source, self._sink = source, sink
        self._spec, self._direction = spec, direction
        self._board = board
        seed = spec.seed * 2 + (direction == "reverse")
        self._loss = loss_of(spec, seed)
        self._jitter = jitter_of(spec, seed)
        self._origin_s = time.monotonic()
        self._conditions: tuple[Condition, ...] = (spec.base(direction),)
        self._queue = Serialiser(capacity(self._conditions, (), self._origin_s), spec.queue_limit_bytes(direction))
        self._started_s = 0.0
        self._line: deque[tuple[float, bytearray, int]] = deque()
        self._last_due_s = 0.0
        self._spare = [bytearray(LARGEST_BYTES) for _ in range(256)]
        self._dropped = self._lost = 0
        self._forwarded = 0.0
        self._enter(self._conditions[0])

    def run(self) -> None:
        clock, line, source = time.monotonic, self._line, self._source.fileno()
        spinning = False
        sent_s = 0.0
        while True:
            self._follow_schedule(clock())
            taken = self._ingest(source)
            if self._deliver():
                spinning, sent_s = False, clock()
            self._report(clock())
            if taken == _BATCH or spinning:
                spinning = bool(line)
                continue
            now_s = clock()
            wait_s = line[0][0] - now_s if line else _IDLE_S
            if wait_s > _SPIN_S and now_s - sent_s > _SPARSE_S:
                wait_s -= _SPIN_S
                spinning = bool(line)
            if wait_s > 0:
                select.select([source], [], [], min(wait_s, _IDLE_S))

    def _ingest(self, source: int) -> int:
        """Take what has arrived, at most a batch of it, and give each packet its deadline."""
        clock, spare, loss = time.monotonic, self._spare, self._loss
        for taken in range(_BATCH):
            packet = spare.pop() if spare else bytearray(LARGEST_BYTES)
            try:
                length = os.readv(source, (packet,))
            except BlockingIOError:
                spare.append(packet)
                return taken
            now_s = clock()
            of = shape(packet, length)
            lost = loss.lost(of.segments)
            if not lost and of.segments <= self._longest_run and of.total_bytes <= self._queue.room_bytes(now_s):
                self._accept(now_s, packet, length, of.wire_bytes(0, of.segments))
                continue
            self._lost += len(lost)
            for low, high in kept_runs(of.segments, lost, self._longest_run):
                self._accept_run(now_s, packet, length, low, high)
            spare.append(packet)
        return _BATCH

    def _accept_run(self, now_s: float, packet: bytearray, length: int, low: int, high: int) -> None:
        """Queue the segments [low, high) of a packet, as many as there is room for."""
        of = shape(packet, length)
        room = self._queue.room_bytes(now_s)
        fitting = high
        while fitting > low and of.wire_bytes(low, fitting) > room:
            fitting -= 1
        self._dropped += high - fitting
        if fitting == low:
            return
        piece = self._spare.pop() if self._spare else bytearray(LARGEST_BYTES)
        if of.segments == 1:
            piece[:length] = packet[:length]
        else:
            length = carve(packet, of, low, fitting, piece)
        self._accept(now_s, piece, length, of.wire_bytes(low, fitting))

    def _accept(self, now_s: float, packet: bytearray, length: int, wire_bytes: int) -> None:
        delay_s = self._delay_s
        if self._jitter:
            delay_s = max(0.0, delay_s + self._jitter.sample(now_s))
        due_s = self._queue.depart(now_s, wire_bytes) + delay_s
        if due_s < self._last_due_s:  # never reorder
            due_s = self._last_due_s
        self._last_due_s = due_s
        self._forwarded += wire_bytes
        self._line.append((due_s, packet, length))

    def _deliver(self) -> bool:
        """Send what is due."""
        line, sink, clock = self._line, self._sink.fileno(), time.monotonic
        sent = False
        while line and line[0][0] <= clock():
            _, packet, length = line.popleft()
            with contextlib.suppress(BlockingIOError):
                os.write(sink, memoryview(packet)[:length])
            self._spare.append(packet)
            sent = True
        return sent

    def _follow_schedule(self, now_s: float) -> None:
        started_s = self._board[Board.START]
        if started_s != self._started_s:
            self._started_s = self._origin_s = started_s
            self._conditions = self._spec.conditions(self._direction)
            trace = self._spec.trace(self._direction)
            self._queue.follow(capacity(self._conditions, trace, started_s), now_s)
            self._enter(self._conditions[0])
        while len(self._conditions) > 1 and now_s - self._origin_s >= self._conditions[1].at_s:
            self._conditions = self._conditions[1:]
            self._enter(self._conditions[0])

    def _enter(self, condition: Condition) -> None:
        self._delay_s = condition.delay_s
        self._loss.set(condition.loss)
        self._longest_run = _ANY
        if condition.rate_bps:
            self._longest_run = max(1, int(condition.rate_bps / 8 * _LONGEST_PIECE_S / self._spec.mtu_bytes))

    def _report(self, now_s: float) -> None:
        board = self._board
        board[Board.QUEUE] = self._queue.backlog_bytes(now_s)
        board[Board.DROPPED] = self._dropped
        board[Board.LOST] = self._lost
        board[Board.FORWARDED] = self._forwarded
        if now_s - board[Board.LATEST] > _IDLE_S / 2:
            board[Board.LATEST] = now_s
            board[Board.CPU] = time.process_time()
            statistics = self._source.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8)
            board[Board.OVERRUN] += struct.unpack("II", statistics)[1]  # reading resets it
