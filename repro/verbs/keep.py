"""Keep a finished run among the reference records, which are committed and from which the figures are drawn: `keep <run directory> …`.

A record that is there already is replaced by a run of the same configuration with committed code, and by nothing else: what figures
and claims rest on must not change its meaning by the way. `--replace` says that it is meant to.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repro.arguments import Parser
from repro.errors import UserError
from repro.record.directory import REFERENCE, Record
from repro.runner import flat, parts_of
from repro.settings import PRESENTATION

#: A reference record is small: what figures, comparisons and reports are made from, without trackers' files and pictures.
_KEPT = ("config.yaml", "provenance.json", "metrics.csv", "requests.parquet", "report.md", "tables", "DONE")
_MOST_BYTES = 4 << 20


@dataclass(frozen=True)
class _Copy:
    """One record to keep: where it comes from, where it goes, its files, and the copies of its parts."""

    record: Record
    target: Path
    files: tuple[Path, ...]
    parts: tuple[_Copy, ...]


def main(argv: list[str]) -> int:
    """Copy each run to results/reference/<experiment>/<label>, in place of an earlier one; with its parts, if it has any.

    A benchmark's record goes to results/reference/<benchmark>/<its folder's name>.
    """
    parser = Parser(prog="keep", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIRECTORY")
    parser.add_argument(
        "--replace",
        action="store_true",
        help="replace a record of another configuration too, and by one of uncommitted code",
    )
    arguments = parser.parse_args(argv)
    for run in arguments.runs:
        print(keep(run, replace=arguments.replace))
    return 0


def keep(source: Path, reference: Path = REFERENCE, *, replace: bool = False) -> Path:
    """Copy one run; returns where it is kept. Nothing is copied unless all of it may be.

    Raises:
        UserError: if the run is not finished, too large for a repository, or may not replace what is there.
    """
    copy = _planned(source, reference)
    if not replace:
        _refuse_unlike(copy)
    _carry_out(copy)
    return copy.target


def _planned(source: Path, reference: Path) -> _Copy:
    if not (source / "DONE").is_file():
        raise UserError(f"{source}: no finished run (it has no DONE file)")
    record = Record(source)
    experiment = record.configuration.get("name")
    if experiment is None:
        target = reference / source.resolve().parent.name / source.name
    else:
        target = reference / str(experiment) / str(record.configuration["label"] or record.configuration["tier"])
    if source.resolve() == target.resolve():
        raise UserError(f"{source}: is the reference record itself; accepted: a run directory")
    files = [file for kept in _KEPT for file in sorted([source / kept, *(source / kept).rglob("*")]) if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    if size > _MOST_BYTES:
        raise UserError(
            f"{source}: {size / 2**20:.1f} MiB is more than the {_MOST_BYTES >> 20} MiB that a reference record may have"
        )
    parts = parts_of(record) if experiment is not None else []
    return _Copy(record, target, tuple(files), tuple(_planned(part.path, reference) for part in parts))


def _refuse_unlike(copy: _Copy) -> None:
    """Refuse to replace a record by one of another configuration or of code that was not committed."""
    for part in copy.parts:
        _refuse_unlike(part)
    if not (copy.target / "DONE").is_file():
        return
    source = copy.record.path
    new, old = _settings(copy.record), _settings(Record(copy.target))
    if other := sorted(key for key in {**new, **old} if new.get(key) != old.get(key)):
        more = f" and {len(other) - 3} more" if len(other) > 3 else ""
        raise UserError(
            f"{source}: differs from {copy.target} in {', '.join(other[:3])}{more}; accepted: a run of the same configuration, or --replace"
        )
    if copy.record.provenance["git"]["dirty"]:
        raise UserError(
            f"{source}: ran with uncommitted changes, {copy.target} is not replaced by it; accepted: a run of committed code, or --replace"
        )


def _settings(record: Record) -> dict[str, Any]:
    """What decides an outcome, by dotted key. A part's folder has a digest in its name that its own record speaks for."""
    return {
        key: value
        for key, value in flat(record.configuration).items()
        if key.partition(".")[0] not in (*PRESENTATION, "parts")
    }


def _carry_out(copy: _Copy) -> None:
    source, target = copy.record.path, copy.target
    if target.exists():
        shutil.rmtree(target)
    for file in copy.files:
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)
    if copy.parts:
        for part in copy.parts:
            _carry_out(part)
        kept = [os.path.relpath(part.target, target) for part in copy.parts]
        copy.record.table("parts").assign(path=kept).to_csv(target / "tables" / "parts.csv", index=False)
