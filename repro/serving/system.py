"""A run of the live system: one prefill worker, one decode worker and the link between them, or one unsplit worker.

This is the router's seat: it gives requests to prefill, hears when each was prefilled, delivered, joined and
finished, and turns that into one `Served` per request. It sees control messages only; state goes past it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repro import configuration
from repro.engine.base import Request
from repro.engine.spans import Span, now_s, spans_from_json
from repro.engine.torch_engine import EngineSpec
from repro.errors import UserError
from repro.link import Link
from repro.serving.decode import DecodeConfig
from repro.serving.prefill import PrefillConfig
from repro.serving.supervision import Supervisor, Worker
from repro.serving.timeline import Timeline
from repro.serving.unsplit import UnsplitConfig
from repro.transport import TransportSpec

MODES = ("unsplit", "bulk", "layerwise")
_START_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class SplitSpec:
    """How a request is served. `in_flight` is how many requests the router lets into the system at a time."""

    engine: EngineSpec
    transport: TransportSpec
    mode: str = "layerwise"
    in_flight: int = 1
    request_timeout_s: float = 120.0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(f"mode: {self.mode!r} is unknown; accepted: {', '.join(MODES)}")
        if self.in_flight < 1:
            raise UserError(f"in_flight: {self.in_flight}; a whole number of at least 1 is accepted")


@dataclass(frozen=True)
class Served:
    """One request from its arrival to its last token. Times are CLOCK_MONOTONIC in seconds.

    `complete_s` is when its manifest was complete at the decode side; of an unsplit run, when prefill ended.
    `kv_bytes` holds what was framed, by kind of state; `pieces` how many.
    """

    request: Request
    tokens: tuple[int, ...]
    arrival_s: float
    prefill_start_s: float
    prefill_end_s: float
    first_piece_s: float
    complete_s: float
    joined_s: float
    token_times_s: tuple[float, ...]
    resent_bytes: int
    kv_bytes: dict[str, int]
    pieces: int

    @property
    def queue_s(self) -> float:
        """From arrival to the start of prefill."""
        return self.prefill_start_s - self.arrival_s

    @property
    def prefill_s(self) -> float:
        """T_prefill."""
        return self.prefill_end_s - self.prefill_start_s

    @property
    def transfer_s(self) -> float:
        """From the first piece that was ready to the last that arrived; in bulk mode, from the end of prefill."""
        return self.complete_s - self.first_piece_s

    @property
    def transfer_exposed_s(self) -> float:
        """What the transfer adds beyond the end of prefill."""
        return self.complete_s - self.prefill_end_s

    @property
    def ttft_s(self) -> float:
        """Arrival at the router to the first token at the decode side."""
        return self.token_times_s[0] - self.arrival_s

    @property
    def tpot_s(self) -> float:
        """Mean time per output token after the first; nan with one token."""
        steps = len(self.token_times_s) - 1
        return (self.token_times_s[-1] - self.token_times_s[0]) / steps if steps else float("nan")

    @property
    def first_step_s(self) -> float:
        """From joining the batch to the first token: one decode step."""
        return self.token_times_s[0] - self.joined_s


@dataclass(frozen=True)
class Run:
    """What a run leaves: its requests in the order of their ids, its timeline, and the most memory its workers held."""

    served: tuple[Served, ...]
    timeline: Timeline
    peak_memory_bytes: int


def run(spec: SplitSpec, requests: Sequence[Request], link: Link | None, log_directory: Path) -> Run:
    """Serve `requests` in their order and return when the last is finished; `link` is not used when unsplit.

    Raises:
        WorkerDiedError: when a worker ends or fails before that, within milliseconds of it.
        WorkerSilentError: when nothing happens for `request_timeout_s`.
    """
    with Supervisor(log_directory) as supervisor:
        entry = _start(spec, link, supervisor)
        if link is not None:
            link.start()
        return _Session(spec, supervisor, entry).serve(requests)


def _start(spec: SplitSpec, link: Link | None, supervisor: Supervisor) -> Worker:
    """Start the workers, wait until they can serve, and return the one that takes requests."""
    environment = {"OMP_NUM_THREADS": str(spec.engine.threads), "TOKENIZERS_PARALLELISM": "false"}

    def python(module: str) -> list[str]:
        return [sys.executable, "-m", f"repro.serving.{module}"]

    if spec.mode == "unsplit":
        config = configuration.plain(UnsplitConfig(spec.engine))
        worker = supervisor.start("unsplit", python("unsplit"), config, environment)
        supervisor.expect("ready", 1, _START_TIMEOUT_S)
        return worker
    if link is None:
        raise UserError(f"mode: {spec.mode} needs a link")
    decode = configuration.plain(DecodeConfig(spec.engine, spec.transport, link.listen_host("decode")))
    supervisor.start("decode", link.command("decode", python("decode")), decode, environment)
    (ready,) = supervisor.expect("ready", 1, _START_TIMEOUT_S)
    host, port = link.dial(ready.message["port"])
    layerwise = spec.mode == "layerwise"
    prefill = PrefillConfig(spec.engine, spec.transport, host, port, layerwise, spec.request_timeout_s)
    worker = supervisor.start(
        "prefill", link.command("prefill", python("prefill")), configuration.plain(prefill), environment
    )
    supervisor.expect("ready", 1, _START_TIMEOUT_S)
    return worker


class _Session:
    """Requests in flight, and what has been heard of each."""

    def __init__(self, spec: SplitSpec, supervisor: Supervisor, entry: Worker) -> None:
        self._spec = spec
        self._supervisor = supervisor
        self._entry = entry
        self._arrivals: dict[int, float] = {}
        self._heard: dict[int, dict[str, dict[str, Any]]] = {}
        self._spans: dict[str, list[Span]] = {}

    def serve(self, requests: Sequence[Request]) -> Run:
        waiting = list(reversed(requests))
        by_id = {request.request_id: request for request in requests}
        needed = {"finished"} if self._spec.mode == "unsplit" else {"finished", "sent", "joined", "prefilled"}
        finished = 0
        open_requests = 0
        peak = 0
        while finished < len(requests):
            while waiting and open_requests < self._spec.in_flight:
                self._submit(waiting.pop())
                open_requests += 1
            event = self._supervisor.next_event(self._spec.request_timeout_s)
            message = event.message
            request_id, kind = message["request_id"], message["kind"]
            self._heard[request_id][kind] = message
            self._spans.setdefault(event.worker, []).extend(spans_from_json(message.pop("spans", ())))
            if kind == "finished":
                open_requests -= 1
                peak = max(peak, self._supervisor.memory_bytes())
            if kind in needed and needed <= self._heard[request_id].keys():
                finished += 1
        served = tuple(self._served(by_id[request_id]) for request_id in sorted(by_id))
        for record in served:
            queue = Span("queue", record.request.request_id, record.arrival_s, record.prefill_start_s)
            self._spans.setdefault("router", []).append(queue)
        return Run(served, Timeline({worker: tuple(spans) for worker, spans in self._spans.items()}), peak)

    def _submit(self, request: Request) -> None:
        self._heard[request.request_id] = {}
        self._arrivals[request.request_id] = now_s()
        self._entry.send(
            "request",
            request_id=request.request_id,
            prompt=request.prompt,
            output_tokens=request.output_tokens,
        )

    def _served(self, request: Request) -> Served:
        heard = self._heard[request.request_id]
        prefilled, finished = heard["prefilled"], heard["finished"]
        joined = heard.get("joined", {"complete_s": prefilled["end_s"], "joined_s": prefilled["end_s"]})
        first_piece_s = prefilled["end_s"] if self._spec.mode != "layerwise" else prefilled["first_piece_s"]
        return Served(
            request=request,
            tokens=tuple(finished["tokens"]),
            arrival_s=self._arrivals[request.request_id],
            prefill_start_s=prefilled["start_s"],
            prefill_end_s=prefilled["end_s"],
            first_piece_s=first_piece_s,
            complete_s=joined["complete_s"],
            joined_s=joined["joined_s"],
            token_times_s=tuple(finished["times_s"]),
            resent_bytes=heard.get("sent", {}).get("resent_bytes", 0),
            kv_bytes=dict(prefilled.get("kv_bytes", {})),
            pieces=prefilled.get("pieces", 0),
        )
