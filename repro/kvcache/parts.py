"""How each cache layer class of transformers is read and refilled.

A class is described by its parts: attention keys and values, a sliding window, linear-attention states, an indexer, …
Mixed classes are two parts. A class that is not in `PARTS` is refused by name: a subclass may keep state that nobody
here knows of, and a cache shipped incomplete decodes nonsense without an error.

Reading yields views of the cache's own tensors. Refilling hands the layer the tensors as they are, so whoever refills
gives the tensors away.
"""

# A part's methods have one signature, whether or not this part needs all of it, and one docstring, at `Part`.
# ruff: noqa: ARG002, D102

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch

from repro.errors import UserError
from repro.kvcache.frames import StateKind
from repro.models.layout import Config, short_convolution_columns

Layer = Any  # transformers ships no types for its cache layers
Key = tuple[StateKind, int]


@dataclass(frozen=True, slots=True)
class Stored:
    """One state tensor as a layer holds it, for tokens [start, end); `window` caps how many are ever kept."""

    kind: StateKind
    slot: int
    tensor: torch.Tensor
    start: int
    end: int
    window: int | None = None


class Part(Protocol):
    """One group of tensors that some cache layer classes have in common."""

    def read(self, layer: Layer, config: Config, tokens: int) -> Iterator[Stored]:
        """What the layer holds after `tokens` tokens."""

    def fill(self, layer: Layer, config: Config, tokens: int, states: Mapping[Key, torch.Tensor]) -> None:
        """Make an empty layer hold `states`, each of the whole range that `read` would yield."""


def _take(states: Mapping[Key, torch.Tensor], kind: StateKind, slot: int, layer: Layer) -> torch.Tensor:
    if (kind, slot) not in states:
        raise UserError(f"state missing: {kind.name.lower()} {slot}, which a {type(layer).__name__} needs")
    return states[kind, slot]


def _kinds(config: Config, keys: torch.Tensor) -> tuple[StateKind, StateKind]:
    """MLA keeps its latents where others keep keys and values; the configuration tells them apart."""
    if config.get("kv_lora_rank") is not None and keys.shape[1] == 1 and keys.shape[-1] == config["kv_lora_rank"]:
        return StateKind.LATENT, StateKind.LATENT_ROPE
    return StateKind.KEY, StateKind.VALUE


def _pair(states: Mapping[Key, torch.Tensor], layer: Layer) -> tuple[torch.Tensor, torch.Tensor]:
    if (StateKind.LATENT, 0) in states:
        return states[StateKind.LATENT, 0], _take(states, StateKind.LATENT_ROPE, 0, layer)
    return _take(states, StateKind.KEY, 0, layer), _take(states, StateKind.VALUE, 0, layer)


class Attention:
    """Keys and values of every token, as `DynamicLayer` keeps them (MLA's latents as well)."""

    def read(self, layer: Layer, config: Config, tokens: int) -> Iterator[Stored]:
        if layer.is_initialized and layer.keys.numel() > 0:
            key, value = _kinds(config, layer.keys)
            yield Stored(key, 0, layer.keys, 0, layer.keys.shape[-2])
            yield Stored(value, 0, layer.values, 0, layer.values.shape[-2])

    def fill(self, layer: Layer, config: Config, tokens: int, states: Mapping[Key, torch.Tensor]) -> None:
        if tokens == 0:
            return
        keys, values = _pair(states, layer)
        _initialise(layer, keys, values)
        layer.keys, layer.values = keys, values


def _initialise(layer: Layer, keys: torch.Tensor, values: torch.Tensor) -> None:
    layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
    layer.keys, layer.values = keys[..., :0, :], values[..., :0, :]


class SlidingAttention:
    """Keys and values of the last window − 1 tokens; the layer also counts all it has seen."""

    def read(self, layer: Layer, config: Config, tokens: int) -> Iterator[Stored]:
        if layer.record_past:
            raise UserError("cache: a sliding-window layer that records its past (assisted decoding) is not shipped")
        if layer.is_initialized and layer.cumulative_length > 0:
            end, window = layer.cumulative_length, layer.sliding_window - 1
            for kind, tensor in ((StateKind.SLIDING_KEY, layer.keys), (StateKind.SLIDING_VALUE, layer.values)):
                yield Stored(kind, 0, tensor, end - tensor.shape[-2], end, window)

    def fill(self, layer: Layer, config: Config, tokens: int, states: Mapping[Key, torch.Tensor]) -> None:
        if tokens == 0:
            return
        keys = _take(states, StateKind.SLIDING_KEY, 0, layer)
        values = _take(states, StateKind.SLIDING_VALUE, 0, layer)
        _initialise(layer, keys, values)
        layer.keys, layer.values, layer.cumulative_length = keys, values, tokens


