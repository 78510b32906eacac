"""Ten thousand transfers with random resets: is anything lost, doubled or altered, and does anything grow?

Requests of 1 KB to 64 MB (log-uniform, so most are small and some are large) cross a relay that resets random connections
all the time; some are cancelled on the way. The receiver counts every hand-over and checks every byte by an independent
digest that the sender noted down. Resident memory and open descriptors of this process, which holds both ends, are
sampled; what is recorded is their level after the first third and at the end, and the slope between.

    scripts/bench soak                                   # 10,000 transfers: some minutes
    scripts/bench soak options.transfers=300 options.largest_bytes=4000000
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import random
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import psutil

from repro.errors import UserError
from repro.experiments.base import TCP, Context, Experiment, Outcome
from repro.kvcache.frames import DType, Manifest, Piece, StateKind, checksum_of
from repro.transport import Receiver, Sender, TransferFailed, TransportSpec, open_receiver, open_sender

_UNDER_WAY = 8
_PIECES = 6


@dataclass(frozen=True)
class Options:
    """So many transfers of up to `largest_bytes`, while connections are reset every so often in the mean."""

    transfers: int = 10_000
    largest_bytes: int = 64_000_000
    reset_every_s: float = 0.25

    def __post_init__(self) -> None:
        for name, least in (("transfers", 20), ("largest_bytes", 1000)):
            if getattr(self, name) < least:
                raise UserError(f"options.{name}: {getattr(self, name)}; accepted: {least} or more")
        if not self.reset_every_s > 0:
            raise UserError(f"options.reset_every_s: {self.reset_every_s:g}; accepted: above 0")


class Resetter:
    """A relay in one thread that resets one of its connections at random moments."""

    def __init__(self, port: int, every_s: float, seed: int) -> None:
        self._target, self._every_s, self._rng = port, every_s, random.Random(seed)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self._listener.getsockname()[1]
        self.resets = 0
        self._over = threading.Event()
        self._pairs: dict[socket.socket, socket.socket] = {}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the relay and all that crosses it."""
        self._over.set()
        self._thread.join()
        self._listener.close()
        for sock in self._pairs:
            sock.close()

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        by_fd: dict[int, socket.socket] = {}
        buffer = memoryview(bytearray(1 << 20))
        due = time.monotonic() + self._every_s
        while not self._over.is_set():
            for fd, _ in poll.poll(20):
                if fd == self._listener.fileno():
                    near = self._listener.accept()[0]
                    far = socket.create_connection(("127.0.0.1", self._target))
                    for here, there in ((near, far), (far, near)):
                        here.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                        self._pairs[here] = there
                        by_fd[here.fileno()] = here
                        poll.register(here, select.POLLIN)
                elif fd in by_fd and not self._carry(by_fd[fd], buffer):
                    self._drop(by_fd[fd], poll, by_fd)
            if time.monotonic() > due and self._pairs:
                self._drop(self._rng.choice(list(self._pairs)), poll, by_fd)
                self.resets += 1
                due = time.monotonic() + self._rng.expovariate(1 / self._every_s)

    def _carry(self, source: socket.socket, buffer: memoryview) -> bool:
        try:
            size = source.recv_into(buffer)
            self._pairs[source].sendall(buffer[:size])
        except OSError:
            return False
        return size > 0

    def _drop(self, sock: socket.socket, poll: select.poll, by_fd: dict[int, socket.socket]) -> None:
        for end in (sock, self._pairs[sock]):
            poll.unregister(end)
            del by_fd[end.fileno()], self._pairs[end]
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            end.close()


@dataclass
class Ledger:
    """What was sent and what came, by request."""

    sent: dict[int, tuple[bytes, ...]] = field(default_factory=dict)
    received: dict[int, int] = field(default_factory=dict)
    altered: list[int] = field(default_factory=list)
    failed: list[tuple[int, str]] = field(default_factory=list)
    cancelled: set[int] = field(default_factory=set)
    payload_bytes: int = 0


def run(context: Context) -> Outcome:
    """The soak; it fails where anything was lost, doubled, altered or left in the arena."""
    assert isinstance(context.options, Options)
    log = logging.getLogger("repro.transport")
    level = log.level
    log.setLevel(logging.ERROR)  # every reset would be a line
    try:
        values, samples = soak(context.options, context.settings.seed, context.settings.transport, context.progress)
    finally:
        log.setLevel(level)
    metrics = [context.metric("tcp", name, value, unit, "measured") for name, (value, unit) in values.items()]
    context.progress("; ".join(f"{name} {value:,.0f}" for name, (value, _) in values.items()))
    wrong = [f"{name} {values[name][0]:,.0f}" for name in FORBIDDEN if values[name][0]]
    return Outcome(metrics, {"samples": samples}, failure=f"soak: {', '.join(wrong)}; accepted: none" if wrong else "")


