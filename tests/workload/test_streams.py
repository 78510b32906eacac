"""Streams and sessions: what a run is fed."""

import numpy as np
import pytest

from repro.workload.arrivals import Poisson
from repro.workload.lengths import TruncatedLogNormal
from repro.workload.mixtures import Empirical, Mixture
from repro.workload.outputs import FixedOutput, LogNormalOutput
from repro.workload.sessions import SessionSpec, draw_prompts, draw_sessions
from repro.workload.stream import Independent, RequestBatch

LAW = TruncatedLogNormal(9.9, 1.0, 128, 131_072)


def whole(stream) -> RequestBatch:  # type: ignore[no-untyped-def]
    parts = list(stream)
    return RequestBatch(*(np.concatenate([part[i] for part in parts]) for i in range(3)))


def test_another_rate_leaves_every_length_as_it_is() -> None:
    slow, fast = (whole(Independent(Poisson(rate), LAW, LogNormalOutput(), 70_000, seed=5)) for rate in (1.0, 4.0))
    assert np.array_equal(slow.input_tokens, fast.input_tokens)
    assert np.array_equal(slow.output_tokens, fast.output_tokens)
    assert slow.arrival_s == pytest.approx(4 * fast.arrival_s)


def test_lengths_change_at_the_shift_and_only_then() -> None:
    plain = whole(Independent(Poisson(1.0), LAW, FixedOutput(8), 5000, seed=5))
    longer = TruncatedLogNormal(11.0, 0.5, 128, 131_072)
    moved = whole(Independent(Poisson(1.0), LAW, FixedOutput(8), 5000, 5, longer, shift_at_s=2500.0))
    before = plain.arrival_s < 2500
    assert np.array_equal(plain.arrival_s, moved.arrival_s)
    assert np.array_equal(plain.input_tokens[before][:1000], moved.input_tokens[before][:1000])
    assert moved.input_tokens[~before].mean() == pytest.approx(longer.mean_tokens, rel=0.05)


def test_log_normal_outputs_have_the_stated_mean() -> None:
    drawn = LogNormalOutput(500.0, 1.5, 100_000).sample(np.random.default_rng(0), 200_000)
    assert drawn.mean() == pytest.approx(500, rel=0.02)
    assert drawn.min() >= 1


def test_an_empirical_distribution_agrees_with_the_law_it_was_drawn_from() -> None:
    sample = Empirical(LAW.sample(np.random.default_rng(0), 200_000))
    for threshold in (5_000.0, 19_400.0, 60_000.0):
        assert float(sample.fraction_above(threshold)) == pytest.approx(float(LAW.fraction_above(threshold)), abs=0.005)
        assert float(sample.mean_above(threshold)) == pytest.approx(float(LAW.mean_above(threshold)), rel=0.01)
        assert float(sample.mean_below(threshold)) == pytest.approx(float(LAW.mean_below(threshold)), rel=0.01)
    assert np.isnan(sample.mean_above(1e9))


def test_a_mixture_weighs_its_parts_exactly() -> None:
    short = TruncatedLogNormal(7.0, 0.5, 128, 131_072)
    both = Mixture((LAW, short), (1.0, 3.0))
    assert both.mean_tokens == pytest.approx(0.25 * LAW.mean_tokens + 0.75 * short.mean_tokens)
    drawn = both.sample(np.random.default_rng(0), 400_000)
    for threshold in (1_000.0, 20_000.0):
        assert float(both.fraction_above(threshold)) == pytest.approx((drawn > threshold).mean(), abs=0.003)
        assert float(both.mean_above(threshold)) == pytest.approx(drawn[drawn > threshold].mean(), rel=0.01)
        assert float(both.expectation_below(np.sqrt, threshold)) == pytest.approx(
            np.sqrt(drawn[drawn <= threshold]).mean(), rel=0.01
        )
    assert float(both.quantile(0.5)) == pytest.approx(np.median(drawn), rel=0.02)


def test_session_prompts_grow_and_share_their_beginning() -> None:
    stream = draw_sessions(SessionSpec(0.5, families=2), 600.0, seed=1).batch
    assert stream.chains is not None
    kept: dict[int, tuple[int, ...]] = {}
    grown = 0
    for prompt, after in stream.chains:
        assert after[: len(prompt)] == prompt
        own = next((key for key in prompt if key < 0), None)
        if own is not None and own in kept:
            assert prompt[: len(kept[own])] == kept[own]
            grown += 1
        if own is not None:
            kept[own] = after
    assert grown > 200
    assert len({prompt[0] for prompt, _ in stream.chains if prompt}) == 2


def test_prompts_of_sessions_are_as_long_as_said_and_begin_as_their_blocks_say() -> None:
    spec = SessionSpec(0.5, families=2, system_tokens=64, first_tokens=80, turn_tokens=40, block_tokens=16, primed=True)
    stream, prompts = draw_sessions(spec, 400.0, seed=1).batch, draw_prompts(spec, 400.0, 1, vocabulary=512)
    assert [len(prompt) for prompt in prompts] == stream.input_tokens.tolist()
    assert prompts == draw_prompts(spec, 400.0, 1, vocabulary=512) != draw_prompts(spec, 400.0, 2, vocabulary=512)
    assert stream.chains is not None
    # A key stands for all tokens up to its block's end, and for no others.
    seen: dict[int, tuple[int, ...]] = {}
    for prompt, (keys, _) in zip(prompts, stream.chains, strict=True):
        for block, key in enumerate(keys):
            assert seen.setdefault(key, prompt[: 16 * (block + 1)]) == prompt[: 16 * (block + 1)]
    assert len(set(seen.values())) == len(seen) < sum(len(keys) for keys, _ in stream.chains)
