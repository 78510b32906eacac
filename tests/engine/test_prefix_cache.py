"""Prefill with a prefix cache of real state: the same bits as without it, only what every layer group can serve, within its bytes."""

import weakref
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from repro.engine.base import Handover, Prefilled, Request
from repro.engine.spans import SpanLog
from repro.engine.torch_engine import EngineSpec, TorchEngine
from repro.errors import UserError
from repro.kvcache.frames import Piece
from repro.kvcache.prefix import PrefixCache, PrefixCacheSpec, block_chain, groups_of, root_of
from repro.kvcache.state import State, extract, restore
from repro.kvcache.tensors import bytes_of, tensor_of
from repro.models import spec as models
from repro.models.architectures import layout_of

CHUNK, BLOCK, OUTPUT_TOKENS = 32, 64, 4  # blocks of two chunks; the tiny window of 32 is full at the first block's end
DENSE = ("minimax_m2_5", "qwen3_235b")
ROOM = PrefixCacheSpec(capacity_bytes=1e9, block_tokens=BLOCK)


@cache
def plain(name: str) -> TorchEngine:
    model = models.load(name, "tiny")
    return TorchEngine(EngineSpec(replace(model, parameters=float(model.parameters)), CHUNK))


def cached(name: str, **changes: object) -> TorchEngine:
    """The plain engine's model with a prefix cache of its own."""
    engine = TorchEngine.__new__(TorchEngine)
    engine.__dict__.update(plain(name).__dict__, _batch={}, _reserved={})
    for own in ("prefixes", "held"):
        engine.__dict__.pop(own, None)
    engine._spec = replace(plain(name)._spec, prefix_cache=replace(ROOM, **changes))  # type: ignore[arg-type]
    return engine


def pool_of(engine: TorchEngine) -> PrefixCache:
    assert engine.prefixes is not None
    return engine.prefixes


