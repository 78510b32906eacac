"""S_kv(l): which state each layer leaves behind, and how many bytes of it there are (§2.1, equation 1).

A layer's state is fixed (recurrent, convolution), grows with every token (full attention), or grows up to a window.
That is all that the size of a KVCache depends on, so a layout is a list of such states and S_kv(l) is a sum over it:
exact, and cheap enough for the analytic tiers, which is why neither torch nor transformers is imported here.

`layout_from_config` derives it from the fields of a transformers configuration, by what the layer is (MLA, GQA, sliding
window, delta attention) and not by model. `repro.kvcache.state.layout` derives it from the cache classes themselves by
running the model without weights; a test holds the two against each other and against real caches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

from repro.errors import UserError

ITEMSIZE: Final = {"float32": 4, "bfloat16": 2, "float16": 2}
#: What keys, values and latents can be kept in instead: one byte each, without the scales, which are one per tensor or block.
KV_ITEMSIZE: Final = {**ITEMSIZE, "fp8": 1}


class StateKind(IntEnum):
    """What a state tensor holds. The comment gives its shape for batch B and T tokens."""

    KEY = 1  # [B, heads, T, dim]
    VALUE = 2  # [B, heads, T, dim]
    LATENT = 3  # compressed key-value of MLA, [B, 1, T, rank]
    LATENT_ROPE = 4  # the rotary part of MLA's key, [B, 1, T, dim]
    SLIDING_KEY = 5  # [B, heads, T, dim], at most the window
    SLIDING_VALUE = 6  # [B, heads, T, dim], at most the window
    RECURRENT = 7  # state of a linear-attention layer after a number of tokens, any shape
    CONVOLUTION = 8  # the columns that a short convolution will still read, [B, channels, kernel - 1]
    INDEXER_KEY = 9  # keys of a sparse-attention indexer, [B, T, dim] or [B, 1, T, dim]
    INDEXER_POSITION = 10  # positions of those keys, [dims, B, T]
    AUXILIARY = 11  # any other tensor of a model's own cache class, after a number of tokens
    COMPRESSED = 12  # keys that are also values, one for several tokens, [B, 1, entries, dim]

    @property
    def token_axis(self) -> int | None:
        """The axis that counts tokens, or None where the tensor stands for the whole prefix."""
        return _TOKEN_AXIS.get(self)

    @property
    def is_windowed(self) -> bool:
        """Whether only the last tokens are kept: such a state belongs to exactly one prefix length."""
        return self in (StateKind.SLIDING_KEY, StateKind.SLIDING_VALUE)


_TOKEN_AXIS: Final = {
    StateKind.KEY: -2,
    StateKind.VALUE: -2,
    StateKind.LATENT: -2,
    StateKind.LATENT_ROPE: -2,
    StateKind.SLIDING_KEY: -2,
    StateKind.SLIDING_VALUE: -2,
    StateKind.INDEXER_KEY: -2,
    StateKind.INDEXER_POSITION: -1,
}


@dataclass(frozen=True, slots=True)
class LayerState:
    """One state tensor of one layer, for one sequence.

    `window_tokens` caps a state that grows per token. Where `entry_tokens` tokens share one entry, it grows when they are complete;
    a `pending` state holds those of an entry that is not.
    """

    layer: int
    kind: StateKind
    bytes_fixed: int = 0
    bytes_per_token: int = 0
    window_tokens: int | None = None
    entry_tokens: int = 1
    pending: bool = False

    def kv_bytes(self, tokens: int) -> int:
        """Bytes after `tokens` tokens."""
        kept = tokens if self.window_tokens is None else min(tokens, self.window_tokens)
        waiting = kept % self.entry_tokens
        return self.bytes_fixed + self.bytes_per_token * (waiting if self.pending else kept - waiting)


@dataclass(frozen=True, slots=True)
class StateLayout:
    """All states of a model. `layers` counts decoder layers, those without state included."""

    layers: int
    states: tuple[LayerState, ...]

    def kv_bytes(self, tokens: int) -> int:
        """S_kv(l): bytes of the state of one sequence of `tokens` tokens."""
        return sum(state.kv_bytes(tokens) for state in self.states)

    def by_kind(self, tokens: int) -> dict[StateKind, int]:
        """Bytes after `tokens` tokens, per kind of state."""
        sizes: Counter[StateKind] = Counter()
        for state in self.states:
            sizes[state.kind] += state.kv_bytes(tokens)
        return dict(sizes)

    @property
    def bytes_per_token(self) -> int:
        """Slope of S_kv beyond every window: what each further token adds."""
        return sum(s.bytes_per_token for s in self.states if s.window_tokens is None and not s.pending)

    @property
    def fixed_bytes(self) -> int:
        """Intercept of S_kv beyond every window, where no token waits: recurrent and convolution states and full windows."""
        return sum(s.bytes_fixed + s.bytes_per_token * (s.window_tokens or 0) for s in self.states)

    def layers_by_kind(self) -> dict[str, int]:
        """How many layers hold which combination of states, in words: `full`, `mla`, `sliding`, `recurrent`, …"""
        per_layer: dict[int, set[str]] = {layer: set() for layer in range(self.layers)}
        for state in self.states:
            per_layer[state.layer].add(_WORD[state.kind])
        return dict(Counter("+".join(sorted(words)) or "none" for words in per_layer.values()))


_WORD: Final = {
    StateKind.KEY: "gqa",
    StateKind.VALUE: "gqa",
    StateKind.LATENT: "mla",
    StateKind.LATENT_ROPE: "mla",
    StateKind.SLIDING_KEY: "sliding",
    StateKind.SLIDING_VALUE: "sliding",
    StateKind.RECURRENT: "recurrent",
    StateKind.CONVOLUTION: "recurrent",
    StateKind.INDEXER_KEY: "indexer",
    StateKind.INDEXER_POSITION: "indexer",
    StateKind.AUXILIARY: "auxiliary",
    StateKind.COMPRESSED: "compressed",
}

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Itemsizes:
    """Bytes per element: of the model's own tensors, and of what attention keeps per token."""

    own: int
    kv: int


