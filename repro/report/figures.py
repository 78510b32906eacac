"""Draw a record's figures, as PNG and for print as PDF too, from the record alone and without running anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from matplotlib.figure import Figure

from repro.record.directory import Record
from repro.report import style

Figures = Mapping[str, Callable[[Record], Figure]]


def records(folder: Path) -> list[Record]:
    """Finished runs of experiments below a folder, in order of their path.

    Benchmarks kept before they were experiments have no name in their configuration, and draw nothing.
    """
    found = [Record(done.parent) for done in sorted(folder.rglob("DONE"))]
    return [record for record in found if "name" in record.configuration]


def redraw(
    record: Record, folder: Path, figures: Figures, *, for_print: bool = False, column: style.Column = "double"
) -> list[Path]:
    """These figures of one record into `folder`, set for one column of a paper or two; returns the PNGs."""
    folder.mkdir(parents=True, exist_ok=True)
    with style.applied(column):
        return [
            style.save(draw(record), folder / name, _about(record, name), for_print=for_print)
            for name, draw in figures.items()
        ]


def _about(record: Record, name: str) -> style.About:
    experiment, tier = record.configuration["name"], record.configuration["tier"]
    return style.About(f"{experiment}: {name}", f"tier {tier}, run {record.path.parent.name}/{record.path.name}")
