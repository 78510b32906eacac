"""Codecs on pieces: trade processor time, and for two of them exactness, for bytes on the link.

A codec maps the raw bytes of one piece to fewer bytes, and back. Which one is used may differ by kind of state, because
kinds differ in what they are: a recurrent state is float32 and small, keys and values are bfloat16 and many. A piece that a
codec does not shrink is sent as it is, so no codec can make a request larger. Lossless codecs first split the elements
into planes of equal byte significance: exponents repeat, mantissas do not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Protocol

import lz4.block
import numpy as np
import torch
import zstandard

from repro.errors import UserError
from repro.kvcache.frames import CodecId, DType, FrameError, FrameHeader, Piece, StateKind, checksum_of
from repro.kvcache.tensors import bytes_of, tensor_from


class Codec(Protocol):
    """One way to encode the payload of a piece. `header` describes the raw tensor."""

    @property
    def id(self) -> CodecId:
        """Its number on the wire."""

    @property
    def lossless(self) -> bool:
        """Whether `decode` gives back every bit."""

    def encode(self, raw: memoryview, header: FrameHeader) -> bytes | memoryview:
        """The encoded payload."""

    def decode(self, payload: memoryview, header: FrameHeader) -> bytes | memoryview:
        """The raw payload. Raises FrameError where `payload` is not an encoding of such a tensor."""


@dataclass(frozen=True)
class Identity:
    """Bytes as they are."""

    id: CodecId = CodecId.NONE
    lossless: bool = True

    def encode(self, raw: memoryview, header: FrameHeader) -> memoryview:  # noqa: ARG002, D102
        return raw

    def decode(self, payload: memoryview, header: FrameHeader) -> memoryview:  # noqa: ARG002, D102
        return payload


@dataclass(frozen=True)
class Zstd:
    """Zstandard over byte planes."""

    level: int = 1
    id: CodecId = CodecId.ZSTD
    lossless: bool = True

    def encode(self, raw: memoryview, header: FrameHeader) -> bytes:  # noqa: D102
        return zstandard.ZstdCompressor(level=self.level).compress(_planes(raw, header.dtype.itemsize))

    def decode(self, payload: memoryview, header: FrameHeader) -> memoryview:  # noqa: D102
        try:
            if zstandard.frame_content_size(payload) != header.raw_bytes:
                raise FrameError(f"zstd: content size is not the {header.raw_bytes} bytes of the header")
            raw = zstandard.ZstdDecompressor().decompress(payload, max_output_size=header.raw_bytes)
        except zstandard.ZstdError as error:
            raise FrameError(f"zstd: {error}") from None
        return _unplanes(raw, header)


@dataclass(frozen=True)
class Lz4:
    """LZ4 blocks over byte planes."""

    id: CodecId = CodecId.LZ4
    lossless: bool = True

    def encode(self, raw: memoryview, header: FrameHeader) -> bytes:  # noqa: D102
        return bytes(lz4.block.compress(_planes(raw, header.dtype.itemsize), store_size=False))

    def decode(self, payload: memoryview, header: FrameHeader) -> memoryview:  # noqa: D102
        try:
            raw = lz4.block.decompress(payload, uncompressed_size=header.raw_bytes)
        except lz4.block.LZ4BlockError as error:
            raise FrameError(f"lz4: {error}") from None
        return _unplanes(raw, header)


@dataclass(frozen=True)
class Quantised:
    """Eight bits per element with one float32 scale per channel: the largest magnitude of the channel meets the type's.

    A channel is everything but the token axis (keys, values, latents), the columns (convolution) or the rows of a
    recurrent state. Elements that are not floating point are refused, and then sent as they are.
    """

    id: CodecId
    element: DType
    largest: float
    lossless: bool = False

    def encode(self, raw: memoryview, header: FrameHeader) -> bytes | memoryview:  # noqa: D102
        if header.dtype not in _FLOATS or math.prod(header.shape) == 0:
            return raw
        tensor = tensor_from(raw, header.dtype, header.shape).float()
        scale = (tensor.abs().amax(dim=_reduced(header), keepdim=True) / self.largest).clamp(min=_SMALLEST)
        scaled = tensor / scale
        codes = scaled.round_() if self.element is DType.INT8 else scaled
        return bytes(bytes_of(scale)) + bytes(bytes_of(codes.to(_ELEMENT[self.element])))

    def decode(self, payload: memoryview, header: FrameHeader) -> memoryview:  # noqa: D102
        shape = list(header.shape)
        if header.dtype not in _FLOATS or not shape:
            raise FrameError(f"{self.id.name.lower()}: {header.dtype.name} of shape {header.shape} is never quantised")
        shape[_reduced(header)] = 1
        scale_bytes, elements = 4 * math.prod(shape), math.prod(header.shape)
        if payload.nbytes != scale_bytes + elements:
            raise FrameError(f"{self.id.name.lower()}: {payload.nbytes} bytes, {scale_bytes + elements} expected")
        scale = tensor_from(payload[:scale_bytes], DType.FLOAT32, tuple(shape))
        codes = tensor_from(payload[scale_bytes:], self.element, header.shape)
        return bytes_of((codes.float() * scale).to(_FLOATS[header.dtype]))


_FLOATS: Final = {DType.FLOAT32: torch.float32, DType.FLOAT16: torch.float16, DType.BFLOAT16: torch.bfloat16}
_ELEMENT: Final = {DType.INT8: torch.int8, DType.FLOAT8_E4M3FN: torch.float8_e4m3fn}
_SMALLEST: Final = 1e-30


def _reduced(header: FrameHeader) -> int:
    """The axis along which a channel runs, counted from the end."""
    if header.kind.token_axis is not None:
        return header.kind.token_axis
    return -1 if header.kind is StateKind.CONVOLUTION or len(header.shape) < 2 else -2


def _planes(raw: memoryview, itemsize: int) -> memoryview | bytes:
    """First all lowest bytes, then all next ones, …"""
    if itemsize == 1:
        return raw
    return np.ascontiguousarray(np.frombuffer(raw, np.uint8).reshape(-1, itemsize).T).data.cast("B")


def _unplanes(planes: bytes, header: FrameHeader) -> memoryview:
    if len(planes) != header.raw_bytes:
        raise FrameError(f"payload: decodes to {len(planes)} bytes, the header says {header.raw_bytes}")
    itemsize = header.dtype.itemsize
    return np.ascontiguousarray(np.frombuffer(planes, np.uint8).reshape(itemsize, -1).T).data.cast("B")


CODECS: Final[Mapping[str, Codec]] = {
    "none": Identity(),
    "zstd": Zstd(),
    "lz4": Lz4(),
    "fp8": Quantised(CodecId.FP8, DType.FLOAT8_E4M3FN, 448.0),
    "int8": Quantised(CodecId.INT8, DType.INT8, 127.0),
}
_BY_ID: Final = {codec.id: codec for codec in CODECS.values()}


@dataclass(frozen=True)
class CodecSpec:
    """Which codec for which kind of state: `default`, and by name of a `StateKind` in lower case where it differs."""

    default: str = "none"
    by_kind: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key, name in {"default": self.default, **self.by_kind}.items():
            if name not in CODECS:
                raise UserError(f"codec.{key}: {name!r} is not one of {', '.join(CODECS)}")
        kinds = [kind.name.lower() for kind in StateKind]
        for kind in self.by_kind:
            if kind not in kinds:
                raise UserError(f"codec.by_kind: {kind!r} is not one of {', '.join(kinds)}")

    def of(self, kind: StateKind) -> Codec:
        """The codec for a kind of state."""
        return CODECS[self.by_kind.get(kind.name.lower(), self.default)]

    @property
    def names(self) -> tuple[str, ...]:
        """All that may be used, each once."""
        return tuple(dict.fromkeys((self.default, *self.by_kind.values())))

    @property
    def lossless(self) -> bool:
        """Whether every bit of every kind of state comes back."""
        return all(CODECS[name].lossless for name in self.names)


def encode(piece: Piece, codec: Codec) -> Piece:
    """The piece encoded, or the very same piece where that would not be smaller."""
    header = piece.header
    if header.codec is not CodecId.NONE:
        raise FrameError(f"codec: piece {header.piece} is already encoded with {header.codec.name}")
    payload = memoryview(codec.encode(piece.payload, header)) if header.raw_bytes else piece.payload
    if payload.nbytes >= header.raw_bytes:
        return piece
    sealed = replace(header, codec=codec.id, payload_bytes=payload.nbytes, checksum=checksum_of(payload))
    return Piece(sealed, payload)


def decode(piece: Piece) -> Piece:
    """The piece with its raw payload. Raises FrameError where the payload is no encoding of what the header says."""
    header = piece.header
    if header.codec is CodecId.NONE:
        return piece
    raw = memoryview(_BY_ID[header.codec].decode(piece.payload, header))
    plain = replace(header, codec=CodecId.NONE, payload_bytes=raw.nbytes, checksum=checksum_of(raw))
    return Piece(plain, raw)
