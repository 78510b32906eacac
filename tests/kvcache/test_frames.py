"""Frames, manifests and assemblies: what is sent arrives as it was, and nothing else is taken for it."""

import random
from dataclasses import replace

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from repro.kvcache.frames import (
    HEADER_BYTES,
    Assembly,
    CodecId,
    DType,
    FrameError,
    FrameHeader,
    FrameLimits,
    Manifest,
    Piece,
    StateKind,
)
from repro.kvcache.tensors import bytes_of, tensor_of, torch_dtype, wire_dtype


def a_piece(piece: int = 0, tokens: tuple[int, int] = (0, 4), layer: int = 3, **fields) -> Piece:
    length = tokens[1] - tokens[0]
    payload = bytes((7 * piece + i) % 256 for i in range(2 * length * 8))
    usual = {
        "request_id": 9,
        "layer": layer,
        "kind": StateKind.KEY,
        "dtype": DType.BFLOAT16,
        "shape": (1, 2, length, 4),
    }
    return Piece.seal(payload, piece=piece, tokens=tokens, **{**usual, **fields})


def resealed(header: bytes) -> bytes:
    body = header[: HEADER_BYTES - 8]
    return body + xxhash.xxh3_64_intdigest(body).to_bytes(8, "little")


@settings(max_examples=300, deadline=None)
@given(
    dtype=st.sampled_from(list(DType)),
    shape=st.lists(st.integers(0, 5), max_size=6),
    request=st.integers(0, 2**64 - 1),
    slot=st.integers(0, 2**16 - 1),
    data=st.data(),
)
def test_a_tensor_of_any_dtype_and_shape_comes_back_bit_for_bit(dtype, shape, request, slot, data):
    elements = torch.Size(shape).numel()
    raw = data.draw(st.binary(min_size=elements * dtype.itemsize, max_size=elements * dtype.itemsize))
    if dtype is DType.BOOL:
        raw = bytes(byte & 1 for byte in raw)
    made = torch.frombuffer(bytearray(raw or b"\0"), dtype=torch.uint8)[: len(raw)]
    tensor = made.view(torch_dtype(dtype)).view(shape) if elements else torch.empty(shape, dtype=torch_dtype(dtype))
    piece = Piece.seal(
        bytes_of(tensor), request_id=request, piece=5, layer=1, kind=StateKind.RECURRENT,
        dtype=wire_dtype(tensor.dtype), shape=shape, tokens=(0, 17), slot=slot,
    )  # fmt: skip
    header = FrameHeader.unpack(piece.header.pack())
    assert header == piece.header
    back = tensor_of(Piece(header, piece.payload))
    assert back.dtype == tensor.dtype
    assert back.shape == tensor.shape
    assert bytes(bytes_of(back)) == raw


def test_a_contiguous_tensor_is_framed_and_read_without_copying():
    tensor = torch.arange(64, dtype=torch.float32).view(1, 2, 8, 4)
    payload = bytes_of(tensor)
    piece = Piece.seal(
        payload, request_id=1, piece=0, layer=0, kind=StateKind.KEY, dtype=DType.FLOAT32, shape=(1, 2, 8, 4),
        tokens=(0, 8),
    )  # fmt: skip
    tensor[0, 0, 0, 0] = 41.0
    assert tensor_of(piece)[0, 0, 0, 0] == 41.0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda b: b"XXXX" + b[4:], "magic"),
        (lambda b: b[:4] + b"\x63\x00" + b[6:], "version"),
        (lambda b: b[:20], "header: 20 bytes"),
        (lambda b: b[:30] + bytes([b[30] ^ 1]) + b[31:], "header checksum"),
        (lambda b: resealed(b[:7] + b"\x63" + b[8:]), "kind"),
        (lambda b: resealed(b[:24] + b"\x63" + b[25:]), "dtype"),
        (lambda b: resealed(b[:25] + b"\x63" + b[26:]), "codec"),
        (lambda b: resealed(b[:6] + b"\x07" + b[7:]), "shape"),
        (lambda b: resealed(b[:48] + b"\x01" + b[49:]), "shape"),
        (lambda b: resealed(b[:20] + b"\xff\xff\xff\xff" + b[24:]), "layer"),
        (lambda b: resealed(b[:16] + b"\xff\xff\xff\xff" + b[20:]), "piece"),
        (lambda b: resealed(b[:36] + b"\xff\xff\xff\xff" + b[40:]), "shape"),
        (lambda b: resealed(b[:62] + b"\x01" + b[63:]), "token range"),
        (lambda b: resealed(b[:78] + b"\xff" * 2 + b[80:]), "payload_bytes"),
    ],
)
def test_a_wrong_field_is_named(change, named):
    with pytest.raises(FrameError, match=named):
        FrameHeader.unpack(change(a_piece().header.pack()))


@pytest.mark.parametrize(
    ("limits", "named"),
    [
        (FrameLimits(max_payload_bytes=63), "payload_bytes"),
        (FrameLimits(max_layers=3), "layer"),
        (FrameLimits(max_tokens=3), "token range"),
        (FrameLimits(max_pieces=0), "piece"),
    ],
)
def test_a_receiver_refuses_what_is_beyond_its_limits(limits, named):
    with pytest.raises(FrameError, match=named):
        FrameHeader.unpack(a_piece().header.pack(), limits)


