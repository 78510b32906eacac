"""A record held against the schema: what every file must hold, so that others can rely on it.

The version of the schema stands in provenance.json as `schema`. A change that adds files or columns keeps the version; one that renames,
removes or changes a type makes a new one, and this module reads the earlier ones as well:

1. Records from before the version was written. Workers in requests.parquet are numbers.
2. Workers are texts, as on all tiers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import yaml

from repro.record import metrics, requests, secrets
from repro.record.provenance import SCHEMA

_PROVENANCE = ("command", "git", "source_digest", "python", "packages", "machine", "seeds", "start")
_SWEEP = ("axes", "words", "points")


def check(folder: Path) -> list[str]:
    """Everything that is wrong with a record, each in a line that names the file; none for a good one."""
    return list(_mistakes(folder))


def _mistakes(folder: Path) -> Iterator[str]:
    config = folder / "config.yaml"
    try:
        configuration = yaml.safe_load(config.read_text())
    except (OSError, yaml.YAMLError) as error:
        yield f"{config}: cannot be read ({_line(error)}); accepted: the resolved configuration as YAML"
        return
    if not isinstance(configuration, dict):
        yield f"{config}: holds no mapping; accepted: the resolved configuration as YAML"
        return
    sweep = configuration.get("kind") == "sweep"
    for key in _SWEEP if sweep else ():
        if key not in configuration:
            yield f"{config}: key {key} is missing"
    yield from _provenance(folder / "provenance.json")
    yield from _sweep(folder) if sweep else _metrics(folder / "metrics.csv")
    if (folder / "requests.parquet").exists():
        yield from _requests(folder / "requests.parquet", _version(folder / "provenance.json"))
    for table in sorted((folder / "tables").glob("*.csv")):
        try:
            pd.read_csv(table)
        except (ValueError, OSError) as error:
            yield f"{table}: cannot be read ({_line(error)})"
    yield from _ending(folder)
    for file in (config, folder / "provenance.json"):
        if file.is_file() and secrets.found(file.read_text()):
            yield f"{file}: holds what looks like a secret; accepted: {secrets.REDACTED} in its place"


def _provenance(file: Path) -> Iterator[str]:
    known = _json(file)
    if known is None:
        yield f"{file}: cannot be read; accepted: a JSON object"
        return
    for key in _PROVENANCE:
        if key not in known:
            yield f"{file}: key {key} is missing"
    version = known.get("schema", 1)
    if version not in range(1, SCHEMA + 1):
        yield f"{file}: schema {version!r} is unknown; accepted: 1 to {SCHEMA}"


def _version(file: Path) -> object:
    return (_json(file) or {}).get("schema", 1)


def _metrics(file: Path) -> Iterator[str]:
    try:
        table = metrics.read(file)
    except (OSError, ValueError) as error:
        yield f"{file}: cannot be read ({_line(error)})"
        return
    yield from _values(file, table)


def _values(file: Path, table: pd.DataFrame) -> Iterator[str]:
    missing = [column for column in metrics.COLUMNS if column not in table]
    if missing:
        yield f"{file}: column {missing[0]} is missing; accepted: {', '.join(metrics.COLUMNS)}"
        return
    unknown = set(table["source"]) - set(metrics.SOURCES)
    if unknown:
        yield f"{file}: source {sorted(map(str, unknown))[0]!r}; accepted: {', '.join(metrics.SOURCES)}"
    keys = [column for column in ("point", "tier", "case", "metric") if column in table]
    twice = table[table.duplicated(keys)]
    if len(twice):
        row = twice.iloc[0]
        yield f"{file}: {row['metric']} of case {row['case']} stands twice"
    for row in metrics.each(table):
        if math.isfinite(row.ci_low) and math.isfinite(row.ci_high) and row.ci_low > row.ci_high:
            yield f"{file}: {row.metric} of case {row.case} has an interval from {row.ci_low:g} down to {row.ci_high:g}"
        if row.n < 1:
            yield f"{file}: {row.metric} of case {row.case} rests on {row.n} samples; accepted: 1 or more"


def _sweep(folder: Path) -> Iterator[str]:
    try:
        points = pd.read_csv(folder / "points.csv")
        table = pd.read_parquet(folder / "metrics.parquet")
    except (OSError, ValueError) as error:
        yield f"{folder}: points.csv or metrics.parquet cannot be read ({_line(error)})"
        return
    yield from _values(folder / "metrics.parquet", table)
    done = points[points["state"] == "done"]
    if set(table["point"]) != set(done["point"]):
        yield f"{folder / 'metrics.parquet'}: has other points than those that are done in points.csv"
    for path in done["path"]:
        if not (folder / path / "DONE").is_file():
            yield f"{folder / 'points.csv'}: {path} is no finished run"


def _requests(file: Path, version: object) -> Iterator[str]:
    try:
        table = pd.read_parquet(file)
        if version == 1:
            table = table.astype({name: str for name in ("prefill_worker", "decode_worker") if name in table})
        requests.validate(table)
    except (OSError, ValueError) as error:
        yield f"{file}: {_line(error)}"


def _ending(folder: Path) -> Iterator[str]:
    done, failed = folder / "DONE", folder / "FAILED.json"
    if done.exists() and failed.exists():
        yield f"{folder}: has both DONE and FAILED.json; accepted: one of them"
    elif not done.exists() and not failed.exists():
        yield f"{folder}: has neither DONE nor FAILED.json: the run was cut, or goes on"
    for file in (done, failed):
        if file.exists() and _json(file) is None:
            yield f"{file}: cannot be read; accepted: a JSON object"


def _json(file: Path) -> dict[str, object] | None:
    try:
        value = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
