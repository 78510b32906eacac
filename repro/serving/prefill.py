"""The prefill worker: `python -m repro.serving.prefill`, the process that stands for the PrfaaS cluster.

It prefills one request after another and gives every piece of state to the transport. Layer-wise, a piece goes the
moment it is final, so the link carries it while later layers and chunks are computed (§3.3); in bulk, all pieces wait
for the end of prefill. That is the only difference between the two modes, which makes them comparable.

A request of mode `unsplit` is prefilled and decoded here, with the same engine, chunks and order of operations as a split one, but its
state never leaves the process. Prefill goes before decode steps, as in a server without chunked mixing.

With a prefix cache (§3.2) only what no earlier prompt left is computed, and all that the decode side does not hold is sent.
"""

from __future__ import annotations

import queue
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from repro import configuration
from repro.engine.base import Request
from repro.engine.memory import keep_freed_memory
from repro.engine.spans import Span, SpanLog, now_s, spans_to_json
from repro.engine.torch_engine import EngineSpec, TorchEngine
from repro.kvcache.codecs import CodecSpec, encode
from repro.kvcache.frames import CodecId, FrameHeader, Manifest, Piece
from repro.models.observed import kernels_called
from repro.processes import Message, Parent, background, place, placed, run_worker
from repro.serving.devices import seen
from repro.serving.running_batch import RunningBatch, prefill_here, report
from repro.transport import Sender, SenderProcess, TransferFailed, TransportSpec, open_sender


@dataclass(frozen=True)
class PrefillConfig:
    """What the worker is started with: how to compute, and how to send. Where to comes when the decode side listens.

    The thread that computes runs on `cores`, all else where the process was started; empty means anywhere.
    """

    engine: EngineSpec
    transport: TransportSpec
    transport_process: bool
    deadline_s: float
    codec: CodecSpec = field(default_factory=CodecSpec)
    cores: tuple[int, ...] = ()


class Outbox:
    """Pieces of one request on their way out: encoded, and then sent at once, or held until `release`."""

    def __init__(self, sender: Sender | SenderProcess, layerwise: bool, codec: CodecSpec, log: SpanLog) -> None:
        self._sender = sender
        self._layerwise = layerwise
        self._codec = codec
        self._log = log
        self._held: list[Piece] = []
        self.headers: list[FrameHeader] = []
        self.first_piece_s = 0.0
        #: Whether `emit` is done with a piece's memory when it returns, and soon: encoding would keep a forward pass waiting.
        self.copies = codec.names == ("none",) and (not layerwise or isinstance(sender, SenderProcess))

    def emit(self, piece: Piece) -> None:
        """Take a piece from the engine. Waits where the link is so far behind that memory must be bounded."""
        header = piece.header
        if (codec := self._codec.of(header.kind)).id is not CodecId.NONE:
            with self._log.span("encode", header.request_id, layer=header.layer, kv_bytes=header.raw_bytes):
                piece = encode(piece, codec)
        if not self.headers:
            self.first_piece_s = now_s()
        self.headers.append(piece.header)
        if self._layerwise:
            self._sender.send(piece)
        else:
            # The engine's memory is for what is on its way: what waits here would end the prefill's own progress.
            self._held.append(Piece(piece.header, memoryview(bytes(piece.payload))))

    def release(self) -> None:
        """Send what was held."""
        for piece in self._held:
            self._sender.send(piece)
        self._held.clear()


