"""Moments of the length distribution against adaptive quadrature, and its samples against its moments."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import lognorm

from repro.errors import UserError
from repro.workload.lengths import TruncatedLogNormal

PAPER = TruncatedLogNormal(mu=9.90, sigma=1.00, minimum_tokens=128, maximum_tokens=131_072)

laws = st.builds(
    TruncatedLogNormal,
    mu=st.floats(7, 11),
    sigma=st.floats(0.3, 1.5),
    minimum_tokens=st.floats(1, 500),
    maximum_tokens=st.floats(60_000, 300_000),
)
thresholds = st.floats(1_000, 50_000)


def quadrature(law: TruncatedLogNormal, function, low: float, high: float) -> float:  # type: ignore[no-untyped-def]
    """∫ f(l) p(l) dl over (low, high), in log-length so that the integrand is smooth."""
    free = lognorm(s=law.sigma, scale=np.exp(law.mu))
    mass = free.cdf(law.maximum_tokens) - free.cdf(law.minimum_tokens)
    found, _ = quad(
        lambda x: function(np.exp(x)) * free.pdf(np.exp(x)) * np.exp(x),
        np.log(low),
        np.log(high),
        epsabs=0,
        epsrel=1e-11,
        limit=200,
    )
    return float(found / mass)


@settings(max_examples=40, deadline=None)
@given(laws, thresholds)
def test_fraction_and_conditional_means_equal_the_integrals(law: TruncatedLogNormal, t: float) -> None:
    above = quadrature(law, lambda l: 1.0, t, law.maximum_tokens)
    below = quadrature(law, lambda l: 1.0, law.minimum_tokens, t)
    assert law.fraction_above(t) == pytest.approx(above, rel=1e-8, abs=1e-12)
    if above > 1e-6:
        assert law.mean_above(t) == pytest.approx(quadrature(law, lambda l: l, t, law.maximum_tokens) / above, rel=1e-8)
    if below > 1e-6:
        assert law.mean_below(t) == pytest.approx(quadrature(law, lambda l: l, law.minimum_tokens, t) / below, rel=1e-8)


@pytest.mark.parametrize("t", [129.0, 5_000.0, 19_400.0, 100_000.0])
def test_expectations_of_a_curve_equal_the_integrals(t: float) -> None:
    def curve(l):  # type: ignore[no-untyped-def]
        return 0.4 + 1.3e-4 * l + 2.9e-10 * l**2

    above = quadrature(PAPER, curve, t, PAPER.maximum_tokens) / quadrature(
        PAPER, lambda l: 1.0, t, PAPER.maximum_tokens
    )
    below = quadrature(PAPER, curve, PAPER.minimum_tokens, t) / quadrature(
        PAPER, lambda l: 1.0, PAPER.minimum_tokens, t
    )
    assert PAPER.expectation_above(curve, t) == pytest.approx(above, rel=1e-6)
    assert PAPER.expectation_below(curve, t) == pytest.approx(below, rel=1e-6)


def test_the_papers_workload_has_the_papers_moments() -> None:
    assert PAPER.mean_tokens == pytest.approx(27_000, abs=500)
    assert PAPER.fraction_above(19_400) == pytest.approx(0.496, abs=5e-4)
    assert PAPER.mean_above(19_400) == pytest.approx(44_000, abs=1_500)


@given(laws, thresholds)
def test_both_sides_of_a_threshold_make_up_the_whole(law: TruncatedLogNormal, t: float) -> None:
    p = float(law.fraction_above(t))
    parts = [(p, law.mean_above(t)), (1 - p, law.mean_below(t))]
    assert sum(share * float(mean) for share, mean in parts if share > 1e-9) == pytest.approx(law.mean_tokens, rel=1e-6)


def test_an_empty_side_of_a_threshold_has_no_mean() -> None:
    assert PAPER.fraction_above(131_072) == 0
    assert np.isnan(PAPER.mean_above(131_072))
    assert PAPER.fraction_above(128) == 1
    assert np.isnan(PAPER.mean_below(128))
    assert np.isnan(PAPER.expectation_above(np.log, 131_072))


def test_thresholds_outside_the_support_behave_as_its_ends() -> None:
    assert PAPER.fraction_above([0.0, 1e9]).tolist() == [1.0, 0.0]


@given(laws, st.floats(0.001, 0.999))
def test_the_quantile_inverts_the_distribution(law: TruncatedLogNormal, fraction: float) -> None:
    assert 1 - law.fraction_above(law.quantile(fraction)) == pytest.approx(fraction, abs=1e-9)


def test_quantiles_0_and_1_are_the_ends() -> None:
    assert PAPER.quantile([0.0, 1.0]) == pytest.approx([128, 131_072])


def test_atoms_carry_all_of_the_probability_and_the_mean() -> None:
    tokens, mass = PAPER.atoms()
    assert np.all(np.diff(tokens) > 0)
    assert mass.sum() == pytest.approx(1, abs=1e-12)
    assert mass @ tokens == pytest.approx(PAPER.mean_tokens, rel=1e-12)


def test_samples_follow_the_distribution_and_the_seed() -> None:
    drawn = PAPER.sample(np.random.default_rng(7), 200_000)
    again = PAPER.sample(np.random.default_rng(7), 200_000)
    assert np.array_equal(drawn, again)
    assert drawn.min() >= 128
    assert drawn.max() <= 131_072
    # Five standard errors: the seed is fixed, so this never flickers.
    standard_error = drawn.std() / np.sqrt(len(drawn))
    assert abs(drawn.mean() - PAPER.mean_tokens) < 5 * standard_error
    for fraction in (0.1, 0.5, 0.9, 0.99):
        assert np.mean(drawn <= PAPER.quantile(fraction)) == pytest.approx(fraction, abs=0.005)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"sigma": 0.0}, "workload.lengths.sigma"),
        ({"sigma": float("nan")}, "workload.lengths.sigma"),
        ({"minimum_tokens": 0.0}, "workload.lengths.minimum_tokens"),
        ({"minimum_tokens": 2e5}, "workload.lengths.minimum_tokens"),
        ({"mu": 60.0}, "workload.lengths.mu"),
    ],
)
def test_an_impossible_distribution_is_refused(change: dict[str, float], key: str) -> None:
    values = {"mu": 9.9, "sigma": 1.0, "minimum_tokens": 128.0, "maximum_tokens": 131_072.0}
    with pytest.raises(UserError, match=key):
        TruncatedLogNormal(**{**values, **change})
