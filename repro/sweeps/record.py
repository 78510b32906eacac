"""A sweep's own record: its definition, every point and what became of it, all values in one tidy table, figures and a report.

All of it is made from the points' records in the order of the points, so it has the same bytes whoever ran them and however often they
were interrupted.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd
import yaml

from repro import runner
from repro.errors import UserError, writing
from repro.experiments import base
from repro.record import tracking
from repro.record.directory import BusyError, Record, RunDirectory
from repro.record.metrics import COLUMNS, read_all
from repro.report import sweep_document
from repro.settings import Settings
from repro.sweeps.definition import Sweep, plain_key
from repro.sweeps.points import Ended


def announce(sweep: Sweep) -> None:
    """Say in the sweep's folder what is coming, before the first point runs; an earlier record is left alone.

    Raises:
        UserError: where the folder cannot be written.
    """
    try:
        sweep.folder.mkdir(parents=True, exist_ok=True)
        if not (sweep.folder / "config.yaml").exists():
            (sweep.folder / "config.yaml").write_text(yaml.safe_dump(sweep.record(), sort_keys=False))
    except FileNotFoundError:  # another process is replacing it
        pass
    except OSError as error:
        raise UserError(f"results: {sweep.folder} cannot be written ({error.strerror})") from error


def write(sweep: Sweep, settings: Settings, ended: Sequence[Ended], command: list[str]) -> Path:
    """Write the record, or find that it holds these points already; returns its folder.

    Of two processes that end together one writes, and the other waits for it.
    """
    directory = RunDirectory(sweep.folder)
    while True:
        try:
            if directory.finished() and all(end.state == "found" for end in ended):
                runner.to_stderr("sweep: already done, nothing to run")
                return sweep.folder
            directory.begin(sweep.record(), command, {"seed": settings.seed})
            break
        except BusyError:
            time.sleep(0.2)
    try:
        with writing(sweep.folder):
            table = points_table(sweep, ended)
            table.to_csv(sweep.folder / "points.csv", index=False)
            metrics_table(sweep, ended).to_parquet(sweep.folder / "metrics.parquet", index=False)
            failed = [end for end in ended if end.state == "failed"]
            directory.add_provenance({"failed": len(failed)})
            if len(failed) < len(ended):
                record = Record(sweep.folder)
                with tracking.Mirror(settings.tracking, sweep.folder) as mirror:
                    mirror.load()
                    sweep_document.write(record, settings.sweep, _study_figures(table["path"], ended))
                    mirror.log(record, sweep.record(), sorted((sweep.folder / "figures").glob("*.png")))
        if failed:
            directory.fail(
                RuntimeError(f"{len(failed)} of {len(ended)} points failed"),
                {"points": [{"number": end.number, "error": end.error} for end in failed]},
            )
        else:
            directory.complete()
    except BaseException as error:
        directory.fail(error)
        raise
    return sweep.folder


def _study_figures(paths: Iterable[str], ended: Sequence[Ended]) -> dict[str, list[Path]]:
    """By path, the figures of each point that says what it found, drawn here: points run without."""
    found = {}
    for path, end in zip(paths, ended, strict=True):
        if end.state != "failed" and (record := Record(Path(end.path))).provenance.get("finding"):
            found[path] = runner.draw(base.load(record.configuration["name"]), record)
    return found


def points_table(sweep: Sweep, ended: Sequence[Ended]) -> pd.DataFrame:
    """One row per point: its number, its values of the axes, its run directory from the sweep's folder, and why it failed."""
    rows = []
    for end, own in zip(ended, _values(sweep), strict=True):
        path = os.path.relpath(end.path, sweep.folder) if end.path else ""
        state = "failed" if end.state == "failed" else "done"
        rows.append({"point": end.number, **own, "state": state, "path": path, "error": end.error})
    return pd.DataFrame(rows)


def metrics_table(sweep: Sweep, ended: Sequence[Ended]) -> pd.DataFrame:
    """Every value of every finished point: `point`, a column for each axis, then the columns of metrics.csv."""
    done = [(end, own) for end, own in zip(ended, _values(sweep), strict=True) if end.state != "failed"]
    if not done:
        return pd.DataFrame(columns=["point", *COLUMNS])
    table, rows = read_all([Path(end.path) / "metrics.csv" for end, _ in done])
    beside: dict[str, list[object]] = {"point": [end.number for end, _ in done]}
    for key in done[0][1]:
        if key not in COLUMNS:
            beside[key] = [own[key] for _, own in done]
    repeated = pd.DataFrame(beside).loc[lambda points: points.index.repeat(rows)].reset_index(drop=True)
    return pd.concat([repeated, table[list(COLUMNS)]], axis=1)


def _values(sweep: Sweep) -> list[dict[str, object]]:
    """Each point's values of the axes; numbers as numbers where all of an axis are, else as they were written."""
    found: list[dict[str, object]] = []
    typed = {axis.key: dict(zip(axis.values, _typed(axis.values), strict=True)) for axis in sweep.axes}
    for words in sweep.points:
        own = words[len(words) - len(sweep.axes) :] if sweep.axes else ()
        row: dict[str, object] = {}
        for axis, word in zip(sweep.axes, own, strict=True):
            row[plain_key(axis.key)] = typed[axis.key][word[len(axis.key) + 1 :]]
        found.append(row)
    return found


def _typed(values: Sequence[str]) -> list[object]:
    try:
        return [float(value) for value in values]
    except ValueError:
        return [value.strip("'\"") for value in values]