def soak(
    options: Options, seed: int, spec: TransportSpec, progress: Callable[[str], None]
) -> tuple[dict[str, tuple[float, str]], pd.DataFrame]:
    """All transfers; what was found with its units, and the samples of memory and descriptors."""
    ledger, samples = Ledger(), []
    process = psutil.Process()
    began = time.monotonic()
    with open_receiver(spec, "127.0.0.1") as receiver:
        relay = Resetter(receiver.port, options.reset_every_s, seed)
        try:
            with open_sender(spec, ("127.0.0.1", relay.port)) as sender:
                over = threading.Event()
                taker = threading.Thread(target=_take, args=(receiver, ledger, over))
                taker.start()

                def sample() -> None:
                    done = len(ledger.received)
                    memory = process.memory_info()
                    samples.append(
                        {
                            "at_s": time.monotonic() - began,
                            "transfers": done,
                            # The arena is shared memory, kept up to its limit once it was needed: counted by itself.
                            "private_bytes": memory.rss - memory.shared,
                            "shared_bytes": memory.shared,
                            "descriptors": process.num_fds(),
                            "threads": process.num_threads(),
                            "arena_used_bytes": receiver.arena.used_bytes,
                            "resets": relay.resets,
                        }
                    )

                _feed(sender, ledger, options, seed, sample, progress)
                time.sleep(1.0)
                over.set()
                taker.join()
                sample()
                lost_connections = sender.stats()["lost"]
        finally:
            relay.close()
    found = _found(ledger, pd.DataFrame(samples), options.transfers, relay.resets, lost_connections)
    return found, pd.DataFrame(samples)


def _feed(
    sender: Sender,
    ledger: Ledger,
    options: Options,
    seed: int,
    sample: Callable[[], None],
    progress: Callable[[str], None],
) -> None:
    rng, transfers, largest = random.Random(seed), options.transfers, options.largest_bytes
    # One block of random bytes, of which each piece is a window: making 64 MB afresh would be the slowest part.
    source = memoryview(np.random.default_rng(seed).bytes(2 * largest))
    under_way: list[int] = []
    for request_id in range(transfers):
        size = int(math.exp(rng.uniform(math.log(1000), math.log(largest))))
        cuts = sorted(rng.randint(0, size) for _ in range(rng.randint(0, _PIECES - 1)))
        bounds = [0, *cuts, size]
        start = rng.randint(0, largest)
        pieces = [
            Piece.seal(
                source[start + a : start + b],
                request_id=request_id,
                piece=index,
                layer=index,
                kind=StateKind.RECURRENT,
                dtype=DType.UINT8,
                shape=(b - a,),
                tokens=(0, 1),
            )
            for index, (a, b) in enumerate(itertools.pairwise(bounds))
        ]
        ledger.sent[request_id] = tuple(piece.header.checksum for piece in pieces)
        sender.begin(request_id, priority=rng.randint(0, 1))
        try:
            for piece in pieces:
                sender.send(piece)
            if rng.random() < 0.02:
                ledger.cancelled.add(request_id)
                sender.cancel(request_id)
            else:
                sender.finish(Manifest.of(request_id, [piece.header for piece in pieces]))
                ledger.payload_bytes += size
        except TransferFailed:
            pass  # `wait` says it again
        under_way.append(request_id)
        while len(under_way) > (_UNDER_WAY if request_id + 1 < transfers else 0):
            waited = under_way.pop(0)
            try:
                sender.wait(waited, 120)
            except (TransferFailed, TimeoutError) as error:
                if waited not in ledger.cancelled:
                    ledger.failed.append((waited, str(error)))
        if request_id % max(1, transfers // 100) == 0:
            sample()
        if request_id % max(1, transfers // 10) == 0:
            progress(f"{request_id} of {transfers} transfers, {ledger.payload_bytes / 1e9:.1f} GB")


def _take(receiver: Receiver, ledger: Ledger, over: threading.Event) -> None:
    while True:
        try:
            received = receiver.receive(0.2)
        except TimeoutError:
            if over.is_set():
                return
            continue
        with received:
            ledger.received[received.request_id] = ledger.received.get(received.request_id, 0) + 1
            digests = tuple(checksum_of(piece.payload) for piece in received.pieces)
            if digests != ledger.sent.pop(received.request_id, digests):  # a second delivery is counted above
                ledger.altered.append(received.request_id)


def _found(
    ledger: Ledger, samples: pd.DataFrame, transfers: int, resets: int, lost_connections: int
) -> dict[str, tuple[float, str]]:
    expected = set(range(transfers)) - ledger.cancelled
    failed = {request_id for request_id, _ in ledger.failed}
    settled = samples[samples["transfers"] >= transfers // 3]  # by then, memory is as large as it gets
    slope = float(np.polyfit(settled["transfers"], settled["private_bytes"], 1)[0]) if len(settled) > 2 else math.nan
    return {
        "transfers": (transfers, "1"),
        "payload_bytes": (ledger.payload_bytes, "B"),
        "resets": (resets, "1"),
        "connections_lost": (lost_connections, "1"),
        "cancelled": (len(ledger.cancelled), "1"),
        "failed": (len(failed), "1"),
        "lost": (len(expected - failed - set(ledger.received)), "1"),
        "duplicated": (sum(count > 1 for count in ledger.received.values()), "1"),
        "corrupted": (len(ledger.altered), "1"),
        "private_start_bytes": (float(settled["private_bytes"].iloc[0]), "B"),
        "private_end_bytes": (float(samples["private_bytes"].iloc[-1]), "B"),
        "private_slope_bytes_per_transfer": (slope, "B"),
        "shared_peak_bytes": (float(samples["shared_bytes"].max()), "B"),
        "descriptors_start": (float(settled["descriptors"].iloc[0]), "1"),
        "descriptors_end": (float(samples["descriptors"].iloc[-1]), "1"),
        "arena_end_bytes": (float(samples["arena_used_bytes"].iloc[-1]), "B"),
    }


#: What must be none.
FORBIDDEN = ("failed", "lost", "duplicated", "corrupted", "arena_end_bytes")

EXPERIMENT = Experiment(
    "bench_soak",
    reads={"execute": ("seed", *TCP, "transport.connections", "transport.tls", "options")},
    run=run,
    options=Options,
    timed=True,
)
