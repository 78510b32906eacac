"""Codecs: what is lossless gives back every bit, what is not keeps its bound, and nothing ever grows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repro.errors import UserError
from repro.kvcache.codecs import CODECS, CodecSpec, decode, encode
from repro.kvcache.frames import CodecId, FrameError, FrameHeader, Piece, StateKind
from repro.kvcache.state import State, seal
from repro.kvcache.tensors import tensor_of

LOSSY = [name for name, codec in CODECS.items() if not codec.lossless]


def a_state(kind: StateKind = StateKind.KEY, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> State:
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn((2, 4, 64, 32), generator=generator) * torch.logspace(-3, 2, 32)
    return State(1, kind, 0, 0, 64, tensor.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.bool])
@pytest.mark.parametrize("name", CODECS)
def test_every_codec_gives_back_the_tensor_it_was_given(name, dtype):
    state = a_state(dtype=dtype)
    piece = encode(seal(state, 1, 0), CODECS[name])
    assert FrameHeader.unpack(piece.header.pack()) == piece.header
    piece.verify()
    back = tensor_of(decode(piece))
    assert back.dtype == dtype
    if CODECS[name].lossless or not dtype.is_floating_point:
        assert torch.equal(back, state.tensor)
    else:
        # Half a step of the coarsest code, relative to the channel's largest magnitude; and the rounding of the dtype.
        largest = state.tensor.float().abs().amax(dim=-2, keepdim=True)
        step = 1 / 127 if name == "int8" else 2**-3
        rounding = 2**-8 if dtype is torch.bfloat16 else 2**-10
        assert ((back.float() - state.tensor.float()).abs() <= largest * (step / 2 + rounding)).all()


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(CODECS)),
    kind=st.sampled_from([StateKind.RECURRENT, StateKind.CONVOLUTION, StateKind.AUXILIARY]),
    shape=st.lists(st.integers(0, 6), max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8]),
    seed=st.integers(0, 99),
)
def test_no_codec_makes_a_piece_larger_whatever_its_shape(name, kind, shape, dtype, seed):
    tensor = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 50).to(dtype)
    plain = seal(State(0, kind, 0, 0, 9, tensor), 1, 0)
    piece = encode(plain, CODECS[name])
    assert piece.header.payload_bytes <= plain.header.payload_bytes
    assert (piece.header.codec is CodecId.NONE) == (piece.header.payload_bytes == plain.header.payload_bytes)
    back = tensor_of(decode(piece))
    assert back.shape == tensor.shape
    if CODECS[name].lossless:
        assert torch.equal(back, tensor)


@pytest.mark.parametrize("name", LOSSY)
def test_quantising_halves_bfloat16_and_quarters_float32(name):
    for dtype, least in ((torch.bfloat16, 1.8), (torch.float32, 3.5)):
        plain = seal(a_state(dtype=dtype), 1, 0)
        assert plain.header.payload_bytes / encode(plain, CODECS[name]).header.payload_bytes > least


def test_an_all_zero_channel_stays_zero():
    state = State(0, StateKind.KEY, 0, 0, 8, torch.zeros((1, 2, 8, 32), dtype=torch.bfloat16))
    for name in LOSSY:
        assert not tensor_of(decode(encode(seal(state, 1, 0), CODECS[name]))).any()


@pytest.mark.parametrize("name", ["zstd", "lz4", "fp8", "int8"])
def test_a_payload_that_is_no_encoding_of_its_header_is_refused(name):
    piece = encode(seal(State(0, StateKind.KEY, 0, 0, 64, torch.zeros((1, 4, 64, 32))), 1, 0), CODECS[name])
    for payload in (memoryview(b""), piece.payload[:-1], memoryview(bytes(len(piece.payload)) + b"x")):
        with pytest.raises(FrameError):
            decode(Piece(piece.header, payload))


def test_a_codec_is_chosen_by_kind_and_a_wrong_name_is_named():
    spec = CodecSpec("fp8", {"recurrent": "zstd"})
    assert spec.of(StateKind.RECURRENT).id is CodecId.ZSTD
    assert spec.of(StateKind.LATENT).id is CodecId.FP8
    with pytest.raises(UserError, match=r"codec\.default: 'gzip' is not one of none, zstd"):
        CodecSpec("gzip")
    with pytest.raises(UserError, match=r"codec\.by_kind: 'keys' is not one of key"):
        CodecSpec(by_kind={"keys": "zstd"})
