"""The wire format of a piece of a request's KVCache (§3.3), and the manifest by which a lost or forged piece is noticed.

A *piece* is one state tensor of one layer for one range of tokens. On the link it is a header of fixed size and the
tensor's raw bytes. The header carries its own checksum and is judged against `FrameLimits` before a byte is allocated,
so that a receiver never trusts a length it was sent. A *manifest* closes a request: how many pieces there are and a
digest over all of them. An *assembly* collects pieces in any order and refuses duplicates, overlaps and strangers.

No torch here: the router and the transport move pieces without it. `repro.kvcache.tensors` joins pieces and tensors.
"""

from __future__ import annotations

import json
import math
import struct
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Final, TypeVar

import xxhash

from repro.errors import UserError
from repro.models.layout import StateKind as StateKind

JSON = Any  # what json.loads yields; the standard library types it no closer
Buffer = bytes | bytearray | memoryview

VERSION: Final = 2
MAX_DIMS: Final = 6
CHECKSUM_BLOCK_BYTES: Final = 1 << 18

_MAGIC: Final = b"PKVF"
_MANIFEST_MAGIC: Final = b"PKVM"
# magic, version, ndim, kind | request, piece, layer | dtype, codec, slot, reserved | shape | tokens, payload | checksum
_HEADER: Final = struct.Struct("<4sHBBQIIBBHI6IQQQ16s")
_MANIFEST: Final = struct.Struct("<4sHHQIIQ16s")
_SEAL: Final = struct.Struct("<Q")
HEADER_BYTES: Final = _HEADER.size + _SEAL.size
MANIFEST_PREFIX_BYTES: Final = _MANIFEST.size + _SEAL.size


class FrameError(UserError):
    """A frame, manifest or set of pieces that cannot be what the sender meant. The message names the field."""


class DType(IntEnum):
    """Element types, by the name that torch gives them in lower case."""

    FLOAT64 = 1
    FLOAT32 = 2
    FLOAT16 = 3
    BFLOAT16 = 4
    FLOAT8_E4M3FN = 5
    FLOAT8_E5M2 = 6
    INT64 = 7
    INT32 = 8
    INT16 = 9
    INT8 = 10
    UINT8 = 11
    BOOL = 12

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return _ITEMSIZE[self]


_ITEMSIZE: Final = {
    DType.FLOAT64: 8,
    DType.FLOAT32: 4,
    DType.FLOAT16: 2,
    DType.BFLOAT16: 2,
    DType.FLOAT8_E4M3FN: 1,
    DType.FLOAT8_E5M2: 1,
    DType.INT64: 8,
    DType.INT32: 4,
    DType.INT16: 2,
    DType.INT8: 1,
    DType.UINT8: 1,
    DType.BOOL: 1,
}


class CodecId(IntEnum):
    """How a payload is encoded; `repro.kvcache.codecs` holds the codecs themselves."""

    NONE = 0
    ZSTD = 1
    LZ4 = 2
    FP8 = 3
    INT8 = 4


@dataclass(frozen=True, slots=True)
class FrameLimits:
    """What a receiver is willing to believe. Anything beyond is refused before allocation."""

    max_payload_bytes: int = 1 << 32
    max_layers: int = 4096
    max_tokens: int = 1 << 24
    max_pieces: int = 1 << 20
    max_meta_bytes: int = 1 << 24


DEFAULT_LIMITS: Final = FrameLimits()


def block_digests(payload: Buffer) -> list[bytes]:
    """xxh3_128 of each `CHECKSUM_BLOCK_BYTES` of a payload, one at least."""
    view = memoryview(payload)
    starts = range(0, max(1, len(view)), CHECKSUM_BLOCK_BYTES)
    return [xxhash.xxh3_128_digest(view[at : at + CHECKSUM_BLOCK_BYTES]) for at in starts]


def checksum_of(payload: Buffer) -> bytes:
    """16 bytes: xxh3_128 over the digests of the payload's blocks, which may so be computed in any order, by anyone."""
    return checksum_of_blocks(block_digests(payload))


