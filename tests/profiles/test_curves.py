"""Prefill curves pass through what was measured and rise with length; sizes and steps are what they say."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from repro.errors import UserError
from repro.paper import tables
from repro.profiles.base import INTERPOLATIONS, DecodeStep, KVSize, PhaseProfile, PrefillCurve

TOKENS = tuple(float(tables.TOKENS[length]) for length in tables.LENGTHS)
SECONDS = tuple(tables.TABLE_5[length].prefill.value for length in tables.LENGTHS)

rising = st.lists(st.tuples(st.floats(1, 1e4), st.floats(1e-3, 10)), min_size=2, max_size=8).map(
    lambda steps: (tuple(np.cumsum([s[0] for s in steps])), tuple(np.cumsum([s[1] for s in steps])))
)


@pytest.mark.parametrize("interpolation", ["linear", "log_log", "monotone_cubic"])
def test_an_interpolation_passes_through_every_point(interpolation: str) -> None:
    curve = PrefillCurve(interpolation, TOKENS, SECONDS)
    np.testing.assert_allclose(curve(TOKENS), SECONDS, rtol=1e-12)


@pytest.mark.parametrize("interpolation", ["power_law", "quadratic"])
def test_a_fit_comes_near_every_point_of_table_5(interpolation: str) -> None:
    curve = PrefillCurve(interpolation, TOKENS, SECONDS)
    np.testing.assert_allclose(curve(TOKENS), SECONDS, rtol=0.06)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_longer_prompts_never_take_less_time(interpolation: str) -> None:
    curve = PrefillCurve(interpolation, TOKENS, SECONDS)
    seconds = curve(np.linspace(1, 400_000, 20_001))
    assert np.all(np.diff(seconds) >= 0)
    assert seconds[0] > 0


@given(rising)
def test_no_measured_points_make_the_cubic_overshoot(points: tuple[tuple[float, ...], tuple[float, ...]]) -> None:
    tokens, seconds = points
    curve = PrefillCurve("monotone_cubic", tokens, seconds)
    between = curve(np.linspace(tokens[0], tokens[-1], 501))
    assert np.all(np.diff(between) >= -1e-9 * seconds[-1])
    assert between.min() >= seconds[0] - 1e-9
    assert between.max() <= seconds[-1] + 1e-9


@pytest.mark.parametrize("interpolation", ["linear", "monotone_cubic"])
def test_beyond_the_points_a_curve_goes_on_straight(interpolation: str) -> None:
    curve = PrefillCurve(interpolation, TOKENS, SECONDS)
    a, b, c = curve([200_000, 300_000, 400_000])
    assert c - b == pytest.approx(b - a)


def test_beyond_the_points_log_log_keeps_its_exponent() -> None:
    curve = PrefillCurve("log_log", TOKENS, SECONDS)
    a, b, c = curve([200_000, 400_000, 800_000])
    assert c / b == pytest.approx(b / a)


def test_given_coefficients_are_the_formula_itself() -> None:
    assert PrefillCurve("quadratic", coefficients=(1, 2, 3))(2e4) == pytest.approx(1 + 2 * 2 + 3 * 0.04)
    assert PrefillCurve("power_law", coefficients=(1, 2, 1.5))(4e4) == pytest.approx(1 + 2 * 8)


def test_a_fit_recovers_the_coefficients_that_made_its_points() -> None:
    made = PrefillCurve("power_law", coefficients=(0.411, 0.385, 1.13))
    points = tuple(float(s) for s in made(TOKENS))
    fitted = PrefillCurve("power_law", TOKENS, points)
    np.testing.assert_allclose(fitted([500, 5_000, 60_000]), made([500, 5_000, 60_000]), rtol=1e-6)


def test_a_complete_prefix_hit_takes_no_time() -> None:
    assert PrefillCurve("linear", TOKENS, SECONDS)([0.0, 1_024.0]).tolist() == [0.0, pytest.approx(0.44)]


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"interpolation": "spline"}, "interpolation: 'spline'"),
        ({"tokens": (1.0,), "seconds": (1.0,)}, "two or more"),
        ({"tokens": (1.0, 2.0), "seconds": (1.0,)}, "as many seconds"),
        ({"tokens": (2.0, 1.0), "seconds": (1.0, 2.0)}, "tokens"),
        ({"tokens": (1.0, 2.0), "seconds": (0.0, 2.0)}, "seconds"),
        ({"interpolation": "linear", "coefficients": (1.0, 2.0, 3.0)}, "coefficients"),
        ({"interpolation": "quadratic", "tokens": (1.0, 2.0), "seconds": (1.0, 2.0)}, "three or more"),
    ],
)
def test_an_impossible_curve_is_refused(values: dict[str, object], key: str) -> None:
    with pytest.raises(UserError, match=key):
        PrefillCurve(**values)  # type: ignore[arg-type]


def test_the_size_is_fixed_plus_linear_plus_a_window_that_stops_growing() -> None:
    size = KVSize(fixed_bytes=1000, bytes_per_token=2, window_tokens=128, window_bytes_per_token=10)
    assert size([0, 100, 128, 1000]).tolist() == [1000, 1000 + 1200, 1000 + 256 + 1280, 1000 + 2000 + 1280]
    with pytest.raises(UserError, match="bytes_per_token"):
        KVSize(bytes_per_token=-1)


def test_a_decode_step_grows_with_batch_and_context() -> None:
    step = DecodeStep(0.01, per_sequence_s=0.001, per_context_token_s=1e-6, batch_max=8)
    assert step(8, 1_000) == pytest.approx(0.01 + 0.008 + 0.001)
    with pytest.raises(UserError, match="batch_max"):
        DecodeStep(0.01, batch_max=0)
    with pytest.raises(UserError, match="decode"):
        DecodeStep(0.0)


def test_another_interpolation_reads_the_same_points_and_leaves_a_calibrated_curve_alone() -> None:
    measured = PhaseProfile("a", "m", "X", 8, PrefillCurve("linear", TOKENS, SECONDS), KVSize(1), DecodeStep(1))
    assert measured.with_interpolation("log_log").prefill.interpolation == "log_log"
    assert measured.with_interpolation("log_log").prefill.tokens == TOKENS
    formula = PhaseProfile(
        "a", "m", "X", 8, PrefillCurve("quadratic", coefficients=(1, 2, 3)), KVSize(1), DecodeStep(1)
    )
    assert formula.with_interpolation("linear") is formula
