"""From a specification to a torch module: without weights, with seeded random weights, or with a checkpoint's.

Models are transformers' own, unchanged, so what runs here is what others run. `full` sizes exist on the meta device
only.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from repro.errors import UserError
from repro.models.spec import ModelSpec
from repro.models.spread import spread, spread_map

_DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def config_of(spec: ModelSpec) -> PreTrainedConfig:
    """The transformers configuration. Raises UserError for a model type, field or checkpoint that is not accepted."""
    try:
        config: PreTrainedConfig
        if spec.pretrained is not None:
            config = AutoConfig.from_pretrained(spec.pretrained)
            return config
        if spec.model_type == "auto":
            raise UserError(f"model.pretrained: missing for model {spec.name}; a hub id or a checkpoint's folder")
        config = AutoConfig.for_model(spec.model_type, **spec.values())
    except (ValueError, OSError, TypeError, KeyError, StrictDataclassError) as error:
        where = f"model.pretrained: {spec.pretrained}" if spec.pretrained else f"model {spec.name}"
        raise UserError(f"{where}: {str(error).splitlines()[0]}") from error
    for key in spec.values():
        if not _is_read(config, key):
            raise UserError(f"model.config: {key!r} is read nowhere by {type(config).__name__} or its model")
    return config


def _is_read(config: PreTrainedConfig, key: str) -> bool:
    """Whether the model knows a field. transformers takes any keyword: a misspelt one would keep its default silently.

    Some models read fields that their configuration class does not declare, so the model's own sources are searched.
    """
    if key in config.attribute_map or key in {item.name for item in fields(type(config))}:
        return True
    package = Path(inspect.getfile(type(config))).parent
    word = re.compile(rf"\b{re.escape(key)}\b")
    return any(word.search(path.read_text(encoding="utf-8")) for path in package.glob("*.py"))


def build_over(spec: ModelSpec, devices: Sequence[str], drawn_on: str | None = None) -> torch.nn.Module:
    """The model on one device, or spread over several. Random weights are drawn on `drawn_on`, by default the one device or the CPU.

    Kinds of devices draw different weights from one seed: whoever compares two of them lets both draw on the same.
    """
    if len(devices) == 1 and (drawn_on in (None, devices[0]) or spec.pretrained is not None):
        return build(spec, devices[0])
    if len(devices) == 1:
        return build(spec, drawn_on or "cpu").to(devices[0])
    placement = spread_map(build(spec, "meta"), devices)
    if spec.pretrained is not None:
        return _load(spec.pretrained, _DTYPES[spec.dtype], placement)
    return spread(build(spec, drawn_on or "cpu"), placement)


def build(spec: ModelSpec, device: str | torch.device = "cpu") -> torch.nn.Module:
    """The model in evaluation mode on `device`; on "meta" without weights, else seeded or loaded.

    A checkpoint with device "auto" is dispatched over all devices by accelerate. Raises UserError for weights of a
    `full` size, and for what transformers refuses.
    """
    dtype = _DTYPES[spec.dtype]
    if spec.layout_only:
        raise UserError(
            f"model: {spec.name} is known by its layout only; accepted on tiers that build a "
            "model: any other of conf/model"
        )
    if spec.kv_dtype not in (None, spec.dtype):
        raise UserError(
            f"model.kv_dtype: {spec.kv_dtype} changes computed sizes only, and the model {spec.name} is built here; accepted: null"
        )
    if spec.pretrained is not None:
        return _load(spec.pretrained, dtype, str(device))
    if spec.size == "full" and torch.device(device).type != "meta":
        raise UserError(f"model.size: full is built without weights only; run {spec.name} as single_gpu or tiny")
    config = config_of(spec)
    devices = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.device(device):
        torch.manual_seed(spec.seed)
        try:
            model = _from_config(config, dtype)
        except ValueError as error:
            raise UserError(f"model {spec.name}: {str(error).splitlines()[0]}") from error
    if torch.device(device).type == "meta" and hasattr(model, "set_experts_implementation"):
        # The other implementations ask which expert got how many tokens, which has no answer without data.
        model.set_experts_implementation("batched_mm")
    return _quiet(model)


def _load(source: str, dtype: torch.dtype, device: str | dict[str, str]) -> torch.nn.Module:
    if device == "meta":
        with torch.device("meta"):
            return _quiet(_from_config(AutoConfig.from_pretrained(source), dtype))
    offline = Path(source).is_dir() or bool(os.environ.get("HF_HUB_OFFLINE"))
    try:
        return _quiet(
            AutoModelForCausalLM.from_pretrained(source, dtype=dtype, device_map=device, local_files_only=offline)
        )
    except (OSError, ValueError) as error:
        raise UserError(f"model.pretrained: {source}: {str(error).splitlines()[0]}") from error


def _from_config(config: PreTrainedConfig, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]


def _quiet(model: Any) -> torch.nn.Module:
    module: torch.nn.Module = model.eval()
    return module.requires_grad_(False)


def parameters(model: torch.nn.Module) -> int:
    """Number of parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())
