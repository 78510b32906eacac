"""Keep a finished run among the reference records, which are committed and from which the figures are drawn: `keep <run directory> …`."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from repro.errors import UserError
from repro.record.directory import REFERENCE, Record
from repro.runner import parts_of

#: A reference record is small: what figures, comparisons and reports are made from, without trackers' files and pictures.
_KEPT = ("config.yaml", "provenance.json", "metrics.csv", "requests.parquet", "report.md", "tables", "DONE")
_MOST_BYTES = 4 << 20


def main(argv: list[str]) -> int:
    """Copy each run to results/reference/<experiment>/<label>, in place of an earlier one; with its parts, if it has any.

    A benchmark's record goes to results/reference/<benchmark>/<its folder's name>.
    """
    if not argv:
        raise UserError("keep: needs the path of one or more finished runs")
    for name in argv:
        print(keep(Path(name)))
    return 0


def keep(source: Path, reference: Path = REFERENCE) -> Path:
    """Copy one run; returns where it is kept.

    Raises:
        UserError: if the run is not finished, or too large for a repository.
    """
    if not (source / "DONE").is_file():
        raise UserError(f"{source}: no finished run (it has no DONE file)")
    record = Record(source)
    experiment = record.configuration.get("name")
    if experiment is None:
        target = reference / source.resolve().parent.name / source.name
    else:
        target = reference / str(experiment) / str(record.configuration["label"] or record.configuration["tier"])
    files = [file for kept in _KEPT for file in sorted([source / kept, *(source / kept).rglob("*")]) if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    if size > _MOST_BYTES:
        raise UserError(
            f"{source}: {size / 2**20:.1f} MiB is more than the {_MOST_BYTES >> 20} MiB that a reference record may have"
        )
    if target.exists():
        shutil.rmtree(target)
    for file in files:
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    if experiment is not None and (parts := parts_of(record)):
        kept = [os.path.relpath(keep(part.path, reference), target) for part in parts]
        record.table("parts").assign(path=kept).to_csv(target / "tables" / "parts.csv", index=False)
    return target
