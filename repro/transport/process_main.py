"""The transport's own process: `python -m repro.transport.process_main send ARENA` or `receive ARENA`, ARENA a file descriptor.

It does what the worker at the other end of its channel tells it, with the sockets, and ends with that worker. What is
sent and received lies in the arena that both have mapped. See `repro.transport.process` for the worker's side.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import queue
import sys
import threading
import time
from dataclasses import asdict

from repro.errors import UserError
from repro.kvcache.frames import FrameHeader, Manifest, Piece
from repro.processes import Message, Parent, run_worker
from repro.transport.arena import Arena
from repro.transport.outgoing import Delivery, TransferFailed
from repro.transport.receiver import Received, Receiver
from repro.transport.sender import Sender
from repro.transport.spec import ReceiverLimits, TransportSpec

#: So long acknowledgements wait for others, in s; the worker needs them to place new pieces only where its memory is short.
_GATHER_S = 0.02


def work(parent: Parent, first: Message) -> None:
    """Serve the worker that started this process until it says `stop`."""
    logging.basicConfig(level=logging.WARNING, format="transport: %(message)s")
    role, descriptor = sys.argv[1], int(sys.argv[2])
    values = first["spec"]
    spec = TransportSpec(**{**values, "limits": ReceiverLimits(**values["limits"])})
    retain = spec.limits.window_bytes if role == "receive" else first["capacity_bytes"]
    arena = Arena(
        first["capacity_bytes"],
        retain_bytes=2 * retain,
        prefault_bytes=spec.limits.prefault_bytes,
        fd=descriptor,
    )
    try:
        if role == "send":
            _serve_sender(parent, first, spec, arena)
        else:
            _serve_receiver(parent, first, spec, arena)
    except (UserError, OSError) as error:
        parent.refuse(first, str(error))


def _serve_sender(parent: Parent, first: Message, spec: TransportSpec, arena: Arena) -> None:
    events: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
    with Sender(spec, tuple(first["address"]), observer=lambda event: events.put(_described(event))) as sender:
        parent.reply(first)
        threading.Thread(target=_forward, args=(parent, events), daemon=True).start()
        try:
            while True:
                message, beside = parent.read_beside()
                if message["kind"] == "stop":
                    return
                try:
                    _obey(sender, arena, message, beside, parent)
                except TransferFailed:
                    pass  # the worker has heard of it as an event, or is about to
                except ValueError as error:
                    logging.getLogger("repro.transport").warning("the worker's %s: %s", message["kind"], error)
        finally:
            events.put(None)


def _obey(sender: Sender, arena: Arena, message: Message, beside: bytes, parent: Parent) -> None:
    match message["kind"]:
        case "begin":
            sender.begin(message["request"], deadline_s=message["deadline_s"], priority=message["priority"])
        case "send":
            offset, size = message["offset"], message["size"]
            sender.send(Piece(FrameHeader.unpack(beside), arena.whole[offset : offset + size]))
        case "finish":
            sender.finish(Manifest.unpack(beside))
        case "cancel":
            sender.cancel(message["request"])
        case "set_priority":
            sender.set_priority(message["request"], message["priority"])
        case "set_rate_cap":
            sender.set_rate_cap(message["bps"])
        case "signals":
            parent.reply(message, value=[asdict(signal) for signal in sender.signals()])
        case "stats":
            parent.reply(message, value=sender.stats())


def _described(event: tuple[int, int] | Delivery | TransferFailed) -> Message:
    if isinstance(event, Delivery):
        return {"kind": "delivered", "request": event.request_id, "delivery": asdict(event)}
    if isinstance(event, TransferFailed):
        return {"kind": "undelivered", "request": event.request_id, "reason": event.reason, "detail": event.detail}
    return {"kind": "acked", "request": event[0], "piece": event[1]}


def _forward(parent: Parent, events: queue.SimpleQueue[Message | None]) -> None:
    """Tell the worker what became of its pieces, many at a time: each message takes Python's lock from its forward pass."""
    with contextlib.suppress(OSError):
        while (message := events.get()) is not None:
            acked: dict[int, list[int]] = {}
            until_s = time.monotonic() + _GATHER_S
            while message is not None and message["kind"] == "acked":
                acked.setdefault(message["request"], []).append(message["piece"])
                try:
                    message = events.get(timeout=max(until_s - time.monotonic(), 0))
                except queue.Empty:
                    break
            for request, pieces in acked.items():
                parent.send("acked", request=request, pieces=pieces)
            if message is None:
                return
            if message["kind"] != "acked":
                parent.send(**message)


def _serve_receiver(parent: Parent, first: Message, spec: TransportSpec, arena: Arena) -> None:
    held: dict[int, Received] = {}
    with Receiver(spec, first["host"], first["port"], arena=arena) as receiver:
        parent.reply(first, port=receiver.port)

        def hand_over() -> None:
            numbers = itertools.count()
            with contextlib.suppress(OSError):
                while True:
                    received = receiver.receive()
                    number = next(numbers)
                    held[number] = received
                    headers = b"".join(piece.header.pack() for piece in received.pieces)
                    message = {
                        "request": number,
                        "offsets": [block.offset for block in received.blocks],
                        "arrivals": [
                            [a.piece, a.layer, a.payload_bytes, a.first_byte_s, a.last_byte_s]
                            for a in received.arrivals
                        ],
                        "completed_s": received.completed_s,
                    }
                    parent.send_beside("received", headers + received.manifest.pack(), **message)

        threading.Thread(target=hand_over, daemon=True).start()
        while True:
            message = parent.read()
            match message["kind"]:
                case "stop":
                    return
                case "release":
                    held.pop(message["request"]).release()
                case "failures":
                    parent.reply(message, value=[asdict(f) for f in receiver.failures()])
                case "stats":
                    parent.reply(message, value=receiver.stats())


if __name__ == "__main__":
    run_worker(work)
