"""Take a transformers cache apart into state tensors, and put it together again (§3.3: what prefill hands to decode).

`extract` yields views in a fixed order (layer, then the order of its parts), `restore` builds a cache that decodes as
the first one would have. Between them stand only (layer, kind, slot, token range, tensor), whatever the cache classes.
For a request whose first n tokens are cached at the other side, `extract(start=n)` yields only the tokens that came
after for states that grow per token, and the whole of those that stand for the prefix; `restore` takes both halves.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import torch
from transformers import DynamicCache, PreTrainedConfig

from repro.errors import UserError
from repro.kvcache.frames import CodecId, Piece, StateKind
from repro.kvcache.parts import Compressor, Stored, parts_of
from repro.kvcache.tensors import bytes_of, wire_dtype
from repro.models.layout import Config, LayerState, StateLayout
from repro.models.prefill import forward, new_cache

Cache = Any  # transformers ships no types for its caches

_CACHES: Final = frozenset(
    f"transformers.cache_utils.{name}" for name in ("Cache", "DynamicCache", "StaticCache", "QuantizedCache")
)


@dataclass(frozen=True, slots=True)
class State:
    """One state tensor of one layer, for tokens [start, end) of the request."""

    layer: int
    kind: StateKind
    slot: int
    start: int
    end: int
    tensor: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's elements."""
        return self.tensor.numel() * self.tensor.element_size()


def config_values(config: PreTrainedConfig) -> Mapping[str, Any]:
    """The decoder's configuration fields as plain values."""
    values: Mapping[str, Any] = config.get_text_config(decoder=True).to_dict()
    return values


def check_cache(cache: Cache) -> None:
    """Raise UserError naming a cache class that keeps state outside its layers, or in a way that is not known."""
    name = f"{type(cache).__module__}.{type(cache).__qualname__}"
    if name not in _CACHES:
        raise UserError(f"cache class: {name} is not known, so its state cannot be shipped whole")


def extract(cache: Cache, config: PreTrainedConfig, tokens: int, start: int = 0) -> list[State]:
    """Every state of a cache that has seen `tokens` tokens, as views of its memory.

    States that grow with each token are cut to [start, tokens). Raises UserError for a cache or layer class that is not
    known, and where a layer has not seen exactly `tokens` tokens.
    """
    check_cache(cache)
    values = config_values(config)
    return [state for layer in range(len(cache.layers)) for state in extract_layer(cache, values, layer, tokens, start)]


def extract_layer(
    cache: Cache, config: Config, layer: int, tokens: int, start: int = 0, closing: bool = True
) -> Iterator[State]:
    """The states of one layer. Without `closing`, only those that later tokens add to and never change."""
    for stored in _stored(cache, config, layer, tokens):
        axis = stored.kind.token_axis
        if axis is None or stored.kind.is_windowed:
            if closing:
                yield State(layer, stored.kind, stored.slot, stored.start, stored.end, stored.tensor)
            continue
        if start < stored.end:
            increment = stored.tensor.narrow(axis, start, stored.end - start)
            yield State(layer, stored.kind, stored.slot, start, stored.end, increment)


def _stored(cache: Cache, config: Config, layer: int, tokens: int) -> Iterator[Stored]:
    held, found = cache.layers[layer], False
    parts = parts_of(held)
    for part in parts:
        for stored in part.read(held, config, tokens):
            if stored.end != tokens:
                raise UserError(f"cache: layer {layer} has seen {stored.end} tokens, {tokens} were asked for")
            found = True
            yield stored
    if parts and tokens and not found:
        name = type(held).__name__
        raise UserError(
            f"cache: layer {layer} ({name}) is empty after {tokens} tokens; the model keeps state elsewhere"
        )


def seal(state: State, request_id: int, piece: int) -> Piece:
    """Frame a state as it is, uncompressed; its memory is the payload's where it is contiguous on the host."""
    return Piece.seal(
        bytes_of(state.tensor),
        request_id=request_id,
        piece=piece,
        layer=state.layer,
        kind=state.kind,
        slot=state.slot,
        dtype=wire_dtype(state.tensor.dtype),
        shape=tuple(state.tensor.shape),
        tokens=(state.start, state.end),
        codec=CodecId.NONE,
    )


def restore(
    states: Iterable[State],
    config: PreTrainedConfig,
    tokens: int,
    device: torch.device | str | Mapping[int, torch.device] = "cpu",
    into: Cache | None = None,
) -> Cache:
    """A cache that has seen `tokens` tokens, from its states in any order and any split into token ranges.

    `into` is an empty cache to fill (by default a `DynamicCache` of the configuration); `device` may be given per
    layer. Raises UserError where a state is missing, foreign or leaves a gap.
    """
    cache = DynamicCache(config=config) if into is None else into
    check_cache(cache)
    values = config_values(config)
    groups: dict[int, dict[tuple[StateKind, int], list[State]]] = defaultdict(lambda: defaultdict(list))
    for state in states:
        groups[state.layer][state.kind, state.slot].append(state)
    if unknown := [layer for layer in groups if not 0 <= layer < len(cache.layers)]:
        raise UserError(f"state of layer {unknown[0]}: the model has {len(cache.layers)} layers")
    for index, layer in enumerate(cache.layers):
        parts = parts_of(layer)
        if index in groups and not parts:
            raise UserError(f"state of layer {index}: this layer of the model keeps none")
        target = device.get(index, "cpu") if isinstance(device, Mapping) else device
        joined = {key: _join(group, tokens).to(target) for key, group in groups[index].items()}
        try:
            for part in parts:
                part.fill(layer, values, tokens, joined)
        except UserError as error:
            raise UserError(f"layer {index}: {error}") from None
    return cache


