"""Redraw every figure from the reference records, or those of a results folder into each run's own: `figures [<folder>]`."""

from __future__ import annotations

import sys
from pathlib import Path

from repro.errors import UserError
from repro.experiments import base
from repro.record.directory import REFERENCE, Record
from repro.report.figures import records, redraw

FIGURES = Path("figures")


def main(argv: list[str]) -> int:
    """Redraw; the last line of stdout is the folder of the figures."""
    source = Path(argv[0]) if argv else REFERENCE
    found = records(source)
    if not found:
        raise UserError(f"{source}: holds no finished run; accepted: a folder below which runs have a DONE file")
    for record in found:
        own = record.path / "figures" if argv else FIGURES / _folder(record)
        figures = base.load(record.configuration["name"]).figures_for(record.configuration["tier"])
        if not figures:
            continue
        for path in redraw(record, own, figures, for_print=True):
            print(path, file=sys.stderr)
    print(source if argv else FIGURES)
    return 0


def _folder(record: Record) -> str:
    """Where a reference record's figures go: one folder per experiment and label, or all would write `goodput.png`."""
    name, label = record.configuration["name"], record.configuration["label"] or record.configuration["tier"]
    return f"{name}-{label}"
