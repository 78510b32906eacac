"""The transport in a process of its own, so that Python's lock never makes a forward pass wait for a socket.

The worker and its transport are on the same side of the link and share an arena of memory: the worker copies a piece's
bytes into it and goes on computing; the transport sends them from there, or has received them there. Over a socket pair
between the two go only JSON commands and events with headers and manifests beside them. The pair's end is the end of the
process: neither outlives the other.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from repro.errors import UserError
from repro.kvcache.frames import HEADER_BYTES, FrameHeader, Manifest, Piece
from repro.link.tcp_info import TcpInfo
from repro.transport.arena import Arena, Block
from repro.transport.outgoing import Delivery, PieceDelivery, SenderStats, TransferFailed
from repro.transport.pipe import Message, Pipe
from repro.transport.receiver import Received, once, receive_arena
from repro.transport.session import Failure, PieceArrival
from repro.transport.signals import ConnectionSignal
from repro.transport.spec import TransportSpec

_REPLY_PATIENCE_S = 10.0
_START_PATIENCE_S = 60.0


class _Child:
    """The other process: started, asked, and gone when this one wants or is gone itself."""

    def __init__(self, role: str, spec: TransportSpec, arena: Arena, **values: Any) -> None:
        near, far = socket.socketpair()
        package = str(Path(__file__).resolve().parents[2])
        paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "repro.transport.process_main", role, str(far.fileno()), str(arena.fd)],
            pass_fds=(far.fileno(), arena.fd),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        far.close()
        self._near = near
        self.pipe = Pipe(near)
        self.pipe.send({"spec": asdict(spec), "capacity_bytes": arena.capacity_bytes, **values})
        near.settimeout(_START_PATIENCE_S)
        try:
            self.started, _ = self.pipe.receive()
        except EOFError:
            self.close()
            raise UserError(f"transport: its process ended at the start with status {self.process.wait()}") from None
        near.settimeout(None)
        if "error" in self.started:
            self.close()
            raise UserError(self.started["error"])
        self._replies: dict[int, queue.SimpleQueue[Message]] = {}
        self._numbers = itertools.count()

    def listen(self, hear: Callable[[Message, bytes], None], gone: Callable[[], None]) -> None:
        """Hand on each event in a thread of its own."""

        def run() -> None:
            try:
                while True:
                    message, beside = self.pipe.receive()
                    if "reply" in message:
                        self._replies.pop(message["reply"]).put(message)
                    else:
                        hear(message, beside)
            except EOFError:
                gone()

        threading.Thread(target=run, name="transport-process", daemon=True).start()

    def ask(self, what: str) -> Any:
        """A question that the other process answers at once. Raises OSError when it has gone."""
        number = next(self._numbers)
        self._replies[number] = queue.SimpleQueue()
        answers = self._replies[number]
        self.pipe.send({"do": what, "number": number})
        try:
            return answers.get(timeout=_REPLY_PATIENCE_S)["value"]
        except queue.Empty:
            raise OSError("the transport's process does not answer") from None

    def close(self) -> None:
        """End the process, with SIGKILL where it will not."""
        self.pipe.close()
        try:
            self.process.wait(timeout=8)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._near.close()


class _Pending:
    """A request as the worker knows it: which blocks of the arena it still occupies."""

    def __init__(self) -> None:
        self.blocks: dict[int, tuple[Block, int]] = {}
        self.outcome: Delivery | TransferFailed | None = None


class SenderProcess:
    """As `Sender`, with the sockets in another process. `send` copies the payload, which is free again at once."""

    def __init__(self, spec: TransportSpec, address: tuple[str, int]) -> None:
        self._spec = spec
        room = spec.max_in_flight_bytes
        self._arena = Arena(4 * room, retain_bytes=room, prefault_bytes=min(room, spec.limits.prefault_bytes))
        # The other process must never wait for room, or a cancellation would wait behind it: the waiting is done here.
        self._child = _Child("send", replace(spec, max_in_flight_bytes=1 << 62), self._arena, address=address)
        self._change = threading.Condition()
        self._pending: dict[int, _Pending] = {}
        self._outstanding_bytes = 0
        self._gone = False
        self._child.listen(self._hear, self._ended)

    def begin(self, request_id: int, *, deadline_s: float | None = None, priority: int = 0) -> None:
        """As `Sender.begin`."""
        with self._change:
            self._check(request_id)
            if request_id in self._pending and self._pending[request_id].outcome is None:
                raise ValueError(f"request {request_id} is under way already")
            self._pending[request_id] = _Pending()
        self._tell({"do": "begin", "request": request_id, "deadline_s": deadline_s, "priority": priority})

    def send(self, piece: Piece) -> None:
        """As `Sender.send`, but the payload is copied before this returns."""
        header, size = piece.header, piece.payload.nbytes
        with self._change:
            pending = self._find(header.request_id)
            while (block := self._place(pending, size)) is None:
                self._change.wait()
                self._raise_if_over(pending, header.request_id)
            pending.blocks[header.piece] = (block, size)
            self._outstanding_bytes += size
        # By numpy, which lets Python's lock go meanwhile: the forward pass goes on.
        np.copyto(np.frombuffer(self._arena.view(block, size), np.uint8), np.frombuffer(piece.payload, np.uint8))
        self._tell({"do": "send", "offset": block.offset, "size": size}, header.pack())

    def finish(self, manifest: Manifest) -> None:
        """As `Sender.finish`."""
        with self._change:
            self._find(manifest.request_id)
        self._tell({"do": "finish"}, manifest.pack())

    def wait(self, request_id: int, timeout_s: float | None = None) -> Delivery:
        """As `Sender.wait`."""
        with self._change:
            pending = self._pending.get(request_id)
            if pending is None:
                raise ValueError(f"request {request_id} has not begun, or was waited for already")
            if not self._change.wait_for(lambda: pending.outcome is not None, timeout_s):
                raise TimeoutError(f"request {request_id} is not delivered after {timeout_s} s")
            if self._pending.get(request_id) is pending:
                del self._pending[request_id]
            if isinstance(pending.outcome, TransferFailed):
                raise pending.outcome
            assert pending.outcome is not None
            return pending.outcome

    def cancel(self, request_id: int) -> None:
        """As `Sender.cancel`."""
        self._tell({"do": "cancel", "request": request_id})

    def set_priority(self, request_id: int, priority: int) -> None:
        """As `Sender.set_priority`."""
        self._tell({"do": "set_priority", "request": request_id, "priority": priority})

    def set_rate_cap(self, bps: float | None) -> None:
        """As `Sender.set_rate_cap`."""
        self._tell({"do": "set_rate_cap", "bps": bps})

    def signals(self) -> list[ConnectionSignal]:
        """As `Sender.signals`."""
        return [
            ConnectionSignal(values["slot"], values["at_s"], TcpInfo(**values["tcp"]))
            for values in self._child.ask("signals")
        ]

    def stats(self) -> SenderStats:
        """As `Sender.stats`."""
        stats: SenderStats = self._child.ask("stats")
        stats["arena_used_bytes"] = self._arena.used_bytes
        return stats

    def close(self) -> None:
        """As `Sender.close`: the other process is gone when this returns."""
        self._child.close()
        self._ended()
        self._arena.close()

    def __enter__(self) -> SenderProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _tell(self, message: Message, beside: bytes = b"") -> None:
        try:
            self._child.pipe.send(message, beside)
        except OSError:
            self._ended()

    def _check(self, request_id: int) -> None:
        if self._gone:
            raise TransferFailed(request_id, "closed", "the transport's process has ended")

    def _find(self, request_id: int) -> _Pending:
        self._check(request_id)
        pending = self._pending.get(request_id)
        if pending is None:
            raise ValueError(f"request {request_id} has not begun")
        self._raise_if_over(pending, request_id)
        return pending

    def _raise_if_over(self, pending: _Pending, request_id: int) -> None:
        if isinstance(pending.outcome, TransferFailed):
            raise pending.outcome
        self._check(request_id)

    def _place(self, pending: _Pending, size: int) -> Block | None:
        """A block, if this request may have one now: the rule of `Sender.send`, the oldest being exempt."""
        room = self._spec.max_in_flight_bytes
        if self._outstanding_bytes + size > room:
            oldest = next((p for p in self._pending.values() if p.outcome is None), None)
            own = sum(taken for _, taken in pending.blocks.values())
            if pending is not oldest or (own and own + size > room):
                return None
        block = self._arena.allocate(size)
        if block is None and not self._outstanding_bytes:
            raise UserError(f"transport.max_in_flight_bytes: a piece of {size} bytes is too large for {room}")
        return block

    def _hear(self, message: Message, _beside: bytes) -> None:
        with self._change:
            pending = self._pending.get(message["request"])
            if pending is None or pending.outcome is not None:
                return
            if message["event"] == "acked":
                self._free(pending, message["piece"])
            else:
                pending.outcome = _outcome(message)
                for piece in list(pending.blocks):
                    self._free(pending, piece)
            self._change.notify_all()

    def _free(self, pending: _Pending, piece: int) -> None:
        block, size = pending.blocks.pop(piece)
        self._outstanding_bytes -= size
        self._arena.free(block)

    def _ended(self) -> None:
        with self._change:
            self._gone = True
            for request_id, pending in self._pending.items():
                if pending.outcome is None:
                    pending.outcome = TransferFailed(request_id, "closed", "the transport's process has ended")
            self._change.notify_all()


class ReceiverProcess:
    """As `Receiver`, with the sockets in another process; what it hands over lies in shared memory."""

    def __init__(self, spec: TransportSpec, host: str, port: int = 0) -> None:
        self._arena = receive_arena(spec)
        self._child = _Child("receive", spec, self._arena, host=host, port=port)
        self._ready: queue.SimpleQueue[Received | None] = queue.SimpleQueue()
        self._child.listen(self._hear, lambda: self._ready.put(None))

    @property
    def memory(self) -> memoryview:
        """As `Receiver.memory`."""
        return self._arena.kept

    @property
    def port(self) -> int:
        """The TCP port that senders dial."""
        return int(self._child.started["port"])

    def receive(self, timeout_s: float | None = None) -> Received:
        """As `Receiver.receive`."""
        try:
            received = self._ready.get(timeout=timeout_s)
        except queue.Empty:
            raise TimeoutError(f"no request arrived within {timeout_s} s") from None
        if received is None:
            self._ready.put(None)
            raise OSError("the receiver is closed")
        return received

    def failures(self) -> list[Failure]:
        """As `Receiver.failures`."""
        return [Failure(**values) for values in self._child.ask("failures")]

    def stats(self) -> dict[str, int]:
        """As `Receiver.stats`."""
        stats: dict[str, int] = self._child.ask("stats")
        return stats

    def close(self) -> None:
        """As `Receiver.close`: the other process is gone when this returns."""
        self._child.close()
        self._arena.close()

    def __enter__(self) -> ReceiverProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _hear(self, message: Message, beside: bytes) -> None:
        view = memoryview(beside)
        pieces = []
        for index, offset in enumerate(message["offsets"]):
            header = FrameHeader.unpack(view[index * HEADER_BYTES : (index + 1) * HEADER_BYTES])
            pieces.append(Piece(header, self._arena.whole[offset : offset + header.payload_bytes]))
        manifest = Manifest.unpack(view[len(pieces) * HEADER_BYTES :])
        arrivals = tuple(PieceArrival(*values) for values in message["arrivals"])
        number = message["number"]
        release = once(lambda: self._release(number))
        self._ready.put(
            Received(
                manifest.request_id,
                manifest,
                tuple(pieces),
                arrivals,
                message["completed_s"],
                release,
            )
        )

    def _release(self, number: int) -> None:
        with contextlib.suppress(OSError):
            self._child.pipe.send({"do": "release", "number": number})


def _outcome(message: Message) -> Delivery | TransferFailed:
    if message["event"] == "failed":
        return TransferFailed(message["request"], message["reason"], message["detail"])
    values = message["delivery"]
    return Delivery(**{**values, "pieces": tuple(PieceDelivery(**piece) for piece in values["pieces"])})
