"""What layer-wise capture costs of T_prefill, and how fast state goes from the device to the wire (§3.3).

The same prompts are prefilled with and without capture, in turns, as paired ratios of T_prefill, which ends when the computation is over
and not when the last copy is. `hooks` drops what it captures: the price of hooks and of slicing views. `staged` copies it to page-locked
memory beside the computation and frames it. `sent` sends it over loopback as well, from a process of its own; `straight` does so without
the staging memory and its thread, as an engine on a CPU does. Beside these stands the processor time inside the hooks themselves, which
needs no quiet machine but does not see what capture does to caches.

Then a whole cache leaves as fast as it can, nothing being computed: `device_to_host_bps` through the staging memory, `device_to_wire_bps`
until the receiver has acknowledged all of it, `host_to_device_bps` back from the receiver's memory.

    scripts/bench capture model=kimi_linear options.tokens=2048 options.pairs=15
    scripts/bench capture size=single_gpu options.device=cuda options.tokens=32768 options.chunk_tokens=4096
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from transformers import DynamicCache

from repro.engine.staging import Copies, Staging, copies_of
from repro.errors import UserError
from repro.experiments.base import MODEL, Context, Experiment, Outcome
from repro.experiments.split_model import check_one
from repro.experiments.table3 import one_model
from repro.kvcache.capture import Emit, LayerwiseCapture
from repro.kvcache.frames import FrameHeader, Manifest, Piece
from repro.kvcache.state import Cache, State, extract, seal
from repro.kvcache.tensors import tensor_of
from repro.models.build import build
from repro.models.prefill import chunked_prefill
from repro.record.metrics import Metric
from repro.record.statistics import Estimate
from repro.transport import ReceiverProcess, SenderProcess, TransportSpec, open_receiver, open_sender

TARGET_PCT = 3.0
#: Somewhere for captured states to go, for the time of one prefill.
Sink = Callable[[], AbstractContextManager[Emit]]


@dataclass(frozen=True)
class Options:
    """One prompt of `tokens` on `device`, in chunks and by `threads` of PyTorch, `pairs` times with and without capture."""

    device: str = "cpu"
    tokens: int = 2048
    chunk_tokens: int = 512
    threads: int = 1
    pairs: int = 15
    staging_bytes: int = 512 << 20

    def __post_init__(self) -> None:
        for name, least in (("tokens", 1), ("chunk_tokens", 1), ("threads", 1), ("pairs", 2), ("staging_bytes", 1)):
            if getattr(self, name) < least:
                raise UserError(f"options.{name}: {getattr(self, name)}; accepted: {least} or more")
        try:
            device = torch.device(self.device)
        except RuntimeError:
            device = None
        if (
            device is None
            or device.type not in ("cpu", "cuda")
            or (device.type == "cuda" and not torch.cuda.is_available())
        ):
            here = "cpu, cuda" if torch.cuda.is_available() else "cpu"
            raise UserError(f"options.device: {self.device!r} is not here; accepted: {here}")


def run(context: Context) -> Outcome:
    """All variants of one model, and a whole cache."""
    return Outcome(_rows(context), provenance={"threads": torch.get_num_threads()})


@dataclass(frozen=True)
class _Prefill:
    """One prompt of one model."""

    model: torch.nn.Module
    ids: torch.Tensor
    chunk_tokens: int
    copies: Copies

    def run(self) -> Cache:
        """Without capture. The computation is over when this returns."""
        cache, _ = chunked_prefill(self.model, self.ids, self.chunk_tokens)
        self.copies.computed()
        return cache

    def captured(self, emit: Emit) -> float:
        """With capture; returns the processor time spent inside its hooks, in s."""
        cache = DynamicCache(config=self.model.config)  # type: ignore[arg-type]
        with _TimedCapture(self.model, cache, emit) as capture:
            chunked_prefill(self.model, self.ids, self.chunk_tokens, cache, on_chunk=capture.chunk)
        self.copies.computed()
        return capture.spent_s


class _TimedCapture(LayerwiseCapture):
    """Adds up the processor time of its own hooks."""

    spent_s = 0.0

    def __enter__(self) -> _TimedCapture:
        super().__enter__()
        return self

    def _hook(self, index: int) -> Callable[..., None]:
        inner = super()._hook(index)

        def timed(*arguments: object) -> None:
            start = time.thread_time()
            inner(*arguments)
            self.spent_s += time.thread_time() - start

        return timed


def _rows(context: Context) -> list[Metric]:
    options, spec = context.options, one_model(context.settings)
    assert isinstance(options, Options)
    torch.set_num_threads(options.threads)
    model = build(spec, options.device)
    random = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    ids = torch.randint(3, min(500, vocabulary), (1, options.tokens), generator=random).to(options.device)
    copies = copies_of(options.device)
    prefill = _Prefill(model, ids, options.chunk_tokens, copies)
    staging = Staging(copies, options.staging_bytes)
    case, rows = f"{spec.name}.{spec.size}.{options.tokens}", []

    def say(variant: str, metric: str, values: list[float], unit: str, note: str = "") -> None:
        found = Estimate.of_signed(values)
        between = f" ({found.low:.4g} to {found.high:.4g})" if found.n > 1 else ""
        context.progress(f"{variant}: {metric} {found.value:.4g} {unit}{between} {note}")
        span = (found.low, found.high)
        rows.append(
            context.metric(f"{case}.{variant}", metric, found.value, unit, "measured", interval=span, n=found.n)
        )

    with _loopback(context.settings.transport.connections) as wire:
        copies.lock(wire.receiver.memory)
        sinks: dict[str, Sink] = {
            "hooks": _dropped, "staged": lambda: _staged(staging, _Framing()), "sent": lambda: _sent(staging, wire),
            "straight": lambda: _sent_straight(wire),
        }  # fmt: skip
        for variant, sink in sinks.items():
            plain_s, wall, cpu = paired(prefill, sink, options.pairs)
            verdict = "within" if Estimate.of_signed(wall).high < TARGET_PCT else "not shown to be within"
            say(variant, "capture_overhead_pct", wall, "%", f"of T_prefill {plain_s:.3f} s: {verdict} {TARGET_PCT:g} %")
            say(variant, "capture_cpu_pct", cpu, "%", "of the processor time of this process")
            say(variant, "inside_hooks_pct", shares_inside_hooks(prefill, sink, options.pairs), "%")
        states = extract(prefill.run(), model.config, options.tokens)  # type: ignore[arg-type]
        for metric, values in goodputs(states, staging, wire, copies, options.pairs).items():
            say("whole", metric, values, "bit/s", f"for {sum(s.nbytes for s in states)} bytes in {len(states)} pieces")
    return rows


def paired(prefill: _Prefill, sink: Sink, pairs: int) -> tuple[float, list[float], list[float]]:
    """Median T_prefill in s without capture; how much longer it and the processor time are with it, in percent per pair.

    The order alternates. What is still on its way when the computation is over leaves before the next prefill begins,
    outside of T_prefill; its processor time counts.
    """

    def plain() -> tuple[float, float]:
        start, cpu = time.perf_counter(), time.process_time()
        prefill.run()
        return time.perf_counter() - start, time.process_time() - cpu

    def captured() -> tuple[float, float]:
        cpu = time.process_time()
        with sink() as emit:
            start = time.perf_counter()
            prefill.captured(emit)
            wall = time.perf_counter() - start
        return wall, time.process_time() - cpu

    plain(), captured()
    found = []
    for index in range(pairs):
        if index % 2:
            with_capture, without = captured(), plain()
        else:
            without, with_capture = plain(), captured()
        found.append((without[0], *(100 * (a / b - 1) for a, b in zip(with_capture, without, strict=True))))
    return (
        float(np.median([one[0] for one in found])),
        [one[1] for one in found],
        [one[2] for one in found],
    )


def shares_inside_hooks(prefill: _Prefill, sink: Sink, repeats: int) -> list[float]:
    """How much of a prefill's processor time its hooks take, in percent, for each repeat."""
    shares = []
    for _ in range(repeats):
        with sink() as emit:
            start = time.thread_time()
            inside_s = prefill.captured(emit)
            shares.append(100 * inside_s / (time.thread_time() - start))
    return shares


