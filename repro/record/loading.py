"""Many records as one tidy frame: a row per value, with the configuration's differing keys as columns. Needs neither torch nor Hydra.

>>> from repro.record import load
>>> frame = load("results/table6/*")
>>> frame[frame["metric"] == "lambda_max"].pivot(index="link.rate_bps", columns="case", values="value")
"""

from __future__ import annotations

import csv
import glob
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from repro.errors import UserError
from repro.record.directory import Record

#: Keys that say where a run is written and shown; they are no difference between runs.
_ASIDE = ("tracking", "label", "results", "processes", "sweep", "parts", "name", "tier")


def load(*where: str | Path) -> pd.DataFrame:
    """Every value of every finished run below the given folders or glob patterns.

    The columns are `run` (its folder), each key of the configuration in which the runs differ, and those of metrics.csv.

    Raises:
        UserError: where there is no finished run.
    """
    found = records(*where)
    if not found:
        raise UserError(
            f"{', '.join(map(str, where))}: no finished run; accepted: folders or patterns of run directories"
        )
    settings = [flat(record.configuration) for record in found]
    keys = differing(settings)
    tables = []
    for record, own in zip(found, settings, strict=True):
        table = record.metrics
        beside = {"run": str(record.path), **{key: own.get(key) for key in keys}}
        columns = {key: [value] * len(table) for key, value in beside.items()}
        tables.append(pd.concat([pd.DataFrame(columns, index=table.index), table], axis=1))
    return pd.concat(tables, ignore_index=True)


def records(*where: str | Path) -> list[Record]:
    """The finished runs in or below folders or glob patterns, each once, in the order of their paths; a sweep's are its points."""
    folders: dict[Path, None] = {}
    for pattern in where:
        # Not Path.glob, which takes no absolute pattern.
        for path in sorted(glob.glob(str(pattern), recursive=True)) or [str(pattern)]:  # noqa: PTH207
            for folder in _runs(Path(path)):
                folders.setdefault(folder.resolve())
    return [Record(_short(folder)) for folder in folders]


def _runs(folder: Path) -> Iterable[Path]:
    """Run directories in or below a folder."""
    if (folder / "points.csv").is_file():
        with (folder / "points.csv").open(newline="") as file:
            own = [folder / row["path"] for row in csv.DictReader(file) if row["state"] == "done"]
        yield from (run for run in own if (run / "DONE").is_file())
        return
    if (folder / "metrics.csv").is_file():
        if (folder / "DONE").is_file():
            yield folder
        return
    if folder.is_dir():
        for path in sorted(folder.rglob("DONE")):
            if (path.parent / "metrics.csv").is_file():
                yield path.parent


def _short(folder: Path) -> Path:
    try:
        return folder.relative_to(Path.cwd())
    except ValueError:
        return folder


def flat(values: Mapping[str, Any], key: str = "") -> dict[str, Any]:
    """A nested mapping's values by dotted key; lists as texts."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        where = f"{key}.{name}" if key else str(name)
        if isinstance(value, Mapping):
            found |= flat(value, where)
        else:
            found[where] = str(value) if isinstance(value, (list, tuple)) else value
    return found


def differing(settings: Iterable[Mapping[str, Any]]) -> list[str]:
    """The keys that do not have the same value everywhere, in the order in which they stand."""
    settings = list(settings)
    keys = dict.fromkeys(key for own in settings for key in own if key.partition(".")[0] not in _ASIDE)
    return [key for key in keys if len({repr(own.get(key)) for own in settings}) > 1]