class Linear:
    """Recurrent and convolution states, any number of each (also layers with a convolution only)."""

    def read(self, layer: Layer, config: Config, tokens: int) -> Iterator[Stored]:
        if layer.record_past:
            raise UserError("cache: a linear-attention layer that records its past (assisted decoding) is not shipped")
        for slot in range(layer.number_of_states):
            if not layer.has_previous_state[slot]:
                continue
            columns = layer.conv_states[slot]
            kept = _columns_read(config, columns.shape[-1])
            yield Stored(StateKind.CONVOLUTION, slot, columns[..., columns.shape[-1] - kept :], 0, tokens)
            recurrent = layer.recurrent_states[slot]
            # A layer with a convolution only says so by an empty state: its absence would pass for a lost one.
            yield Stored(StateKind.RECURRENT, slot, torch.empty(0) if recurrent is None else recurrent, 0, tokens)

    def fill(self, layer: Layer, config: Config, tokens: int, states: Mapping[Key, torch.Tensor]) -> None:
        if tokens == 0:
            return
        for slot in range(layer.number_of_states):
            columns = _take(states, StateKind.CONVOLUTION, slot, layer)
            if _columns_read(config, columns.shape[-1] + 1) == columns.shape[-1]:
                columns = torch.nn.functional.pad(columns, (1, 0))
            recurrent = _take(states, StateKind.RECURRENT, slot, layer)
            present = recurrent if recurrent.numel() else None
            layer.lazy_initialization(conv_states=columns, recurrent_states=present, state_idx=slot)
            layer.conv_states[slot].copy_(columns)
            # The layer updates its states in place, so it gets memory of its own and the payload stays as it came.
            if present is not None:
                layer.recurrent_states[slot].copy_(present)
            layer.has_previous_state[slot] = True


def _columns_read(config: Config, held: int) -> int:
    """Of `held` convolution columns, how many a later step reads: all but the oldest where `held` is the kernel."""
    columns = short_convolution_columns(config)
    return columns if columns is not None and held == columns + 1 else held


class Indexer:
    """Keys of a sparse-attention indexer, [B, T, dim], with the positions that some models keep beside them."""

    def read(self, layer: Layer, config: Config, tokens: int) -> Iterator[Stored]:
        if layer.is_indexer_initialized and layer.indexer_keys.numel() > 0:
            yield Stored(StateKind.INDEXER_KEY, 0, layer.indexer_keys, 0, layer.indexer_keys.shape[-2])
        if layer.indexer_position_ids is not None:
            positions = layer.indexer_position_ids
            yield Stored(StateKind.INDEXER_POSITION, 0, positions, 0, positions.shape[-1])

    def fill(self, layer: Layer, config: Config, tokens: int, states: Mapping[Key, torch.Tensor]) -> None:
        if (StateKind.INDEXER_KEY, 0) in states:
            keys = states[StateKind.INDEXER_KEY, 0]
            layer.lazy_initialization_indexer(keys)
            layer.indexer_keys = keys
        if (StateKind.INDEXER_POSITION, 0) in states:
            layer.indexer_position_ids = states[StateKind.INDEXER_POSITION, 0]


class SparseIndex:
    """MiniMax-M3's index keys, [B, 1, T, dim], beside ordinary attention."""

    def read(self, layer: Layer, config: Config, tokens: int) -> Iterator[Stored]:
        if layer.idx_keys is not None:
            yield Stored(StateKind.INDEXER_KEY, 0, layer.idx_keys, 0, layer.idx_keys.shape[-2])

    def fill(self, layer: Layer, config: Config, tokens: int, states: Mapping[Key, torch.Tensor]) -> None:
        layer.idx_keys = states.get((StateKind.INDEXER_KEY, 0))