def work(parent: Parent, config: Message) -> None:
    """Build the model, connect when told where to, then serve until told to stop."""
    spec = configuration.build(PrefillConfig, {key: value for key, value in config.items() if key != "kind"})
    kept = keep_freed_memory()
    with placed(spec.cores):  # threads of PyTorch's pool stay where the first of them was started
        engine = TorchEngine(spec.engine)
    log = SpanLog()
    batch = RunningBatch(engine, log)
    address = parent.read()
    if address["kind"] == "stop":
        return
    sender = open_sender(spec.transport, (address["host"], address["port"]), own_process=spec.transport_process)
    inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
    parent.deliver(inbox.put)
    parent.send("ready", seen=seen(spec.engine.devices, kept))
    place(spec.cores)
    while True:
        while not batch or not inbox.empty():
            message = inbox.get()
            if message["kind"] == "stop":
                sender.close()
                return
            request = Request.from_json(message["request"])
            if message["kind"] == "observe":
                _observe(request, engine, parent)
            elif message["kind"] == "alone":
                _time_alone(request, engine, parent, log)
            elif message["kind"] == "reference":
                engine.reference(request)
                parent.send("referenced", request_id=request.request_id)
            elif message["mode"] == "unsplit":
                prefill_here(request, engine, batch, parent, log)
            else:
                try:
                    _serve(request, message, engine, sender, spec, parent, log)
                except TransferFailed as error:  # in the middle of prefill: the rest of it would be computed for nobody
                    parent.send("undelivered", request_id=error.request_id, error=str(error))
        for generation in batch.step():
            report(generation, engine, parent, log)


def _observe(request: Request, engine: TorchEngine, parent: Parent) -> None:
    """Note which kernels a prefill calls."""
    with kernels_called() as called:
        engine.prefill_and_join(request, SpanLog())
    engine.leave(request.request_id)
    parent.send("observed", request_id=request.request_id, kernels=sorted(called))


def _time_alone(request: Request, engine: TorchEngine, parent: Parent, log: SpanLog) -> None:
    """Prefill with nothing captured and nothing sent: the T_prefill that a split run is held against."""
    start_s = now_s()
    engine.prefill_and_join(request, log)
    parent.send("alone", request_id=request.request_id, prefill_s=now_s() - start_s)
    engine.leave(request.request_id)
    log.take()


def _serve(
    request: Request,
    message: Message,
    engine: TorchEngine,
    sender: Sender | SenderProcess,
    spec: PrefillConfig,
    parent: Parent,
    log: SpanLog,
) -> None:
    request_id = request.request_id
    outbox = Outbox(sender, message["mode"] == "layerwise", spec.codec, log)
    sender.begin(request_id, deadline_s=spec.deadline_s)
    start_s = now_s()
    held_tokens = message.get("held_tokens", 0)
    prefilled = engine.prefill(request, outbox.emit, log, held_tokens, emit_copies=outbox.copies)
    log.add(Span("prefill", request_id, start_s, prefilled.end_s))
    try:
        outbox.release()
        sender.finish(Manifest.of(request_id, outbox.headers, prefilled.handover.as_meta()))
    except TransferFailed:
        prefilled.release()
        raise
    # The next request's prefill does not wait for this one's last acknowledgement.
    background(_confirm, request_id, prefilled.release, sender, parent, log, name=f"confirm {request_id}")
    kv_bytes: Counter[str] = Counter()
    for header in outbox.headers:
        kv_bytes[header.kind.name.lower()] += header.raw_bytes
    parent.send(
        "prefilled",
        request_id=request_id,
        start_s=start_s,
        end_s=prefilled.end_s,
        cached_tokens=prefilled.cached_tokens,
        held_tokens=held_tokens,
        first_piece_s=outbox.first_piece_s,
        pieces=len(outbox.headers),
        kv_bytes=+kv_bytes,  # without kinds that are there and empty, as Lightning attention's convolution
        encoded_bytes=sum(header.payload_bytes for header in outbox.headers),
    )
    with log.span("keep", request_id):
        prefilled.keep()


def _confirm(
    request_id: int, release: Callable[[], None], sender: Sender | SenderProcess, parent: Parent, log: SpanLog
) -> None:
    """Report the delivery once the decode side has acknowledged it, or that there will be none."""
    try:
        delivery = sender.wait(request_id)
    except TransferFailed as error:
        parent.send("undelivered", request_id=request_id, error=str(error))
        return
    finally:
        release()
    for piece in delivery.pieces:
        log.add(
            Span(
                "send",
                request_id,
                piece.first_byte_s,
                piece.acked_s,
                layer=piece.layer,
                kv_bytes=piece.payload_bytes,
            )
        )
    parent.send(
        "sent",
        request_id=request_id,
        resent_bytes=delivery.resent_bytes,
        wire_bytes=sender.stats()["wire_bytes"],
        spans=spans_to_json(log.take()),
    )


if __name__ == "__main__":
    run_worker(work)
