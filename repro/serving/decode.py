"""The decode worker: `python -m repro.serving.decode`, the process that stands for the local PD cluster.

One thread takes requests from the transport and brings their state to the device, beside the batch that is running; the
main thread restores them and steps the batch. A request joins only when its manifest is complete, never on part of its
state.

A request that arrives whole may still be none: state of another model, a codec's output that does not decode, a
hand-over that is no hand-over. It is refused by name, and the batch goes on.
"""

from __future__ import annotations

import queue
import threading
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

from repro import configuration
from repro.engine.base import Handover, Request
from repro.engine.memory import keep_freed_memory
from repro.engine.spans import Span, SpanLog, now_s
from repro.engine.torch_engine import EngineSpec, TorchEngine
from repro.errors import UserError
from repro.kvcache import codecs
from repro.kvcache.frames import CodecId, Manifest, Piece
from repro.kvcache.state import State
from repro.models.observed import kernels_called
from repro.processes import Message, Parent, place, placed, run_worker
from repro.serving.devices import seen
from repro.serving.running_batch import RunningBatch, report
from repro.transport import Received, TransportSpec, open_receiver


@dataclass(frozen=True)
class DecodeConfig:
    """What the worker is started with: how to compute, and where to listen.

    The thread that computes runs on `cores`, all else where the process was started; empty means anywhere.
    """

    engine: EngineSpec
    transport: TransportSpec
    transport_process: bool
    host: str
    cores: tuple[int, ...] = ()


def work(parent: Parent, config: Message) -> None:
    """Listen, build the model, then serve until told to stop."""
    spec = configuration.build(DecodeConfig, {key: value for key, value in config.items() if key != "kind"})
    kept = keep_freed_memory()
    receiver = open_receiver(spec.transport, spec.host, own_process=spec.transport_process)
    with placed(spec.cores):  # threads of PyTorch's pool stay where the first of them was started
        engine = TorchEngine(spec.engine)
    engine.lock(receiver.memory)
    log = SpanLog()
    batch = RunningBatch(engine, log)
    inbox: queue.SimpleQueue[_Arrived | Message | Exception] = queue.SimpleQueue()

    def receive() -> None:
        try:
            while True:
                inbox.put(_arrived(receiver.receive(), engine, log))
        except Exception as error:
            inbox.put(error)

    threading.Thread(target=receive, name="receive", daemon=True).start()
    parent.deliver(inbox.put)
    parent.send("ready", port=receiver.port, admission=engine.admission.record(), seen=seen(spec.engine.devices, kept))
    place(spec.cores)
    while True:
        while not batch or not inbox.empty():
            item = inbox.get()
            if isinstance(item, Exception):
                raise item
            if isinstance(item, _Arrived):
                try:
                    _join(item, engine, batch, parent, log)
                except Exception as error:  # whatever is wrong with one request must not end the others
                    traceback.print_exception(error)
                    parent.send("refused", request_id=item.request_id, error=f"the decode side refused it: {error}")
            elif item["kind"] == "stop":
                receiver.close()
                return
            elif item["kind"] == "reserve":
                request = Request.from_json(item["request"])
                parent.send("reserved", request_id=request.request_id, held_tokens=engine.reserve(request))
            elif item["kind"] == "reference":
                request = Request.from_json(item["request"])
                engine.reference(request)
                parent.send("referenced", request_id=request.request_id)
            elif item["kind"] == "observe":
                _observe(Request.from_json(item["request"]), engine, parent)
        for generation in batch.step():
            report(generation, engine, parent, log)


def _observe(request: Request, engine: TorchEngine, parent: Parent) -> None:
    """Note which kernels a decode step calls. The batch is empty: whoever asks has no request under way."""
    engine.prefill_and_join(request, SpanLog())
    with kernels_called() as called:
        engine.step()
    engine.leave(request.request_id)
    parent.send("observed", request_id=request.request_id, kernels=sorted(called))


@dataclass(frozen=True)
class _Arrived:
    """A request that arrived whole: its state on the device, or what is wrong with it."""

    request_id: int
    complete_s: float
    manifest: Manifest
    states: Sequence[State] | Exception


def _arrived(received: Received, engine: TorchEngine, log: SpanLog) -> _Arrived:
    """Bring a request's state to the device, and give back the memory that it arrived in."""
    request_id = received.request_id
    with received:
        for arrival in received.arrivals:
            log.add(
                Span(
                    "receive",
                    request_id,
                    arrival.first_byte_s,
                    arrival.last_byte_s,
                    layer=arrival.layer,
                    kv_bytes=arrival.payload_bytes,
                )
            )
        try:
            pieces = _expanded(received, log)
            with log.span("fetch", request_id, kv_bytes=sum(piece.payload.nbytes for piece in pieces)):
                states = engine.fetch(pieces)
        except Exception as error:
            return _Arrived(request_id, received.completed_s, received.manifest, error)
    return _Arrived(request_id, received.completed_s, received.manifest, states)


def _join(arrived: _Arrived, engine: TorchEngine, batch: RunningBatch, parent: Parent, log: SpanLog) -> None:
    request_id, complete_s = arrived.request_id, arrived.complete_s
    if isinstance(arrived.states, Exception):
        raise arrived.states
    handover = Handover.from_meta(arrived.manifest.meta)
    if handover.request_id != request_id or request_id in batch:
        raise UserError(f"manifest meta: hands request {handover.request_id} over as {request_id}, or once more")
    if handover.output_tokens < 1:
        raise UserError(f"manifest meta: output_tokens is {handover.output_tokens}; at least 1 is accepted")
    log.add(Span("decode_queue", request_id, complete_s, now_s()))
    with log.span("restore", request_id, kv_bytes=sum(state.nbytes for state in arrived.states)):
        engine.join(handover, arrived.states)
    batch.admit(handover)
    parent.send("joined", request_id=request_id, complete_s=complete_s, joined_s=now_s())


def _expanded(received: Received, log: SpanLog) -> Sequence[Piece]:
    """The pieces as they were before the codec, whichever the sender chose: each frame says it."""
    if all(piece.header.codec is CodecId.NONE for piece in received.pieces):
        return received.pieces
    with log.span("expand", received.request_id, kv_bytes=received.manifest.payload_bytes):
        return [codecs.decode(piece) for piece in received.pieces]


if __name__ == "__main__":
    run_worker(work)
