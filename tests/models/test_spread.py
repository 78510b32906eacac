"""A model that is spread over several devices computes what it computes on one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accelerate.hooks import AlignDevicesHook

from repro.engine.base import Handover, Request
from repro.engine.spans import SpanLog
from repro.engine.torch_engine import EngineSpec, TorchEngine
from repro.errors import UserError
from repro.models import spec as models
from repro.models.build import build, build_over
from repro.models.prefill import chunked_prefill
from repro.models.spec import ModelSpec
from repro.models.spread import spread_map


def tiny(name: str) -> ModelSpec:
    model = models.load(name, "tiny")
    return replace(model, parameters=float(model.parameters))


@pytest.mark.parametrize("name", ["kimi_linear", "qwen3_235b"])
@pytest.mark.parametrize("count", [2, 3])
def test_whole_layers_go_to_each_device_in_their_order_and_in_fair_shares(name: str, count: int) -> None:
    bare = build(tiny(name), "meta")
    placement = spread_map(bare, [f"cuda:{number}" for number in range(count)])
    held = dict.fromkeys(placement.values(), 0)
    seen = []
    for parameter, values in bare.named_parameters():
        (device,) = {place for part, place in placement.items() if f"{parameter}.".startswith(f"{part}.")}
        held[device] += values.numel()
        seen.append(device)
    layers = [placement[key] for key in placement if ".layers." in key]
    assert layers == sorted(layers)
    assert set(seen) == {f"cuda:{number}" for number in range(count)}
    assert max(held.values()) < 0.8 * sum(held.values())


def test_more_devices_than_layers_are_refused() -> None:
    with pytest.raises(UserError, match="devices: 40 for a model that splits into"):
        spread_map(build(tiny("qwen3_235b"), "meta"), [f"cuda:{number}" for number in range(40)])


def test_a_spread_model_answers_as_the_one_that_lies_on_one_device() -> None:
    model = tiny("kimi_linear")
    whole, parted = build(model), build_over(model, ("cpu", "cpu"))
    hooked = [module for module in parted.modules() if isinstance(getattr(module, "_hf_hook", None), AlignDevicesHook)]
    assert len(hooked) > 2
    ids = torch.arange(3, 103)[None]
    assert torch.equal(chunked_prefill(parted, ids, 32)[1], chunked_prefill(whole, ids, 32)[1])


def test_an_engine_over_two_devices_hands_over_the_state_of_all_of_them() -> None:
    spec = EngineSpec(tiny("kimi_linear"), chunk_tokens=32)
    near, far, asked = (
        TorchEngine(replace(spec, more_devices=("cpu",))),
        TorchEngine(spec),
        Request(1, tuple(range(3, 103)), 3),
    )
    pieces = []
    near.prefill(
        asked, lambda piece: pieces.append(replace(piece, payload=memoryview(bytes(piece.payload)))), SpanLog()
    )
    far.reference(asked)
    far.join(Handover.of(asked), far.fetch(pieces))
    for _ in range(asked.output_tokens):
        far.step()
    far.leave(1)
    agreement = far.agreement(1)
    assert agreement is not None
    assert agreement.matches
