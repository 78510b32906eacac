"""The running batch: who is in it, what each has produced and when.

Continuous batching: a request joins between two steps, as soon as its state is whole, and leaves with its last token.
The engine steps each request on its own cache, so a request's tokens cannot depend on who else is in the batch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from repro.engine.base import DecodeEngine, Handover, Request
from repro.engine.spans import Span, SpanLog, now_s, spans_to_json
from repro.engine.torch_engine import TorchEngine
from repro.processes import Parent


@dataclass
class Generation:
    """One request while it is decoded, and its tokens with their times (CLOCK_MONOTONIC, seconds) when it is done."""

    handover: Handover
    joined_s: float
    tokens: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)

    @property
    def done(self) -> bool:
        """Whether the last token that was asked for is there."""
        return len(self.tokens) == self.handover.output_tokens


class RunningBatch:
    """Steps a decode engine and keeps each request's tokens until it is done."""

    def __init__(self, engine: DecodeEngine, log: SpanLog) -> None:
        self._engine = engine
        self._log = log
        self._running: dict[int, Generation] = {}

    def __bool__(self) -> bool:
        return bool(self._running)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._running

    @property
    def running(self) -> list[Generation]:
        """Requests that have tokens to come."""
        return list(self._running.values())

    def admit(self, handover: Handover) -> None:
        """Count in a request that the engine has just taken."""
        self._running[handover.request_id] = Generation(handover, now_s())

    def step(self) -> list[Generation]:
        """One token for everyone; returns the requests that this finished. They have left the engine."""
        for request_id, token in self._engine.step():
            request = self._running[request_id]
            request.tokens.append(token)
            request.times_s.append(now_s())
        finished = [request for request in self._running.values() if request.done]
        for request in finished:
            request_id = request.handover.request_id
            self._log.add(Span("first_token", request_id, request.joined_s, request.times_s[0]))
            self._log.add(Span("decode", request_id, request.times_s[0], request.times_s[-1]))
            del self._running[request_id]
            self._engine.leave(request_id)
        return finished

    def drop(self, request_id: int) -> None:
        """Give up a request that is not done; it has left the engine."""
        del self._running[request_id]
        self._engine.leave(request_id)


def report(finished: Generation, engine: TorchEngine, parent: Parent, log: SpanLog) -> None:
    """Tell the supervisor a request's tokens and times, and how they compare with the model's own `generate`."""
    agreement = engine.agreement(finished.handover.request_id)
    parent.send(
        "finished",
        request_id=finished.handover.request_id,
        agreement=None if agreement is None else asdict(agreement),
        tokens=finished.tokens,
        times_s=finished.times_s,
        spans=spans_to_json(log.take()),
    )


def prefill_here(request: Request, engine: TorchEngine, batch: RunningBatch, parent: Parent, log: SpanLog) -> None:
    """The unsplit run: prefill a request into this process's own batch, with nothing captured or sent."""
    start_s = now_s()
    engine.prefill_and_join(request, log)
    end_s = now_s()
    log.add(Span("prefill", request.request_id, start_s, end_s))
    batch.admit(Handover.of(request))
    parent.send("prefilled", request_id=request.request_id, start_s=start_s, end_s=end_s)
