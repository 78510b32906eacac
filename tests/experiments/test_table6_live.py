"""The requests of a search on a running system: a few hundred must find what thousands do, or every rate looks like too much."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from repro.composition import compose
from repro.experiments.deployment import deployment, operating_points
from repro.experiments.table6_live import Case, Spread
from repro.simulate.deployments import shared_link, simulated
from repro.simulate.stability import lambda_max
from repro.workload.lengths import TruncatedLogNormal

LAW = TruncatedLogNormal(5.0, 0.6, 64, 512)


@pytest.mark.parametrize("seed", range(3))
def test_of_any_few_in_a_row_as_many_are_long_as_the_law_says(seed):
    lengths = Spread(LAW).sample(np.random.default_rng(seed), 200)
    assert 64 <= lengths.min() < lengths.max() <= 512
    for fraction in (0.25, 0.5, 0.9):
        longer = lengths > LAW.quantile(fraction)
        shares = np.convolve(longer, np.ones(40) / 40, "valid")
        np.testing.assert_allclose(shares, 1 - fraction, atol=0.06)
    assert not np.array_equal(lengths, Spread(LAW).sample(np.random.default_rng(seed + 10), 200))


def test_so_few_requests_find_the_lambda_max_of_the_equations():
    settings = compose(["experiment=table6"]).settings
    settings = replace(settings, policy=replace(settings.policy, lengths="true_mean"))
    base = deployment(settings)
    point = operating_points(base, settings, ("prfaas_pd",))["prfaas_pd"]
    spec = simulated(base, point, shared_link(settings.link, settings.transport))
    case = Case("prfaas_pd", spec, base, point, 0)
    found = lambda_max(spec, lambda rate, _: case.stream(rate, 400, even=True), point.lambda_max, [0], 0.01).value
    assert found == pytest.approx(point.lambda_max, rel=0.06)
    at_two_rates = [next(iter(case.stream(rate, 50, even=True))) for rate in (1.0, 2.0)]
    np.testing.assert_array_equal(*(batch.input_tokens for batch in at_two_rates))
