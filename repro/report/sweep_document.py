"""A sweep's figures and its report, from its record alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from matplotlib.image import imread, thumbnail

from repro.presets import choices
from repro.record.directory import Record
from repro.report import page, style, sweep_figures
from repro.report.comparison import readable
from repro.report.document import again, own_numbers
from repro.report.page import Card, Cell, Column, Picture, Section, Table
from repro.report.sweep_spec import SweepSpec
from repro.report.words import label, value_label

#: More rows than these make a page that nobody reads; the table itself has them all.
_MOST_ROWS = 400
#: Width of a figure on the page of findings.
_THUMBNAIL_PX = 560


def write(record: Record, spec: SweepSpec, studies: Mapping[str, Sequence[Path]]) -> Path:
    """Draw the figures and write report.html and report.md into the sweep's folder; returns the HTML.

    `studies` are the points that found something, by their path, with their figures, the first of which stands for the point.
    """
    table, points = pd.read_parquet(record.path / "metrics.parquet"), pd.read_csv(record.path / "points.csv")
    axes = axes_of(record, points)
    drawn, findings = [], _findings(record, studies)
    with style.applied():
        folder = record.path / "figures"
        folder.mkdir(exist_ok=True)
        # Studies have figures of their own, and no axis in common.
        for name, figure in (sweep_figures.figures(table, axes, spec) if not findings else {}).items():
            about = style.About(label(name), f"sweep {record.path.name}")
            drawn.append(Picture(label(name), style.save(figure, folder / name, about, for_print=False)))
    name = record.configuration["sweep"]
    question = choices("sweep").get(name, "") if name else f"{len(points)} points: {' × '.join(map(label, axes))}."
    sections = [
        *findings,
        Section("Figures", (), drawn),
        Section(
            "Values",
            (_kept(table, drawn),),
            (),
            [_values(table, points, axes, picture.path.stem, spec) for picture in drawn],
        ),
        Section("Points", _failures(points), (), (_points(points, axes),)),
    ]
    provenance = page.provenance_rows(record.provenance)
    return page.write(record.path, name or record.path.name.rpartition("-")[0], question, sections, provenance)


def _findings(record: Record, studies: Mapping[str, Sequence[Path]]) -> list[Section]:
    """What each point found, where it is a study: all of them on one page, a sentence and a thumbnail each, then each with its figures."""
    sections, cards = list[Section](), list[Card]()
    for path, figures in studies.items():
        run = Record(record.path / path)
        name, finding = run.configuration["name"], str(run.provenance["finding"])
        hinges = f"It hinges on this: {run.provenance['hinges_on']}"
        command = f"With your own numbers: {again(run)}, and any of {own_numbers(run)}"
        pictures = [Picture(label(file.stem), file) for file in figures]
        sections.append(Section(label(name), (finding, hinges, command), pictures))
        cards.append(Card(label(name), finding, _thumbnail(record.path, name, pictures)))
    return [Section("Findings", cards=cards), *sections] if cards else []


def _thumbnail(folder: Path, name: str, pictures: Sequence[Picture]) -> Picture | None:
    """The first figure in small, kept beside the sweep's own."""
    if not pictures:
        return None
    path = folder / "figures" / f"{name}_small.png"
    path.parent.mkdir(exist_ok=True)
    width = imread(pictures[0].path).shape[1]
    thumbnail(str(pictures[0].path), str(path), scale=min(1.0, _THUMBNAIL_PX / width))
    return Picture(pictures[0].title, path)


def axes_of(record: Record, points: pd.DataFrame) -> dict[str, Sequence[object]]:
    """The sweep's axes with their values as they stand in its table of points."""
    return {key: list(dict.fromkeys(points[key])) for key in record.configuration["axes"] if key in points}


def _kept(table: pd.DataFrame, drawn: Sequence[Picture]) -> str:
    return (
        f"{len(drawn)} of {table['metric'].nunique()} metrics are drawn and listed here; metrics.parquet holds all {len(table)} values. "
        "Other figures: the same words with sweep.metrics=[…]."
    )


def _values(
    table: pd.DataFrame, points: pd.DataFrame, axes: dict[str, Sequence[object]], metric: str, spec: SweepSpec
) -> Table:
    drawn = sweep_figures.select(table, metric, axes, spec.cases)
    rows = table[table["metric"] == metric]
    unit = str(rows["unit"].iloc[0]) if len(rows) and isinstance(rows["unit"].iloc[0], str) else ""
    cases = list(dict.fromkeys(drawn.table["case"]))
    rows = rows.assign(case=sweep_figures.cases_without_axes(rows, axes))
    wide = rows[rows["case"].isin(cases)].pivot(index="point", columns="case", values="value")
    found = []
    for number, values in wide.iterrows():
        own = points[points["point"] == number].iloc[0]
        found.append([
            *(_axis(key, own[key]) for key in axes),
            *(Cell.of(readable(float(values[case]), unit), float(values[case])) for case in cases),
        ])  # fmt: skip
    columns = [*(Column(label(key)) for key in axes), *(Column(label(case), True) for case in cases)]
    caption = f"{label(metric)}: {len(found)} points"
    return Table(columns, found[:_MOST_ROWS], caption, open=len(found) <= 60)


def _axis(key: str, value: object) -> Cell:
    if isinstance(value, (int, float)):
        return Cell(value_label(key, float(value)), float(value))
    return Cell(label(str(value)))


def _failures(points: pd.DataFrame) -> list[str]:
    failed = int((points["state"] == "failed").sum())
    return [f"{failed} of {len(points)} points failed; the same words run them again."] if failed else []


def _points(points: pd.DataFrame, axes: dict[str, Sequence[object]]) -> Table:
    columns = [
        Column("point", True),
        *(Column(label(key)) for key in axes),
        Column("state"),
        Column("run"),
        Column("error"),
    ]
    rows = [
        [
            Cell.of(str(row["point"]), row["point"]), *(_axis(key, row[key]) for key in axes), Cell(row["state"], kind=row["state"]),
            Cell(str(row["path"]).removeprefix("../../"), link=str(row["path"])),
            Cell(row["error"] if isinstance(row["error"], str) else ""),
        ]
        for row in points.head(_MOST_ROWS).to_dict("records")
    ]  # fmt: skip
    return Table(columns, rows, f"Points: {len(points)}", open=len(points) <= 60)
