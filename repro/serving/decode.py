"""The decode worker: `python -m repro.serving.decode`, the process that stands for the local PD cluster's decode side.

One thread takes requests from the transport; the main thread restores them and steps the batch. A request is taken in
only when its manifest is complete, never on part of its state.
"""

from __future__ import annotations

import queue
import threading
from dataclasses import dataclass

from repro import configuration
from repro.engine.base import Handover
from repro.engine.spans import Span, SpanLog, now_s, spans_to_json
from repro.engine.torch_engine import EngineSpec, TorchEngine
from repro.serving.channel import Channel, Message, run_worker
from repro.serving.decoding import Generation, RunningBatch
from repro.transport import Received, TransportSpec, open_receiver


@dataclass(frozen=True)
class DecodeConfig:
    """What the worker is started with: how to compute, and where to listen."""

    engine: EngineSpec
    transport: TransportSpec
    host: str


@dataclass(frozen=True)
class _Stop:
    pass


@dataclass(frozen=True)
class _Broken:
    error: Exception


def report(channel: Channel, request: Generation, log: SpanLog) -> None:
    """Tell the supervisor of a finished request: its tokens and when each was there."""
    channel.send(
        "finished",
        request_id=request.handover.request_id,
        tokens=request.tokens,
        times_s=request.times_s,
        spans=spans_to_json(log.take()),
    )


def work(channel: Channel, config: Message) -> None:
    """Serve until told to stop."""
    spec = configuration.build(DecodeConfig, {key: value for key, value in config.items() if key != "kind"})
    engine = TorchEngine(spec.engine)
    log = SpanLog()
    batch = RunningBatch(engine, log)
    receiver = open_receiver(spec.transport, spec.host, 0)
    inbox: queue.SimpleQueue[Received | _Stop | _Broken] = queue.SimpleQueue()

    def receive() -> None:
        try:
            while True:
                inbox.put(receiver.receive())
        except Exception as error:
            inbox.put(_Broken(error))

    threading.Thread(target=receive, name="receive", daemon=True).start()
    channel.deliver(lambda message: inbox.put(_Stop()) if message["kind"] == "stop" else None)
    channel.send("ready", port=receiver.port)
    while True:
        while not batch or not inbox.empty():
            item = inbox.get()
            if isinstance(item, _Stop):
                receiver.close()
                return
            if isinstance(item, _Broken):
                raise item.error
            _admit(item, engine, batch, channel, log)
        for request in batch.step():
            report(channel, request, log)


def _admit(received: Received, engine: TorchEngine, batch: RunningBatch, channel: Channel, log: SpanLog) -> None:
    request_id, complete_s = received.request_id, received.completed_s
    with received:
        handover = Handover.from_meta(received.manifest.meta)
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
        log.add(Span("decode_queue", request_id, complete_s, now_s()))
        with log.span("restore", request_id, kv_bytes=received.manifest.payload_bytes):
            engine.join(handover, received.pieces)
    batch.admit(handover)
    channel.send("joined", request_id=request_id, complete_s=complete_s, joined_s=now_s())


if __name__ == "__main__":
    run_worker(work)
