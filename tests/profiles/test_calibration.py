"""The calibration finds a curve that it was given, and leaves one value out as if it were unknown."""

from dataclasses import replace

import numpy as np
import pytest

from repro.profiles.base import PrefillCurve
from repro.profiles.calibration import (
    FAMILIES,
    DecodeAnchors,
    Family,
    PrefillAnchors,
    calibrate_prefill,
    prefill_residuals,
)
from repro.profiles.presets import PaperInputs

INPUTS = PaperInputs.draw()
LENGTHS = np.array([500.0, 8_000, 27_000, 130_000])


def anchors_of(curve: PrefillCurve) -> PrefillAnchors:
    """What the paper would have printed, had this curve been its H20."""
    anchors = INPUTS.prefill_anchors()
    law = anchors.lengths
    tokens, mass = law.atoms()
    return replace(
        anchors,
        pd_prefill_per_s=anchors.pd_prefill_instances / float(curve(law.mean_below(anchors.threshold_tokens))),
        homogeneous_prefill_per_s=anchors.homogeneous_instances / float(curve(law.mean_tokens)),
        ttft_mean_s=float(mass @ curve(tokens)),
        ttft_p90_s=float(curve(law.quantile(0.9))),
    )


@pytest.mark.parametrize(
    ("family", "coefficients"), [("quadratic", (0.468, 1.302, 2.9)), ("power_law", (0.5, 1.2, 1.2))]
)
def test_a_known_curve_is_found_again_and_each_value_predicted_from_the_others(
    family: Family, coefficients: tuple[float, ...]
) -> None:
    truth = PrefillCurve(family, coefficients=coefficients)
    anchors = anchors_of(truth)
    np.testing.assert_allclose(calibrate_prefill(anchors, family)(LENGTHS), truth(LENGTHS), rtol=1e-4)
    for row in prefill_residuals(anchors, family):
        assert row.fitted == pytest.approx(row.anchor.value, rel=1e-5)
        assert row.left_out == pytest.approx(row.anchor.value, rel=2e-3)


def test_h20_explains_all_four_printed_values_within_a_tenth_of_a_percent() -> None:
    for row in prefill_residuals(INPUTS.prefill_anchors(), "quadratic"):
        assert row.fitted == pytest.approx(row.anchor.value, rel=1.2e-3), row.anchor.name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_value_left_out_does_not_enter_its_own_prediction(family: Family) -> None:
    """Moving one anchor by 20 % must move its fit, and must not move the prediction that leaves it out."""
    anchors = INPUTS.prefill_anchors()
    moved = replace(anchors, ttft_p90_s=anchors.ttft_p90_s * 1.2)
    before, after = (prefill_residuals(a, family)[3] for a in (anchors, moved))
    assert after.left_out == pytest.approx(before.left_out, rel=1e-6)
    assert abs(after.fitted / before.fitted - 1) > 0.01


def test_one_decode_rate_explains_all_three_deployments_within_their_rounding() -> None:
    for row in INPUTS.decode_anchors().residuals():
        assert abs(row.fitted - row.anchor.value) <= 0.005
        assert row.left_out == pytest.approx(row.anchor.value, rel=0.01)


def test_the_common_rate_is_the_rate_when_all_agree() -> None:
    anchors = DecodeAnchors((1.5, 3.0, 4.5), (1, 2, 3), ("a", "b", "c"), 1000, 40)
    assert anchors.per_instance() == pytest.approx(1.5)
    assert anchors.per_instance((0, 2)) == pytest.approx(1.5)
    step = anchors.step()
    assert step.batch_max == 37  # 1.5 req/s · 1000 tokens at 40 tokens/s is 37.5 sequences at once
    assert step.batch_max / (step.base_s * 1000) == pytest.approx(1.5)
