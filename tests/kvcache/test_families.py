"""Model families that nobody here wrote a line for work by configuration alone, or are refused with the reason."""

import pytest
import torch

from repro.errors import UserError
from repro.kvcache.state import State, extract, layout, restore
from repro.models.build import build
from repro.models.prefill import chunked_prefill, greedy_decode
from repro.models.spec import ModelSpec

SMALL = {
    "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
BARE = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2}
MOE = {"num_experts": 4, "num_experts_per_tok": 2}
HYBRID = {
    "jamba": {
        **MOE, "num_hidden_layers": 8, "mamba_d_state": 8, "mamba_dt_rank": 8, "attn_layer_offset": 3,
        "use_mamba_kernels": False,
    },
    "bamba": {
        "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1,
    },
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"] * 2, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16,
        "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 32,
    },
    "falcon_h1": {
        "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1,
        "head_dim": 16,
    },
    "nemotron_h": {
        "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1, "head_dim": 16,
        "layer_types": ["mamba", "moe", "attention", "mamba"], "n_routed_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False},
    "qwen3_next": {
        **MOE, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "head_dim": 16,
        "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    },
    "olmo_hybrid": {
        "linear_num_value_heads": 4, "linear_num_key_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    },
    "afmoe": {**MOE, "moe_intermediate_size": 32, "head_dim": 16, "sliding_window": 9},
    "gemma3_text": {"head_dim": 16, "sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 9},
    "llama": {},
}  # fmt: skip


@pytest.mark.parametrize("family", HYBRID)
def test_a_family_works_by_configuration_alone(family):
    model = build(ModelSpec(family, family, dtype="float32", config={**SMALL, **HYBRID[family]}))
    ids = torch.randint(3, 100, (2, 40), generator=torch.Generator().manual_seed(0))
    cache, logits = chunked_prefill(model, ids, chunk_tokens=16)
    states = extract(cache, model.config, 40)
    copies = [State(s.layer, s.kind, s.slot, s.start, s.end, s.tensor.clone()) for s in states]
    assert sum(s.nbytes for s in states) == 2 * layout(model).kv_bytes(40)
    restored = restore(copies, model.config, 40)
    expected, got = (greedy_decode(model, c, logits.argmax(-1), 5, 40) for c in (cache, restored))
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize(
    ("family", "config", "reason"),
    [
        ("minimax", {**SMALL, "num_local_experts": 4, "head_dim": 16}, "uses cache of its own"),
        ("rwkv", {**BARE, "attention_hidden_size": 64}, "its forward pass takes no cache"),
    ],
)
def test_a_family_whose_state_is_elsewhere_is_refused_with_the_reason(family, config, reason):
    with pytest.raises(UserError, match=reason):
        layout(build(ModelSpec(family, family, dtype="float32", config=config)))


def test_a_wrong_model_type_or_field_is_named():
    with pytest.raises(UserError, match="nonsense"):
        build(ModelSpec("x", "nonsense"), "meta")
    with pytest.raises(UserError, match="'hidden_sise' is read nowhere by LlamaConfig"):
        build(ModelSpec("x", "llama", config={"hidden_sise": 64}), "meta")
    with pytest.raises(UserError, match="full is built without weights only"):
        build(ModelSpec("x", "llama", size="full"))
    with pytest.raises(UserError, match=r"model\.pretrained: missing"):
        build(ModelSpec("pretrained", "auto"))
    with pytest.raises(UserError, match=r"model\.pretrained: /nowhere"):
        build(ModelSpec("pretrained", "auto", pretrained="/nowhere"))
