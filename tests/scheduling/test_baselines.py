"""Baselines that the paper lacks: each is a corner or a bound of the throughput model."""

from dataclasses import replace

import pytest

from repro.composition import compose
from repro.experiments.deployment import deployment
from repro.scheduling.baselines import bandwidth_unaware, colocated, load_balanced
from repro.scheduling.search import search
from repro.scheduling.spec import PolicySpec
from repro.scheduling.throughput import Deployment, decode_per_instance

POLICY = PolicySpec("search")


@pytest.fixture(scope="module")
def base() -> Deployment:
    return deployment(compose(["experiment=table6"]).settings)


def test_load_balancing_without_prfaas_is_the_homogeneous_cluster(base: Deployment) -> None:
    alone = base.without_prfaas(12)
    assert load_balanced(alone, "representative") == pytest.approx(search(alone, POLICY).lambda_max)


def test_load_balancing_of_twins_gains_nothing_by_a_length_rule_in_true_means(base: Deployment) -> None:
    """Where both clusters run the same accelerator no length is better off on one of them."""
    twins = replace(base, prfaas=base.pd)
    ours = search(twins, PolicySpec("search", lengths="true_mean", threshold_step_tokens=10)).lambda_max
    assert ours == pytest.approx(load_balanced(twins, "true_mean"), rel=2e-3)


def test_blindness_to_the_link_costs_nothing_until_the_link_binds(base: Deployment) -> None:
    assert bandwidth_unaware(base, POLICY) == pytest.approx(search(base, POLICY).lambda_max)
    narrow = replace(base, egress_bps=6e9)
    assert bandwidth_unaware(narrow, POLICY) < 0.8 * search(narrow, POLICY).lambda_max


def test_overlapped_phases_are_bounded_by_the_longer_one_and_beat_taking_turns(base: Deployment) -> None:
    alone = base.without_prfaas(12)
    law = alone.lengths
    turns, overlapped = (colocated(alone, "representative", overlapped=flag) for flag in (False, True))
    assert overlapped == pytest.approx(
        12 * min(1 / float(alone.pd.prefill_s(law.mean_tokens)), decode_per_instance(alone))
    )
    assert turns < overlapped < 2 * turns