Rule = Callable[[Config, int, Itemsizes], Iterator[LayerState]]


def layout_from_config(
    model_type: str, config: Config, dtype: str = "bfloat16", kv_dtype: str | None = None
) -> StateLayout:
    """The layout of a model whose transformers configuration has these values (defaults filled in).

    `kv_dtype` is what attention keeps per token (keys, values, latents) where that is not the model's own `dtype`: a quantised
    KVCache. Recurrent and convolution states and an indexer's keys are not touched by it.

    Raises:
        UserError: for a `model_type` or layer type whose state these rules do not know.
    """
    if model_type not in KNOWN_MODEL_TYPES:
        known = ", ".join(sorted(KNOWN_MODEL_TYPES))
        raise UserError(f"model_type: no rule gives the state of {model_type!r}; known are {known}")
    types = config.get("layer_types") or ["full_attention"] * config["num_hidden_layers"]
    if dtype not in ITEMSIZE:
        raise UserError(f"dtype: {dtype!r} is not one of {', '.join(ITEMSIZE)}")
    if kv_dtype is not None and kv_dtype not in KV_ITEMSIZE:
        raise UserError(f"kv_dtype: {kv_dtype!r} is not one of {', '.join(KV_ITEMSIZE)}")
    sizes = Itemsizes(ITEMSIZE[dtype], KV_ITEMSIZE[kv_dtype or dtype])
    states: list[LayerState] = []
    for layer, name in enumerate(types):
        rule = _OWN_RULES.get((model_type, name)) or _RULES.get(name)
        if rule is None:
            raise UserError(f"layer_types: no rule gives the state of {name!r}; known are {', '.join(sorted(_RULES))}")
        states += rule(config, layer, sizes)
    return StateLayout(len(types), tuple(states))


def short_convolution_columns(config: Config) -> int | None:
    """Columns of its past that the convolution of a delta-attention or Mamba-2 layer reads: kernel − 1; None without a kernel.

    transformers keeps `kernel` columns, the oldest of which nothing reads any more. It is not counted and not shipped.
    """
    for key in ("linear_conv_kernel_dim", "short_conv_kernel_size", "conv_kernel"):
        if config.get(key) is not None:
            return int(config[key]) - 1
    return None