def tokens(count: int, seed: int) -> tuple[int, ...]:
    return tuple(torch.randint(3, 512, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


def request(number: int, *parts: tuple[int, ...], salt: str = "") -> Request:
    return Request(number, sum(parts, ()), OUTPUT_TOKENS, salt)


def prefill(engine: TorchEngine, asked: Request, log: SpanLog | None = None) -> tuple[Prefilled, list[Piece]]:
    pieces: list[Piece] = []
    prefilled = engine.prefill(asked, pieces.append, log or SpanLog())
    prefilled.keep()
    prefilled.release()
    return prefilled, pieces


def state_bits(engine: TorchEngine, asked: Request, pieces: list[Piece]) -> list[tuple[object, ...]]:
    states = [
        State(h.layer, h.kind, h.slot, h.token_start, h.token_end, tensor_of(p)) for p in pieces for h in (p.header,)
    ]
    whole = restore(states, engine._config, asked.state_tokens)
    return [
        (s.layer, s.kind, s.slot, s.start, s.end, xxh3_64_intdigest(bytes_of(s.tensor)))
        for s in extract(whole, engine._config, asked.state_tokens)
    ]


def decoded(engine: TorchEngine, asked: Request, pieces: list[Piece]) -> list[int]:
    engine.join(Handover.of(asked), engine.fetch(pieces))
    found = [engine.step()[0][1] for _ in range(OUTPUT_TOKENS)]
    engine.leave(asked.request_id)
    return found


def check_same(name: str, asked: Request, pieces: list[Piece]) -> None:
    """State bit for bit, and tokens, of an engine without a cache."""
    reference = plain(name)
    _, expected = prefill(reference, asked)
    assert state_bits(reference, asked, pieces) == state_bits(reference, asked, expected)
    assert decoded(reference, asked, pieces) == decoded(reference, asked, expected)


@pytest.mark.parametrize("name", models.names())
def test_a_full_hit_computes_nothing_and_yields_the_same_bits(name: str) -> None:
    engine, log = cached(name), SpanLog()
    asked = request(1, tokens(2 * BLOCK + 1, 1))
    first, _ = prefill(engine, asked)
    log.take()
    again, pieces = prefill(engine, asked, log)
    assert (first.cached_tokens, again.cached_tokens) == (0, asked.state_tokens)
    assert not [span for span in log.take() if span.what == "compute"]
    check_same(name, asked, pieces)


@pytest.mark.parametrize("name", models.names())
def test_after_a_partial_hit_only_the_rest_is_computed_and_the_bits_are_the_same(name: str) -> None:
    engine, log, shared = cached(name, checkpoint_blocks=1), SpanLog(), tokens(2 * BLOCK, 2)
    prefill(engine, request(1, shared, tokens(90, 3)))
    asked = request(2, shared, tokens(75, 4))
    prefilled, pieces = prefill(engine, asked, log)
    assert prefilled.cached_tokens == 2 * BLOCK
    computed = {span.chunk for span in log.take() if span.what == "compute"}
    assert computed == {4, 5, 6}  # 74 tokens after 128 in chunks of 32, counted from the prompt's beginning
    check_same(name, asked, pieces)
    longer = request(3, asked.prompt[: 3 * BLOCK], tokens(20, 5))
    prefilled, pieces = prefill(engine, longer)  # on a prefix that was itself computed after a hit
    assert prefilled.cached_tokens == 3 * BLOCK
    check_same(name, longer, pieces)


def test_the_cached_prefix_leaves_first_and_its_earliest_layer_before_the_others() -> None:
    engine, shared = cached("qwen3_235b"), tokens(2 * BLOCK, 18)
    prefill(engine, request(1, shared, tokens(5, 19)))
    _, pieces = prefill(engine, request(2, shared, tokens(75, 20)))
    order = [(p.header.token_end > 2 * BLOCK, p.header.layer) for p in sorted(pieces, key=lambda p: p.header.piece)]
    sent_before = [layer for is_new, layer in order if not is_new]
    assert order == sorted(order, key=lambda at: at[0])
    assert sent_before == sorted(sent_before)
    assert len(sent_before) == 2 * 2 * len(set(sent_before))  # keys and values of two blocks


@pytest.mark.parametrize("name", models.names())
def test_without_a_checkpoint_at_the_common_end_a_hybrid_hits_nothing_and_a_dense_model_does(name: str) -> None:
    engine, shared = cached(name), tokens(2 * BLOCK, 6)
    prefill(engine, request(1, shared, tokens(BLOCK + 10, 7)))
    asked = request(2, shared, tokens(40, 8))
    prefilled, pieces = prefill(engine, asked)
    assert prefilled.cached_tokens == (2 * BLOCK if name in DENSE else 0)
    check_same(name, asked, pieces)


@pytest.mark.parametrize("name", models.names())
def test_what_was_evicted_is_computed_again_to_the_same_bits(name: str) -> None:
    size = layout_of(name, "tiny").kv_bytes(2 * BLOCK)
    engine, asked = cached(name, capacity_bytes=1.2 * size), request(1, tokens(BLOCK + 9, 9))
    prefill(engine, asked)
    evicted = [weakref.ref(state.tensor) for state in held(engine)]
    prefill(engine, request(2, tokens(2 * BLOCK + 1, 10)))
    assert pool_of(engine).pool.evicted
    assert not any(tensor() is not None for tensor in evicted)  # their memory is free, not only accounted so
    prefilled, pieces = prefill(engine, asked)
    assert prefilled.cached_tokens == 0
    check_same(name, asked, pieces)


@pytest.mark.parametrize("name", models.names())
def test_a_capacity_too_small_for_anything_changes_nothing(name: str) -> None:
    engine, asked = cached(name, capacity_bytes=100.0), request(1, tokens(BLOCK + 20, 11))
    for _ in range(2):
        prefilled, pieces = prefill(engine, asked)
        assert prefilled.cached_tokens == 0
    assert len(pool_of(engine).pool) == 0
    check_same(name, asked, pieces)


def held(engine: TorchEngine) -> list[State]:
    return [state for entry in pool_of(engine).pool._entries.values() for state in entry.payload]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "eviction"), [("kimi_linear", "lru"), ("mimo_v2_flash", "length_aware"), ("qwen3_235b", "length_aware")]
)
def test_the_bytes_accounted_are_the_bytes_of_the_tensors_held(name: str, eviction: str) -> None:
    capacity = 1.5 * layout_of(name, "tiny").kv_bytes(3 * BLOCK)
    engine = cached(name, capacity_bytes=capacity, eviction=eviction, checkpoint_blocks=1)
    shared = tokens(BLOCK, 12)
    for number in range(5):
        prefill(engine, request(number, shared if number % 2 else (), tokens(40 + 40 * number, number)))
        memory = [state.tensor.untyped_storage().nbytes() for state in held(engine)]
        assert pool_of(engine).pool.used_pages == sum(memory) <= capacity
        assert all(state.tensor.untyped_storage().nbytes() == state.nbytes for state in held(engine))
    assert pool_of(engine).pool.evicted


