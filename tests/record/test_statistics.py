"""Intervals: Student's where it is possible, logarithms where it is not, pairs for differences, no quantile from too few."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repro.record.request_metrics import over_runs
from repro.record.statistics import Estimate, least_samples, quantile, repeats_for, warm_up

POSITIVE = st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=6)


def test_the_interval_of_a_mean_is_students() -> None:
    found = Estimate.of([10.0, 11.0, 12.0])
    half = 4.302652729911275 / math.sqrt(3)  # t of 2 degrees of freedom at 97.5 %, standard deviation 1
    assert (found.value, found.n) == (11.0, 3)
    assert found.low == pytest.approx(11 - half)
    assert found.high == pytest.approx(11 + half)


@settings(max_examples=200, deadline=None)
@given(POSITIVE)
def test_what_cannot_be_negative_never_gets_a_negative_bound(values: list[float]) -> None:
    found = Estimate.of(values)
    assert 0 < found.low <= found.value <= found.high


def test_scattered_seconds_get_an_interval_on_their_logarithms() -> None:
    """Three repeats that Student's interval would take to −0.5 s."""
    found = Estimate.of([0.2, 0.5, 1.1])
    assert Estimate.of_signed([0.2, 0.5, 1.1]).low < 0
    logs = Estimate.of_signed([math.log(value) for value in (0.2, 0.5, 1.1)])
    assert (found.low, found.high) == pytest.approx((math.exp(logs.low), math.exp(logs.high)))


def test_no_interval_leaves_what_a_quantity_can_be() -> None:
    exposed = Estimate.of([0.0, 0.0, 0.3])
    assert Estimate.of_signed([0.0, 0.0, 0.3]).low < 0
    assert exposed.low == 0
    assert over_runs("good_fraction", [0.4, 1.0, 1.0]).high == 1
    assert over_runs("ttft_mean_s", [0.4, 1.0, 1.0]).high > 1


def test_a_difference_is_taken_in_pairs_and_may_reach_below_zero() -> None:
    found = Estimate.paired([5.0, 9.0, 2.1], [4.0, 8.2, 1.0])
    assert found.value == pytest.approx(np.mean([1.0, 0.8, 1.1]))
    assert Estimate.paired([1.0, 3.0], [2.0, 2.0]).low < 0


def test_one_sample_has_no_interval() -> None:
    found = Estimate.of([3.0])
    assert found.value == 3.0
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_a_geometric_mean_of_ratios_is_that_of_their_inverses_inverted() -> None:
    found, inverse = Estimate.geometric([0.5, 2.0, 4.0]), Estimate.geometric([2.0, 0.5, 0.25])
    assert found.value == pytest.approx(1 / inverse.value)
    assert found.low == pytest.approx(1 / inverse.high)


@pytest.mark.parametrize(("fraction", "least"), [(0.5, 2), (0.9, 10), (0.99, 100)])
def test_no_percentile_comes_from_fewer_samples_than_it_needs(fraction: float, least: int) -> None:
    assert math.isnan(quantile(np.arange(least - 1.0), fraction))
    assert math.isfinite(quantile(np.arange(float(least)), fraction))


def test_a_quantiles_bootstrap_interval_covers_it_as_often_as_it_says() -> None:
    rng = np.random.default_rng(5)
    truth = math.log(10)  # P90 of an exponential of mean 1
    hits = 0
    for seed in range(60):
        found = Estimate.of_quantile(rng.exponential(size=200), 0.9, seed)
        hits += found.low <= truth <= found.high
    assert 51 <= hits <= 60


def test_a_percentile_needs_one_sample_beyond_it() -> None:
    for fraction, least in ((0.5, 2), (0.9, 10), (0.99, 100), (0.999, 1000)):
        assert least_samples(fraction) == least
        values = np.arange(least, dtype=np.float64)
        assert np.isfinite(quantile(values, fraction))
        assert np.isnan(quantile(values[:-1], fraction))


def test_mser5_cuts_the_transient_and_not_what_has_settled() -> None:
    rng = np.random.default_rng(0)
    settled = rng.normal(10, 1, 1000)
    assert warm_up(settled) <= 200
    rising = np.concatenate([np.linspace(0, 10, 100), settled])
    assert 70 <= warm_up(rising) <= 130
    assert warm_up(np.linspace(0, 100, 500)) == -1, "what never settles says so"
    assert warm_up([1.0, 2.0]) == 0


def test_the_stated_number_of_repeats_finds_the_difference_four_times_of_five() -> None:
    rng = np.random.default_rng(1)
    scatter, difference = 1.0, 0.8
    repeats = repeats_for(scatter, difference)
    found = 0
    for _ in range(2000):
        estimate = Estimate.of_signed(list(rng.normal(difference, scatter, repeats)))
        found += estimate.low > 0
    assert 0.77 < found / 2000 < 0.86
    assert repeats_for(1.0, 0.1) > 700
    with pytest.raises(ValueError, match="no number of repeats"):
        repeats_for(1.0, 0.0)
