"""Every cache layer class of the pinned transformers release is taken apart and put together, or refused by name."""

import inspect

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, StaticCache, cache_utils
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as v4
from transformers.models.minimax.modeling_minimax import MiniMaxCache
from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl as m3

from repro.errors import UserError
from repro.kvcache.frames import StateKind
from repro.kvcache.parts import PARTS
from repro.kvcache.state import State, extract, layout_of_cache, restore, seal
from repro.kvcache.tensors import tensor_of

WINDOW = 9
CONFIG = LlamaConfig(num_hidden_layers=1)
REFUSED = {
    "CacheLayerMixin": "abstract",
    "LinearAttentionCacheLayerMixin": "abstract",
    "BaseQuantizedLayer": "abstract",
    "QuantizedLayer": "abstract",
    "QuantoQuantizedLayer": "its tensors are opaque objects of a package that is not among the dependencies",
    "HQQQuantizedLayer": "its tensors are opaque objects of a package that is not among the dependencies",
}


def v4_config(kind: str):
    rates = {"heavily_compressed_attention": 4, "compressed_sparse_attention": 4}
    return type("Config", (), {"sliding_window": WINDOW, "compress_rates": rates})()


MAKE = {
    "DynamicLayer": cache_utils.DynamicLayer,
    "DynamicSlidingWindowLayer": lambda: cache_utils.DynamicSlidingWindowLayer(WINDOW),
    "DynamicIndexedLayer": cache_utils.DynamicIndexedLayer,
    "LinearAttentionLayer": lambda: cache_utils.LinearAttentionLayer(number_of_states=2),
    "LinearAttentionAndFullAttentionLayer": cache_utils.LinearAttentionAndFullAttentionLayer,
    "LinearAttentionAndSlidingWindowAttentionLayer": lambda: cache_utils.LinearAttentionAndSlidingWindowAttentionLayer(
        WINDOW
    ),
    "StaticLayer": lambda: cache_utils.StaticLayer(64),
    "StaticSlidingWindowLayer": lambda: cache_utils.StaticSlidingWindowLayer(64, WINDOW),
    "StaticIndexedLayer": lambda: cache_utils.StaticIndexedLayer(64),
    "LinearAttentionAndStaticFullAttentionLayer": lambda: cache_utils.LinearAttentionAndStaticFullAttentionLayer(64),
    "LinearAttentionAndStaticSlidingWindowAttentionLayer": (
        lambda: cache_utils.LinearAttentionAndStaticSlidingWindowAttentionLayer(64, WINDOW)
    ),
    "Fp8QuantizedLayer": cache_utils.Fp8QuantizedLayer,
    "DummyLayer": cache_utils.DummyLayer,
    "MiniMaxM3VLSparseCacheLayer": m3.MiniMaxM3VLSparseCacheLayer,
    "DeepseekV4HCACache": lambda: v4.DeepseekV4HCACache(v4_config("h")),
    "DeepseekV4CSACache": lambda: v4.DeepseekV4CSACache(v4_config("c")),
}


