"""The live system of a split run: a prefill worker, a decode worker and the link between them.

This is the router's seat: it gives requests to a worker, hears when each was prefilled, delivered, joined and finished,
and turns that into one `Served` per request. It sees control messages only; state goes past it.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from repro.configuration import plain
from repro.engine.base import Request
from repro.engine.reference import Agreement
from repro.engine.spans import Span, now_s, spans_from_json
from repro.engine.torch_engine import EngineSpec
from repro.errors import UserError
from repro.kvcache.codecs import CodecSpec
from repro.link import Link, Side
from repro.processes import Child, Cores, Message, Supervisor
from repro.serving.decode import DecodeConfig
from repro.serving.devices import Given
from repro.serving.prefill import PrefillConfig
from repro.serving.timeline import Timeline
from repro.transport import TransportSpec, remote_memory

log = logging.getLogger("repro.serving")

SIDES: tuple[Side, ...] = ("prefill", "decode")
MODES = ("unsplit", "bulk", "layerwise")
_START_TIMEOUT_S = 120.0


class RequestFailedError(UserError):
    """A request that was not delivered, or that the decode side could not restore. The workers are well."""

    def __init__(self, request_id: int, why: str) -> None:
        self.request_id = request_id
        super().__init__(f"request {request_id} failed: {why}")


@dataclass(frozen=True)
class Served:
    """One request from its arrival to its last token. Times are CLOCK_MONOTONIC in seconds.

    `first_piece_s` is when prefill had the first piece of state ready, in bulk mode as well; `complete_s` when the manifest
    was complete at the decode side. In an unsplit run both are the end of prefill.
    `kv_bytes` holds the state that was shipped, by kind and before any codec, `encoded_bytes` what the codec left of it;
    `pieces` counts the frames. `cached_tokens` of the prompt were in the prefill side's prefix cache; of
    the first `held_tokens` the decode side held all that grows with each token, which was not shipped. `agreement` compares
    with the model's own `generate`, where `System.reference` was asked for it.
    """

    request: Request
    mode: str
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
    encoded_bytes: int
    pieces: int
    cached_tokens: int
    held_tokens: int
    agreement: Agreement | None

    @property
    def total_kv_bytes(self) -> int:
        """S_kv: the state that was shipped, before any codec; 0 when unsplit."""
        return sum(self.kv_bytes.values())

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
        """From when the first piece could be sent (in bulk mode the end of prefill) to the complete manifest."""
        return self.complete_s - (self.first_piece_s if self.mode == "layerwise" else self.prefill_end_s)

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
    """What a run leaves: its requests in the order given and its timeline.

    `memory_bytes` is what its workers held after it; `wire_bytes` the TCP payload that prefill's kernel
    sent, each byte once: state, frame headers, manifests, heartbeats and whatever was given to it twice.
    """

    served: tuple[Served, ...]
    timeline: Timeline
    memory_bytes: int
    wire_bytes: int

    @property
    def tokens(self) -> list[tuple[int, ...]]:
        """What was generated, request by request."""
        return [served.tokens for served in self.served]


def joined(runs: Sequence[Run]) -> Run:
    """Runs of one system, one after another, as one."""
    workers = {worker: None for run in runs for worker in run.timeline.spans}
    spans = {worker: tuple(span for run in runs for span in run.timeline.spans[worker]) for worker in workers}
    served = tuple(served for run in runs for served in run.served)
    return Run(served, Timeline(spans), max(run.memory_bytes for run in runs), sum(run.wire_bytes for run in runs))


class System:
    """A prefill and a decode worker on the two sides of a link; a context manager, after which both are gone.

    Pieces of state cross the link encoded by `codec`, in prefill's process but beside its computation. With
    `transport_process` each worker's sockets live in a process of their own, so that Python's lock never makes a forward
    pass wait for them, nor the other way round; it costs memory and a start-up. The threads that compute run
    on their `cores`, all else of the workers on the others; the link is placed by whoever opens it.

    Any method may raise ChildEndedError, within milliseconds of the end of a worker or of a process that the link stands on and within
    10 s of its silence, and SilenceError where nothing happens for `request_timeout_s`; `serve` RequestFailedError, after which the
    other requests of the call may still be under way: the next ones need numbers of their own.
    """

    def __init__(
        self,
        engine: EngineSpec,
        transport: TransportSpec,
        link: Link,
        log_directory: Path,
        request_timeout_s: float = 120.0,
        *,
        codec: CodecSpec | None = None,
        transport_process: bool = False,
        cores: Cores | None = None,
        devices: Mapping[str, Given] | None = None,
    ) -> None:
        if transport.backend != "tcp" and link.backend == "relay":
            raise UserError(
                f"transport.backend: {transport.backend} opens connections of its own, which a relay link does not carry; "
                f"accepted: tcp, or another link.backend"
            )
        self._engine = engine
        self._transport = transport
        self._link = link
        self._request_timeout_s = request_timeout_s
        self._codec = codec or CodecSpec()
        self._transport_process = transport_process
        self._cores = cores or Cores({}, (), "handed out to nobody")
        self._devices = devices or {}
        #: What each worker computes on, as it says itself.
        self.seen: dict[str, dict[str, Any]] = {}
        self._supervisor = Supervisor(log_directory)
        self._wire_bytes = 0

    def __enter__(self) -> System:
        try:
            self._start()
        except BaseException:
            self._supervisor.kill()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._supervisor.__exit__(kind, error, at)

    def _start(self) -> None:
        """Both workers load at the same time; prefill dials when decode listens and the link leads there."""
        environment = {"OMP_NUM_THREADS": str(self._engine.threads), "TOKENIZERS_PARALLELISM": "false"}
        configs = {
            "decode": plain(
                DecodeConfig(
                    self._engine_of("decode"),
                    self._transport,
                    self._transport_process,
                    self._link.listen_host("decode"),
                    self._cores.computing.get("decode", ()),
                )
            ),
            "prefill": plain(
                PrefillConfig(
                    self._engine_of("prefill"),
                    self._transport,
                    self._transport_process,
                    self._request_timeout_s,
                    self._codec,
                    self._cores.computing.get("prefill", ()),
                )
            ),
        }
        self._workers: dict[str, Child] = {}
        if self._link.helper is not None:
            self._supervisor.watch(self._link.helper)
        for side in SIDES:
            worker = [sys.executable, "-m", f"repro.serving.{side}"]
            started = remote_memory.started(self._transport.backend, worker, namespaced=self._link.backend != "none")
            command = self._link.command(side, started)
            others = self._cores.others or None
            own = environment | dict(self._devices[side].environment if side in self._devices else {})
            self._workers[side] = self._supervisor.start(side, command, configs[side], own, others)
        (listening,) = self._supervisor.expect("ready", 1, _START_TIMEOUT_S)
        self.seen["decode"] = listening.message["seen"]
        self.admission: dict[str, Any] = listening.message["admission"]
        host, port = self._link.dial(listening.message["port"])
        self._workers["prefill"].send("connect", host=host, port=port)
        (connected,) = self._supervisor.expect("ready", 1, _START_TIMEOUT_S)
        self.seen["prefill"] = connected.message["seen"]

    def _engine_of(self, side: Side) -> EngineSpec:
        if side not in self._devices:
            return self._engine
        first, *more = self._devices[side].devices
        # What a seed draws on a GPU is not what it draws on the CPU, and a spread model is drawn there.
        alike = all(len(given.devices) == 1 for given in self._devices.values()) and (
            len({given.devices[0].partition(":")[0] for given in self._devices.values()}) == 1
        )
        return replace(self._engine, device=first, more_devices=tuple(more), weights_drawn_on=None if alike else "cpu")

    def pid(self, side: Side) -> int:
        """The process of that side's worker."""
        return self._workers[side].pid

    def reference(self, requests: Sequence[Request]) -> None:
        """Let each worker's model answer with its own `generate`: what these ids are answered with later is held against it."""
        for request in requests:
            for side in SIDES:
                self._workers[side].send("reference", request=request.as_json())
            self._supervisor.expect("referenced", len(SIDES), self._request_timeout_s)

    def observe(self, request: Request) -> None:
        """Let each worker note which kernels a prefill and a decode step call; `seen` holds them from then on.

        No request may be under way.
        """
        for side in SIDES:
            self._workers[side].send("observe", request=request.as_json())
            (event,) = self._supervisor.expect("observed", 1, self._request_timeout_s)
            self.seen[side]["kernels"] = event.message["kernels"]

    def prefill_alone(self, requests: Sequence[Request]) -> dict[int, float]:
        """T_prefill in seconds by request: measured where prefill runs, with nothing captured, sent or decoded meanwhile."""
        found = {}
        for request in requests:
            self._workers["prefill"].send("alone", request=request.as_json())
            (event,) = self._supervisor.expect("alone", 1, self._request_timeout_s)
            found[request.request_id] = float(event.message["prefill_s"])
        return found

    def serve(self, requests: Sequence[Request], mode: str, in_flight: int = 1) -> Run:
        """Serve `requests` in their order, `in_flight` of them at a time, and return when the last is finished.

        In mode `unsplit` the prefill worker decodes as well and nothing crosses the link.
        """
        if mode not in MODES:
            raise UserError(f"mode: {mode!r} is unknown; accepted: {', '.join(MODES)}")
        if in_flight < 1:
            raise UserError(f"in_flight: {in_flight}; a whole number of at least 1 is accepted")
        prefill, decode = (self._workers[side] for side in SIDES)
        increments = mode != "unsplit" and self._engine.prefix_cache.increments
        needed = {"prefilled", "finished"} if mode == "unsplit" else {"prefilled", "sent", "joined", "finished"}
        waiting, by_id = list(reversed(requests)), {request.request_id: request for request in requests}
        arrivals: dict[int, float] = {}
        heard: dict[int, dict[str, Message]] = {}
        spans: dict[str, list[Span]] = {side: [] for side in (*SIDES, "router")}
        complete = 0
        while complete < len(requests):
            while waiting and len(arrivals) - complete < in_flight:
                request = waiting.pop()
                arrivals[request.request_id], heard[request.request_id] = now_s(), {}
                if increments:
                    decode.send("reserve", request=request.as_json())
                else:
                    prefill.send("request", request=request.as_json(), mode=mode)
            event = self._supervisor.next_event(self._request_timeout_s)
            of_request = heard.get(event.message["request_id"])
            if of_request is None:
                # Somebody else who knows the secret sends to our decode side: none of ours waits for it.
                log.warning("ignored the %s of a request that was not asked for", event.message["kind"])
                continue
            if event.message["kind"] in ("undelivered", "refused"):
                raise self._supervisor.cause(RequestFailedError(event.message["request_id"], event.message["error"]))
            if event.message["kind"] == "reserved":
                asked, held_tokens = by_id[event.message["request_id"]], event.message["held_tokens"]
                prefill.send("request", request=asked.as_json(), mode=mode, held_tokens=held_tokens)
            of_request[event.message["kind"]] = event.message
            spans[event.worker].extend(spans_from_json(event.message.pop("spans", ())))
            complete += needed <= of_request.keys()
        served = tuple(
            _served(request, mode, arrivals[request.request_id], heard[request.request_id]) for request in requests
        )
        spans["router"] = [Span("queue", s.request.request_id, s.arrival_s, s.prefill_start_s) for s in served]
        timeline = Timeline({worker: tuple(found) for worker, found in spans.items()})
        wire_bytes = max(
            (heard[number]["sent"]["wire_bytes"] for number in heard if "sent" in heard[number]), default=0
        )
        before, self._wire_bytes = self._wire_bytes, max(wire_bytes, self._wire_bytes)
        return Run(served, timeline, self._supervisor.memory_bytes(), self._wire_bytes - before)


def _served(request: Request, mode: str, arrival_s: float, heard: Mapping[str, Message]) -> Served:
    """One request from what the workers said of it."""
    prefilled, finished = heard["prefilled"], heard["finished"]
    joined = heard.get("joined", {"complete_s": prefilled["end_s"], "joined_s": prefilled["end_s"]})
    return Served(
        request=request,
        mode=mode,
        tokens=tuple(finished["tokens"]),
        arrival_s=arrival_s,
        prefill_start_s=prefilled["start_s"],
        prefill_end_s=prefilled["end_s"],
        first_piece_s=prefilled.get("first_piece_s") or prefilled["end_s"],
        complete_s=joined["complete_s"],
        joined_s=joined["joined_s"],
        token_times_s=tuple(finished["times_s"]),
        resent_bytes=heard.get("sent", {}).get("resent_bytes", 0),
        kv_bytes=dict(prefilled.get("kv_bytes", {})),
        encoded_bytes=prefilled.get("encoded_bytes", 0),
        pieces=prefilled.get("pieces", 0),
        cached_tokens=prefilled.get("cached_tokens", 0),
        held_tokens=prefilled.get("held_tokens", 0),
        agreement=Agreement(**finished["agreement"]) if finished["agreement"] else None,
    )