def _join(group: Sequence[State], tokens: int) -> torch.Tensor:
    """One tensor of a state's ranges, which must reach without a gap to `tokens`, and from 0 unless it is a window."""
    group = sorted(group, key=lambda state: state.start)
    first, axis = group[0], group[0].kind.token_axis
    where = f"layer {first.layer}, {first.kind.name.lower()}"
    if first.start != 0 and not first.kind.is_windowed:
        raise UserError(f"state missing: {where} begins at token {first.start}")
    for left, right in pairwise(group):
        if axis is None or left.end != right.start:
            raise UserError(f"state ranges: {where} has [{left.start}, {left.end}) and [{right.start}, {right.end})")
    if group[-1].end != tokens:
        raise UserError(f"state missing: {where} ends at token {group[-1].end} of {tokens}")
    if len(group) == 1 or axis is None:
        return first.tensor
    return torch.cat([state.tensor for state in group], dim=axis)


def layout(model: torch.nn.Module, cache: Cache | None = None) -> StateLayout:
    """The state layout of any causal language model, read from the cache that one forward pass leaves.

    A model without weights (on the meta device) is enough: nothing but shapes is computed. Raises UserError where the
    model's cache cannot be taken apart.
    """
    cache = _probed(model, cache)
    return layout_of_cache(cache, _configuration(model), _PROBE_TOKENS)


def _configuration(model: torch.nn.Module) -> PreTrainedConfig:
    return model.config  # type: ignore[return-value]


def _probed(model: torch.nn.Module, cache: Cache | None = None) -> Cache:
    """The cache of a forward pass over a few tokens. Raises UserError where the model does not run with it."""
    cache = new_cache(model) if cache is None else cache
    ids = torch.ones((1, _PROBE_TOKENS), dtype=torch.long, device=next(model.parameters()).device)
    try:
        with torch.no_grad():
            forward(model, ids, cache, 0)
    except (ValueError, TypeError, NotImplementedError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"model {type(model).__name__}: does not run with a {type(cache).__name__}: {reason}"
        ) from error
    return cache


_PROBE_TOKENS: Final = 3


class Outline:
    """What a model's states look like, so that another model's are refused before a decode step fails on them."""

    def __init__(self, model: torch.nn.Module) -> None:
        states = extract(_probed(model), _configuration(model), _PROBE_TOKENS)
        self._seen = {_name_of(state): _form_of(state) for state in states if state.kind is not StateKind.AUXILIARY}

    def check(self, states: Iterable[State]) -> None:
        """Raises UserError naming the first state that is none of this model's."""
        for state in states:
            expected, form = self._seen.get(_name_of(state)), _form_of(state)
            if expected != form and state.kind is not StateKind.AUXILIARY:
                where = f"layer {state.layer}, {state.kind.name.lower()}, slot {state.slot}"
                raise UserError(f"state of another model: {where} has {form}; here: {expected or 'no such state'}")


def _name_of(state: State) -> tuple[int, StateKind, int]:
    return state.layer, state.kind, state.slot


def _form_of(state: State) -> str:
    """Type and shape, whatever the number of tokens."""
    shape: list[int | str] = list(state.tensor.shape)
    if state.kind.token_axis is not None:
        shape[state.kind.token_axis] = "tokens"
    return f"{state.tensor.dtype} [{', '.join(map(str, shape))}]"


def layout_of_cache(cache: Cache, config: PreTrainedConfig, tokens: int) -> StateLayout:
    """The layout of a filled cache of batch 1, before any window is full."""
    check_cache(cache)
    values = config_values(config)
    states = []
    for index, layer in enumerate(cache.layers):
        if any(isinstance(part, Compressor) for part in parts_of(layer)):
            raise UserError(
                f"layout: layer {index} ({type(layer).__name__}) grows in steps, S_kv(l) is no sum over tokens"
            )
        for stored in _stored(cache, values, index, tokens):
            nbytes = stored.tensor.numel() * stored.tensor.element_size()
            if stored.kind.token_axis is None:
                states.append(LayerState(index, stored.kind, bytes_fixed=nbytes))
            else:
                per_token = nbytes // (stored.end - stored.start)
                states.append(LayerState(index, stored.kind, bytes_per_token=per_token, window_tokens=stored.window))
    return StateLayout(len(cache.layers), tuple(states))