def test_a_request_under_way_pins_its_hit_and_leases_its_tail_until_it_is_delivered() -> None:
    engine, asked = cached("kimi_linear"), request(1, tokens(2 * BLOCK + 31, 13))
    prefill(engine, asked)
    pool = pool_of(engine).pool
    before = pool.used_pages
    pieces: list[Piece] = []
    prefilled = engine.prefill(asked, pieces.append, SpanLog())
    layout = layout_of("kimi_linear", "tiny")
    assert pool.used_pages - before == layout.kv_bytes(2 * BLOCK + 30) - layout.bytes_per_token * 2 * BLOCK
    assert pool.lease(pool.pages - before) is None  # the hit is pinned: not everything can be made room of
    for _ in range(2):  # a second release does no harm
        prefilled.release()
    assert pool.lease(pool.pages) is not None
    assert not held(engine)
    check_same("kimi_linear", asked, pieces)  # the pieces on their way keep their memory although the pool has lost it


def test_a_failed_prefill_holds_nothing_of_the_cache() -> None:
    engine, asked = cached("kimi_linear"), request(1, tokens(2 * BLOCK + 31, 14))
    prefill(engine, asked)

    def refuse(_piece: Piece) -> None:
        raise OSError("the link is gone")

    with pytest.raises(OSError, match="the link is gone"):
        engine.prefill(asked, refuse, SpanLog())
    pool = pool_of(engine).pool
    assert pool.lease(pool.pages) is not None


@pytest.mark.parametrize("name", models.names())
def test_nobody_writes_to_what_the_pool_holds(name: str) -> None:
    engine, shared = cached(name, checkpoint_blocks=1), tokens(BLOCK, 15)
    prefill(engine, request(1, shared, tokens(BLOCK, 16)))
    before = {id(state): xxh3_64_intdigest(bytes_of(state.tensor)) for state in held(engine)}
    for number in (2, 3):
        asked = request(number, shared, tokens(100, number))
        _, pieces = prefill(engine, asked)
        decoded(engine, asked, pieces)
    after = {id(state): xxh3_64_intdigest(bytes_of(state.tensor)) for state in held(engine)}
    assert before.items() <= after.items()


def handed_over(near: TorchEngine, far: TorchEngine, asked: Request) -> tuple[int, int, list[int]]:
    """Tokens that decode held, bytes that were sent, and tokens that came out."""
    held_tokens, pieces = far.reserve(asked), list[Piece]()
    prefilled = near.prefill(asked, pieces.append, SpanLog(), held_tokens)
    prefilled.keep()
    prefilled.release()
    far.join(Handover.from_meta(prefilled.handover.as_meta()), far.fetch(pieces))
    found = [far.step()[0][1] for _ in range(OUTPUT_TOKENS)]
    far.leave(asked.request_id)
    return held_tokens, sum(piece.header.payload_bytes for piece in pieces), found


