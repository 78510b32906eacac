"""The two ends that `scripts/bench transport` puts on a path, as processes of their own: `receive` and `send`.

Each end answers once when it is ready and once when it is done. A contender's job is the same for all: keep the
path full of requests of equal pieces for `warm_s + seconds`, and count the bytes that the other end has confirmed to
have in memory within the last `seconds`. CPU is this process's own, user and system, from ready to done, per byte moved
in all of that time. Plain sockets do what any receiver of KVCache must: fill fresh places of prefaulted memory.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import psutil

from repro.configuration import build
from repro.kvcache.frames import DType, Manifest, Piece, StateKind
from repro.processes import Message, Parent, run_worker
from repro.transport import Sender, TransportSpec, open_receiver, open_sender
from repro.transport.arena import Arena

REQUEST_BYTES = 128 << 20
UNDER_WAY = 3

#: Tells the benchmark that this end is ready, and where it listens.
Say = Callable[..., None]


@dataclass(frozen=True)
class Job:
    """What both ends are told. `contender` is `sockets` or `transport`; `host` is the receiving end's address.

    `own_process`: the transport's sockets live in another process than the one that sends and receives requests.
    """

    contender: str
    host: str
    seconds: float
    warm_s: float
    piece_bytes: int
    spec: TransportSpec
    own_process: bool = False


def work(parent: Parent, asked: Message) -> None:
    """Be the end that `open` asks for, then answer with its result."""
    job = build(Job, asked["job"])
    ends: dict[tuple[str, str], Callable[..., dict[str, Any]]] = {
        ("receive", "sockets"): receive_by_sockets,
        ("send", "sockets"): send_by_sockets,
        ("receive", "transport"): receive_by_transport,
        ("send", "transport"): send_by_transport,
    }
    result = ends[asked["role"], job.contender](job, partial(parent.reply, asked), *asked["where"])
    if (asked := parent.read())["kind"] != "stop":
        parent.reply(asked, **result)


def cpu_s() -> float:
    """User and system seconds of this process and of those that it has started."""
    here = psutil.Process()
    times = [process.cpu_times() for process in (here, *here.children(recursive=True))]
    return sum(time.user + time.system for time in times)


def prefaulted(size_bytes: int) -> memoryview:
    """Memory with its pages in place, filled with bytes that do not compress."""
    arena = Arena(size_bytes, retain_bytes=size_bytes, prefault_bytes=size_bytes)
    seed = os.urandom(1 << 20)
    for offset in range(0, size_bytes, len(seed)):
        end = min(offset + len(seed), size_bytes)
        arena.whole[offset:end] = seed[: end - offset]
    return arena.whole[:size_bytes]


def measure(job: Job, confirmed_bytes: Callable[[], int]) -> dict[str, Any]:
    """Count what is confirmed in the seconds after the warm-up."""
    time.sleep(job.warm_s)
    began, before = time.monotonic(), confirmed_bytes()
    time.sleep(job.seconds)
    ended, after = time.monotonic(), confirmed_bytes()
    return {"bytes": after - before, "wall_s": ended - began}


def configure(sock: socket.socket, spec: TransportSpec) -> None:
    """The socket options that its specification asks for; what it leaves open is the kernel's choice."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if spec.congestion_control:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, spec.congestion_control.encode())
    if spec.send_buffer_bytes:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, spec.send_buffer_bytes)