class StaticIndexer:
    """As `Indexer`, of a preallocated buffer."""

    def read(self, layer: Layer, config: Config, tokens: int) -> Iterator[Stored]:
        if layer.is_indexer_initialized and (end := int(layer.indexer_cumulative_length)):
            yield Stored(StateKind.INDEXER_KEY, 0, layer.indexer_keys[:, :end], 0, end)
        if layer.indexer_position_ids is not None:
            positions = layer.indexer_position_ids
            yield Stored(StateKind.INDEXER_POSITION, 0, positions, 0, positions.shape[-1])

    def fill(self, layer: Layer, config: Config, tokens: int, states: Mapping[Key, torch.Tensor]) -> None:
        if (StateKind.INDEXER_KEY, 0) in states:
            layer.update_indexer(states[StateKind.INDEXER_KEY, 0])
        layer.indexer_position_ids = states.get((StateKind.INDEXER_POSITION, 0))


class SharedSlidingAttention:
    """DeepSeek-V4's window, whose keys are its values: shipped once."""

    def read(self, layer: Layer, config: Config, tokens: int) -> Iterator[Stored]:
        yield from (s for s in SlidingAttention().read(layer, config, tokens) if s.kind is StateKind.SLIDING_KEY)

    def fill(self, layer: Layer, config: Config, tokens: int, states: Mapping[Key, torch.Tensor]) -> None:
        keys = _take(states, StateKind.SLIDING_KEY, 0, layer) if tokens else torch.empty(0)
        SlidingAttention().fill(layer, config, tokens, {**states, (StateKind.SLIDING_VALUE, 0): keys})


class Compressor:
    """DeepSeek-V4's compressed entries, the tokens not yet compressed, and the overlap of two windows.

    A window of tokens becomes one entry when it is full, so these grow in steps: they are shipped whole, and `layout` has
    no slope for them.
    """

    def read(self, layer: Layer, config: Config, tokens: int) -> Iterator[Stored]:
        for slot, (tensors, name) in self._slots(layer):
            tensor = tensors[name]
            if tensor is not None:
                yield Stored(StateKind.AUXILIARY, slot, tensor, 0, tokens)

    def fill(self, layer: Layer, config: Config, tokens: int, states: Mapping[Key, torch.Tensor]) -> None:
        for slot, (tensors, name) in self._slots(layer):
            if tokens and tensors is layer.buffer_kv:
                _take(states, StateKind.AUXILIARY, slot, layer)
            tensors[name] = states.get((StateKind.AUXILIARY, slot))
        for name, entries in layer.compressed_kv.items():
            layer.entry_count[name] = 0 if entries is None else entries.shape[1]

    def _slots(self, layer: Layer) -> Iterator[tuple[int, tuple[dict[str, torch.Tensor | None], str]]]:
        groups = ("buffer_kv", "buffer_gate", "compressed_kv", "overlap_kv", "overlap_gate")
        for index, group in enumerate(groups):
            for offset, name in enumerate(("compressor", "indexer")):
                if name in getattr(layer, group, {}):
                    yield 2 * index + offset, (getattr(layer, group), name)


class StaticAttention:
    """A preallocated buffer of which the first tokens are filled: only those are read."""

    def read(self, layer: Layer, config: Config, tokens: int) -> Iterator[Stored]:
        if layer.is_initialized and (end := int(layer.cumulative_length)):
            key, value = _kinds(config, layer.keys)
            yield Stored(key, 0, layer.keys[..., :end, :], 0, end)
            yield Stored(value, 0, layer.values[..., :end, :], 0, end)

    def fill(self, layer: Layer, config: Config, tokens: int, states: Mapping[Key, torch.Tensor]) -> None:
        if tokens == 0:
            return
        keys, values = _pair(states, layer)
        if tokens > layer.max_cache_len:
            raise UserError(f"cache: {tokens} tokens do not fit a static layer of {layer.max_cache_len}")
        layer.update(keys, values)


class StaticSlidingAttention:
    """As `StaticAttention`, for a window. The buffer holds one token more than later steps read."""

    def read(self, layer: Layer, config: Config, tokens: int) -> Iterator[Stored]:
        end = layer.cumulative_length_int
        if not layer.is_initialized or end == 0:
            return
        held = min(end, layer.max_cache_len)
        kept = min(held, layer.max_cache_len - 1)
        for kind, tensor in ((StateKind.SLIDING_KEY, layer.keys), (StateKind.SLIDING_VALUE, layer.values)):
            yield Stored(kind, 0, tensor[..., held - kept : held, :], end - kept, end, layer.max_cache_len - 1)

    def fill(self, layer: Layer, config: Config, tokens: int, states: Mapping[Key, torch.Tensor]) -> None:
        if tokens == 0:
            return
        keys = _take(states, StateKind.SLIDING_KEY, 0, layer)
        values = _take(states, StateKind.SLIDING_VALUE, 0, layer)
        layer.lazy_initialization(keys, values)
        # The slot of the token that no step reads any more comes first once the buffer is full.
        first = layer.max_cache_len - keys.shape[-2] if tokens >= layer.max_cache_len else 0
        layer.keys[..., first : first + keys.shape[-2], :].copy_(keys)
        layer.values[..., first : first + keys.shape[-2], :].copy_(values)
        layer.cumulative_length_int = tokens
        layer.cumulative_length.fill_(min(tokens, layer.max_cache_len))


