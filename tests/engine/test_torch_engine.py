"""The computing engine: split tokens equal unsplit ones and transformers' own, and state leaves as the layout says."""

import threading
from dataclasses import replace
from functools import partial

import pytest
import torch

from repro.engine import pace, torch_engine
from repro.engine.base import Handover, Request
from repro.engine.spans import SpanLog
from repro.engine.torch_engine import EngineSpec, TorchEngine
from repro.errors import UserError
from repro.kvcache.frames import Piece
from repro.models import spec as models
from repro.models.architectures import layout_of
from repro.models.build import build

OUTPUT_TOKENS = 6
CHUNK_TOKENS = 64


def engine_spec(name: str) -> EngineSpec:
    model = models.load(name, "tiny")
    return EngineSpec(replace(model, parameters=float(model.parameters)), CHUNK_TOKENS)


def request(number: int, tokens: int) -> Request:
    generator = torch.Generator().manual_seed(number)
    return Request(number, tuple(torch.randint(3, 512, (tokens,), generator=generator).tolist()), OUTPUT_TOKENS)


def prefill(engine: TorchEngine, asked: Request, log: SpanLog | None = None) -> list[Piece]:
    pieces: list[Piece] = []
    engine.prefill(asked, pieces.append, log or SpanLog())
    return pieces


def decode(engine: TorchEngine, steps: int = OUTPUT_TOKENS) -> dict[int, list[int]]:
    tokens: dict[int, list[int]] = {}
    for _ in range(steps):
        for request_id, token in engine.step():
            tokens.setdefault(request_id, []).append(token)
    return tokens


@pytest.fixture(scope="module")
def kimi() -> TorchEngine:
    return TorchEngine(engine_spec("kimi_linear"))


@pytest.mark.parametrize("name", models.names())
def test_tokens_after_a_hand_over_equal_those_without_one(name: str) -> None:
    near, far = TorchEngine(engine_spec(name)), TorchEngine(engine_spec(name))
    asked = request(1, 150)
    far.join(Handover.of(asked), far.fetch(prefill(near, asked)))
    near.prefill_and_join(asked, SpanLog())
    assert decode(far) == decode(near)


@pytest.mark.parametrize("name", ["kimi_linear", "qwen3_235b"])
def test_state_goes_straight_to_who_copies_it_and_is_what_staging_hands_on(name: str) -> None:
    engine, asked = TorchEngine(engine_spec(name)), request(5, 150)
    staged = [(piece.header, bytes(piece.payload)) for piece in prefill(engine, asked)]
    straight, threads = [], set()

    def take(piece: Piece) -> None:
        straight.append((piece.header, bytes(piece.payload)))
        threads.add(threading.get_ident())

    engine.prefill(asked, take, SpanLog(), emit_copies=True)
    assert straight == staged
    assert threads == {threading.get_ident()}, "the thread of the forward pass, and no other"


def test_what_a_straight_way_raises_ends_the_prefill_and_not_the_engine(kimi: TorchEngine) -> None:
    asked, taken = request(6, 150), list[Piece]()

    def refuse_the_third(piece: Piece) -> None:
        if len(taken) == 2:
            raise TimeoutError("the link is gone")
        taken.append(piece)

    with pytest.raises(TimeoutError, match="the link is gone"):
        kimi.prefill(asked, refuse_the_third, SpanLog(), emit_copies=True)
    later = request(7, 100)
    kimi.join(Handover.of(later), kimi.fetch(prefill(kimi, later)))
    found = decode(kimi)[7]
    kimi.leave(7)
    kimi.prefill_and_join(later, SpanLog())
    assert decode(kimi)[7] == found
    kimi.leave(7)


