"""Tiny checkpoints that a production engine can serve: a hybrid and a dense model with random weights, written as it reads them.

The architectures of Table 1 at their tiny sizes are too small for the kernels that such engines bring (head dimensions of 64 and
more, blocks of 16 tokens), and not every engine knows every one of them. Qwen3-Next (Gated DeltaNet and full attention, 3 : 1) and
Llama are known to all.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from repro.errors import UserError

_COMMON: Final = {"vocab_size": 2048, "max_position_embeddings": 32768, "tie_word_embeddings": False}
#: By name: a transformers model type and its configuration. Their full-attention layers keep as many bytes per token, each.
SERVED: Final[Mapping[str, tuple[str, Mapping[str, Any]]]] = {
    "hybrid": ("qwen3_next", {
        **_COMMON, "num_hidden_layers": 4, "layer_types": ["linear_attention"] * 3 + ["full_attention"], "hidden_size": 256,
        "intermediate_size": 512, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128, "num_experts": 4,
        "num_experts_per_tok": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
    }),
    "dense": ("llama", {
        **_COMMON, "num_hidden_layers": 4, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64,
    }),
}  # fmt: skip


def write_served(name: str, folder: Path, seed: int = 0) -> Path:
    """Write the checkpoint of that name below `folder`, the same bytes for the same seed; returns where. One that is there is kept."""
    if name not in SERVED:
        raise UserError(f"checkpoint: {name!r} is unknown; accepted: {', '.join(SERVED)}")
    model_type, values = SERVED[name]
    target = folder / f"served_{name}"
    if (target / "config.json").is_file() and (target / "model.safetensors").is_file():
        return target
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values), dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    # Wider than at initialisation: logits of almost equal size would turn every comparison of tokens into one of rounding.
    with torch.no_grad():
        for parameter in model.get_output_embeddings().parameters():
            parameter.mul_(8)
    partial = folder / f"served_{name}.partial"
    model.save_pretrained(partial)
    partial.replace(target)
    return target
