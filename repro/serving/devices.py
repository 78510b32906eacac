"""Devices for the two workers: each is given its own, and sees no other.

A GPU that both workers computed on would make Φ_kv and TTFT those of half a device, so that one is shared only where it is asked for.
What a worker sees is decided before it starts, in its environment: no library in it can take another's device.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from repro.errors import UserError

#: NVIDIA's, and AMD's by its own name. ROCR_VISIBLE_DEVICES stays as it is: these two count within it.
_VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
_ACCEPTED = "accepted: cpu, cuda, cuda:<number>, auto"
#: There torch has no way to wait that the kit uses, so every time would be that of a launch.
_REFUSED = ("mps", "xpu")


@dataclass(frozen=True)
class WorkerDevices:
    """`devices` of one worker: one of cpu, cuda, cuda:<number> and auto, which is a GPU where there is one left, else cpu.

    Over several cuda:<number> the layers of its model are spread.
    """

    devices: tuple[str, ...] = ("cpu",)


@dataclass(frozen=True)
class Given:
    """What a worker is given: devices by their names within the worker, and here, and the environment that hides all others."""

    devices: tuple[str, ...]
    outside: tuple[str, ...]
    environment: Mapping[str, str]

    def record(self) -> str:
        """The devices as they are called here."""
        return ", ".join(self.outside)


def hand_out_devices(
    prefill: Sequence[str], decode: Sequence[str], *, share: bool, gpus: int | None = None
) -> dict[str, Given]:
    """Devices by worker, of the `gpus` that this process sees.

    Raises:
        UserError: naming the key, where a device does not exist, is refused, or would be shared without being asked for.
    """
    count = torch.cuda.device_count() if gpus is None else gpus
    asked = {"prefill": _accepted("prefill", prefill), "decode": _accepted("decode", decode)}
    numbers: dict[str, list[int]] = {}
    # Who asks for a device by its number comes before who takes what is left.
    for side in sorted(asked, key=lambda side: asked[side][0] in ("auto", "cuda")):
        taken = [number for found in numbers.values() for number in found]
        key = f"options.{side}.devices"
        found = [_number(key, device, count, taken, share=share) for device in asked[side]]
        numbers[side] = [number for number in found if number is not None]
    return {side: _given(numbers[side]) for side in asked}


def one_device(key: str, device: str, gpus: int | None = None) -> str:
    """The one device that this process computes on itself: cpu, or cuda:<number> of the `gpus` that it sees.

    Raises:
        UserError: naming the `key`, where the device does not exist or is refused.
    """
    _check(key, device)
    number = _number(key, device, torch.cuda.device_count() if gpus is None else gpus, (), share=False)
    return "cpu" if number is None else f"cuda:{number}"


def seen(devices: Sequence[str], memory_kept: bool) -> dict[str, Any]:
    """What this process computes on, how many GPUs it could, and whether its allocator keeps freed memory: for a run's record."""
    names = [torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu" for device in devices]
    return {"devices": list(devices), "names": names, "visible_gpus": torch.cuda.device_count(),
            "freed_memory": "kept" if memory_kept else "as the C library does"}  # fmt: skip


def _accepted(side: str, devices: Sequence[str]) -> Sequence[str]:
    key = f"options.{side}.devices"
    if not devices or len(set(devices)) < len(devices):
        raise UserError(f"{key}: {list(devices)}; accepted: one device or more, each once")
    for device in devices:
        _check(key, device)
        if len(devices) > 1 and not device.startswith("cuda:"):
            raise UserError(f"{key}: {device} among {len(devices)}; accepted of several: cuda:<number>")
    return devices


def _check(key: str, device: str) -> None:
    kind, _, number = device.partition(":")
    if kind in _REFUSED:
        raise UserError(
            f"{key}: {device}; times would be those of launches, as synchronising does nothing there; {_ACCEPTED}"
        )
    if device not in ("cpu", "cuda", "auto") and not (kind == "cuda" and number.isdecimal()):
        raise UserError(f"{key}: {device!r}; {_ACCEPTED}")


def _number(key: str, device: str, count: int, taken: Sequence[int], *, share: bool) -> int | None:
    """Which GPU it is; None for the CPU."""
    if device == "cpu" or (device == "auto" and not count):
        return None
    if not count:
        raise UserError(f"{key}: {device}, but torch sees no GPU; accepted: cpu, auto")
    if ":" in device:
        number = int(device.partition(":")[2])
        if number >= count:
            raise UserError(f"{key}: {device}; accepted: cuda:0 to cuda:{count - 1}")
    else:
        number = next((number for number in range(count) if number not in taken), taken[-1] if taken else 0)
    if number in taken and not share:
        raise UserError(
            f"{key}: cuda:{number} is the other worker's; accepted: another device, or options.share_device=true"
        )
    return number


def _given(numbers: Sequence[int]) -> Given:
    if not numbers:
        return Given(("cpu",), ("cpu",), dict.fromkeys(_VISIBLE, ""))
    environment = {}
    for variable in _VISIBLE:
        # What this process sees may itself be a choice of the machine's.
        inherited = [one for one in os.environ.get(variable, "").split(",") if one]
        environment[variable] = ",".join(
            inherited[number] if number < len(inherited) else str(number) for number in numbers
        )
    inside = tuple(f"cuda:{place}" for place in range(len(numbers)))
    return Given(inside, tuple(f"cuda:{number}" for number in numbers), environment)