def test_an_encoded_piece_is_bounded_by_its_decoded_size():
    with pytest.raises(FrameError, match="raw size"):
        a_piece(codec=CodecId.ZSTD)
    huge = replace(a_piece().header, shape=(1, 2**16, 4, 2**16), codec=CodecId.ZSTD, payload_bytes=10)
    with pytest.raises(FrameError, match="decoded bytes"):
        huge.pack()


def test_an_assembly_takes_pieces_in_any_order_and_returns_them_in_theirs():
    pieces = [a_piece(i, (4 * i, 4 * i + 4)) for i in range(6)]
    manifest = Manifest.unpack(Manifest.of(9, [p.header for p in pieces], {"first_token": 3, "prompt": [1, 2]}).pack())
    assert manifest.meta == {"first_token": 3, "prompt": [1, 2]}
    assembly = Assembly(9)
    for piece in (pieces[i] for i in (3, 0, 5, 1, 4)):
        assembly.add(piece)
    assert assembly.missing(manifest) == [2]
    with pytest.raises(FrameError, match=r"1 of 6 pieces missing \(2\)"):
        assembly.complete(manifest)
    assembly.add(pieces[2])
    assert assembly.complete(manifest) == pieces


def test_an_assembly_refuses_duplicates_overlaps_strangers_and_altered_payloads():
    assembly = Assembly(9)
    assembly.add(a_piece(0, (0, 4)))
    for piece, named in [
        (a_piece(0, (4, 8)), "came twice"),
        (a_piece(1, (3, 7)), "overlaps"),
        (a_piece(1, (0, 4)), "overlaps"),
        (a_piece(1, (4, 8), request_id=8), "belongs to request 8"),
        (Piece(a_piece(1, (4, 8)).header, memoryview(bytes(64))), "checksum of piece 1"),
        (Piece(a_piece(1, (4, 8)).header, memoryview(bytes(63))), "63 bytes"),
    ]:
        with pytest.raises(FrameError, match=named):
            assembly.add(piece)
    assert len(assembly) == 1
    state = {"kind": StateKind.RECURRENT, "shape": (4, 8), "tokens": (0, 4)}
    assembly.add(a_piece(1, **state))
    with pytest.raises(FrameError, match="overlaps"):
        assembly.add(a_piece(2, **state))


def test_an_assembly_refuses_a_manifest_that_is_not_of_its_pieces():
    pieces = [a_piece(i, (4 * i, 4 * i + 4)) for i in range(2)]
    manifest = Manifest.of(9, [p.header for p in pieces])
    for changed, named in [
        (replace(manifest, request_id=8), "request 8"),
        (replace(manifest, pieces=1), "beyond the manifest"),
        (replace(manifest, payload_bytes=1), "payload_bytes"),
        (replace(manifest, digest=bytes(16)), "digest"),
    ]:
        assembly = Assembly(9)
        for piece in pieces:
            assembly.add(piece)
        with pytest.raises(FrameError, match=named):
            assembly.complete(changed)


@pytest.mark.parametrize(
    ("meta", "limits", "named"),
    [({"a": "x" * 100}, FrameLimits(max_meta_bytes=50), "meta"), ({}, FrameLimits(max_pieces=1), "pieces")],
)
def test_a_manifest_beyond_the_limits_is_refused_before_it_is_parsed(meta, limits, named):
    packed = Manifest.of(9, [a_piece(i, (4 * i, 4 * i + 4)).header for i in range(2)], meta).pack()
    with pytest.raises(FrameError, match=named):
        Manifest.unpack(packed, limits)


def mutate(data: bytes, random_: random.Random) -> bytes:
    """One to four blows: flip a bit, set, cut, insert or repeat bytes, write an extreme number."""
    out = bytearray(data)
    for _ in range(random_.randint(1, 4)):
        at = random_.randrange(len(out)) if out else 0
        match random_.randrange(6):
            case 0 if out:
                out[at] ^= 1 << random_.randrange(8)
            case 1 if out:
                out[at] = random_.randrange(256)
            case 2:
                del out[at:]
            case 3:
                out[at:at] = random_.randbytes(random_.randint(1, 9))
            case 4:
                out[at:at] = out[at : at + random_.randint(1, 16)]
            case _:
                out[at : at + 8] = random_.choice([b"\0" * 8, b"\xff" * 8, b"\x7f" + b"\xff" * 7, b"\1" + b"\0" * 7])
    return bytes(out)


@pytest.mark.slow
def test_100_000_mutated_inputs_are_all_refused_by_name():
    random_ = random.Random(2604)
    pieces = [a_piece(i, (4 * i, 4 * i + 4)) for i in range(3)]
    headers = [p.header for p in pieces]
    manifest = Manifest.of(9, headers, {"prompt": [1, 2, 3], "first_token": 4})
    packed = [h.pack() for h in headers]
    tried = 0

    def receive(mutated: bytes, which: int) -> None:
        if which == 3:
            Manifest.unpack(mutated)
            return
        assembly = Assembly(9)
        for i, piece in enumerate(pieces):
            assembly.add(piece if i != which else Piece(FrameHeader.unpack(mutated), piece.payload))
        assembly.complete(manifest)

    while tried < 100_000:
        which = random_.randrange(4)
        original = manifest.pack() if which == 3 else packed[which]
        mutated = mutate(original, random_)
        if which < 3 and random_.random() < 0.5 and len(mutated) >= HEADER_BYTES:
            mutated = resealed(mutated)  # a sender that is wrong but signs what it sends
        if mutated[: len(original)] == original:
            continue  # bytes behind a header belong to its payload
        tried += 1
        with pytest.raises(FrameError, match=r"\w+"):
            receive(mutated, which)
