"""The unsplit worker: `python -m repro.serving.unsplit`, prefill and decode in one process on one cache.

It is the reference that a split run's tokens must equal: the same engine, chunks and order of operations, but its state
never leaves the process. Prefill has priority over decode steps, as in a server without chunked mixing.
"""

from __future__ import annotations

import queue
from dataclasses import dataclass

from repro import configuration
from repro.engine.base import Handover, Request
from repro.engine.spans import Span, SpanLog, now_s
from repro.engine.torch_engine import EngineSpec, TorchEngine
from repro.serving.channel import Channel, Message, run_worker
from repro.serving.decode import report
from repro.serving.decoding import RunningBatch


@dataclass(frozen=True)
class UnsplitConfig:
    """What the worker is started with."""

    engine: EngineSpec


def work(channel: Channel, config: Message) -> None:
    """Serve until told to stop."""
    spec = configuration.build(UnsplitConfig, {key: value for key, value in config.items() if key != "kind"})
    engine = TorchEngine(spec.engine)
    log = SpanLog()
    batch = RunningBatch(engine, log)
    inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
    channel.deliver(inbox.put)
    channel.send("ready")
    while True:
        while not batch or not inbox.empty():
            message = inbox.get()
            if message["kind"] == "stop":
                return
            request = Request(message["request_id"], tuple(message["prompt"]), message["output_tokens"])
            start_s = now_s()
            engine.prefill_and_join(request, log)
            end_s = now_s()
            log.add(Span("prefill", request.request_id, start_s, end_s))
            batch.admit(Handover.of(request))
            channel.send("prefilled", request_id=request.request_id, start_s=start_s, end_s=end_s)
        for generation in batch.step():
            report(channel, generation, log)


if __name__ == "__main__":
    run_worker(work)
