"""Models that are younger than the paper: their state by hand, by their cache classes, and in a real cache of a shrunken twin."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM, DynamicCache

from repro.errors import UserError
from repro.kvcache.state import extract, layout
from repro.models import spec
from repro.models.architectures import layout_of
from repro.models.build import build
from repro.models.layout import StateKind, layout_from_config
from repro.models.prefill import chunked_prefill

BUILT = [name for name in spec.names_of_today() if not spec.load(name).layout_only]


@pytest.mark.parametrize(
    ("name", "layers", "bytes_per_token", "fixed_bytes"),
    [
        ("kimi_k3", 93, 24 * (512 + 64) * 2, 69 * (96 * 128 * 128 * 4 + 3 * (3 * 96 * 128) * 2)),
        ("qwen3_6_27b", 64, 16 * 4 * 2 * 256 * 2, 48 * (48 * 128 * 128 * 4 + 3 * (2 * 16 * 128 + 48 * 128) * 2)),
        ("qwen3_6_35b", 40, 10 * 2 * 2 * 256 * 2, 30 * (32 * 128 * 128 * 4 + 3 * (2 * 16 * 128 + 32 * 128) * 2)),
        ("nemotron_3_super", 88, 8 * 2 * 2 * 128 * 2, 40 * (128 * 64 * 128 * 4 + 3 * (128 * 64 + 2 * 8 * 128) * 2)),
        ("minimax_m3", 60, 60 * 4 * 2 * 128 * 2 + 57 * 128 * 2, 0),
        ("glm_5_3", 78, 78 * (512 + 64) * 2 + 21 * 128 * 2, 0),
        ("gemma_4_26b", 30, 5 * 2 * 2 * 512 * 2, 25 * 1023 * 8 * 2 * 256 * 2),
        ("gpt_oss_120b", 36, 18 * 8 * 2 * 64 * 2, 18 * 127 * 8 * 2 * 64 * 2),
        ("step_3_7_flash", 45, 12 * 8 * 2 * 128 * 2, 33 * 511 * 8 * 2 * 128 * 2),
        # A window of 127 in every layer; one entry of 512 + 128 for 4 tokens, or of 512 for 128; what the next entry of 4 reads again.
        (
            "deepseek_v4_flash",
            43,
            21 * (512 + 128) * 2 // 4 + 20 * 8,
            43 * 127 * 512 * 2 + 21 * 4 * 2 * (512 + 128) * 2,
        ),
        ("deepseek_v4_pro", 61, 30 * (512 + 128) * 2 // 4 + 31 * 8, 61 * 127 * 512 * 2 + 30 * 4 * 2 * (512 + 128) * 2),
    ],
)
def test_full_sizes_have_the_state_of_their_public_configurations(name, layers, bytes_per_token, fixed_bytes):
    found = layout_of(name, "full")
    assert (found.layers, found.bytes_per_token, found.fixed_bytes) == (layers, bytes_per_token, fixed_bytes)


def test_every_model_of_today_is_in_the_table_above():
    table = test_full_sizes_have_the_state_of_their_public_configurations.pytestmark[0].args[1]
    assert [row[0] for row in sorted(table)] == sorted(spec.names_of_today())
    assert not set(spec.names_of_today()) & set(spec.names())


def test_kimi_k3_has_the_pattern_that_table_5_implies():
    """Full attention at every fourth layer and the last, as in the reconstructed model."""
    for name in ("kimi_k3", "paper_1t"):
        found = layout_of(name, "full")
        full = {state.layer for state in found.states if state.kind is StateKind.LATENT}
        assert full == {i for i in range(found.layers) if i % 4 == 3 or i == found.layers - 1}


@pytest.mark.parametrize("name", BUILT)
def test_cache_classes_and_configuration_give_the_same_layout(name):
    assert layout(build(spec.load(name, "tiny"), "meta")) == layout_of(name, "tiny")


@pytest.mark.parametrize("name", BUILT)
def test_the_layout_counts_the_bytes_of_a_real_cache_of_a_shrunken_twin(name):
    torch.set_num_threads(1)
    model = build(replace(spec.load(name, "tiny"), dtype="float32"))
    own = layout_of(replace(spec.load(name, "tiny"), dtype="float32"), "tiny")
    for tokens in (1, 31, 40):  # below and beyond every window
        ids = torch.randint(3, 100, (1, tokens), generator=torch.Generator().manual_seed(0))
        cache, _ = chunked_prefill(model, ids, chunk_tokens=64)
        assert sum(state.nbytes for state in extract(cache, model.config, tokens)) == own.kv_bytes(tokens)


@pytest.mark.parametrize("name", ["deepseek_v4_flash", "deepseek_v4_pro"])
def test_a_cache_of_compressed_entries_is_counted_with_what_waits_for_its_entry(name):
    """The class of transformers at the tiny size, whose cache the kit does not ship: every tensor that its layers keep."""
    torch.set_num_threads(1)
    values = spec.load(name, "tiny").values()
    config = DeepseekV4Config(
        **values, hidden_size=64, moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2, num_attention_heads=4,
        q_lora_rank=32, o_lora_rank=16, o_groups=2, qk_rope_head_dim=8, index_n_heads=2, index_topk=4, vocab_size=128, hc_mult=2,
        bos_token_id=0, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model = DeepseekV4ForCausalLM(config).eval()
    own = layout_of(replace(spec.load(name, "tiny"), dtype="float32"), "tiny")
    for tokens in (1, 3, 4, 31, 40, 64, 77):  # entries and windows begun, full and beyond
        cache = DynamicCache(config=config)
        with torch.no_grad():
            model(torch.randint(3, 100, (1, tokens)), past_key_values=cache)
        assert sum(_kept_bytes(layer) for layer in cache.layers) == own.kv_bytes(tokens)


def _kept_bytes(layer: object) -> int:
    """Bytes of the state in a cache layer. Keys are values: where the class keeps them twice, they count once."""
    kept = dict(vars(layer))
    assert torch.equal(kept["keys"], kept.pop("values"))
    tensors = [tensor for value in kept.values() for tensor in (value.values() if isinstance(value, dict) else [value])]
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor) and tensor.is_floating_point())


@pytest.mark.parametrize("name", [*spec.names_of_today(), "kimi_linear", "mimo_v2_flash"])
def test_a_cache_in_fp8_halves_what_attention_keeps_and_nothing_else(name):
    own = layout_of(name, "full")
    quantised = layout_of(replace(spec.load(name), kv_dtype="fp8"), "full")
    halved = (
        StateKind.KEY, StateKind.VALUE, StateKind.LATENT, StateKind.LATENT_ROPE, StateKind.SLIDING_KEY, StateKind.SLIDING_VALUE,
        StateKind.COMPRESSED,
    )  # fmt: skip
    for kind, size in own.by_kind(10_000).items():
        assert quantised.by_kind(10_000)[kind] == (size // 2 if kind in halved else size)


def test_what_has_no_class_or_only_a_computed_size_is_not_built():
    with pytest.raises(UserError, match=r"step_3_7_flash is known by its layout only"):
        build(spec.load("step_3_7_flash"))
    with pytest.raises(UserError, match=r"model.kv_dtype: fp8 changes computed sizes only"):
        build(replace(spec.load("kimi_k3"), kv_dtype="fp8"))


def test_an_unknown_kv_dtype_layer_type_or_indexer_word_is_named():
    with pytest.raises(UserError, match=r"model.kv_dtype: 'int3'.*fp8"):
        replace(spec.load("kimi_k3"), kv_dtype="int3")
    with pytest.raises(UserError, match=r"layer_types.*'strange'"):
        layout_from_config("gpt_oss", {"layer_types": ["strange"]})
    with pytest.raises(UserError, match=r"indexers: 'FX'"):
        spec.written_out("FX", {"F": "full"}, "indexers")
