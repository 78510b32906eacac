"""Which families of transformers are served, and how: `python -m repro.engine.families` prints docs/models.md.

Each family is built tiny, by its configuration alone, and goes through the gate like any model. None has code of its own here: the list
says what was tried, not what is accepted, and a family that is missing from it is checked in the same way when it is built.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any, Final

from transformers import AutoConfig

from repro.engine.gate import admit
from repro.errors import UserError
from repro.models.build import build
from repro.models.spec import ModelSpec

#: Fields that most families know, under one name or another; each takes those that its configuration has.
_COMMON: Final[Mapping[str, Any]] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "max_position_embeddings": 512, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "linear_num_value_heads": 4,
    "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "ffn_dim": 48, "rotary_dim": 4,
    "state_size": 8, "sliding_window": 9,
}  # fmt: skip
_MLA: Final[Mapping[str, Any]] = {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "n_group": 1, "topk_group": 1, "head_dim": None,
}  # fmt: skip
_MAMBA: Final[Mapping[str, Any]] = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
_SSD: Final[Mapping[str, Any]] = {"num_heads": 4, "head_dim": 16, "n_groups": 1}

#: What a family needs beside `_COMMON`; None leaves a field out.
FAMILIES: Final[Mapping[str, Mapping[str, Any]]] = {
    "afmoe": {}, "apertus": {}, "arcee": {}, "bamba": {"attn_layer_indices": [1], **_MAMBA}, "bert": {},
    "bitnet": {}, "bloom": {}, "codegen": {"rotary_dim": 4}, "cohere": {}, "cohere2": {}, "deepseek_v2": _MLA, "deepseek_v3": _MLA,
    "diffllama": {}, "doge": {}, "ernie4_5": {}, "ernie4_5_moe": {}, "exaone4": {},
    "falcon_h1": {"mamba_d_ssm": 64, **_MAMBA}, "falcon_mamba": {}, "flex_olmo": {}, "gemma": {}, "gemma2": {},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]}, "glm": {}, "glm4": {}, "glm4_moe": {},
    "gpt2": {}, "gpt_bigcode": {}, "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 9}, "gpt_neox": {},
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention"]}, "gptj": {}, "granite": {}, "granitemoe": {},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 24, **_MAMBA},
    "helium": {}, "hunyuan_v1_dense": {},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}, "llama": {}, "mamba": {},
    "mamba2": _SSD, "minimax": {}, "mistral": {}, "mixtral": {}, "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2},
    "nemotron_h": {
        "layer_types": ["mamba", "attention"], "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1,
        "num_hidden_layers": None,
    },
    "olmo": {}, "olmo2": {}, "olmo3": {"layer_types": ["sliding_attention", "full_attention"]},
    "olmo_hybrid": {"linear_num_key_heads": 4, "layer_types": ["linear_attention", "full_attention"]}, "olmoe": {}, "opt": {},
    "persimmon": {}, "phi": {}, "phi3": {}, "phimoe": {}, "qwen2": {"sliding_window": None}, "qwen2_moe": {}, "qwen3": {},
    "qwen3_moe": {}, "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]}, "rwkv": {"attention_hidden_size": 32},
    "seed_oss": {}, "smollm3": {}, "stablelm": {}, "starcoder2": {},
}  # fmt: skip
DOC: Final = """# Models

Any causal language model of transformers is accepted by its configuration (`model_type` and fields) or as a checkpoint
(`pretrained=`). Before it serves it goes through one gate (`repro/engine/gate.py`): short prompts, prefilled in one chunk and in
several, whose state leaves layer by layer and is put together again, must give the logits of the model's own `generate`. What passes in one
chunk only is prefilled in one, without a prefix cache; what does not pass is refused with the reason.

## Models of today

`conf/model` also holds models that are younger than the paper, from their public configurations: Kimi-K3 (the published model of the
paper's kind), Qwen3.6, Nemotron-3-Super, MiniMax-M3, GLM-5.3, Gemma-4, gpt-oss, Step-3.7-Flash and DeepSeek-V4. `experiment=models`
shows them beside Table 1's, their KVCache in bf16 and in fp8 (`model.<name>.kv_dtype=fp8`: one byte for what attention keeps per
token, recurrent state unchanged). Each S_kv is held against a real cache of a shrunken twin, but for Step-3.7-Flash, which
transformers has no class for. It and DeepSeek-V4, of whose cache the tokens that wait for their compressed entry lie outside keys
and values, are known by their layout only.

## Families

These families of transformers 5.23 were tried, tiny and with random weights in float32; written by `python -m repro.engine.families`.

| family | served | why not otherwise |
|---|---|---|
"""


def spec_of(family: str) -> ModelSpec:
    """A tiny model of a family."""
    default = AutoConfig.for_model(family)
    aliases = set(default.attribute_map)
    own = FAMILIES[family]
    known = {key: value for key, value in _COMMON.items() if hasattr(default, key) or key in aliases}
    values = {key: value for key, value in {**known, **own}.items() if value is not None}
    return ModelSpec(family, family, dtype="float32", config=values)


def verdict(family: str) -> tuple[str, str]:
    """How a family is served, and why not otherwise."""
    try:
        found = admit(build(spec_of(family)))
    except UserError as error:
        return "refused", str(error)
    return ("in chunks", "") if found.chunked else ("in one chunk", found.reason)


def document(families: Iterable[str] = FAMILIES) -> str:
    """The text of docs/models.md."""
    rows = [f"| {family} | {served} | {reason} |\n" for family in families for served, reason in (verdict(family),)]
    return DOC + "".join(rows)


if __name__ == "__main__":
    sys.stdout.write(document())