def advance(layer, tokens: int, seed: int) -> list[torch.Tensor]:
    """Feed a layer `tokens` tokens as a model would; returns all that the layer gives back for attention."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random)

    seen: list[torch.Tensor] = []
    if hasattr(layer, "conv_states"):
        for slot in range(layer.number_of_states):
            seen.append(layer.update_conv_state(normal(2, 6, tokens), state_idx=slot, conv_kernel_size=4).clone())
            if slot == 0:  # the second state is a convolution only
                previous = layer.recurrent_states[slot]
                state = normal(2, 3, 5, 5) + (0 if previous is None else 0.5 * previous)
                seen.append(layer.update_recurrent_state(state, state_idx=slot).clone())
    if hasattr(layer, "get_mask_sizes") and hasattr(layer, "keys"):
        seen += [torch.tensor(layer.get_mask_sizes(tokens))]
        seen += [t.clone() for t in layer.update(normal(2, 3, tokens, 8), normal(2, 3, tokens, 8))]
    if hasattr(layer, "update_indexer"):
        seen.append(layer.update_indexer(normal(2, tokens, 4)).clone())
    if hasattr(layer, "update_index"):
        seen.append(layer.update_index(normal(2, 1, tokens, 4)).clone())
    if hasattr(layer, "store_compression_weights"):
        for name in layer.entry_count:
            kv, gate, first = layer.store_compression_weights(name, normal(2, tokens, 8), normal(2, tokens, 8))
            entries = kv.view(2, -1, 4, 8).mean(dim=2)
            seen += [kv, gate, torch.tensor(first), layer.update_compressor_states(name, entries)]
            if hasattr(layer, "overlap_kv") and kv.shape[1]:
                chunk = kv.view(2, -1, 4, 8)
                seen += [t for t in layer.update_overlap_state(name, chunk, chunk, 4) if t is not None]
    return seen


def framed(states: list[State]) -> list[State]:
    pieces = [seal(state, 1, i) for i, state in enumerate(states)]
    return [
        State(s.layer, s.kind, s.slot, s.start, s.end, tensor_of(p).clone())
        for s, p in zip(states, pieces, strict=True)
    ]


def test_every_class_of_the_release_is_known_or_refused_for_a_reason():
    layers = (cache_utils.CacheLayerMixin, cache_utils.LinearAttentionCacheLayerMixin, cache_utils.DummyLayer)
    found = {
        name
        for name, value in vars(cache_utils).items()
        if inspect.isclass(value) and issubclass(value, layers) and value.__module__ == cache_utils.__name__
    }
    known = {name.rsplit(".", 1)[1] for name in PARTS}
    assert found - known == set(REFUSED)
    assert set(MAKE) == known


@pytest.mark.parametrize("tokens", [1, 5, WINDOW - 1, WINDOW, WINDOW + 1, 30])
@pytest.mark.parametrize("name", MAKE)
def test_a_restored_layer_continues_as_the_first_would_have(name, tokens):
    first, second = MAKE[name](), MAKE[name]()
    for layer in (first, second):
        if name == "DummyLayer":
            break
        assert type(layer).__name__ == name
    advance(first, tokens, seed=1)
    states = extract(cache_utils.Cache(layers=[first]), CONFIG, tokens)
    assert bool(states) == (name != "DummyLayer")
    restored = restore(framed(states), CONFIG, tokens, into=cache_utils.Cache(layers=[second])).layers[0]
    for step, more in enumerate((1, 1, 3)):
        expected, got = advance(first, more, seed=step), advance(restored, more, seed=step)
        assert len(got) == len(expected)
        for ours, theirs in zip(got, expected, strict=True):
            # A static window's slot that no step reads any more is not shipped: it is zero here, stale there.
            if "StaticSliding" in name and ours.shape == theirs.shape and ours.ndim == 4 and ours.shape[2] == WINDOW:
                ours, theirs = ours[:, :, 1:], theirs[:, :, 1:]
            assert torch.equal(ours, theirs), (step, ours.shape, theirs.shape)


def test_state_of_a_static_cache_fills_a_dynamic_one():
    config = LlamaConfig(
        num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=3, hidden_size=24, sliding_window=None
    )
    static = StaticCache(config=config, max_cache_len=32)
    for layer in static.layers:
        advance(layer, 7, seed=3)
    dynamic = restore(framed(extract(static, config, 7)), config, 7)
    assert isinstance(dynamic, DynamicCache)
    assert torch.equal(dynamic.layers[1].keys, static.layers[1].keys[:, :, :7])


def test_an_unknown_layer_class_is_refused_by_name():
    class Mine(cache_utils.DynamicLayer):
        pass

    layer = Mine()
    advance(layer, 4, seed=0)
    with pytest.raises(UserError, match=r"test_cache_layers\..*Mine is not known"):
        extract(cache_utils.Cache(layers=[layer]), CONFIG, 4)


@pytest.mark.parametrize("cache", [MiniMaxCache(), cache_utils.EncoderDecoderCache(DynamicCache(), DynamicCache())])
def test_an_unknown_cache_class_is_refused_by_name(cache):
    with pytest.raises(UserError, match=type(cache).__name__):
        extract(cache, CONFIG, 4)


def test_a_layer_that_is_empty_or_has_seen_other_tokens_is_refused():
    layer = cache_utils.DynamicLayer()
    with pytest.raises(UserError, match="empty after 4 tokens"):
        extract(cache_utils.Cache(layers=[layer]), CONFIG, 4)
    advance(layer, 5, seed=0)
    with pytest.raises(UserError, match="has seen 5 tokens, 4 were asked for"):
        extract(cache_utils.Cache(layers=[layer]), CONFIG, 4)


def test_a_layer_that_records_its_past_is_refused():
    layer = cache_utils.DynamicSlidingWindowLayer(WINDOW)
    layer.activate_past_recording()
    advance(layer, 5, seed=0)
    with pytest.raises(UserError, match="records its past"):
        extract(cache_utils.Cache(layers=[layer]), CONFIG, 5)


def test_a_layer_that_grows_in_steps_has_no_layout():
    layer = MAKE["DeepseekV4HCACache"]()
    advance(layer, 5, seed=0)
    with pytest.raises(UserError, match="grows in steps"):
        layout_of_cache(cache_utils.Cache(layers=[layer]), CONFIG, 5)


def test_a_latent_is_told_from_a_key_by_the_configuration():
    from transformers import AutoConfig

    config = AutoConfig.for_model("kimi_linear", kv_lora_rank=8, num_hidden_layers=1, layer_types=["full_attention"])
    layer = cache_utils.DynamicLayer()
    layer.update(torch.zeros(2, 1, 5, 8), torch.zeros(2, 1, 5, 4))
    kinds = [s.kind for s in extract(cache_utils.Cache(layers=[layer]), config, 5)]
    assert kinds == [StateKind.LATENT, StateKind.LATENT_ROPE]
