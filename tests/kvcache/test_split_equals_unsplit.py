"""A request prefilled in one place and decoded in another gives the tokens that it would have given in one place.

All that passes between the two is frames: the decode side is built from their bytes. A split and an unsplit run use the
same chunks; their logits are then equal bit for bit on CPU (the documented tolerance is 0), so are the tokens.
"""

from functools import cache

import pytest
import torch
from transformers import DynamicCache

from repro.errors import UserError
from repro.kvcache.capture import LayerwiseCapture
from repro.kvcache.frames import Assembly, FrameHeader, Manifest, Piece, StateKind
from repro.kvcache.state import State, extract, layout, restore, seal
from repro.kvcache.tensors import tensor_of
from repro.models import spec
from repro.models.architectures import layout_of
from repro.models.build import build
from repro.models.prefill import chunked_prefill, greedy_decode

LENGTHS = (
    1,
    17,
    512,
    1100,
)  # below, at and beyond the tiny window (32) and the chunk (512), of which the last needs three
CHUNK = 512
STEPS = 4


@cache
def tiny(name: str) -> torch.nn.Module:
    torch.set_num_threads(1)
    return build(spec.load(name, "tiny"))


def prompt(tokens: int, batch: int) -> torch.Tensor:
    return torch.randint(3, 500, (batch, tokens), generator=torch.Generator().manual_seed(tokens))


def over_the_wire(pieces: list[Piece]) -> list[State]:
    """What a receiver makes of the bytes, whatever their order."""
    manifest = Manifest.unpack(Manifest.of(7, [p.header for p in pieces]).pack())
    assembly = Assembly(7)
    for piece in reversed(pieces):
        assembly.add(Piece(FrameHeader.unpack(piece.header.pack()), memoryview(bytearray(piece.payload))))
    return [
        State(h.layer, h.kind, h.slot, h.token_start, h.token_end, tensor_of(piece))
        for piece in assembly.complete(manifest)
        for h in (piece.header,)
    ]