def checksum_of_blocks(digests: Iterable[bytes]) -> bytes:
    """The checksum of a payload with these block digests."""
    return xxhash.xxh3_128_digest(b"".join(digests))


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """All that is known of a piece before its bytes are read.

    `shape` and `dtype` describe the decoded tensor; `payload_bytes` and `checksum` the bytes on the link. `slot` tells
    apart several states of one kind in one layer. Tokens are counted from the request's beginning, the end excluded.
    """

    request_id: int
    piece: int
    layer: int
    kind: StateKind
    dtype: DType
    shape: tuple[int, ...]
    token_start: int
    token_end: int
    payload_bytes: int
    checksum: bytes
    codec: CodecId = CodecId.NONE
    slot: int = 0

    @property
    def raw_bytes(self) -> int:
        """Size of the decoded tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def pack(self) -> bytes:
        """The header's `HEADER_BYTES` bytes. Raises FrameError where a field does not fit the format."""
        _check(self, DEFAULT_LIMITS)
        body = _HEADER.pack(
            _MAGIC, VERSION, len(self.shape), self.kind, self.request_id, self.piece, self.layer, self.dtype,
            self.codec, self.slot, 0, *self.shape, *(0,) * (MAX_DIMS - len(self.shape)),
            self.token_start, self.token_end, self.payload_bytes, self.checksum,
        )  # fmt: skip
        return body + _SEAL.pack(xxhash.xxh3_64_intdigest(body))

    @staticmethod
    def unpack(buf: Buffer, limits: FrameLimits = DEFAULT_LIMITS) -> FrameHeader:
        """Read and judge a header. Raises FrameError naming the first field that is wrong; allocates nothing by it."""
        if len(buf) < HEADER_BYTES:
            raise FrameError(f"header: {len(buf)} bytes, {HEADER_BYTES} needed")
        body = memoryview(buf)[: _HEADER.size]
        magic, version, ndim, kind, request_id, piece, layer, dtype, codec, slot, reserved, *rest = _HEADER.unpack(body)
        dims, (token_start, token_end, payload_bytes, checksum) = rest[:MAX_DIMS], rest[MAX_DIMS:]
        if magic != _MAGIC:
            raise FrameError(f"magic: {magic!r} is not a frame's {_MAGIC!r}")
        if version != VERSION:
            raise FrameError(f"version: {version} is not spoken here, only {VERSION}")
        (seal,) = _SEAL.unpack_from(buf, _HEADER.size)
        if seal != xxhash.xxh3_64_intdigest(body):
            raise FrameError("header checksum: does not match, the header was altered on its way")
        if reserved or ndim > MAX_DIMS or any(dims[ndim:]):
            raise FrameError(f"shape: {ndim} dimensions given as {dims}, or a reserved field is set")
        header = FrameHeader(
            request_id=request_id,
            piece=piece,
            layer=layer,
            kind=_member(StateKind, kind, "kind"),
            dtype=_member(DType, dtype, "dtype"),
            shape=tuple(dims[:ndim]),
            token_start=token_start,
            token_end=token_end,
            payload_bytes=payload_bytes,
            checksum=checksum,
            codec=_member(CodecId, codec, "codec"),
            slot=slot,
        )
        _check(header, limits)
        return header


_E = TypeVar("_E", bound=IntEnum)


def _member(enum: type[_E], value: int, name: str) -> _E:
    try:
        return enum(value)
    except ValueError:
        known = ", ".join(f"{m.value} {m.name.lower()}" for m in enum)
        raise FrameError(f"{name}: {value} is unknown, accepted are {known}") from None


def _check(h: FrameHeader, limits: FrameLimits) -> None:
    """Every rule that a header obeys whoever made it; the message names the field."""
    _bound("request_id", h.request_id, (1 << 64) - 1)
    _bound("piece", h.piece, limits.max_pieces - 1)
    _bound("layer", h.layer, limits.max_layers - 1)
    _bound("slot", h.slot, (1 << 16) - 1)
    if len(h.shape) > MAX_DIMS:
        raise FrameError(f"shape: {len(h.shape)} dimensions, at most {MAX_DIMS} are accepted")
    for dim in h.shape:
        _bound("shape", dim, (1 << 32) - 1)
    if h.token_start > h.token_end:
        raise FrameError(f"token range: starts at {h.token_start}, after its end {h.token_end}")
    _bound("token range", h.token_start, limits.max_tokens)
    _bound("token range", h.token_end, limits.max_tokens)
    axis = h.kind.token_axis
    if axis is not None:
        if len(h.shape) < -axis:
            raise FrameError(f"shape: {h.shape} has no token axis, which {h.kind.name.lower()} needs")
        if h.shape[axis] != h.token_end - h.token_start:
            raise FrameError(
                f"token range: [{h.token_start}, {h.token_end}) is not the {h.shape[axis]} tokens of shape {h.shape}"
            )
    if len(h.checksum) != 16:
        raise FrameError(f"checksum: {len(h.checksum)} bytes, 16 needed")
    _bound("payload_bytes", h.payload_bytes, limits.max_payload_bytes)
    _bound("shape (decoded bytes)", h.raw_bytes, limits.max_payload_bytes)
    if h.codec is CodecId.NONE:
        if h.payload_bytes != h.raw_bytes:
            raise FrameError(f"payload_bytes: {h.payload_bytes}, but {h.shape} of {h.dtype.name} is {h.raw_bytes}")
    elif not 0 < h.payload_bytes < h.raw_bytes:
        # A codec that does not shrink a piece sends it as it is: a longer encoded payload is never right.
        raise FrameError(f"payload_bytes: {h.payload_bytes} encoded with {h.codec.name}, raw size is {h.raw_bytes}")


