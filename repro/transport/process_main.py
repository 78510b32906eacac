"""The transport's own process: `python -m repro.transport.process_main send FD ARENA` or `receive FD ARENA`.

It does what the worker at the other end of the socket pair tells it, with the sockets, and ends with that worker. What
is sent and received lies in the arena that both have mapped. See `repro.transport.process` for the worker's side.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import os
import queue
import socket
import sys
import threading
from dataclasses import asdict

from repro.errors import UserError
from repro.kvcache.frames import FrameHeader, Manifest, Piece
from repro.transport.arena import Arena
from repro.transport.outgoing import Delivery, TransferFailed
from repro.transport.pipe import Message, Pipe
from repro.transport.receiver import Received, Receiver
from repro.transport.sender import Sender
from repro.transport.spec import ReceiverLimits, TransportSpec


def main(argv: list[str]) -> int:
    """`send FD ARENA` or `receive FD ARENA`: serve the worker at the other end of the socket pair until it ends."""
    logging.basicConfig(level=logging.WARNING, format="transport: %(message)s")
    gc.freeze()  # what is imported by now stays: no collection need walk it
    role, pipe = argv[0], Pipe(socket.socket(fileno=int(argv[1])))
    try:
        first, _ = pipe.receive()
        values = first["spec"]
        spec = TransportSpec(**{**values, "limits": ReceiverLimits(**values["limits"])})
        retain = spec.limits.window_bytes if role == "receive" else first["capacity_bytes"]
        arena = Arena(
            first["capacity_bytes"],
            retain_bytes=2 * retain,
            prefault_bytes=spec.limits.prefault_bytes,
            fd=int(argv[2]),
        )
        try:
            if role == "send":
                _serve_sender(pipe, spec, arena, tuple(first["address"]))
            else:
                _serve_receiver(pipe, spec, arena, first["host"], first["port"])
        except (UserError, OSError) as error:
            pipe.send({"error": str(error)})
    except (EOFError, BrokenPipeError):
        pass
    return 0


def _serve_sender(pipe: Pipe, spec: TransportSpec, arena: Arena, address: tuple[str, int]) -> None:
    events: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
    with Sender(spec, address, observer=lambda event: events.put(_described(event))) as sender:
        pipe.send({"ready": True})
        threading.Thread(target=_forward, args=(pipe, events), daemon=True).start()
        try:
            while True:
                message, beside = pipe.receive()
                try:
                    _obey(sender, arena, message, beside, pipe)
                except TransferFailed:
                    pass  # the worker has heard of it as an event, or is about to
                except ValueError as error:
                    logging.getLogger("repro.transport").warning("the worker's %s: %s", message["do"], error)
        finally:
            events.put(None)


def _obey(sender: Sender, arena: Arena, message: Message, beside: bytes, pipe: Pipe) -> None:
    match message["do"]:
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
            pipe.send({"reply": message["number"], "value": [asdict(signal) for signal in sender.signals()]})
        case "stats":
            pipe.send({"reply": message["number"], "value": sender.stats()})


def _described(event: tuple[int, int] | Delivery | TransferFailed) -> Message:
    if isinstance(event, Delivery):
        return {"event": "delivered", "request": event.request_id, "delivery": asdict(event)}
    if isinstance(event, TransferFailed):
        return {"event": "failed", "request": event.request_id, "reason": event.reason, "detail": event.detail}
    return {"event": "acked", "request": event[0], "piece": event[1]}


def _forward(pipe: Pipe, events: queue.SimpleQueue[Message | None]) -> None:
    with contextlib.suppress(OSError):
        while (message := events.get()) is not None:
            pipe.send(message)


def _serve_receiver(pipe: Pipe, spec: TransportSpec, arena: Arena, host: str, port: int) -> None:
    held: dict[int, Received] = {}
    with Receiver(spec, host, port, arena=arena) as receiver:
        pipe.send({"port": receiver.port})

        def hand_over() -> None:
            numbers = itertools.count()
            with contextlib.suppress(OSError):
                while True:
                    received = receiver.receive()
                    number = next(numbers)
                    held[number] = received
                    headers = b"".join(piece.header.pack() for piece in received.pieces)
                    message = {
                        "number": number,
                        "offsets": [block.offset for block in received.blocks],
                        "arrivals": [
                            [a.piece, a.layer, a.payload_bytes, a.first_byte_s, a.last_byte_s]
                            for a in received.arrivals
                        ],
                        "completed_s": received.completed_s,
                    }
                    pipe.send(message, headers + received.manifest.pack())

        threading.Thread(target=hand_over, daemon=True).start()
        while True:
            message, _ = pipe.receive()
            match message["do"]:
                case "release":
                    held.pop(message["number"]).release()
                case "failures":
                    pipe.send({"reply": message["number"], "value": [asdict(f) for f in receiver.failures()]})
                case "stats":
                    pipe.send({"reply": message["number"], "value": receiver.stats()})


if __name__ == "__main__":
    # Threads that wait in sockets must not hold the end of the process up.
    status = main(sys.argv[1:])
    os._exit(status)