def prefill_in_pieces(model, ids, start=0, cache=None, chunk=CHUNK):
    pieces: list[Piece] = []
    cache = DynamicCache(config=model.config) if cache is None else cache

    def emit(state: State) -> None:
        copied = State(state.layer, state.kind, state.slot, state.start, state.end, state.tensor.clone())
        pieces.append(seal(copied, 7, len(pieces)))

    with LayerwiseCapture(model, cache, emit) as capture:
        cache, logits = chunked_prefill(model, ids, chunk, cache, start, on_chunk=capture.chunk)
    return pieces, cache, logits.argmax(-1)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("tokens", [1, 17, 512, pytest.param(1100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", spec.names())
def test_split_equals_unsplit_token_for_token(name, tokens, batch):
    model = tiny(name)
    pieces, here, first = prefill_in_pieces(model, prompt(tokens, batch))
    assert sum(p.header.payload_bytes for p in pieces) == batch * layout_of(name, "tiny").kv_bytes(tokens)
    there = restore(over_the_wire(pieces), model.config, tokens)
    unsplit, unsplit_logits = greedy_decode(model, here, first, STEPS, tokens)
    split, split_logits = greedy_decode(model, there, first, STEPS, tokens)
    assert torch.equal(split, unsplit)
    assert torch.equal(split_logits, unsplit_logits)


@pytest.mark.parametrize("name", spec.names())
def test_two_derivations_of_a_layout_agree(name):
    assert layout(build(spec.load(name, "tiny"), "meta")) == layout_of(name, "tiny")


@pytest.mark.slow
@pytest.mark.parametrize("name", spec.names())
def test_the_layout_of_the_full_model_is_what_its_cache_classes_say(name):
    assert layout(build(spec.load(name, "full"), "meta")) == layout_of(name, "full")


@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 40])
@pytest.mark.parametrize("name", ["kimi_linear", "mimo_v2_flash", "qwen3_5_397b", "minimax_m2_5"])
def test_the_layout_counts_the_bytes_of_a_real_cache(name, tokens):
    model = tiny(name)
    filled, _ = chunked_prefill(model, prompt(tokens, 1))
    assert sum(s.nbytes for s in extract(filled, model.config, tokens)) == layout_of(name, "tiny").kv_bytes(tokens)


@pytest.mark.parametrize("cached", [1, 16, 33])
@pytest.mark.parametrize("name", spec.names())
def test_a_cached_prefix_ships_only_the_increment_and_the_states_of_the_whole_prefix(name, cached):
    model, ids = tiny(name), prompt(48, 1)
    prefix, _ = chunked_prefill(model, ids[:, :cached])
    states = extract(prefix, model.config, cached)
    held = [State(s.layer, s.kind, s.slot, s.start, s.end, s.tensor.clone()) for s in states]
    pieces, here, first = prefill_in_pieces(model, ids, start=cached, cache=prefix, chunk=16)
    for header in (p.header for p in pieces):
        grows = header.kind.token_axis is not None and not header.kind.is_windowed
        assert not grows or header.token_start >= cached
    own = layout_of(name, "tiny")
    windows = sum(s.kv_bytes(48) for s in own.states if s.window_tokens is not None)
    fixed = sum(s.bytes_fixed for s in own.states)
    assert sum(p.header.payload_bytes for p in pieces) == fixed + windows + own.bytes_per_token * (48 - cached)
    # The decode side has the prefix's per-token states; those that stand for a whole prefix came anew.
    kept = [s for s in held if s.kind.token_axis is not None and not s.kind.is_windowed]
    there = restore([*over_the_wire(pieces), *kept], model.config, 48)
    assert torch.equal(
        greedy_decode(model, there, first, STEPS, 48)[0], greedy_decode(model, here, first, STEPS, 48)[0]
    )


def test_layers_emit_in_order_and_closing_states_follow_with_the_last_chunk():
    pieces, _, _ = prefill_in_pieces(tiny("kimi_linear"), prompt(40, 1), chunk=16)
    order = [(p.header.token_end, p.header.layer) for p in pieces]
    assert order == sorted(order)
    closing = [p.header for p in pieces if p.header.kind in (StateKind.RECURRENT, StateKind.CONVOLUTION)]
    assert closing
    assert all(h.token_end == 40 for h in closing)
    again, _, _ = prefill_in_pieces(tiny("kimi_linear"), prompt(40, 1), chunk=16)
    assert [p.header for p in again] == [p.header for p in pieces]


def test_a_state_that_is_missing_doubled_or_has_a_gap_is_named():
    model, ids = tiny("kimi_linear"), prompt(40, 1)
    states = over_the_wire(prefill_in_pieces(model, ids, chunk=16)[0])
    latent = [i for i, s in enumerate(states) if s.kind is StateKind.LATENT]
    for broken, named in [
        ([s for s in states if s.kind is not StateKind.RECURRENT or s.layer], r"layer 0: state missing: recurrent"),
        ([s for s in states if s.kind is not StateKind.LATENT], r"layer 3: state missing: key"),
        ([s for i, s in enumerate(states) if i != latent[0]], "begins at token 16"),
        ([s for i, s in enumerate(states) if i != latent[2]], r"\[0, 16\) and \[32, 40\)"),
        (states[:-2], "ends at token 32 of 40"),
    ]:
        with pytest.raises(UserError, match=named):
            restore(broken, model.config, 40)
    with pytest.raises(UserError, match="ends at token 40 of 41"):
        restore(states, model.config, 41)


def test_a_cache_is_extracted_as_views_of_its_own_memory():
    model = tiny("minimax_m2_5")
    filled, _ = chunked_prefill(model, prompt(17, 1))
    key = extract(filled, model.config, 17)[0].tensor
    assert key.data_ptr() == filled.layers[0].keys.data_ptr()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the same test runs on CPU above")
@pytest.mark.parametrize("name", spec.names())
def test_split_equals_unsplit_on_cuda(name):
    model = build(spec.load(name, "tiny"), "cuda")
    pieces, here, first = prefill_in_pieces(model, prompt(512, 3).cuda())
    there = restore(over_the_wire(pieces), model.config, 512, "cuda")
    assert torch.equal(
        greedy_decode(model, there, first, STEPS, 512)[0], greedy_decode(model, here, first, STEPS, 512)[0]
    )
