"""KVCache over the link: pieces of many requests over several TCP connections, layer by layer (§3.3).

    with open_receiver(spec, "0.0.0.0", 7000) as receiver:        # decode side
        with receiver.receive() as received: restore(received.pieces)
    with open_sender(spec, ("10.0.0.2", 7000)) as sender:         # prefill side
        sender.begin(17)
        for piece in capture: sender.send(piece)                  # while later layers still compute
        sender.finish(Manifest.of(17, headers, meta))
        delivery = sender.wait(17)                                # or TransferFailed

What arrives is handed over once per request, whole, and only after every checksum and the manifest have held.
"""

from repro.transport.receiver import Received, Receiver
from repro.transport.sender import Delivery, PieceDelivery, Sender, TransferFailed
from repro.transport.session import Failure, PieceArrival
from repro.transport.signals import ConnectionSignal
from repro.transport.spec import ReceiverLimits, TransportSpec

__all__ = [
    "ConnectionSignal", "Delivery", "Failure", "PieceArrival", "PieceDelivery", "Received", "Receiver",
    "ReceiverLimits", "Sender", "TransferFailed", "TransportSpec", "open_receiver", "open_sender",
]  # fmt: skip


def open_sender(spec: TransportSpec, address: tuple[str, int]) -> Sender:
    """Connect to a receiver and keep the connections warm. Raises UserError where none answers in time."""
    return Sender(spec, address)


def open_receiver(spec: TransportSpec, host: str, port: int = 0) -> Receiver:
    """Listen on `host` and `port` (0: any free one, see `Receiver.port`)."""
    return Receiver(spec, host, port)
