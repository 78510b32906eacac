"""Redraw every figure from the reference records, or those of a results folder into each run's own: `figures [<folder>]`."""

from __future__ import annotations

import sys
from pathlib import Path

from repro.arguments import Parser
from repro.errors import UserError
from repro.experiments import base
from repro.record.directory import REFERENCE, Record
from repro.report import claims_page, style
from repro.report.figures import records, redraw

FIGURES = Path("figures")
CLAIMS = Path("CLAIMS.md")


def main(argv: list[str]) -> int:
    """Redraw; from the reference records CLAIMS.md too. The last line of stdout is the folder of the figures."""
    parser = Parser(prog="figures", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "folder", type=Path, nargs="?", help="runs whose own figures are drawn; by default the reference records"
    )
    parser.add_argument(
        "--column", choices=style.COLUMNS, default="double", help="one column of a paper, or two (default)"
    )
    options = parser.parse_args(argv)
    source = options.folder or REFERENCE
    found = records(source)
    if not found:
        raise UserError(f"{source}: holds no finished run; accepted: a folder below which runs have a DONE file")
    for record in found:
        own = record.path / "figures" if options.folder else FIGURES / _folder(record)
        figures = base.load(record.configuration["name"]).figures_for(record.configuration["tier"])
        if not figures:
            continue
        for path in redraw(record, own, figures, for_print=True, column=options.column):
            print(path, file=sys.stderr)
    if not options.folder:
        CLAIMS.write_text(claims_page.page(found))
        print(CLAIMS, file=sys.stderr)
    print(source if options.folder else FIGURES)
    return 0


def _folder(record: Record) -> str:
    """Where a reference record's figures go: one folder per experiment and label, or all would write `goodput.png`."""
    name, label = record.configuration["name"], record.configuration["label"] or record.configuration["tier"]
    return f"{name}-{label}"
