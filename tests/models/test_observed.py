"""Kernels are named by what a pass called."""

from __future__ import annotations

from dataclasses import replace

import torch

from repro.models import spec as models
from repro.models.build import build
from repro.models.observed import kernels_called


def called(name: str, attention: str) -> set[str]:
    model = models.load(name, "tiny")
    built = build(replace(model, parameters=float(model.parameters)), "cpu")
    built.set_attn_implementation(attention)
    with torch.no_grad(), kernels_called() as found:
        built(input_ids=torch.ones((1, 8), dtype=torch.long))
    return {one.rpartition(".")[2] for one in found}


def test_the_attention_that_ran_is_named_and_no_other() -> None:
    assert "sdpa_attention_forward" in called("qwen3_235b", "sdpa")
    eager = called("qwen3_235b", "eager")
    assert "eager_attention_forward" in eager
    assert "sdpa_attention_forward" not in eager


def test_a_fallback_of_linear_attention_in_pytorch_is_named() -> None:
    assert "torch_chunk_gated_delta_rule" in called("qwen3_5_397b", "sdpa")
