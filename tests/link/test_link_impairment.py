import itertools
import math
from statistics import fmean, median, stdev

import pytest

from repro.link.impairment import Jitter, Loss

SEGMENTS = 400_000


def lost_segments(loss: Loss, bundle: int) -> list[int]:
    found = []
    for start in range(0, SEGMENTS, bundle):
        found += [start + index for index in loss.lost(bundle)]
    return found


@pytest.mark.parametrize("probability", [0.0001, 0.001, 0.02])
@pytest.mark.parametrize("bundle", [1, 44])
def test_random_loss_is_binomial_per_segment_whatever_the_bundle(probability: float, bundle: int) -> None:
    lost = len(lost_segments(Loss(probability, 1, 1, seed=3), bundle))
    deviation = math.sqrt(SEGMENTS * probability * (1 - probability))
    assert abs(lost - SEGMENTS * probability) < 3 * deviation


def test_the_same_seed_loses_the_same_segments_however_they_are_bundled() -> None:
    assert lost_segments(Loss(0.01, 5, 1, seed=7), 1) == lost_segments(Loss(0.01, 5, 1, seed=7), 40)


def test_bursts_have_the_asked_length_and_the_asked_mean_loss() -> None:
    lost = lost_segments(Loss(0.02, 10, 1, seed=5), 16)
    bursts = 1 + sum(later != earlier + 1 for earlier, later in itertools.pairwise(lost))
    assert len(lost) / SEGMENTS == pytest.approx(0.02, rel=0.15)
    assert len(lost) / bursts == pytest.approx(10, rel=0.15)


def test_a_burst_that_loses_half_still_loses_the_asked_share_in_all() -> None:
    lost = lost_segments(Loss(0.02, 20, 0.5, seed=5), 16)
    assert len(lost) / SEGMENTS == pytest.approx(0.02, rel=0.15)


def test_a_link_without_loss_loses_nothing_until_it_is_told_to() -> None:
    loss = Loss(0.0, 1, 1, seed=0)
    assert not lost_segments(loss, 64)
    loss.set(0.1)
    assert lost_segments(loss, 64)


def test_a_new_loss_rate_does_not_begin_inside_an_old_burst() -> None:
    for seed in range(50):
        loss = Loss(1e-5, 1000, 1, seed=seed)
        loss.set(1e-5)
        assert len(loss.lost(100)) < 100


@pytest.mark.parametrize("distribution", ["normal", "uniform", "exponential"])
def test_jitter_has_the_asked_deviation_and_no_mean(distribution: str) -> None:
    jitter = Jitter(0.002, distribution, 0.0, seed=1)
    samples = [jitter.sample(i * 0.005) for i in range(40_000)]
    assert stdev(samples) == pytest.approx(0.002, rel=0.05)
    assert abs(fmean(samples)) < 0.002 * 0.03


@pytest.mark.parametrize("distribution", ["normal", "uniform", "exponential"])
@pytest.mark.parametrize("gap_s", [0.01, 0.002])
def test_jitter_leaves_the_rtt_what_was_asked_however_dense_the_packets(distribution: str, gap_s: float) -> None:
    """Packets that would overtake wait, on both ways: that must not add to the delay."""
    there, back = Jitter(0.004, distribution, 0.0, seed=1), Jitter(0.004, distribution, 0.0, seed=2)
    trips, turned_s, came_s = [], 0.0, 0.0
    for index in range(int(60 / gap_s)):
        sent_s = index * gap_s
        turned_s = max(turned_s, sent_s + 0.015 + there.sample(sent_s))
        came_s = max(came_s, turned_s + 0.015 + back.sample(turned_s))
        trips.append(came_s - sent_s)
    assert fmean(trips) == pytest.approx(0.030, abs=0.0005)
    assert stdev(trips) == pytest.approx(0.004 * math.sqrt(2), rel=0.05)
    if distribution != "exponential":
        assert median(trips) == pytest.approx(0.030, abs=0.0005)


def test_the_same_moments_have_the_same_jitter_whoever_asks_between_them() -> None:
    often, seldom = Jitter(0.004, "normal", 0.0, seed=3), Jitter(0.004, "normal", 0.0, seed=3)
    samples = {i: often.sample(i * 0.001) for i in range(5000)}
    assert [seldom.sample(i * 0.001) for i in range(0, 5000, 10)] == [samples[i] for i in range(0, 5000, 10)]


def test_correlated_jitter_forgets_over_its_correlation_time() -> None:
    jitter = Jitter(0.001, "normal", 0.1, seed=1)
    samples = [jitter.sample(i * 0.05) / 0.001 for i in range(40_000)]
    correlation = fmean(a * b for a, b in itertools.pairwise(samples))
    assert correlation == pytest.approx(math.exp(-0.5), abs=0.05)
    assert stdev(samples) == pytest.approx(1.0, rel=0.05)