@pytest.mark.parametrize("name", models.names())
def test_decode_goes_on_from_the_blocks_that_it_holds_and_the_increment_that_it_gets(name: str) -> None:
    near, far, shared = cached(name), cached(name, increments=True), tokens(BLOCK, 21)
    layout = layout_of(name, "tiny")
    for number, held_before in ((1, 0), (2, BLOCK)):
        asked = request(number, shared, tokens(75, 21 + number))
        held_tokens, sent_bytes, found = handed_over(near, far, asked)
        assert held_tokens == held_before  # recurrent state is sent anyway, so decode needs no checkpoint for a hit
        assert sent_bytes == layout.kv_bytes(asked.state_tokens) - layout.bytes_per_token * held_before
        reference = plain(name)
        assert found == decoded(reference, asked, prefill(reference, asked)[1])
    assert far.held is not None
    payloads = [state for entry in far.held.pool._entries.values() for state in entry.payload]  # type: ignore[attr-defined]
    assert sum(state.nbytes for state in payloads) == far.held.pool.used_pages == layout.bytes_per_token * 3 * BLOCK


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the same test runs on CPU above")
@pytest.mark.parametrize("name", models.names())
def test_decode_goes_on_from_the_blocks_that_it_holds_on_cuda(name: str) -> None:
    spec = replace(plain(name)._spec, device="cuda")
    kept = replace(spec, prefix_cache=replace(ROOM, increments=True, checkpoint_blocks=1))
    reference, near, far = TorchEngine(spec), TorchEngine(kept), TorchEngine(kept)
    shared = tokens(BLOCK, 21)
    for number, held_before in ((1, 0), (2, BLOCK)):
        asked = request(number, shared, tokens(75, 21 + number))
        held_tokens, _, found = handed_over(near, far, asked)
        assert held_tokens == held_before
        reference.prefill_and_join(asked, SpanLog())
        assert found == [reference.step()[0][1] for _ in range(OUTPUT_TOKENS)]
        reference.leave(number)


def test_decode_refuses_a_request_that_lacks_what_is_not_reserved_here() -> None:
    near, far, shared = cached("qwen3_235b"), cached("qwen3_235b", increments=True), tokens(BLOCK, 24)
    handed_over(near, far, request(1, shared, tokens(10, 25)))
    asked, pieces = request(2, shared, tokens(20, 26)), list[Piece]()
    assert far.reserve(asked) == BLOCK
    handover = near.prefill(asked, pieces.append, SpanLog(), BLOCK).handover
    for wrong in (replace(handover, held_key=1), replace(handover, held_tokens=2 * BLOCK), handover):
        with pytest.raises(UserError, match=r"held_tokens: request 2 came without its first"):
            far.join(wrong, far.fetch(pieces))  # the first failure ends the reservation: the right one comes too late
    assert far.held is not None
    assert far.held.pool.lease(far.held.pool.pages) is not None  # nothing is pinned any more
    assert far.reserve(asked) == 0


def test_what_is_reserved_stays_until_the_request_has_left() -> None:
    layout = layout_of("qwen3_235b", "tiny")
    near = cached("qwen3_235b")
    far = cached("qwen3_235b", increments=True, capacity_bytes=1.5 * layout.bytes_per_token * BLOCK)
    asked, other = request(1, tokens(BLOCK + 9, 27)), request(2, tokens(BLOCK + 9, 28))
    handed_over(near, far, asked)
    assert far.reserve(asked) == BLOCK
    handed_over(near, far, other)  # finds no room, since what is reserved may not go
    assert handed_over(near, far, replace(asked, request_id=3))[0] == BLOCK
    assert far.reserve(asked) == BLOCK  # once more, for the same request: the old reservation is given up
    far._reserved.pop(1).close()
    assert handed_over(near, far, other)[0] == 0
    assert handed_over(near, far, other)[0] == BLOCK