def _full(config: Config, layer: int, itemsize: Itemsizes) -> Iterator[LayerState]:
    if config.get("kv_lora_rank") is not None:
        yield LayerState(layer, StateKind.LATENT, bytes_per_token=config["kv_lora_rank"] * itemsize.kv)
        yield LayerState(layer, StateKind.LATENT_ROPE, bytes_per_token=config["qk_rope_head_dim"] * itemsize.kv)
        return
    heads, key_dim = config["num_key_value_heads"], config["head_dim"]
    value_dim = config.get("v_head_dim") or key_dim
    yield from _keys_and_values(layer, heads * key_dim * itemsize.kv, heads * value_dim * itemsize.kv)


def _keys_and_values(
    layer: int, key_bytes: int, value_bytes: int, window_tokens: int | None = None
) -> Iterator[LayerState]:
    windowed = window_tokens is not None
    key, value = (StateKind.SLIDING_KEY, StateKind.SLIDING_VALUE) if windowed else (StateKind.KEY, StateKind.VALUE)
    yield LayerState(layer, key, bytes_per_token=key_bytes, window_tokens=window_tokens)
    yield LayerState(layer, value, bytes_per_token=value_bytes, window_tokens=window_tokens)


def _sliding(config: Config, layer: int, itemsize: Itemsizes, heads_factor: int = 1) -> Iterator[LayerState]:
    # A window of w includes the query, so w − 1 are kept.
    heads, key_dim, window = (
        heads_factor * config["num_key_value_heads"],
        config["head_dim"],
        config["sliding_window"] - 1,
    )
    value_dim = config.get("v_head_dim") or key_dim
    yield from _keys_and_values(layer, heads * key_dim * itemsize.kv, heads * value_dim * itemsize.kv, window)


def _sliding_of_twice_the_heads(config: Config, layer: int, itemsize: Itemsizes) -> Iterator[LayerState]:
    yield from _sliding(config, layer, itemsize, heads_factor=2)  # MiMo-V2-Flash


def _wide_full(config: Config, layer: int, itemsize: Itemsizes) -> Iterator[LayerState]:
    # Gemma-4's full layers have heads of their own number and width. Keys and values come from one projection and are both
    # kept: the one is rotated, the other normalised.
    element = config["num_global_key_value_heads"] * config["global_head_dim"] * itemsize.kv
    yield from _keys_and_values(layer, element, element)


def _linear(config: Config, layer: int, itemsize: Itemsizes) -> Iterator[LayerState]:
    if config.get("linear_num_value_heads") is not None:  # Gated DeltaNet: fewer query and key heads than value heads
        heads, key_dim, value_dim = (
            config["linear_num_value_heads"],
            config["linear_key_head_dim"],
            config["linear_value_head_dim"],
        )
        channels = 2 * config["linear_num_key_heads"] * key_dim + heads * value_dim
    else:  # Kimi Delta Attention, and Lightning attention where the convolution's kernel is 1
        heads = config.get("linear_num_heads") or config["num_attention_heads"]
        key_dim = value_dim = config.get("linear_head_dim") or config["head_dim"]
        channels = 3 * heads * key_dim
    yield from _recurrent(config, layer, channels * itemsize.own, heads * key_dim * value_dim)


def _recurrent(config: Config, layer: int, column_bytes: int, elements: int) -> Iterator[LayerState]:
    columns = short_convolution_columns(config)
    assert columns is not None
    yield LayerState(layer, StateKind.CONVOLUTION, bytes_fixed=column_bytes * columns)
    yield LayerState(layer, StateKind.RECURRENT, bytes_fixed=elements * 4)  # kept in float32


def _mamba(config: Config, layer: int, itemsize: Itemsizes) -> Iterator[LayerState]:
    inner = config["mamba_num_heads"] * config["mamba_head_dim"]
    channels = inner + 2 * config["n_groups"] * config["ssm_state_size"]
    yield from _recurrent(config, layer, channels * itemsize.own, inner * config["ssm_state_size"])


