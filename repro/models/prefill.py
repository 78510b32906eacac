"""Run a prompt through a model in chunks, and decode from a cache: the two phases that the paper separates.

Chunks bound the memory of prefill (the PyTorch fallback of delta attention needs gigabytes for a long prompt at once)
and are what layer-wise capture cuts states at. The same chunks give the same bits, so a split run is compared with an
unsplit one of equal chunk size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import DynamicCache

from repro.errors import UserError

Cache = Any
#: Called with (start, end, is_last) before each chunk; the chunk runs inside what it returns.
OnChunk = Callable[[int, int, bool], AbstractContextManager[object]]


def chunks(start: int, end: int, chunk_tokens: int) -> Iterator[tuple[int, int]]:
    """Token ranges of at most `chunk_tokens` from start to end."""
    if chunk_tokens < 1:
        raise UserError(f"chunk_tokens: {chunk_tokens} is below 1")
    for at in range(start, end, chunk_tokens):
        yield at, min(at + chunk_tokens, end)


@torch.no_grad()
def chunked_prefill(
    model: torch.nn.Module,
    ids: torch.Tensor,
    chunk_tokens: int = 2048,
    cache: Cache | None = None,
    start: int = 0,
    on_chunk: OnChunk | None = None,
) -> tuple[Cache, torch.Tensor]:
    """Prefill tokens [start, n) of `ids` [B, n] into a cache that has seen `start` tokens.

    Returns the cache and the logits [B, vocabulary] after the last token.
    """
    if not start < ids.shape[1]:
        raise UserError(f"prompt: {ids.shape[1]} tokens, of which {start} are cached; at least one must be left")
    if cache is None:
        cache = DynamicCache(config=model.config)  # type: ignore[arg-type]
    logits = torch.empty(0)
    for begin, end in chunks(start, ids.shape[1], chunk_tokens):
        with nullcontext() if on_chunk is None else on_chunk(begin, end, end == ids.shape[1]):
            output = model(input_ids=ids[:, begin:end], past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits = output.logits[:, -1]
    return cache, logits


@torch.no_grad()
def greedy_decode(
    model: torch.nn.Module, cache: Cache, first: torch.Tensor, steps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode `steps` tokens greedily from token `first` [B].

    Returns the tokens [B, steps] and the logits [B, steps, vocabulary] that chose them.
    """
    token, tokens, logits = first[:, None], [], []
    for _ in range(steps):
        step = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1]
        token = step.argmax(dim=-1, keepdim=True)
        tokens.append(token)
        logits.append(step)
    return torch.cat(tokens, dim=1), torch.stack(logits, dim=1)
