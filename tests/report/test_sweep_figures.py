"""The form of a sweep's figure follows from its axes."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd

from repro.report import sweep_figures
from repro.report.sweep_spec import SweepSpec


def table(**axes: list[object]) -> pd.DataFrame:
    rows = []
    for number, values in enumerate(itertools.product(*axes.values())):
        own = dict(zip(axes, values, strict=True))
        for case in ("prfaas_pd", "homogeneous_pd"):
            value = float(number) if case == "prfaas_pd" else 2.0
            common = {"metric": "lambda_max", "unit": "req/s", "ci_low": np.nan, "ci_high": np.nan}
            rows.append({"point": number, **own, **common, "case": case, "value": value})
    return pd.DataFrame(rows)


def drawn(spec: SweepSpec | None = None, **axes: list[object]) -> object:
    return sweep_figures.figures(table(**axes), axes, spec or SweepSpec())["lambda_max"]


def images(figure: object) -> int:
    return sum(len(axis.images) for axis in figure.axes)  # type: ignore[attr-defined]


def test_one_axis_gives_lines_and_two_give_a_heat_map_and_three_give_panels() -> None:
    one = drawn(rate=[1.0, 2.0, 3.0])
    assert images(one) == 0
    two = drawn(rate=[1.0, 2.0, 3.0], split=[1.0, 2.0, 3.0])
    assert images(two) == 1, "the case that the sweep does not change is left out"
    three = drawn(rate=[1.0, 2.0, 3.0], split=[1.0, 2.0], loss=[0.0, 0.1])
    assert images(three) == 0
    assert len(three.axes) == 2  # type: ignore[attr-defined]


def test_seeds_are_an_interval_and_no_axis() -> None:
    found = sweep_figures.select(
        table(rate=[1.0, 2.0], seed=[0, 1, 2]), "lambda_max", {"rate": [1.0, 2.0], "seed": [0, 1, 2]}, ()
    )
    assert found.axes == ("rate",)
    row = found.table.iloc[0]
    assert row["value"] == 1.0
    assert row["low"] < 1.0 < row["high"]


def test_of_four_axes_one_is_held_and_the_title_says_at_which_value() -> None:
    axes: dict[str, list[object]] = {"a": [1.0, 2.0, 3.0], "b": [1.0, 2.0], "c": [1.0, 2.0], "d": ["x", "y"]}
    found = sweep_figures.select(table(**axes), "lambda_max", axes, ())
    assert found.held == {"d": "x"}


def test_cases_that_name_the_points_own_model_are_one_case() -> None:
    rows = pd.DataFrame({
        "model": ["ring", "kimi"], "case": ["ring 32K", "kimi 32K"], "metric": ["m", "m"], "unit": ["", ""], "value": [1.0, 2.0],
        "ci_low": [np.nan, np.nan], "ci_high": [np.nan, np.nan],
    })  # fmt: skip
    assert set(sweep_figures.select(rows, "m", {"model": ["ring", "kimi"]}, ()).table["case"]) == {"32K"}