def _indexed(config: Config, layer: int, itemsize: Itemsizes) -> Iterator[LayerState]:
    # Sparse attention keeps all keys and values as full attention does, and small keys by which it picks among them; a layer
    # that shares the pick of an earlier one has none.
    yield from _full(config, layer, itemsize)
    kinds = config.get("indexer_types")
    if kinds is None or kinds[layer] == "full":
        yield LayerState(layer, StateKind.INDEXER_KEY, bytes_per_token=config["index_head_dim"] * itemsize.own)


def _shared_sliding(config: Config, layer: int, itemsize: Itemsizes) -> Iterator[LayerState]:
    # DeepSeek-V4's keys are its values, and are kept once.
    key_bytes = config["head_dim"] * itemsize.kv
    yield LayerState(
        layer, StateKind.SLIDING_KEY, bytes_per_token=key_bytes, window_tokens=config["sliding_window"] - 1
    )


def _heavily_compressed(config: Config, layer: int, itemsize: Itemsizes) -> Iterator[LayerState]:
    yield from _shared_sliding(config, layer, itemsize)
    entry_tokens = config["compress_rates"]["heavily_compressed_attention"]
    yield from _compressed(layer, StateKind.COMPRESSED, config["head_dim"], entry_tokens, itemsize.kv, itemsize.own)


def _compressed_sparse(config: Config, layer: int, itemsize: Itemsizes) -> Iterator[LayerState]:
    yield from _shared_sliding(config, layer, itemsize)
    entry_tokens = config["compress_rates"]["compressed_sparse_attention"]
    parts = (
        (StateKind.COMPRESSED, config["head_dim"], itemsize.kv),
        (StateKind.INDEXER_KEY, config["index_head_dim"], itemsize.own),
    )
    for kind, dim, element in parts:
        # An entry is made of its own tokens and the ones before, so that a token is projected twice, and the half that the next
        # entry reads is kept, with its gate.
        yield from _compressed(layer, kind, dim, entry_tokens, element, 2 * itemsize.own)
        yield LayerState(
            layer,
            StateKind.AUXILIARY,
            bytes_per_token=2 * dim * itemsize.own,
            window_tokens=entry_tokens,
            entry_tokens=entry_tokens,
        )


def _compressed(
    layer: int, kind: StateKind, dim: int, entry_tokens: int, element: int, waiting_element: int
) -> Iterator[LayerState]:
    """Entries for `entry_tokens` tokens each, and the projections and gates of those that wait for theirs."""
    yield LayerState(layer, kind, bytes_per_token=dim * element // entry_tokens, entry_tokens=entry_tokens)
    waiting_bytes = 2 * dim * waiting_element
    yield LayerState(layer, StateKind.AUXILIARY, bytes_per_token=waiting_bytes, entry_tokens=entry_tokens, pending=True)


def _stateless(*_: object) -> Iterator[LayerState]:
    yield from ()


_RULES: Final[Mapping[str, Rule]] = {
    "full_attention": _full,
    "sliding_attention": _sliding,
    "linear_attention": _linear,
    "mamba": _mamba,
    "attention": _full,
    "moe": _stateless,
    "indexed_attention": _indexed,
    "minimax_m3_sparse": _indexed,
    "compressed_sparse_attention": _compressed_sparse,
    "heavily_compressed_attention": _heavily_compressed,
}
#: Layers that a model builds otherwise than others of their name.
_OWN_RULES: Final[Mapping[tuple[str, str], Rule]] = {
    ("mimo_v2_flash", "sliding_attention"): _sliding_of_twice_the_heads,
    ("gemma4_text", "full_attention"): _wide_full,
    ("deepseek_v4", "sliding_attention"): _shared_sliding,
}
KNOWN_MODEL_TYPES: Final = frozenset(
    (
        "kimi_linear", "mimo_v2_flash", "qwen3_5_moe_text", "bailing_hybrid", "minimax_m2", "qwen3_moe",
        "qwen3_5_text", "nemotron_h", "minimax_m3_vl_text", "glm_moe_dsa", "gemma4_text", "gpt_oss", "step3p7", "deepseek_v4",
    )
)  # fmt: skip
