"""Decode batches that memory limits, and steps that grow with context, against closed forms and against the stage without either."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tiny import TinyProfile, local, play

from repro.errors import UserError
from repro.profiles.base import DecodeRows
from repro.profiles.presets import load_profile
from repro.simulate.spec import Fault, PdCluster, SimulationSpec
from repro.workload.arrivals import Poisson
from repro.workload.outputs import FixedOutput, LogNormalOutput
from repro.workload.stream import Independent, RequestBatch

#: The KVCache of a request has one size, so memory counts requests.
EQUAL = TinyProfile(
    s_per_token=1e-6, fixed_bytes=1e6, bytes_per_token=0.0, per_sequence_s=0.001, per_context_s=1e-7, batch_max=16
)


def batch(at_s: list[float], tokens: list[int], outputs: list[int]) -> RequestBatch:
    return RequestBatch(np.array(at_s), np.array(tokens), np.array(outputs))


def limited(spec: SimulationSpec, memory_bytes: float) -> SimulationSpec:
    return replace(spec, pd=tuple(replace(pd, decode_memory_bytes=memory_bytes) for pd in spec.pd))


def requests(rate: float = 8.0, n: int = 600) -> Any:
    return Independent(Poisson(rate), Tokens(), LogNormalOutput(50, 0.8, 300), n, 3)


class Tokens:
    def sample(self, rng: np.random.Generator, n: int) -> Any:
        return rng.integers(100, 9000, n)


def test_tpot_is_the_mean_of_the_steps_over_the_growing_context() -> None:
    k, tokens, output = 4, 5000, 700
    table, _ = play(limited(local(EQUAL, n_p=4, n_d=1), 1e9), [batch([0.0] * k, [tokens] * k, [output] * k)])
    steps = [EQUAL.decode_step_s(k, k * (tokens + done)) for done in range(output)]
    np.testing.assert_allclose(table["tpot_s"], np.mean(steps[1:]), rtol=1e-9)
    np.testing.assert_allclose(table["ttft_s"], tokens * EQUAL.s_per_token + steps[0], rtol=1e-9)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_memory_for_k_requests_is_a_batch_of_k(k: int) -> None:
    by_batch, _ = play(local(replace(EQUAL, batch_max=k), n_p=4, n_d=2), requests())
    by_memory, summary = play(limited(local(EQUAL, n_p=4, n_d=2), (k + 0.5) * EQUAL.fixed_bytes), requests())
    assert not summary.preemptions
    for column in ("ttft_s", "tpot_s", "finish_s"):
        np.testing.assert_allclose(by_memory[column], by_batch[column], rtol=1e-9)


def test_memory_without_end_changes_nothing() -> None:
    growing = replace(EQUAL, bytes_per_token=1e3, batch_max=5)
    free, _ = play(local(growing, n_p=4, n_d=2), requests())
    limitless, summary = play(limited(local(growing, n_p=4, n_d=2), 1e15), requests())
    assert not summary.preemptions
    for column in ("ttft_s", "tpot_s", "finish_s", "decode_queue_s"):
        np.testing.assert_allclose(limitless[column], free[column], rtol=1e-9, atol=1e-9)


def test_who_joined_last_leaves_when_memory_fills_and_is_recomputed_when_there_is_room() -> None:
    profile = TinyProfile(s_per_token=0.001, fixed_bytes=0.0, bytes_per_token=1.0, step_s=0.01)
    # Two prompts of 100 tokens with 50 to come each, and room for 250 tokens: full after 25 steps, when the second leaves.
    table, summary = play(limited(local(profile, n_p=2, n_d=1), 250.0), [batch([0.0, 0.0], [100, 100], [50, 50])])
    assert summary.preemptions == 1
    stayed, left = table["finish_s"]
    assert stayed == pytest.approx(0.1 + 50 * 0.01)
    # It comes back when the first has ended, prefills 125 tokens anew, and has 25 to go.
    assert left == pytest.approx(stayed + 0.125 + 25 * 0.01)
    assert table["ttft_s"].tolist() == pytest.approx([0.11, 0.11])


def test_less_memory_never_answers_sooner_and_loses_nobody_though_instances_fail() -> None:
    growing = replace(EQUAL, bytes_per_token=1e3)
    finish = []
    for memory_bytes in (1e9, 6e7, 3e7):
        faults = (Fault("pd_d", 4, 20.0, 15.0), Fault("pd_d", 5, 40.0, 5.0))
        spec = replace(limited(local(growing, n_p=4, n_d=2), memory_bytes), faults=faults)
        table, summary = play(spec, requests())
        assert summary.completed == len(table) == 600
        assert (table["tpot_s"] > 0).mean() > 0.95
        finish.append(table["finish_s"].mean())
    assert finish == sorted(finish)
    assert finish[0] < finish[-1]
    assert summary.preemptions > 0


def test_a_request_that_memory_cannot_hold_is_refused_by_name() -> None:
    with pytest.raises(
        UserError, match=r"^cluster\.decode\.memory_bytes: 1000, but a request of 150 tokens keeps 1e\+06 bytes"
    ):
        play(limited(local(EQUAL), 1e3), [batch([0.0], [100], [50])])
    with pytest.raises(UserError, match=r"^cluster\.decode\.memory_bytes"):
        PdCluster(EQUAL, 1, 1, decode_memory_bytes=0.0)


def test_flat_rows_give_the_results_of_a_flat_step_to_the_last_digit() -> None:
    paper = load_profile("paper_1t_h20")
    step_s = paper.decode.base_s
    rows = DecodeRows((1, 1, 8, 8, 32), (1e3, 1e5, 1e3, 1e5, 1e3), (step_s,) * 5)
    measured = replace(paper, decode_rows=rows).with_decode_steps("rows")
    stream = Independent(Poisson(0.8), Tokens(), FixedOutput(1024), 300, 3)
    usual, _ = play(SimulationSpec((PdCluster(paper, 3, 1),), scheduler=local(EQUAL).scheduler), stream)
    flat, _ = play(SimulationSpec((PdCluster(measured, 3, 1),), scheduler=local(EQUAL).scheduler), stream)
    assert flat.to_csv() == usual.to_csv()


def test_rows_pass_through_measured_steps_where_the_three_coefficients_do_not() -> None:
    fitted = load_profile("silicon:qwen3_5_397b@h200")
    rows = fitted.with_decode_steps("rows")
    assert fitted.decode_rows is not None
    measured = fitted.decode_rows
    errors = {}
    for name, profile in (("fitted", fitted), ("rows", rows)):
        said = [profile.decode_step_s(b, b * t) for b, t in zip(measured.batch, measured.tokens, strict=True)]
        errors[name] = np.abs(np.array(said) / measured.seconds - 1)
    assert errors["rows"].max() < 0.06 < errors["fitted"].max()
    between, low, high = (rows.decode_step_s(b, 1e6) for b in (10, 4, 16))
    assert low < between < high
    with pytest.raises(UserError, match=r"^profile\.decode_steps: 'rows' of paper_1t_h20; accepted: fitted"):
        load_profile("paper_1t_h20").with_decode_steps("rows")