class Float8Attention:
    """transformers' own 8-bit cache: quantised keys and values with one frozen scale each."""

    def read(self, layer: Layer, config: Config, tokens: int) -> Iterator[Stored]:
        if layer.is_initialized:
            pairs = ((StateKind.KEY, layer._quantized_keys), (StateKind.VALUE, layer._quantized_values))
            for slot, (kind, (tensor, scale)) in enumerate(pairs):
                yield Stored(kind, 0, tensor, 0, tensor.shape[-2])
                yield Stored(StateKind.AUXILIARY, slot, scale, 0, tokens)
            # What the layer gives back is of the model's dtype, which its own tensors no longer show.
            yield Stored(StateKind.AUXILIARY, 2, torch.empty(0, dtype=layer.dtype), 0, tokens)

    def fill(self, layer: Layer, config: Config, tokens: int, states: Mapping[Key, torch.Tensor]) -> None:
        if tokens == 0:
            return
        keys, values = _pair(states, layer)
        auxiliary = [_take(states, StateKind.AUXILIARY, slot, layer) for slot in range(3)]
        _initialise(layer, auxiliary[2].view(1, 1, 0, 1), auxiliary[2].view(1, 1, 0, 1))
        layer.device, layer.cumulative_length = keys.device, tokens
        layer._quantized_keys, layer._quantized_values = (keys, auxiliary[0]), (values, auxiliary[1])


_LIBRARY: Final = "transformers.cache_utils."
_MODELS: Final = "transformers.models."
PARTS: Final[Mapping[str, tuple[Part, ...]]] = {
    _LIBRARY + "DynamicLayer": (Attention(),),
    _LIBRARY + "DynamicSlidingWindowLayer": (SlidingAttention(),),
    _LIBRARY + "DynamicIndexedLayer": (Attention(), Indexer()),
    _LIBRARY + "LinearAttentionLayer": (Linear(),),
    _LIBRARY + "LinearAttentionAndFullAttentionLayer": (Linear(), Attention()),
    _LIBRARY + "LinearAttentionAndSlidingWindowAttentionLayer": (Linear(), SlidingAttention()),
    _LIBRARY + "StaticLayer": (StaticAttention(),),
    _LIBRARY + "StaticIndexedLayer": (StaticAttention(), StaticIndexer()),
    _LIBRARY + "StaticSlidingWindowLayer": (StaticSlidingAttention(),),
    _LIBRARY + "LinearAttentionAndStaticFullAttentionLayer": (Linear(), StaticAttention()),
    _LIBRARY + "LinearAttentionAndStaticSlidingWindowAttentionLayer": (Linear(), StaticSlidingAttention()),
    _LIBRARY + "Fp8QuantizedLayer": (Float8Attention(),),
    _LIBRARY + "DummyLayer": (),
    _MODELS + "minimax_m3_vl.modeling_minimax_m3_vl.MiniMaxM3VLSparseCacheLayer": (Attention(), SparseIndex()),
    _MODELS + "deepseek_v4.modeling_deepseek_v4.DeepseekV4HCACache": (SharedSlidingAttention(), Compressor()),
    _MODELS + "deepseek_v4.modeling_deepseek_v4.DeepseekV4CSACache": (SharedSlidingAttention(), Compressor()),
}


def parts_of(layer: Layer) -> tuple[Part, ...]:
    """The parts of a cache layer. Raises UserError naming a class that is not known."""
    name = f"{type(layer).__module__}.{type(layer).__qualname__}"
    if name not in PARTS:
        known = ", ".join(sorted(key.rsplit(".", 1)[1] for key in PARTS))
        raise UserError(f"cache layer class: {name} is not known, so its state cannot be shipped whole; known: {known}")
    return PARTS[name]
