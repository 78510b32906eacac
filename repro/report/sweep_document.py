"""A sweep's figures and its report, from its record alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from repro.record.directory import Record
from repro.report import style, sweep_figures
from repro.report.sweep_spec import SweepSpec


def write(record: Record, spec: SweepSpec) -> Path:
    """Draw the figures and write report.html and report.md into the sweep's folder; returns the HTML."""
    table = pd.read_parquet(record.path / "metrics.parquet")
    drawn = []
    with style.applied():
        folder = record.path / "figures"
        folder.mkdir(exist_ok=True)
        for name, figure in sweep_figures.figures(table, axes_of(record), spec).items():
            drawn.append(style.save(figure, folder / name, for_print=False))
    page = record.path / "report.html"
    page.write_text("<!doctype html>\n")
    return page


def axes_of(record: Record) -> dict[str, Sequence[object]]:
    """The sweep's axes with their values as they stand in its table of points."""
    points = pd.read_csv(record.path / "points.csv")
    return {key: list(dict.fromkeys(points[key])) for key in record.configuration["axes"] if key in points}
