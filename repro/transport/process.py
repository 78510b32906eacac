"""The transport in a process of its own, so that Python's lock never makes a forward pass wait for a socket.

The worker and its transport are on the same side of the link and share an arena of memory: the worker copies a piece's
bytes into it and goes on computing; the transport sends them from there, or has received them there. Over the channel
between the two go only JSON commands and events with headers and manifests beside them.
"""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from repro.errors import UserError
from repro.kvcache.frames import HEADER_BYTES, FrameHeader, Manifest, Piece
from repro.link.tcp_info import TcpInfo
from repro.processes import Child, Message
from repro.transport.arena import Arena, Block
from repro.transport.outgoing import Delivery, PieceDelivery, SenderStats, TransferFailed
from repro.transport.receiver import Received, once, receive_arena
from repro.transport.session import Failure, PieceArrival
from repro.transport.signals import ConnectionSignal
from repro.transport.spec import TransportSpec

_REPLY_PATIENCE_S = 10.0
_START_PATIENCE_S = 60.0
_CLOSE_PATIENCE_S = 8.0


def _started(
    role: str,
    spec: TransportSpec,
    arena: Arena,
    hear: Callable[[Message, bytes], None],
    gone: Callable[[str], None],
    **values: Any,
) -> tuple[Child, Message]:
    """The other process and what it said first; `gone` hears how it ended. Raises UserError where it cannot start."""
    child = Child(
        f"transport process ({role})",
        [sys.executable, "-m", "repro.transport.process_main", role, str(arena.fd)],
        hear=hear,
        stderr="inherited",
        pass_fds=(arena.fd,),
        own_group=False,  # whoever ends this process by its group ends both
    )
    child.on_end(lambda ended: gone(str(ended)))
    try:
        values = {"spec": asdict(spec), "capacity_bytes": arena.capacity_bytes, **values}
        return child, child.ask("open", _START_PATIENCE_S, **values)
    except BaseException:
        child.kill()
        raise


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
        self._change = threading.Condition()
        self._pending: dict[int, _Pending] = {}
        self._outstanding_bytes = 0
        self._gone: str | None = None
        # The other process must never wait for room, or a cancellation would wait behind it: the waiting is done here.
        there = replace(spec, max_in_flight_bytes=1 << 62)
        self._child, _ = _started("send", there, self._arena, self._hear, self._ended, address=address)

    def begin(self, request_id: int, *, deadline_s: float | None = None, priority: int = 0) -> None:
        """As `Sender.begin`."""
        with self._change:
            self._check(request_id)
            if request_id in self._pending and self._pending[request_id].outcome is None:
                raise ValueError(f"request {request_id} is under way already")
            self._pending[request_id] = _Pending()
        self._child.send("begin", request=request_id, deadline_s=deadline_s, priority=priority)

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
        self._child.send("send", beside=header.pack(), offset=block.offset, size=size)

    def finish(self, manifest: Manifest) -> None:
        """As `Sender.finish`."""
        with self._change:
            self._find(manifest.request_id)
        self._child.send("finish", beside=manifest.pack())

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
        self._child.send("cancel", request=request_id)

    def set_priority(self, request_id: int, priority: int) -> None:
        """As `Sender.set_priority`."""
        self._child.send("set_priority", request=request_id, priority=priority)

    def set_rate_cap(self, bps: float | None) -> None:
        """As `Sender.set_rate_cap`."""
        self._child.send("set_rate_cap", bps=bps)

    def signals(self) -> list[ConnectionSignal]:
        """As `Sender.signals`."""
        return [
            ConnectionSignal(values["slot"], values["at_s"], TcpInfo(**values["tcp"]))
            for values in _answer(self._child, "signals")
        ]

    def stats(self) -> SenderStats:
        """As `Sender.stats`."""
        stats: SenderStats = _answer(self._child, "stats")
        stats["arena_used_bytes"] = self._arena.used_bytes
        return stats

    def close(self) -> None:
        """As `Sender.close`: the other process is gone when this returns."""
        self._ended("the sender is closed")
        self._child.end(_CLOSE_PATIENCE_S)
        self._arena.close()

    def __enter__(self) -> SenderProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self, request_id: int) -> None:
        if self._gone is not None:
            raise TransferFailed(request_id, "closed", self._gone)

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
            if message["kind"] == "acked":
                for piece in message["pieces"]:
                    self._free(pending, piece)
            else:
                pending.outcome = _outcome(message)
                for piece in list(pending.blocks):
                    self._free(pending, piece)
            self._change.notify_all()

    def _free(self, pending: _Pending, piece: int) -> None:
        block, size = pending.blocks.pop(piece)
        self._outstanding_bytes -= size
        self._arena.free(block)

    def _ended(self, how: str) -> None:
        with self._change:
            self._gone = self._gone or how
            for request_id, pending in self._pending.items():
                if pending.outcome is None:
                    pending.outcome = TransferFailed(request_id, "closed", how)
            self._change.notify_all()


class ReceiverProcess:
    """As `Receiver`, with the sockets in another process; what it hands over lies in shared memory."""

    def __init__(self, spec: TransportSpec, host: str, port: int = 0) -> None:
        self._arena = receive_arena(spec)
        self._ready: queue.SimpleQueue[Received | str] = queue.SimpleQueue()
        self._child, self._hello = _started(
            "receive", spec, self._arena, self._hear, self._ready.put, host=host, port=port
        )

    @property
    def memory(self) -> memoryview:
        """As `Receiver.memory`."""
        return self._arena.kept

    @property
    def port(self) -> int:
        """The TCP port that senders dial."""
        return int(self._hello["port"])

    def receive(self, timeout_s: float | None = None) -> Received:
        """As `Receiver.receive`."""
        try:
            received = self._ready.get(timeout=timeout_s)
        except queue.Empty:
            raise TimeoutError(f"no request arrived within {timeout_s} s") from None
        if isinstance(received, str):
            self._ready.put(received)
            raise OSError(f"the receiver is closed: {received}")
        return received

    def failures(self) -> list[Failure]:
        """As `Receiver.failures`."""
        return [Failure(**values) for values in _answer(self._child, "failures")]

    def stats(self) -> dict[str, int]:
        """As `Receiver.stats`."""
        stats: dict[str, int] = _answer(self._child, "stats")
        return stats

    def close(self) -> None:
        """As `Receiver.close`: the other process is gone when this returns."""
        self._child.end(_CLOSE_PATIENCE_S)
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
        number = message["request"]
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
        self._child.send("release", request=number)


def _answer(child: Child, what: str) -> Any:
    """What the other process answers at once. Raises OSError when it has gone."""
    try:
        return child.ask(what, _REPLY_PATIENCE_S)["value"]
    except UserError as error:
        raise OSError(str(error)) from None


def _outcome(message: Message) -> Delivery | TransferFailed:
    if message["kind"] == "undelivered":
        return TransferFailed(message["request"], message["reason"], message["detail"])
    values = message["delivery"]
    return Delivery(**{**values, "pieces": tuple(PieceDelivery(**piece) for piece in values["pieces"])})
