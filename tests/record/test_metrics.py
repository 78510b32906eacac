"""metrics.csv in the columns of the contract."""

import math
from pathlib import Path

import pytest

from repro.record.metrics import COLUMNS, SOURCES, Metric, frame, read, value


def row(case: str = "a", number: float = 1.0, **more: float) -> Metric:
    return Metric("table6", "model", case, "lambda_max", number, "req/s", "computed", **more)  # type: ignore[arg-type]


def test_the_columns_are_those_of_the_contract(tmp_path: Path) -> None:
    contract = "experiment, tier, case, metric, value, unit, ci_low, ci_high, n, paper, deviation_pct, source"
    assert ", ".join(COLUMNS) == contract
    assert list(frame([]).columns) == list(COLUMNS)
    frame([row()]).to_csv(tmp_path / "metrics.csv", index=False)
    assert list(read(tmp_path / "metrics.csv").columns) == list(COLUMNS)


def test_the_deviation_is_in_percent_of_the_papers_value() -> None:
    assert row(number=3.24, paper=3.0).deviation_pct == pytest.approx(8)
    assert math.isnan(row().deviation_pct)
    assert math.isnan(row(paper=0.0).deviation_pct)


def test_numbers_and_text_survive_the_file(tmp_path: Path) -> None:
    rows = [row("007", 1 / 3, ci_low=0.1, ci_high=0.5), row("b", math.nan)]
    frame(rows).to_csv(tmp_path / "metrics.csv", index=False)
    table = read(tmp_path / "metrics.csv")
    assert table["case"].tolist() == ["007", "b"]
    assert table["value"].iloc[0] == 1 / 3
    assert math.isnan(table["value"].iloc[1])
    assert (table["ci_low"].iloc[0], table["n"].iloc[0]) == (0.1, 1)


def test_an_unknown_source_is_a_mistake_of_the_program() -> None:
    with pytest.raises(ValueError, match="guessed"):
        Metric("e", "model", "c", "m", 1.0, "", "guessed")
    for source in SOURCES:
        Metric("e", "model", "c", "m", 1.0, "", source)


def test_value_wants_exactly_one_row() -> None:
    table = frame([row("a", 1.0), row("b", 2.0)])
    assert value(table, "lambda_max", "b") == 2.0
    with pytest.raises(KeyError, match="2 rows"):
        value(table, "lambda_max")
    with pytest.raises(KeyError, match="0 rows"):
        value(table, "ttft_mean_s")