@pytest.mark.parametrize("name", ["kimi_linear", "qwen3_235b"])
def test_tokens_equal_those_of_transformers_own_generate(name: str) -> None:
    spec = engine_spec(name)
    spec = replace(spec, model=replace(spec.model, dtype="float32"))
    engine, model, asked = TorchEngine(spec), build(spec.model), request(2, 100)
    ids = torch.tensor([asked.prompt])
    model.generation_config.eos_token_id = None  # type: ignore[union-attr]
    expected = model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=OUTPUT_TOKENS, do_sample=False, pad_token_id=0
    )
    engine.join(Handover.of(asked), engine.fetch(prefill(engine, asked)))
    assert decode(engine)[2] == expected[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("name", models.names())
def test_shipped_bytes_equal_the_layouts_for_every_kind_of_state(name: str) -> None:
    asked = request(3, 150)
    shipped: dict[str, int] = {}
    for piece in prefill(TorchEngine(engine_spec(name)), asked):
        shipped[piece.header.kind.name] = shipped.get(piece.header.kind.name, 0) + piece.header.payload_bytes
    expected = layout_of(name, "tiny").by_kind(asked.state_tokens)
    assert {name: size for name, size in shipped.items() if size} == {kind.name: n for kind, n in expected.items() if n}


def test_tokens_do_not_depend_on_who_else_is_in_the_batch(kimi: TorchEngine) -> None:
    first, second = request(4, 90), request(5, 130)
    alone = TorchEngine(engine_spec("kimi_linear"))
    alone.join(Handover.of(first), alone.fetch(prefill(kimi, first)))
    together = TorchEngine(engine_spec("kimi_linear"))
    together.join(Handover.of(first), together.fetch(prefill(kimi, first)))
    early = decode(together, 2)
    together.join(Handover.of(second), together.fetch(prefill(kimi, second)))
    late = decode(together, OUTPUT_TOKENS - 2)
    assert early[4] + late[4] == decode(alone)[4]
    together.leave(4)
    assert [request_id for request_id, _ in together.step()] == [5]


def test_a_restored_cache_does_not_need_the_memory_that_it_came_in(kimi: TorchEngine) -> None:
    asked = request(6, 60)  # shorter than a chunk: every state is a single piece, which a cache could alias
    pieces = [Piece(p.header, memoryview(bytearray(p.payload))) for p in prefill(kimi, asked)]
    kept, overwritten = TorchEngine(engine_spec("kimi_linear")), TorchEngine(engine_spec("kimi_linear"))
    kept.join(Handover.of(asked), kept.fetch(pieces))
    expected = decode(kept)
    overwritten.join(Handover.of(asked), overwritten.fetch(pieces))
    for piece in pieces:
        piece.payload[:] = b"\xff" * piece.payload.nbytes
    assert decode(overwritten) == expected


def test_pieces_that_wait_for_the_link_keep_no_more_memory_than_their_own_bytes(kimi: TorchEngine) -> None:
    for piece in prefill(kimi, request(7, 200)):
        backing = torch.frombuffer(piece.payload, dtype=torch.uint8).untyped_storage().nbytes()
        assert backing == piece.header.payload_bytes


def test_attention_state_leaves_with_every_chunk_and_recurrent_state_with_the_last(kimi: TorchEngine) -> None:
    ranges: dict[str, set[tuple[int, int]]] = {}
    for piece in prefill(kimi, request(8, 2 * CHUNK_TOKENS + 11)):
        ranges.setdefault(piece.header.kind.name, set()).add((piece.header.token_start, piece.header.token_end))
    end = 2 * CHUNK_TOKENS + 10
    assert ranges["LATENT"] == {(0, CHUNK_TOKENS), (CHUNK_TOKENS, 2 * CHUNK_TOKENS), (2 * CHUNK_TOKENS, end)}
    assert ranges["RECURRENT"] == {(0, end)}


def test_every_layer_and_chunk_has_one_compute_span_that_ends_before_its_state_is_copied(kimi: TorchEngine) -> None:
    log = SpanLog()
    prefill(kimi, request(9, 2 * CHUNK_TOKENS), log)
    spans = log.take()
    compute = [span for span in spans if span.what == "compute"]
    assert sorted((span.layer, span.chunk) for span in compute) == [
        (layer, chunk) for layer in range(8) for chunk in range(2)
    ]
    for copy in (span for span in spans if span.what == "copy"):
        latest = max((s for s in compute if s.layer == copy.layer and s.start_s < copy.start_s), key=lambda s: s.end_s)
        assert latest.end_s <= copy.start_s


@pytest.mark.parametrize(
    ("prompt", "output_tokens", "message"), [((5,), 4, "at least 2"), ((5, 6), 0, "output_tokens of request 1: 0")]
)
def test_a_request_that_cannot_be_split_is_refused(prompt: tuple[int, ...], output_tokens: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Request(1, prompt, output_tokens)


def test_a_manifest_without_a_hand_over_is_refused() -> None:
    with pytest.raises(UserError, match="not a hand-over"):
        Handover.from_meta({"request_id": 1})


def test_a_device_that_is_not_there_is_named() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match=r"engine\.device: cuda"):
        TorchEngine(replace(engine_spec("kimi_linear"), device="cuda"))


def test_a_slower_engine_rests_after_every_pass_and_computes_the_same(
    kimi: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    rests, asked = list[float](), request(7, 150)
    rested = partial(pace.throttled, rest=rests.append)
    monkeypatch.setattr(torch_engine, "throttled", rested)
    slow = TorchEngine(replace(engine_spec("kimi_linear"), slowdown=1000.0))
    for engine in (kimi, slow):
        engine.prefill_and_join(asked, SpanLog())
    assert decode(slow) == decode(kimi)
    assert len(rests) == -(-asked.state_tokens // CHUNK_TOKENS) + OUTPUT_TOKENS


@pytest.mark.parametrize("slowdown", [0.5, float("nan"), float("inf")])
def test_an_engine_cannot_be_faster_than_its_machine(slowdown: float) -> None:
    with pytest.raises(UserError, match=r"engine.slowdown: .*accepted: 1 or more"):
        replace(engine_spec("kimi_linear"), slowdown=slowdown)