def goodputs(
    states: list[State], staging: Staging, wire: _Wire, copies: Copies, repeats: int
) -> dict[str, list[float]]:
    """Bits per second of a whole cache to the host, to the wire and acknowledged, and back to the device, for each repeat."""
    size, found = sum(state.nbytes for state in states), dict[str, list[float]]()

    def timed(metric: str, action: Callable[[], object]) -> None:
        start = time.perf_counter()
        action()
        copies.computed()
        found.setdefault(metric, []).append(8 * size / (time.perf_counter() - start))

    def leave(sink: AbstractContextManager[Emit]) -> None:
        with sink as emit:
            for state in states:
                emit(state)

    for _ in range(repeats):
        timed("device_to_host_bps", lambda: leave(_staged(staging, _nowhere)))
        timed("device_to_wire_bps", lambda: leave(_sent(staging, wire)))
        arrived = [tensor_of(piece) for piece in wire.arrived]
        timed("host_to_device_bps", lambda: copies.to_device(arrived))  # noqa: B023 - called at once
    return found


@contextlib.contextmanager
def _dropped() -> Iterator[Emit]:
    yield _ignore


def _ignore(_state: State) -> None:
    pass


def _nowhere(_state: State, _put_s: float, _copied_s: float) -> None:
    pass


@contextlib.contextmanager
def _staged(staging: Staging, deliver: Callable[[State, float, float], None]) -> Iterator[Emit]:
    with staging.lane(deliver) as lane:
        yield lane.put