def _bound(name: str, value: int, maximum: int) -> None:
    if not 0 <= value <= maximum:
        raise FrameError(f"{name}: {value} is outside 0 to {maximum}")


@dataclass(frozen=True, slots=True)
class Piece:
    """A header and the bytes it describes. The payload is a view, which keeps its memory alive."""

    header: FrameHeader
    payload: memoryview

    @staticmethod
    def seal(
        payload: Buffer,
        *,
        request_id: int,
        piece: int,
        layer: int,
        kind: StateKind,
        dtype: DType,
        shape: Sequence[int],
        tokens: tuple[int, int],
        codec: CodecId = CodecId.NONE,
        slot: int = 0,
    ) -> Piece:
        """Frame raw bytes: computes the checksum, copies nothing. Raises FrameError where the fields disagree."""
        view = memoryview(payload).cast("B") if len(payload) else memoryview(b"")
        header = FrameHeader(
            request_id=request_id,
            piece=piece,
            layer=layer,
            kind=kind,
            dtype=dtype,
            shape=tuple(shape),
            token_start=tokens[0],
            token_end=tokens[1],
            payload_bytes=view.nbytes,
            checksum=checksum_of(view),
            codec=codec,
            slot=slot,
        )
        _check(header, DEFAULT_LIMITS)
        return Piece(header, view)

    def verify(self) -> None:
        """Raise FrameError unless the payload is the one that the header was made for."""
        h = self.header
        if self.payload.nbytes != h.payload_bytes:
            raise FrameError(f"payload of piece {h.piece}: {self.payload.nbytes} bytes, {h.payload_bytes} announced")
        if checksum_of(self.payload) != h.checksum:
            state = f"layer {h.layer}, {h.kind.name.lower()}"
            raise FrameError(f"checksum of piece {h.piece} ({state}): does not match its payload")


def digest_of(headers: Iterable[FrameHeader]) -> bytes:
    """One digest over all headers in index order, payload checksums included: 16 bytes."""
    digest = xxhash.xxh3_128()
    for header in sorted(headers, key=lambda h: h.piece):
        digest.update(header.pack())
    return digest.digest()


@dataclass(frozen=True, slots=True)
class Manifest:
    """What closes a request: everything that was sent for it, so that the receiver can tell whether it has all.

    `meta` is small JSON for the engine (prompt tokens, the first token, the length of the cached prefix).
    """

    request_id: int
    pieces: int
    payload_bytes: int
    digest: bytes
    meta: Mapping[str, JSON] = field(default_factory=dict)

    @staticmethod
    def of(request_id: int, headers: Sequence[FrameHeader], meta: Mapping[str, JSON] | None = None) -> Manifest:
        """The manifest of pieces 0 … n − 1 with these headers."""
        if sorted(h.piece for h in headers) != list(range(len(headers))):
            raise FrameError(f"manifest of request {request_id}: pieces are not numbered 0 to {len(headers) - 1}")
        total = sum(h.payload_bytes for h in headers)
        return Manifest(request_id, len(headers), total, digest_of(headers), dict(meta or {}))

    def pack(self) -> bytes:
        """Fixed prefix, its checksum, then the metadata as JSON with the checksum of that."""
        meta = json.dumps(self.meta, separators=(",", ":"), allow_nan=False, ensure_ascii=False).encode()
        if len(meta) > DEFAULT_LIMITS.max_meta_bytes:
            raise FrameError(f"manifest meta: {len(meta)} bytes, at most {DEFAULT_LIMITS.max_meta_bytes} are accepted")
        body = _MANIFEST.pack(
            _MANIFEST_MAGIC, VERSION, 0, self.request_id, self.pieces, len(meta), self.payload_bytes, self.digest
        )
        return body + _SEAL.pack(xxhash.xxh3_64_intdigest(body + meta)) + meta

    @staticmethod
    def unpack(buf: Buffer, limits: FrameLimits = DEFAULT_LIMITS) -> Manifest:
        """Read a whole manifest. Raises FrameError naming what was wrong, before the metadata is parsed."""
        if len(buf) < MANIFEST_PREFIX_BYTES:
            raise FrameError(f"manifest: {len(buf)} bytes, at least {MANIFEST_PREFIX_BYTES} needed")
        body = memoryview(buf)[: _MANIFEST.size]
        magic, version, reserved, request_id, pieces, meta_bytes, payload_bytes, digest = _MANIFEST.unpack(body)
        if magic != _MANIFEST_MAGIC:
            raise FrameError(f"manifest magic: {magic!r} is not {_MANIFEST_MAGIC!r}")
        if version != VERSION or reserved:
            raise FrameError(f"manifest version: {version} is not spoken here, only {VERSION}")
        _bound("manifest meta", meta_bytes, limits.max_meta_bytes)
        _bound("manifest pieces", pieces, limits.max_pieces)
        _bound("manifest payload_bytes", payload_bytes, limits.max_payload_bytes * max(pieces, 1))
        if len(buf) != MANIFEST_PREFIX_BYTES + meta_bytes:
            raise FrameError(f"manifest: {len(buf)} bytes, {MANIFEST_PREFIX_BYTES + meta_bytes} announced")
        meta = bytes(memoryview(buf)[MANIFEST_PREFIX_BYTES:])
        (seal,) = _SEAL.unpack_from(buf, _MANIFEST.size)
        if seal != xxhash.xxh3_64_intdigest(bytes(body) + meta):
            raise FrameError("manifest checksum: does not match, the manifest was altered on its way")
        try:
            parsed = json.loads(meta)
        except (ValueError, RecursionError) as error:
            raise FrameError(f"manifest meta: not JSON ({error})") from None
        if not isinstance(parsed, dict):
            raise FrameError(f"manifest meta: a JSON object is needed, not {type(parsed).__name__}")
        return Manifest(request_id, pieces, payload_bytes, digest, parsed)


