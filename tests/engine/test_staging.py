"""States on their way from the device to the link: in order, as they were when they were put, in bounded memory, without a stop."""

import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from repro.engine.base import Handover, Request
from repro.engine.spans import SpanLog
from repro.engine.staging import Copies, HostCopies, Staging, copies_of
from repro.engine.torch_engine import EngineSpec, TorchEngine
from repro.errors import UserError
from repro.kvcache.frames import Piece, StateKind
from repro.kvcache.state import State
from repro.models import spec as models

PAGE = 4096
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the CPU runs the same test"),
    ),
]


class LateCopies(HostCopies):
    """The worst that a stream of copies may do: nothing is copied before `go`, whatever is computed meanwhile."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def to_host(self, source: torch.Tensor, target: torch.Tensor, *, changes: bool) -> Callable[[], None]:
        source = source.clone() if changes else source

        def wait() -> None:
            assert self.go.wait(30)
            target.copy_(source)

        return wait

    def computed(self) -> None:
        self.go.set()


def state(number: int, size_bytes: int = PAGE, kind: StateKind = StateKind.KEY, device: str = "cpu") -> State:
    tokens = size_bytes // 4
    tensor = torch.full((1, 1, tokens, 1), float(number), device=device)
    return State(number, kind, 0, 0, tokens, tensor)


def staged_engine(name: str, copies: Copies, staging_bytes: int = 64 << 20, device: str = "cpu") -> TorchEngine:
    model = models.load(name, "tiny")
    spec = EngineSpec(
        replace(model, parameters=float(model.parameters)), 32, device=device, staging_bytes=staging_bytes
    )
    engine = TorchEngine(spec)
    engine._copies = copies
    return engine


def decoded(engine: TorchEngine, asked: Request, pieces: list[Piece]) -> list[int]:
    engine.join(Handover.of(asked), engine.fetch(pieces))
    found = [engine.step()[0][1] for _ in range(4)]
    engine.leave(asked.request_id)
    return found


def prompt(number: int, length: int) -> Request:
    generator = torch.Generator().manual_seed(number)
    return Request(number, tuple(torch.randint(3, 512, (length,), generator=generator).tolist()), 4)


@pytest.mark.parametrize("device", DEVICES)
def test_states_are_delivered_in_the_order_of_their_puts(device: str) -> None:
    seen: list[tuple[int, float]] = []
    with Staging(copies_of(device), 8 * PAGE).lane(
        lambda s, *_: seen.append((s.layer, s.tensor[0, 0, 0, 0].item()))
    ) as lane:
        for number in range(100):
            lane.put(state(number, PAGE * (1 + number % 3), device=device), settled=device == "cpu" and number % 7 == 0)
    assert seen == [(number, float(number)) for number in range(100)]


@pytest.mark.parametrize("kind", [StateKind.RECURRENT, StateKind.CONVOLUTION, StateKind.SLIDING_KEY])
def test_a_state_that_is_overwritten_after_its_put_arrives_as_it_was(kind: StateKind) -> None:
    copies, seen, changing = LateCopies(), list[float](), state(0, kind=kind)
    with Staging(copies, 64 * PAGE).lane(lambda s, *_: seen.append(s.tensor.max().item())) as lane:
        for number in range(5):
            changing.tensor.fill_(number)
            lane.put(changing)
        copies.go.set()
    assert seen == [0.0, 1.0, 2.0, 3.0, 4.0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: LateCopies stands for a late stream above")
def test_a_state_overwritten_by_later_kernels_arrives_as_it_was_on_cuda() -> None:
    seen, changing = list[float](), state(0, 64 << 20, StateKind.RECURRENT, "cuda")
    with Staging(copies_of("cuda"), 512 << 20).lane(lambda s, *_: seen.append(s.tensor.mean().item())) as lane:
        for number in range(5):
            torch.cuda._sleep(20_000_000)
            changing.tensor.fill_(number)
            lane.put(changing)
    assert seen == [0.0, 1.0, 2.0, 3.0, 4.0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, so nothing to page-lock")
def test_staged_memory_is_page_locked_and_put_does_not_wait_for_the_device_on_cuda() -> None:
    pinned, ready = (
        list[bool](),
        state(1, 1 << 20, device="cuda"),
    )  # allocated before: an allocation may wait for the device
    with Staging(copies_of("cuda"), 16 << 20).lane(lambda s, *_: pinned.append(s.tensor.is_pinned())) as lane:
        torch.cuda._sleep(2_000_000_000)
        lane.put(ready)
        assert not torch.cuda.current_stream().query()  # the kernel before it is still running
    assert pinned == [True]


def test_put_waits_for_memory_until_a_view_is_dropped_and_no_longer() -> None:
    held: list[State] = []
    arrived, done = threading.Semaphore(0), threading.Event()

    def hold(staged: State, *_: float) -> None:
        held.append(staged)
        arrived.release()

    def produce() -> None:
        with Staging(HostCopies(), 4 * PAGE).lane(hold) as lane:
            for number in range(9):
                lane.put(state(number))
        done.set()

    threading.Thread(target=produce, daemon=True).start()
    for number in range(9):
        assert arrived.acquire(timeout=10)
        if number >= 3:  # four are out, there is memory for no fifth
            assert len(held) == 4
            assert not done.is_set() or number == 8
            assert held.pop(0).tensor.max() == number - 3
    assert done.wait(10)


def test_memory_comes_back_when_the_last_view_of_a_payload_is_gone() -> None:
    staging, views = Staging(HostCopies(), 2 * PAGE), []
    for _ in range(50):
        with staging.lane(lambda s, *_: views.append(memoryview(s.tensor.numpy()).cast("B")[10:20])) as lane:
            lane.put(state(1))
        views[:] = views[-1:]  # one stays out, the other room is used again and again
    assert bytes(views[0][2:6]) == torch.full((1,), 1.0).numpy().tobytes()


@pytest.mark.parametrize("pages", [1, 2])
def test_what_delivery_raises_ends_the_lane_and_not_the_next_one(pages: int) -> None:
    staging, seen = Staging(HostCopies(), pages * PAGE), list[int]()

    def fail(staged: State, *_: float) -> None:
        seen.append(staged.layer)
        if staged.layer == 1:
            raise OSError("the link is gone")

    def send(*numbers: int) -> None:
        with staging.lane(fail) as lane:
            for number in numbers:
                lane.put(state(number))

    with pytest.raises(OSError, match="the link is gone"):
        send(*range(1000))
    assert seen == [0, 1]
    send(5)
    assert seen == [0, 1, 5]


def test_a_copy_that_fails_ends_the_lane() -> None:
    class Broken(HostCopies):
        def to_host(self, *_: object, **__: object) -> Callable[[], None]:  # type: ignore[override]
            return fail

    def fail() -> None:
        raise RuntimeError("the device is gone")

    with pytest.raises(RuntimeError, match="the device is gone"), Staging(Broken(), 2 * PAGE).lane(print) as lane:
        lane.put(state(0))


def test_a_state_larger_than_the_staging_memory_is_refused_by_name() -> None:
    with (
        pytest.raises(UserError, match=r"engine\.staging_bytes: 4096 is too small for a state of 8192 bytes"),
        Staging(HostCopies(), PAGE).lane(lambda *_: None) as lane,
    ):
        lane.put(state(0, 2 * PAGE))


@pytest.mark.parametrize("name", models.names())
def test_tokens_are_the_same_when_every_copy_comes_after_all_of_the_computation(name: str) -> None:
    asked, reference, late = prompt(1, 150), staged_engine(name, HostCopies()), staged_engine(name, LateCopies())
    pieces: list[Piece] = []
    late.prefill(asked, pieces.append, SpanLog())
    tokens = decoded(late, asked, pieces)
    reference.prefill_and_join(asked, SpanLog())
    assert tokens == [reference.step()[0][1] for _ in range(4)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["kimi_linear", "qwen3_235b"])
def test_tokens_are_the_same_through_little_staging_memory(name: str, device: str) -> None:
    # Room for some three pieces: the forward pass waits for it again and again.
    engine = staged_engine(name, copies_of(device), 64 << 10, device)
    asked, pieces = prompt(2, 150), list[Piece]()
    engine.prefill(asked, lambda p: pieces.append(Piece(p.header, memoryview(bytearray(p.payload)))), SpanLog())
    tokens = decoded(engine, asked, pieces)
    engine.prefill_and_join(asked, SpanLog())
    assert tokens == [engine.step()[0][1] for _ in range(4)]
