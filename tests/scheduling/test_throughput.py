"""Equations 1 to 6 against numbers worked by hand, on a profile simple enough to do so."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from repro.errors import UserError
from repro.profiles.base import DecodeStep, KVSize, PhaseProfile, PrefillCurve
from repro.profiles.presets import load_profile
from repro.scheduling.throughput import Deployment, Stages, at_thresholds, decode_per_instance, evaluate
from repro.workload.lengths import TruncatedLogNormal

LAW = TruncatedLogNormal(mu=9.90, sigma=1.00, minimum_tokens=128, maximum_tokens=131_072)


def profile(seconds_per_token: float, batch_max: int = 20) -> PhaseProfile:
    """T_prefill = s·l, S_kv = 1 MB + 1 kB·l, a decode step of 25 ms."""
    return PhaseProfile(
        "toy", "toy", "TOY", 8,
        PrefillCurve("linear", (1.0, 1e6), (seconds_per_token, 1e6 * seconds_per_token)),
        KVSize(fixed_bytes=1e6, bytes_per_token=1e3),
        DecodeStep(0.025, batch_max=batch_max),
    )  # fmt: skip


TOY = Deployment(profile(1e-4), 4, profile(2e-4), 8, 1e9, LAW, 1000)


def test_kv_throughput_is_size_over_time() -> None:
    # 1 MB + 10 MB in 1 s: 88 Mbit/s (equation 1)
    assert profile(1e-4).kv_throughput_bps(10_000) == pytest.approx(88e6)


def test_prfaas_runs_at_the_slower_of_prefill_and_egress() -> None:
    row = at_thresholds(TOY, 20_000, "representative")
    l_long = float(LAW.mean_above(20_000))
    prefill, egress = 4 / (1e-4 * l_long), 1e9 / (8 * (1e6 + 1e3 * l_long))
    assert row.prfaas_prefill_per_s[0] == pytest.approx(prefill)
    assert row.prfaas_egress_per_s[0] == pytest.approx(egress)
    assert row.prfaas_per_s[0] == pytest.approx(min(prefill, egress))
    slow = at_thresholds(replace(TOY, egress_bps=1e6), 20_000, "representative")
    assert slow.prfaas_per_s[0] == pytest.approx(egress / 1e3)


def test_local_prefill_and_decode_scale_with_their_instances() -> None:
    row = at_thresholds(TOY, 20_000, "representative")
    assert row.pd_prefill_per_instance_per_s[0] == pytest.approx(1 / (2e-4 * float(LAW.mean_below(20_000))))
    assert decode_per_instance(TOY) == pytest.approx(20 / (0.025 * 1000))
    point = evaluate(TOY, 20_000, 3, 5, "representative")
    assert point.stages.pd_prefill == pytest.approx(3 * row.pd_prefill_per_instance_per_s[0])
    assert point.stages.pd_decode == pytest.approx(5 * 0.8)


def test_the_slowest_stage_under_its_share_of_the_load_sets_lambda_max() -> None:
    assert Stages(1.0, 1.0, 10.0).lambda_max(0.5) == pytest.approx(2.0)
    assert Stages(1.0, 1.0, 10.0).lambda_max(0.8) == pytest.approx(1.25)
    assert Stages(1.0, 1.0, 10.0).lambda_max(0.2) == pytest.approx(1.25)
    assert Stages(1.0, 1.0, 1.5).lambda_max(0.5) == pytest.approx(1.5)
    assert Stages(3.0, 0.0, 10.0).lambda_max(1.0) == pytest.approx(3.0)
    assert Stages(0.0, 3.0, 10.0).lambda_max(0.0) == pytest.approx(3.0)


@given(st.floats(0.1, 10), st.floats(0.1, 10), st.floats(0.1, 10), st.floats(0.01, 0.99), st.floats(1, 3))
def test_more_capacity_never_lowers_lambda_max(a: float, b: float, c: float, p: float, factor: float) -> None:
    base = Stages(a, b, c).lambda_max(p)
    assert Stages(a * factor, b, c).lambda_max(p) >= base
    assert Stages(a, b * factor, c).lambda_max(p) >= base
    assert Stages(a, b, c * factor).lambda_max(p) >= base
    assert Stages(a * factor, b * factor, c * factor).lambda_max(p) == pytest.approx(factor * base)


def test_for_a_linear_profile_both_readings_of_the_mean_agree() -> None:
    """T(E[L]) and E[T(L)] differ by convexity alone."""
    one = evaluate(TOY, 20_000, 3, 5, "representative")
    other = evaluate(TOY, 20_000, 3, 5, "true_mean")
    assert other.lambda_max == pytest.approx(one.lambda_max, rel=1e-9)


def test_for_the_papers_convex_profiles_the_true_mean_sustains_less() -> None:
    base = replace(TOY, prfaas=load_profile("paper_1t_h200"), pd=load_profile("paper_1t_h20"), egress_bps=100e9)
    for n_p in (2, 3, 4):
        one = evaluate(base, 19_400, n_p, 8 - n_p, "representative")
        other = evaluate(base, 19_400, n_p, 8 - n_p, "true_mean")
        assert other.stages.prfaas < one.stages.prfaas
        assert other.stages.pd_prefill < one.stages.pd_prefill


def test_egress_is_what_the_offloaded_requests_leave_at_lambda_max() -> None:
    point = evaluate(TOY, 20_000, 3, 5, "representative")
    bits_each = 8 * (1e6 + 1e3 * float(LAW.mean_above(20_000)))
    assert point.egress_bps == pytest.approx(point.lambda_max * point.offload_fraction * bits_each, rel=1e-6)
    assert point.link_utilisation == pytest.approx(point.egress_bps / 1e9)


def test_a_homogeneous_cluster_offloads_nothing_and_a_naive_one_everything() -> None:
    homogeneous = evaluate(TOY.without_prfaas(12), 131_072, 9, 3, "representative")
    assert (homogeneous.offload_fraction, homogeneous.egress_bps, homogeneous.n_prfaas) == (0, 0, 0)
    naive = evaluate(TOY, 128, 0, 8, "representative")
    assert (naive.offload_fraction, naive.stages.pd_prefill) == (1, 0)
    assert naive.l_long_tokens == pytest.approx(LAW.mean_tokens)


def test_a_stage_that_requests_need_must_have_an_instance() -> None:
    with pytest.raises(UserError, match=r"policy\.n_p: 0"):
        evaluate(TOY, 20_000, 0, 8, "representative")
    with pytest.raises(UserError, match=r"policy\.threshold_tokens: 20000"):
        evaluate(TOY.without_prfaas(8), 20_000, 3, 5, "representative")
    with pytest.raises(UserError, match="n_d"):
        evaluate(TOY, 20_000, 8, 0, "representative")


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"egress_bps": 0.0}, "link.rate_bps"),
        ({"output_tokens": 0.0}, "workload.output_tokens"),
        ({"n_pd": 0}, "cluster"),
    ],
)
def test_an_impossible_deployment_is_refused(change: dict[str, float], key: str) -> None:
    with pytest.raises(UserError, match=key):
        replace(TOY, **change)


def test_thresholds_are_evaluated_together_as_one_by_one() -> None:
    grid = np.array([128.0, 5_000, 19_400, 100_000, 131_072])
    together = at_thresholds(TOY, grid, "true_mean")
    for i, t in enumerate(grid):
        alone = at_thresholds(TOY, t, "true_mean")
        for name in ("offload_fraction", "l_long_tokens", "prfaas_per_s", "pd_prefill_per_instance_per_s"):
            np.testing.assert_allclose(getattr(together, name)[i], getattr(alone, name)[0], rtol=1e-12)
