"""metrics.csv: one row per value, in one long form for every tier, so that any two results, and the paper, lie side by side."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import pandas as pd

COLUMNS = (
    "experiment", "tier", "case", "metric", "value", "unit", "ci_low", "ci_high", "n", "paper", "deviation_pct", "source",
)  # fmt: skip

#: Where a value comes from. `calibrated` marks a value that was itself used to calibrate an input; a value that the calibration never saw
#: is a prediction and marked `computed`.
SOURCES = ("published", "public", "silicon", "measured", "calibrated", "simulated", "emulated", "computed")


@dataclass(frozen=True)
class Metric:
    """One value with its unit, its 95 % interval or spread, the number of samples behind it and the paper's value where there is one."""

    experiment: str
    tier: str
    case: str
    metric: str
    value: float
    unit: str
    source: str
    ci_low: float = math.nan
    ci_high: float = math.nan
    n: int = 1
    paper: float = math.nan

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ValueError(f"metric {self.metric}: source {self.source!r} is none of {', '.join(SOURCES)}")

    @property
    def deviation_pct(self) -> float:
        """(value − paper) / paper in percent; nan without a paper value or with one of 0."""
        if not math.isfinite(self.paper) or self.paper == 0:
            return math.nan
        return 100 * (self.value - self.paper) / self.paper


def frame(rows: Iterable[Metric]) -> pd.DataFrame:
    """Rows in the columns of the contract."""
    return pd.DataFrame([[getattr(row, name) for name in COLUMNS] for row in rows], columns=list(COLUMNS))


def read(path: Path | TextIO) -> pd.DataFrame:
    """A metrics.csv, with text columns as text."""
    return pd.read_csv(path, dtype=dict.fromkeys(("experiment", "tier", "case", "metric", "unit", "source"), str))


def read_all(paths: Sequence[Path]) -> tuple[pd.DataFrame, list[int]]:
    """Many files of the same columns as one table, and how many rows are of each; in one go, as thousands take their time."""
    bodies, head = [], ""
    for path in paths:
        first, _, body = path.read_text().partition("\n")
        if head not in ("", first):
            return _one_by_one(paths)
        head = first
        bodies.append(body)
    table = read(io.StringIO("\n".join([head, "".join(bodies)])))
    rows = [body.count("\n") for body in bodies]
    return (table, rows) if len(table) == sum(rows) else _one_by_one(paths)


def _one_by_one(paths: Sequence[Path]) -> tuple[pd.DataFrame, list[int]]:
    tables = [read(path)[list(COLUMNS)] for path in paths]
    return pd.concat(tables, ignore_index=True), [len(table) for table in tables]


def each(table: pd.DataFrame) -> Iterator[Any]:
    """Rows as named tuples; what type a column holds is known to whoever made the table, not to the type checker."""
    return iter(table.itertuples(index=False))


def value(table: pd.DataFrame, metric: str, case: str | None = None) -> float:
    """The one value of a metric (of one case).

    Raises:
        KeyError: unless exactly one row fits.
    """
    rows = table[table["metric"] == metric]
    if case is not None:
        rows = rows[rows["case"] == case]
    if len(rows) != 1:
        raise KeyError(f"{metric} of case {case}: {len(rows)} rows")
    return float(rows["value"].iloc[0])
