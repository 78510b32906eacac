"""KVCache over the link: pieces of many requests over several TCP connections, layer by layer (§3.3).

    with open_receiver(spec, "0.0.0.0", 7000) as receiver:        # decode side
        with receiver.receive() as received: restore(received.pieces)
    with open_sender(spec, ("10.0.0.2", 7000)) as sender:         # prefill side
        sender.begin(17)
        for piece in capture: sender.send(piece)                  # while later layers still compute
        sender.finish(Manifest.of(17, headers, meta))
        delivery = sender.wait(17)                                # or TransferFailed

With `own_process=True` the sockets live in another process, fed through shared memory on the same side of the link.
What arrives is handed over once per request, whole, and only after every checksum and the manifest have held.
"""

from typing import Literal, overload

from repro.transport.connections import ReceiverAwayError
from repro.transport.outgoing import Delivery, PieceDelivery, TransferFailed
from repro.transport.process import ReceiverProcess, SenderProcess
from repro.transport.receiver import Received, Receiver
from repro.transport.sender import Sender
from repro.transport.session import Failure, PieceArrival
from repro.transport.signals import ConnectionSignal
from repro.transport.spec import ReceiverLimits, TransportSpec

__all__ = [
    "ConnectionSignal", "Delivery", "Failure", "PieceArrival", "PieceDelivery", "Received", "Receiver",
    "ReceiverAwayError", "ReceiverLimits", "ReceiverProcess", "Sender", "SenderProcess", "TransferFailed", "TransportSpec", "open_receiver",
    "open_sender",
]  # fmt: skip


@overload
def open_sender(spec: TransportSpec, address: tuple[str, int], *, own_process: Literal[False] = False) -> Sender: ...
@overload
def open_sender(spec: TransportSpec, address: tuple[str, int], *, own_process: Literal[True]) -> SenderProcess: ...
@overload
def open_sender(spec: TransportSpec, address: tuple[str, int], *, own_process: bool) -> Sender | SenderProcess: ...
def open_sender(spec: TransportSpec, address: tuple[str, int], *, own_process: bool = False) -> Sender | SenderProcess:
    """Connect to a receiver and keep the connections warm. Raises UserError where none answers in time."""
    return SenderProcess(spec, address) if own_process else Sender(spec, address)


@overload
def open_receiver(
    spec: TransportSpec, host: str, port: int = 0, *, own_process: Literal[False] = False
) -> Receiver: ...
@overload
def open_receiver(spec: TransportSpec, host: str, port: int = 0, *, own_process: Literal[True]) -> ReceiverProcess: ...
@overload
def open_receiver(
    spec: TransportSpec, host: str, port: int = 0, *, own_process: bool
) -> Receiver | ReceiverProcess: ...
def open_receiver(
    spec: TransportSpec, host: str, port: int = 0, *, own_process: bool = False
) -> Receiver | ReceiverProcess:
    """Listen on `host` and `port` (0: any free one, see `Receiver.port`)."""
    return ReceiverProcess(spec, host, port) if own_process else Receiver(spec, host, port)
