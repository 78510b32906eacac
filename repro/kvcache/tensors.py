"""Between tensors and bytes: a state tensor's memory as a payload, and a payload as a tensor, without copying either.

A copy happens only where memory forbids a view: on an accelerator (the bytes must come to the host), and where the
tensor is a slice that is not contiguous, which `torch` cannot hand out as one run of bytes.
"""

from __future__ import annotations

from typing import Final

import torch

from repro.kvcache.frames import DType, FrameError, Piece

_TORCH: Final = {
    DType.FLOAT64: torch.float64,
    DType.FLOAT32: torch.float32,
    DType.FLOAT16: torch.float16,
    DType.BFLOAT16: torch.bfloat16,
    DType.FLOAT8_E4M3FN: torch.float8_e4m3fn,
    DType.FLOAT8_E5M2: torch.float8_e5m2,
    DType.INT64: torch.int64,
    DType.INT32: torch.int32,
    DType.INT16: torch.int16,
    DType.INT8: torch.int8,
    DType.UINT8: torch.uint8,
    DType.BOOL: torch.bool,
}
_WIRE: Final = {torch_dtype: dtype for dtype, torch_dtype in _TORCH.items()}


def torch_dtype(dtype: DType) -> torch.dtype:
    """The torch dtype of a wire dtype."""
    return _TORCH[dtype]


def wire_dtype(dtype: torch.dtype) -> DType:
    """The wire dtype of a torch dtype. Raises FrameError for one that frames do not carry."""
    if dtype not in _WIRE:
        raise FrameError(f"dtype: {dtype} is not carried, accepted are {', '.join(map(str, _WIRE))}")
    return _WIRE[dtype]


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The tensor's elements in row-major order as bytes: a view of its memory where that is contiguous on the host."""
    if tensor.numel() == 0:
        return memoryview(b"")
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return flat.numpy().data


def tensor_from(payload: memoryview, dtype: DType, shape: tuple[int, ...]) -> torch.Tensor:
    """A host tensor over the payload's memory. Writing to it writes to the payload where that is writable."""
    if payload.nbytes == 0:
        return torch.empty(shape, dtype=_TORCH[dtype])
    # torch.frombuffer warns of read-only memory; nothing writes to a received state, caches grow by concatenation.
    source = payload if not payload.readonly else memoryview(bytearray(payload))
    return torch.frombuffer(source, dtype=torch.uint8).view(_TORCH[dtype]).view(shape)


def tensor_of(piece: Piece) -> torch.Tensor:
    """The tensor of a piece that is not encoded. Raises FrameError for one that is: decode it first."""
    if piece.header.codec:
        raise FrameError(f"codec: piece {piece.header.piece} is encoded with {piece.header.codec.name}")
    return tensor_from(piece.payload, piece.header.dtype, piece.header.shape)
