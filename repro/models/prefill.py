"""Run a prompt through a model in chunks, and decode from a cache: the two phases that the paper separates.

Chunks bound the memory of prefill (the PyTorch fallback of delta attention needs gigabytes for a long prompt at once)
and are what layer-wise capture cuts states at. The same chunks give the same bits, so a split run is compared with an
unsplit one of equal chunk size. Whether a model may be run in chunks at all is for `repro.engine.gate` to find out.

Positions are always passed: some families count them from 0 in every forward pass where they are not told.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache as memoized
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


def new_cache(model: torch.nn.Module) -> Cache:
    """An empty cache of the class that the model's configuration asks for."""
    return DynamicCache(config=model.config)  # type: ignore[arg-type]


def _accepts(model: torch.nn.Module) -> frozenset[str]:
    return _parameters(type(model).forward)


@memoized
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def cache_argument(model: torch.nn.Module) -> str | None:
    """The name under which the model's forward pass takes a cache; None where it takes none."""
    accepted = _accepts(model)
    return next((name for name in ("past_key_values", "cache_params") if name in accepted), None)


def forward(model: torch.nn.Module, ids: torch.Tensor, cache: Cache, seen_tokens: int) -> torch.Tensor:
    """One forward pass over `ids` [B, n] after `seen_tokens` tokens; returns the logits [B, vocabulary] after the last.

    Raises UserError for a model that takes no cache.
    """
    argument, accepted = cache_argument(model), _accepts(model)
    if argument is None:
        raise UserError(f"model {type(model).__name__}: its forward pass takes no cache, so its state cannot be had")
    given: dict[str, Any] = {argument: cache, "use_cache": True}
    if "logits_to_keep" in accepted:
        given["logits_to_keep"] = 1
    positions = torch.arange(seen_tokens, seen_tokens + ids.shape[1], device=ids.device)
    if "position_ids" in accepted:
        given["position_ids"] = positions.expand(ids.shape[0], -1)
    if "cache_position" in accepted:
        given["cache_position"] = positions
    logits: torch.Tensor = model(input_ids=ids, **given).logits
    return logits[:, -1]


@torch.no_grad()
def chunked_prefill(
    model: torch.nn.Module,
    ids: torch.Tensor,
    chunk_tokens: int = 2048,
    cache: Cache | None = None,
    start: int = 0,
    on_chunk: OnChunk | None = None,
    attention_mask: torch.Tensor | None = None,
) -> tuple[Cache, torch.Tensor]:
    """Prefill tokens [start, n) of `ids` [B, n] into a cache that has seen `start` tokens.

    Returns the cache and the logits [B, vocabulary] after the last token. Raises UserError for an `attention_mask` that
    hides tokens: the state of padding would be shipped as a prompt's.
    """
    if attention_mask is not None and not bool(attention_mask.all()):
        raise UserError("attention_mask: hides tokens; accepted: a batch of prompts of one length, without padding")
    if not start < ids.shape[1]:
        raise UserError(f"prompt: {ids.shape[1]} tokens, of which {start} are cached; at least one must be left")
    if cache is None:
        cache = new_cache(model)
    logits = torch.empty(0)
    for begin, end in chunks(start, ids.shape[1], chunk_tokens):
        with nullcontext() if on_chunk is None else on_chunk(begin, end, end == ids.shape[1]):
            logits = forward(model, ids[:, begin:end], cache, begin)
    return cache, logits


@torch.no_grad()
def greedy_decode(
    model: torch.nn.Module, cache: Cache, first: torch.Tensor, steps: int, seen_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode `steps` tokens greedily from token `first` [B], with a cache that has seen `seen_tokens` tokens.

    Returns the tokens [B, steps] and the logits [B, steps, vocabulary] that chose them.
    """
    token, tokens, logits = first[:, None], [], []
    for at in range(steps):
        step = forward(model, token, cache, seen_tokens + at)
        token = step.argmax(dim=-1, keepdim=True)
        tokens.append(token)
        logits.append(step)
    return torch.cat(tokens, dim=1), torch.stack(logits, dim=1)