class Assembly:
    """The pieces of one request as they arrive, in any order."""

    def __init__(self, request_id: int, limits: FrameLimits = DEFAULT_LIMITS) -> None:
        self.request_id = request_id
        self._limits = limits
        self._pieces: dict[int, Piece] = {}
        # Per state, the sorted token ranges that have arrived.
        self._ranges: dict[tuple[int, StateKind, int], list[tuple[int, int]]] = {}

    def __len__(self) -> int:
        return len(self._pieces)

    def add(self, piece: Piece) -> None:
        """Take a piece in. Raises FrameError, keeping nothing, where it is altered, foreign, double or overlapping."""
        h = piece.header
        _check(h, self._limits)
        if h.request_id != self.request_id:
            raise FrameError(f"request_id: piece {h.piece} belongs to request {h.request_id}, not to {self.request_id}")
        if h.piece in self._pieces:
            raise FrameError(f"piece: {h.piece} of request {h.request_id} came twice")
        piece.verify()
        # A state of the whole prefix may come once, whatever range it names.
        span = (h.token_start, h.token_end) if h.kind.token_axis is not None else (0, self._limits.max_tokens)
        ranges = self._ranges.setdefault((h.layer, h.kind, h.slot), [])
        at = bisect_left(ranges, span)
        if (at > 0 and ranges[at - 1][1] > span[0]) or (at < len(ranges) and ranges[at][0] < max(span[1], span[0] + 1)):
            raise FrameError(
                f"token range: [{h.token_start}, {h.token_end}) of layer {h.layer}, {h.kind.name.lower()}, "
                f"overlaps a piece that is already here"
            )
        ranges.insert(at, span)
        self._pieces[h.piece] = piece

    def missing(self, manifest: Manifest) -> list[int]:
        """Indices of the pieces that the manifest announces and that have not come."""
        return [i for i in range(manifest.pieces) if i not in self._pieces]

    def complete(self, manifest: Manifest) -> list[Piece]:
        """All pieces in index order. Raises FrameError unless they are exactly those that the manifest was made for."""
        if manifest.request_id != self.request_id:
            raise FrameError(f"request_id: the manifest is of request {manifest.request_id}, not of {self.request_id}")
        missing = self.missing(manifest)
        if missing:
            some = ", ".join(map(str, missing[:8])) + (", …" if len(missing) > 8 else "")
            raise FrameError(f"request {self.request_id}: {len(missing)} of {manifest.pieces} pieces missing ({some})")
        if len(self._pieces) > manifest.pieces:
            extra = max(self._pieces)
            raise FrameError(f"piece: {extra} of request {self.request_id} is beyond the manifest's {manifest.pieces}")
        headers = [p.header for p in self._pieces.values()]
        total = sum(h.payload_bytes for h in headers)
        if total != manifest.payload_bytes:
            raise FrameError(f"payload_bytes: {total} arrived, the manifest says {manifest.payload_bytes}")
        if digest_of(headers) != manifest.digest:
            raise FrameError(f"digest: the pieces of request {self.request_id} are not those of its manifest")
        return [self._pieces[i] for i in range(manifest.pieces)]
