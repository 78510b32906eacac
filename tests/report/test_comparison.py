from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from repro.experiments import base
from repro.paper.claims import CLAIMS, Tolerance
from repro.presets import choices
from repro.record.directory import REFERENCE, Record
from repro.record.metrics import Metric, frame
from repro.report.comparison import compare, console, percent, readable
from repro.report.figures import records as records_below
from repro.report.figures import redraw


def record_of(folder: Path, *rows: Metric, others: Sequence[str] = ()) -> Record:
    folder.mkdir(parents=True)
    frame(rows).to_csv(folder / "metrics.csv", index=False)
    (folder / "config.yaml").write_text(yaml.safe_dump({"name": rows[0].experiment, "tier": rows[0].tier}))
    (folder / "provenance.json").write_text(json.dumps({"other_configuration": others}))
    return Record(folder)


def lambda_max(value: float, source: str = "computed") -> Metric:
    return Metric("table6", "model", "prfaas_pd", "lambda_max", value, "req/s", source)


@pytest.mark.parametrize(
    ("value", "source", "verdict"),
    [
        (3.24, "computed", "reproduced"),
        (3.18, "computed", "reproduced"),
        (3.0, "computed", "deviates"),
        (3.24, "calibrated", "input"),
    ],
)
def test_verdict_follows_tolerance_and_source(tmp_path: Path, value: float, source: str, verdict: str) -> None:
    table = compare([record_of(tmp_path / "run", lambda_max(value, source))]).set_index("claim")
    assert table.loc["prfaas_pd/lambda_max", "verdict"] == verdict


@pytest.mark.parametrize("value", [3.24, 3.0])
def test_no_claim_is_judged_on_another_configuration(tmp_path: Path, value: float) -> None:
    table = compare([record_of(tmp_path / "run", lambda_max(value), others=["link.rate_bps"])]).set_index("claim")
    assert table.loc["prfaas_pd/lambda_max", "verdict"] == "other configuration"


def test_a_claim_without_its_value_is_not_run(tmp_path: Path) -> None:
    table = compare([record_of(tmp_path / "run", lambda_max(3.24))]).set_index("claim")
    assert table.loc["prfaas_pd/theta_prfaas", "verdict"] == "not run"
    assert "not run" in console(table.reset_index())


def test_claims_of_other_experiments_are_left_out_unless_asked_for(tmp_path: Path) -> None:
    record = record_of(tmp_path / "run", lambda_max(3.24))
    assert set(compare([record])["experiment"]) == {"table6"}
    assert len(compare([record], only_run=False)) == len(CLAIMS)


def test_one_sided_tolerance_holds_on_its_side_only() -> None:
    assert Tolerance(side="below").holds(99, 100)
    assert not Tolerance(side="below").holds(101, 100)
    assert not Tolerance(relative=0.1).holds(math.nan, 1.0)


def test_claim_names_are_unique_and_their_experiments_exist() -> None:
    assert len({claim.name for claim in CLAIMS}) == len(CLAIMS)
    assert {claim.experiment for claim in CLAIMS} <= set(choices("experiment"))


def test_values_are_written_as_a_person_would() -> None:
    assert readable(12.26e9, "bit/s") == "12.26 Gbps"
    assert readable(200 * 2**20, "bytes") == "200 MiB"
    assert readable(19400.0, "tokens") == "19,400 tokens"
    assert readable(math.nan, "s") == "–"
    assert percent(-0.001) == "0.0 %"


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="no reference records in the working folder")
@pytest.mark.parametrize(
    "record", records_below(REFERENCE), ids=lambda record: f"{record.path.parent.name}-{record.path.name}"
)
def test_every_reference_record_still_draws_its_figures(tmp_path: Path, record: Record) -> None:
    experiment = base.load(record.configuration["name"])
    figures = experiment.figures_for(record.configuration["tier"])
    assert len(redraw(record, tmp_path, figures)) == len(figures)