def receive_by_sockets(job: Job, say: Say) -> dict[str, Any]:
    """Each connection fills its part of a request's memory, round and round, and confirms each piece by one byte."""
    count, size = job.spec.connections, job.piece_bytes
    listener = socket.create_server((job.host, 0), backlog=count)
    if job.spec.receive_buffer_bytes:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, job.spec.receive_buffer_bytes)
    per_connection = max(1, REQUEST_BYTES // size // count)
    parts = [prefaulted(per_connection * size) for _ in range(count)]
    totals = [0] * count

    def fill(slot: int, sock: socket.socket) -> None:
        at = 0
        while True:
            got = sock.recv_into(parts[slot][at : at + size], size, socket.MSG_WAITALL)
            if got < size:
                return
            totals[slot] += got
            at = (at + size) % (per_connection * size)
            sock.sendall(b"k")

    say(port=listener.getsockname()[1])
    cpu = cpu_s()
    threads = [threading.Thread(target=fill, args=(slot, listener.accept()[0])) for slot in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"cpu_s": cpu_s() - cpu, "total_bytes": sum(totals)}


def send_by_sockets(job: Job, say: Say, port: int) -> dict[str, Any]:
    """A thread per connection that does nothing but `sendall`, and one that counts the confirmations."""
    count, size = job.spec.connections, job.piece_bytes
    pieces = max(count, REQUEST_BYTES // size)
    source = prefaulted(pieces * size)
    socks = []
    for _ in range(count):
        sock = socket.socket()
        configure(sock, job.spec)
        sock.connect((job.host, port))
        socks.append(sock)
    confirmed = [0] * count
    over = threading.Event()

    def fill(slot: int) -> None:
        at = slot
        while not over.is_set():
            socks[slot].sendall(source[at * size : (at + 1) * size])
            at = (at + count) % pieces
        socks[slot].shutdown(socket.SHUT_WR)

    def count_up(slot: int) -> None:
        while got := socks[slot].recv(64):
            confirmed[slot] += len(got) * size

    say()
    cpu = cpu_s()
    threads = [threading.Thread(target=work, args=(slot,)) for slot in range(count) for work in (fill, count_up)]
    for thread in threads:
        thread.start()
    result = measure(job, lambda: sum(confirmed))
    over.set()
    for thread in threads:
        thread.join()
    return {**result, "cpu_s": cpu_s() - cpu, "total_bytes": sum(confirmed)}


def receive_by_transport(job: Job, say: Say) -> dict[str, Any]:
    """Takes whole requests and releases them, as decode does once it has restored them."""
    with open_receiver(job.spec, job.host, own_process=job.own_process) as receiver:
        say(port=receiver.port)
        cpu = cpu_s()
        total = 0
        while True:
            with receiver.receive() as received:
                total += received.manifest.payload_bytes
                if received.manifest.meta.get("last"):
                    break
        time.sleep(0.2)  # the last release must be heard
        return {"cpu_s": cpu_s() - cpu, "total_bytes": total}


def send_by_transport(job: Job, say: Say, port: int) -> dict[str, Any]:
    """A few requests under way at any time, from memory that is checksummed once: capture pays for that elsewhere."""
    size = job.piece_bytes
    source = prefaulted(REQUEST_BYTES)
    payloads = [source[at : at + size] for at in range(0, REQUEST_BYTES, size)]
    model = [_piece(payload, index) for index, payload in enumerate(payloads)]
    over = threading.Event()
    total = 0
    with open_sender(job.spec, (job.host, port), own_process=job.own_process) as sender:
        if isinstance(sender, Sender):
            sender.register(source)
        say()
        cpu = cpu_s()

        def send_requests() -> None:
            nonlocal total
            request = 0
            while True:
                last = over.is_set()
                pieces = [Piece(replace(piece.header, request_id=request), piece.payload) for piece in model]
                sender.begin(request, deadline_s=600)
                for piece in pieces:
                    sender.send(piece)
                sender.finish(Manifest.of(request, [piece.header for piece in pieces], {"last": last}))
                if last:
                    for waited in range(max(0, request - UNDER_WAY + 1), request + 1):
                        sender.wait(waited)
                    total = (request + 1) * REQUEST_BYTES
                    return
                if request >= UNDER_WAY - 1:
                    sender.wait(request - UNDER_WAY + 1)
                request += 1

        thread = threading.Thread(target=send_requests)
        thread.start()
        result = measure(job, lambda: sender.stats()["acked_bytes"])
        over.set()
        thread.join()
        return {**result, "cpu_s": cpu_s() - cpu, "total_bytes": total}


def _piece(payload: memoryview, index: int) -> Piece:
    return Piece.seal(
        payload,
        request_id=0,
        piece=index,
        layer=index,
        kind=StateKind.RECURRENT,
        dtype=DType.UINT8,
        shape=(payload.nbytes,),
        tokens=(0, 1),
    )


if __name__ == "__main__":
    run_worker(work)