def test_prompts_of_another_salt_or_another_model_share_nothing() -> None:
    engine, prompt = cached("qwen3_235b"), tokens(2 * BLOCK, 17)
    prefill(engine, request(1, prompt, salt="a"))
    assert prefill(engine, request(2, prompt, salt="b"))[0].cached_tokens == 0
    assert prefill(engine, request(3, prompt, salt="a"))[0].cached_tokens == BLOCK
    other = PrefixCache(ROOM, layout_of("qwen3_235b", "tiny"), engine._config, "another model")
    other.pool = pool_of(engine).pool
    assert other.open(prompt, "a").cached_tokens == 0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 2), max_size=24), st.lists(st.integers(0, 2), max_size=24), st.integers(1, 5))
def test_two_chains_agree_exactly_as_far_as_the_prompts_full_blocks_do(a: list[int], b: list[int], block: int) -> None:
    chains = [block_chain(prompt, block, b"root") for prompt in (a, b)]
    assert [len(chain) for chain in chains] == [len(a) // block, len(b) // block]
    for n in range(1, min(map(len, chains)) + 1):
        assert (chains[0][n - 1] == chains[1][n - 1]) == (a[: n * block] == b[: n * block])


@pytest.mark.parametrize("name", models.names())
def test_the_groups_of_a_model_hold_all_of_its_state(name: str) -> None:
    layout, groups = layout_of(name, "tiny"), groups_of(layout_of(name, "tiny"))
    sizes = {kind: sum(group.bytes for group in groups if group.kind == kind) for kind in ("block", "request")}
    assert sizes["request"] + sizes["block"] * 5000 == layout.kv_bytes(5000)
    assert (sizes["request"] == 0) == (name in DENSE)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"capacity_bytes": -1.0}, r"prefix_cache\.capacity_bytes: -1\.0; accepted: 0 \(off\)"),
        ({"block_tokens": 0}, r"prefix_cache\.block_tokens: 0"),
        ({"checkpoint_blocks": -1}, r"prefix_cache\.checkpoint_blocks: -1"),
        ({"capacity_bytes": 1.0, "block_tokens": 48}, r"prefix_cache\.block_tokens: 48; accepted: multiples of chunk_tokens 32"),
        ({"capacity_bytes": 1.0, "block_tokens": 64, "eviction": "random"}, r"cache\.eviction: 'random'"),
    ],
)  # fmt: skip
def test_a_prefix_cache_that_cannot_work_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prefill(cached("kimi_linear", **values), request(1, tokens(10, 1)))


@pytest.mark.parametrize("name", ["kimi_linear", "mimo_v2_flash", "qwen3_235b"])
def test_a_prefix_that_another_instance_lent_serves_as_ones_own(name: str) -> None:
    lender, borrower = cached(name), cached(name)
    first, then = request(1, tokens(2 * BLOCK + 9, 1)), request(2, tokens(2 * BLOCK + 9, 1), tokens(70, 2))
    chain = block_chain(first.prompt[:-1], BLOCK, root_of(lender._spec.identity))
    assert pool_of(lender).lend(chain) is None
    prefill(lender, first)
    states = pool_of(lender).lend(chain)
    assert states is not None
    pool_of(borrower).changes()
    pool_of(borrower).adopt(chain, states)
    changes = pool_of(borrower).changes()
    assert set(changes.added) == set(chain)
    assert changes.added_checkpoints == ([] if name == "qwen3_235b" else [chain[-1]])
    prefilled, pieces = prefill(borrower, then)
    assert prefilled.cached_tokens == 2 * BLOCK
    assert state_bits(borrower, then, pieces) == state_bits(plain(name), then, prefill(plain(name), then)[1])
    # The lender may lose what it lent.
    pool_of(lender).pool._entries.clear()
    assert prefill(borrower, replace(then, request_id=3))[0].cached_tokens == 3 * BLOCK
