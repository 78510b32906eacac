"""The grid's argmax against a loop over evaluate(), and against what the paper prints."""

from dataclasses import replace

import numpy as np
import pytest

from repro.errors import UserError
from repro.profiles.presets import load_profile
from repro.scheduling.search import grid_search, search, surface, threshold_grid
from repro.scheduling.spec import PolicySpec
from repro.scheduling.throughput import Deployment, Lengths, OperatingPoint, evaluate
from repro.workload.lengths import TruncatedLogNormal

LAW = TruncatedLogNormal(mu=9.90, sigma=1.00, minimum_tokens=128, maximum_tokens=131_072)
PAPER = Deployment(load_profile("paper_1t_h200"), 4, load_profile("paper_1t_h20"), 8, 100e9, LAW, 1024)


def brute_force(deployment: Deployment, step: int, lengths: Lengths) -> OperatingPoint:
    points = []
    for t in threshold_grid(deployment, step):
        for n_p in range(deployment.n_pd):
            try:
                points.append(evaluate(deployment, float(t), n_p, deployment.n_pd - n_p, lengths))
            except UserError:
                continue  # N_p = 0 with local requests
    return max(points, key=lambda point: point.lambda_max)


@pytest.mark.parametrize("lengths", ["representative", "true_mean"])
@pytest.mark.parametrize("egress_bps", [5e9, 100e9])
def test_the_grid_finds_what_a_loop_over_the_equations_finds(lengths: Lengths, egress_bps: float) -> None:
    deployment = replace(PAPER, egress_bps=egress_bps)
    found, expected = grid_search(deployment, 2_000, lengths), brute_force(deployment, 2_000, lengths)
    assert found == expected


@pytest.mark.slow
def test_on_the_full_grid_of_steps_of_100_tokens_it_is_still_the_loops_optimum() -> None:
    assert grid_search(PAPER, 100) == brute_force(PAPER, 100, "representative")


def test_the_papers_operating_point_is_the_grids_own_argmax() -> None:
    best = grid_search(PAPER, 100)
    assert (best.n_p, best.n_d) == (3, 5)
    assert best.threshold_tokens == pytest.approx(19_400, abs=500)
    assert best.lambda_max == pytest.approx(3.24, rel=0.02)


def test_at_the_optimum_both_prefill_stages_meet() -> None:
    """Equation 7, to within a step of the threshold; the split is whole instances, so equation 8 can only be neared."""
    best = grid_search(PAPER, 10)
    p = best.offload_fraction
    assert best.stages.prfaas / p == pytest.approx(best.stages.pd_prefill / (1 - p), rel=0.005)
    assert best.stages.pd_decode > best.lambda_max


def test_no_point_of_the_surface_beats_the_best() -> None:
    grid = threshold_grid(PAPER, 500)
    table = surface(PAPER, grid, np.arange(8), "representative")
    best = grid_search(PAPER, 500)
    assert table.lambda_max.shape == (len(grid), 8)
    assert np.nanmax(table.lambda_max) == pytest.approx(best.lambda_max)
    assert table.best() == (best.threshold_tokens, best.n_p)


def test_along_the_threshold_the_prfaas_bound_rises_and_the_local_bound_falls() -> None:
    """Figure 5b: a higher threshold sends fewer (if longer) requests to PrfaaS and more to PD-P."""
    table = surface(PAPER, threshold_grid(PAPER, 500), np.array([3]), "representative")
    inner = (table.threshold_tokens > 128) & (table.threshold_tokens < 131_072)
    assert np.all(np.diff(table.prfaas_bound[inner]) > 0)
    assert np.all(np.diff(table.pd_prefill_bound[inner, 0]) < 0)


@pytest.mark.parametrize(
    "more",
    [{"n_prfaas": 5}, {"n_pd": 9}, {"egress_bps": 200e9}],
    ids=lambda change: next(iter(change)),
)
def test_more_of_anything_never_sustains_less(more: dict[str, float]) -> None:
    for base in (PAPER, replace(PAPER, egress_bps=8e9)):
        assert grid_search(replace(base, **more)).lambda_max >= grid_search(base).lambda_max


def test_a_finer_grid_never_sustains_less() -> None:
    coarse, fine = grid_search(PAPER, 2_000), grid_search(PAPER, 100)
    assert fine.lambda_max >= coarse.lambda_max


def test_the_grid_covers_the_distribution_from_end_to_end() -> None:
    grid = threshold_grid(PAPER, 100)
    assert (grid[0], grid[-1]) == (128, 131_072)
    assert np.all(np.diff(grid) >= 0)
    assert np.max(np.diff(grid)) <= 100


def test_without_prfaas_only_the_split_is_searched() -> None:
    homogeneous = grid_search(PAPER.without_prfaas(12))
    assert (homogeneous.n_p, homogeneous.n_d) == (9, 3)
    assert homogeneous.lambda_max == pytest.approx(2.11, rel=0.02)


def test_what_the_policy_fixes_is_kept() -> None:
    fixed = search(PAPER, PolicySpec("x", threshold_tokens=30_000, n_p=2))
    assert (fixed.threshold_tokens, fixed.n_p, fixed.n_d) == (30_000, 2, 6)
    half = search(PAPER, PolicySpec("x", n_p=2))
    assert half.n_p == 2
    assert half.lambda_max >= fixed.lambda_max
    assert search(PAPER, PolicySpec("x")).lambda_max >= half.lambda_max


@pytest.mark.parametrize(
    ("deployment", "policy", "key"),
    [
        (PAPER, PolicySpec("x", threshold_tokens=127), "threshold_tokens: 127"),
        (PAPER, PolicySpec("x", threshold_tokens=131_073), "threshold_tokens: 131073"),
        (PAPER, PolicySpec("x", threshold_tokens=20_000, n_p=0), "n_p: 0"),
        (PAPER, PolicySpec("x", n_p=8), "n_p: 8"),
        (PAPER, PolicySpec("x", threshold_step_tokens=200_000), "threshold_step_tokens: 200000"),
        (PAPER.without_prfaas(8), PolicySpec("x", threshold_tokens=20_000), "threshold_tokens: 20000"),
    ],
)
def test_an_impossible_policy_is_refused_with_what_is_accepted(
    deployment: Deployment, policy: PolicySpec, key: str
) -> None:
    with pytest.raises(UserError, match=key):
        search(deployment, policy)
