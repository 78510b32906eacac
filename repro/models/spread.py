"""Spreads one model over several devices by accelerate: whole decoder layers, in their order, of about equal bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import compute_module_sizes

from repro.errors import UserError


def spread_map(bare: torch.nn.Module, devices: Sequence[str]) -> dict[str, str]:
    """Which of `devices` each part of the model goes to. `bare` is the model without weights, on the meta device.

    Raises UserError where a device would be left without a part.
    """
    whole = cast(Any, bare)
    if hasattr(whole, "tie_weights"):
        whole.tie_weights()
    names = sorted(getattr(whole, "_no_split_modules", None) or ())
    sizes = compute_module_sizes(bare)
    of_parts = [sizes[name] for name, part in bare.named_modules() if type(part).__name__ in names]
    largest = max(of_parts, default=max(size for name, size in sizes.items() if name))
    share = sizes[""] // len(devices)
    # accelerate keeps room for the largest layer free on the first device, and the last takes what is left.
    memory = {number: share + largest * (2 if number == 0 else 1) for number in range(len(devices))}
    memory[len(devices) - 1] = 2 * sizes[""]
    found = infer_auto_device_map(bare, max_memory=cast(Any, memory), no_split_module_classes=names)
    if {int(number) for number in found.values()} != set(range(len(devices))):
        raise UserError(
            f"devices: {len(devices)} for a model that splits into {len(set(found.values()))} parts; accepted: fewer"
        )
    return {name: devices[int(number)] for name, number in found.items()}


def spread(model: torch.nn.Module, placement: dict[str, str]) -> torch.nn.Module:
    """The model with its parts where `placement` says; what passes between them is moved, but a cache stays where it grows."""
    skip = getattr(model, "_skip_keys_device_placement", None)
    dispatched: torch.nn.Module = dispatch_model(model, cast(Any, placement), skip_keys=skip, force_hooks=True)
    return dispatched
