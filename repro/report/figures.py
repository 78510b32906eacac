"""`scripts/figures`: redraw every figure from the reference records, without running anything.

With the path of a results folder it draws those records instead, into each run's own figures folder.
"""

from __future__ import annotations

import sys
from pathlib import Path

from repro.errors import UserError
from repro.experiments import base
from repro.record.directory import Record
from repro.report import style

REFERENCE = Path("results") / "reference"
FIGURES = Path("figures")


def records(folder: Path) -> list[Record]:
    """Finished runs of experiments below a folder, in order of their path. A benchmark's record has no name, and draws nothing."""
    found = [Record(done.parent) for done in sorted(folder.rglob("DONE"))]
    return [record for record in found if "name" in record.configuration]


def redraw(record: Record, folder: Path, *, for_print: bool = False) -> list[Path]:
    """All figures of one record into `folder`, as PNG and for print as PDF too; returns the PNGs."""
    experiment = base.load(record.configuration["name"])
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with style.applied():
        for name, figure in experiment.figures_for(record.configuration["tier"]).items():
            written.append(style.save(figure(record), folder / name, for_print=for_print))
    return written


def _folder(record: Record) -> str:
    """Where a reference record's figures go: one folder per experiment and label, or all would write `goodput.png`."""
    name, label = record.configuration["name"], record.configuration["label"] or record.configuration["tier"]
    return f"{name}-{label}"


def main(argv: list[str]) -> int:
    """Redraw; the last line of stdout is the folder of the figures."""
    source = Path(argv[0]) if argv else REFERENCE
    try:
        found = records(source)
        if not found:
            raise UserError(f"{source}: holds no finished run; accepted: a folder below which runs have a DONE file")
        for record in found:
            own = record.path / "figures" if argv else FIGURES / _folder(record)
            for path in redraw(record, own, for_print=True):
                print(path, file=sys.stderr)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(FIGURES if not argv else source)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
