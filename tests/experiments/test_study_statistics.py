"""What a study says of its own statistics: where it cuts, where MSER-5 would, and how many seeds show a difference."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from repro.composition import compose
from repro.experiments.simulated import _power_said, _seeds_needed, _warm_up_said, settles
from repro.record.directory import Record
from repro.runner import run


def requests(ttft_s: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame({"arrival_s": np.arange(len(ttft_s)) * 0.5, "ttft_s": ttft_s, "outcome": "ok"})


def test_a_run_settles_where_its_transient_ends_and_a_growing_one_never_does() -> None:
    rng = np.random.default_rng(0)
    settled = rng.normal(2.0, 0.2, 1000)
    filling = np.concatenate([np.linspace(0, 2, 100), settled])
    assert 30 <= settles(requests(filling)) <= 65
    assert settles(requests(np.linspace(0, 100, 500))) == math.inf
    refused = requests(filling)
    refused.loc[::2, ["outcome", "ttft_s"]] = ["refused", np.nan]
    assert 30 <= settles(refused) <= 65, "of those that were answered"


def test_what_is_said_of_the_cut_names_the_runs_that_never_settle() -> None:
    assert _warm_up_said(60.0, [0.0, 30.0, math.inf]) == (
        "Requests count from 60 s on. By MSER-5 on TTFT 2 of 3 runs settle after 0 to 30 s (median 15 s). "
        "1 of 3 do not: their load changes, or their queues grow."
    )
    assert _warm_up_said(None, [math.inf]).endswith("Of these, requests count from 60 s on.")


def test_the_seeds_that_a_difference_needs_follow_from_how_pairs_scatter() -> None:
    usual = [{"goodput": value} for value in (1.0, 2.0, 3.0)]

    def other(*shifts: float) -> list[dict[str, float]]:
        return [{"goodput": own["goodput"] + shift} for own, shift in zip(usual, shifts, strict=True)]

    found = {
        "static": usual,
        "alike": other(0.1, 0.1, 0.1),
        "near": other(0.0, 0.01, 0.02),
        "far": other(0.0, 0.5, 1.0),
    }
    near, far = _seeds_needed(found, dict.fromkeys(found, "static"))
    assert 2 <= near < far
    assert _power_said([near, far]) == [
        f"A paired difference of 2% in goodput is seen four times out of five with {near} to {far} seeds."
    ]
    assert _power_said([]) == []


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    """The same short runs with a fixed cut, and with the one that MSER-5 says."""
    folder = tmp_path_factory.mktemp("results")
    small = ["experiment=simulation", "options.seeds=2", "options.duration_s=120", "tracking=disabled", "processes=1"]
    return {
        warmup: run(compose([*small, f"options.warmup_s={warmup}", f"results={folder}"]), ["repro"], lambda line: None)
        for warmup in ("10", "null")
    }


def test_a_study_cuts_where_it_says_and_its_report_says_it(cut: dict[str, Record]) -> None:
    fixed, own = (cut[warmup].provenance["statistics"] for warmup in ("10", "null"))
    assert fixed[0].startswith("Requests count from 10 s on. By MSER-5 on TTFT ")
    assert own[0].startswith("Requests count from where it has settled on. ")
    for record in cut.values():
        assert record.provenance["statistics"][0] in (record.path / "report.md").read_text()
