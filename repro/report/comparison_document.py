"""A comparison of runs as a folder: its table, and a report in the form of a run's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from repro.record import pairing
from repro.record.metrics import each
from repro.record.pairing import Side
from repro.report import page
from repro.report.comparison import percent, readable
from repro.report.page import Cell, Column, Section, Table
from repro.report.words import label


def write(folder: Path, sides: Sequence[Side], table: pd.DataFrame, changes: Sequence[Sequence[str]]) -> Path:
    """comparison.csv, report.html and report.md; `changes` are the settings in which each further side differs from the first."""
    folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / "comparison.csv", index=False, float_format="%.10g")
    sections = []
    for index, other in enumerate(sides[1:]):
        own = table[table["side"] == index + 1]
        counts = ", ".join(f"{count} {name}" for name, count in own["verdict"].value_counts().items())
        texts = [f"A: {sides[0].name}", f"B: {other.name}", *changes[index], f"{counts}. {pairing.describe(own)}"]
        sections.append(Section(f"Against {Path(other.name).name}", texts, (), (_table(own),)))
    first = sides[0].records[0]
    question = "Difference B − A of every value that both have; noise where the interval holds 0."
    return page.write(
        folder, f"Comparison of {len(sides)} sides", question, sections, page.provenance_rows(first.provenance)
    )


def _table(table: pd.DataFrame) -> Table:
    columns = [
        Column("case"), Column("metric"), Column("A", True), Column("B", True), Column("difference", True), Column("verdict"),
        Column("95 % interval", True), Column("how"),
    ]  # fmt: skip
    rows = [
        [
            Cell(label(str(row.case))), Cell(label(str(row.metric))), Cell.of(readable(row.a, row.unit), row.a),
            Cell.of(readable(row.b, row.unit), row.b), Cell.of(percent(row.difference_pct), row.difference_pct),
            Cell(row.verdict, kind=row.verdict.partition(" ")[0]),
            Cell(f"{readable(row.low, row.unit)} to {readable(row.high, row.unit)}" if row.low == row.low else "–"), Cell(row.how),
        ]
        for row in each(table)
    ]  # fmt: skip
    return Table(columns, rows)
