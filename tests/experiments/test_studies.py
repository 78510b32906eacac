"""Studies: each finding is recomputed from the record, and each moves when the assumption that it names does."""

from __future__ import annotations

from pathlib import Path

import pytest

from repro.composition import compose
from repro.experiments import base
from repro.presets import choices
from repro.record.directory import Record
from repro.record.metrics import value
from repro.runner import run

STUDIES = sorted(name for name in choices("experiment") if base.load(name).finding is not None)


def study(folder: Path, *words: str) -> Record:
    return run(
        compose([*words, f"results={folder}", "tracking=disabled", "processes=1"]), ["repro", *words], lambda line: None
    )


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_names_the_assumption_that_would_change_its_conclusion(name: str) -> None:
    assert len(base.load(name).hinges_on) > 20


@pytest.fixture(scope="module")
def sensitivity(tmp_path_factory: pytest.TempPathFactory) -> Record:
    return study(tmp_path_factory.mktemp("results"), "experiment=sensitivity", "options.draws=20")


def test_sensitivity_says_what_the_length_rule_is_worth_beside_load_balancing(sensitivity: Record) -> None:
    table = sensitivity.metrics
    ours = value(table, "lambda_max", "prfaas_pd")
    worth = 100 * (ours / value(table, "lambda_max", "load_balanced") - 1)
    assert 0 < worth < 5
    assert f"{worth:.1f}" in sensitivity.provenance["finding"]
    assert f"{ours / value(table, 'lambda_max', 'homogeneous_pd'):.2f} ×" in sensitivity.provenance["finding"]


def test_sensitivity_names_the_longest_bar_of_its_tornado(sensitivity: Record) -> None:
    bars = sensitivity.table("tornado").dropna().set_index("input")
    longest = (bars["gain_at_high"] - bars["gain_at_low"]).abs().idxmax()
    assert longest == "prfaas_prefill"
    assert "T_prefill on PrfaaS" in sensitivity.provenance["finding"]
    assert (bars.loc["price_ratio", "gain_at_low"], bars.loc["price_ratio", "gain_at_high"]) == pytest.approx(
        [value(sensitivity.metrics, "throughput_gain", "homogeneous_pd")] * 2
    ), "a price moves no throughput"
    assert bars.loc["price_ratio", "money_at_high"] < 1 < bars.loc["price_ratio", "money_at_low"]


def test_sensitivity_ends_where_both_accelerators_prefill_alike(tmp_path: Path) -> None:
    alike = study(tmp_path, "experiment=sensitivity", "options.draws=1", "cluster.prfaas.profile=paper_1t_h20")
    assert value(alike.metrics, "throughput_gain", "homogeneous_pd") < 1.05
