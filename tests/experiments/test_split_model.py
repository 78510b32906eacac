"""The yardstick of a split run: what a mode costs prefill counts against it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from repro.engine.base import Request
from repro.experiments.split_model import ModelRun, in_turn, model_layout
from repro.models import spec as models
from repro.serving.system import Served

REQUEST = Request(1, tuple(range(3, 103)), 2)
STEP_S = 0.01


def served(mode: str, prefill_s: float, cached_tokens: int = 0) -> Served:
    return Served(
        request=REQUEST, mode=mode, tokens=(1, 2), arrival_s=0.0, prefill_start_s=0.0, prefill_end_s=prefill_s,
        first_piece_s=0.1, complete_s=prefill_s, joined_s=prefill_s,
        token_times_s=(prefill_s + STEP_S, prefill_s + 2 * STEP_S), resent_bytes=0, kv_bytes={}, encoded_bytes=0, pieces=1,
        cached_tokens=cached_tokens, held_tokens=0, agreement=None,
    )  # fmt: skip


def model_run(*found: Served) -> ModelRun:
    fields: dict[str, Any] = {
        "name": "a model",
        "layout": model_layout(models.load("qwen3_235b", "tiny")),
        "runs": {one.mode: SimpleNamespace(served=(one,)) for one in found},
        "origin_s": 0.0,
        "measured": SimpleNamespace(rate_bps=1e12, ideal_rate_bps=1e12, rtt_s=0.0),
        "codec": None,
        "alone_s": {1: 1.0},
    }
    return ModelRun(**{name: fields.get(name) for name in ModelRun.__dataclass_fields__})


def test_a_mode_that_slows_prefill_down_is_farther_from_the_bound() -> None:
    slow = served("layerwise", prefill_s=1.4)
    run = model_run(served("unsplit", prefill_s=1.0), slow)
    assert run.slowdown(slow) == pytest.approx(1.4)
    assert run.bound_s(slow) == pytest.approx(1.0 + STEP_S)
    assert slow.ttft_s / run.bound_s(slow) == pytest.approx(1.41 / 1.01)


def test_t_prefill_is_that_of_the_worker_that_prefills_and_not_of_the_unsplit_run() -> None:
    assert model_run(served("unsplit", prefill_s=2.0)).prefill_s(100) == pytest.approx(1.0)


def test_a_request_that_found_a_prefix_is_held_against_its_own_t_prefill() -> None:
    cached = served("layerwise", prefill_s=0.5, cached_tokens=50)
    run = model_run(served("unsplit", prefill_s=1.0), cached)
    assert run.bound_s(cached) == pytest.approx(0.5 + STEP_S)


def test_every_mode_comes_first_and_last_as_often_as_the_others() -> None:
    orders = [in_turn(("unsplit", "bulk", "layerwise"), number) for number in (1, 2, 3)]
    assert {order[0] for order in orders} == {order[-1] for order in orders} == {"unsplit", "bulk", "layerwise"}
    assert all(sorted(order) == sorted(orders[0]) for order in orders)


def test_layerwise_is_compared_with_bulk_by_pairs_of_the_same_prompt() -> None:
    run = model_run(served("bulk", prefill_s=1.19), served("layerwise", prefill_s=0.89))
    assert run.paired_ratios("layerwise", "bulk", 100) == pytest.approx([0.75])