class _Framing:
    """Frames states as a sender would, and drops the frames."""

    def __init__(self) -> None:
        self._pieces = count()

    def __call__(self, state: State, _put_s: float, _copied_s: float) -> None:
        seal(state, 0, next(self._pieces))


class _Wire:
    """A sender and a receiver over loopback, both in processes of their own, and what arrived last."""

    def __init__(self, sender: SenderProcess, receiver: ReceiverProcess) -> None:
        self.sender, self.receiver = sender, receiver
        self.numbers = count(1)
        self.arrived: tuple[Piece, ...] = ()
        self._release: Callable[[], None] = lambda: None

    def receive(self) -> None:
        """Take what was acknowledged, and give back the memory of what arrived before it."""
        self._release()
        received = self.receiver.receive(timeout_s=60.0)
        self.arrived, self._release = received.pieces, received.release


@contextlib.contextmanager
def _loopback(connections: int) -> Iterator[_Wire]:
    transport = TransportSpec(connections=connections, secret="of one benchmark", deadline_s=600.0)
    with (
        open_receiver(transport, "127.0.0.1", own_process=True) as receiver,
        open_sender(transport, ("127.0.0.1", receiver.port), own_process=True) as sender,
    ):
        yield _Wire(sender, receiver)


@contextlib.contextmanager
def _sent(staging: Staging, wire: _Wire) -> Iterator[Emit]:
    """Send what is put from the staging thread, and end when all of it is acknowledged."""
    with _request(wire) as send, staging.lane(lambda state, _put_s, _copied_s: send(state)) as lane:
        yield lane.put


@contextlib.contextmanager
def _sent_straight(wire: _Wire) -> Iterator[Emit]:
    """Send what is put at once, and end when all of it is acknowledged."""
    with _request(wire) as send:
        yield send


@contextlib.contextmanager
def _request(wire: _Wire) -> Iterator[Emit]:
    number, headers = next(wire.numbers), list[FrameHeader]()

    def send(state: State) -> None:
        piece = seal(state, number, len(headers))
        headers.append(piece.header)
        wire.sender.send(piece)

    wire.sender.begin(number)
    yield send
    wire.sender.finish(Manifest.of(number, headers))
    wire.sender.wait(number)
    wire.receive()


EXPERIMENT = Experiment(
    "bench_capture",
    reads={"execute": (*MODEL, "transport.connections", "options")},
    run=run,
    options=Options,
    check=check_one,
    timed=True,
)
