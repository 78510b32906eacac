"""The process behind `tracking.Mirror`: loads W&B, waits for one job, logs it and ends."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import wandb

from repro.processes import Message, Parent, run_worker
from repro.record.directory import Record
from repro.record.tracking import TrackingSpec

#: Files of a record that go into its artifact.
_RECORD = (
    "config.yaml",
    "provenance.json",
    "metrics.csv",
    "metrics.parquet",
    "points.csv",
    "requests.parquet",
    "tables",
)


def mirror(record: Record, configuration: dict[str, Any], figures: list[Path], spec: TrackingSpec) -> None:
    """Log a finished run's configuration, metrics, tables and figures; `online` becomes `offline` when the service is out of reach."""
    modes: list[Literal["online", "offline"]] = ["online", "offline"] if spec.mode == "online" else ["offline"]
    for mode in modes:
        try:
            _log(record, configuration, figures, spec, mode)
            return
        except Exception as error:  # a tracker's failure of any kind must not fail the run
            wandb.teardown()  # its service holds the run's id
            print(
                f"tracking={mode}: {' '.join(str(error).split())}; the record is complete without it", file=sys.stderr
            )


def run_id(record: Record) -> str:
    """A run's name at W&B, from its configuration's hash: the same configuration updates its run and makes no second one."""
    return f"{record.path.parent.name}-{record.path.name.rpartition('-')[2]}"


def _log(
    record: Record,
    configuration: dict[str, Any],
    figures: list[Path],
    spec: TrackingSpec,
    mode: Literal["online", "offline"],
) -> None:
    settings = wandb.Settings(
        console="off", disable_git=True, disable_code=True, x_disable_stats=True, x_disable_meta=True,
        init_timeout=spec.init_timeout_s, silent=True,
    )  # fmt: skip
    sweep = configuration.get("kind") == "sweep"
    group = record.path.name if sweep else record.path.parent.name
    tags = [str(configuration[key]) for key in ("kind", "name", "tier", "label") if configuration.get(key)]
    run = wandb.init(
        project=spec.project, entity=spec.entity, mode=mode, dir=str(record.path), config=dict(configuration), id=run_id(record),
        resume="allow" if mode == "online" else None, name=f"{record.path.parent.name}/{record.path.name}", group=group, tags=tags,
        job_type="sweep" if sweep else "run", settings=settings,
    )  # fmt: skip
    try:
        table = pd.read_parquet(record.path / "metrics.parquet") if sweep else record.metrics
        if not sweep:
            known = table.dropna(subset=["value"])
            names = known["tier"] + "/" + known["case"] + "/" + known["metric"]
            run.summary.update(dict(zip(names, known["value"], strict=True)))
        _log_series(run, record)
        logged: dict[str, Any] = {"metrics": wandb.Table(dataframe=table)}
        for path in sorted((record.path / "tables").glob("*.csv")):
            logged[f"tables/{path.stem}"] = wandb.Table(dataframe=record.table(path.stem))
        for path in figures:
            logged[f"figures/{path.stem}"] = wandb.Image(str(path))
        run.log(logged)
        run.log_artifact(_artifact(record))
    finally:
        run.finish()


def _log_series(run: Any, record: Record) -> None:
    """What a study drew over time, with its own seconds as steps: means over seeds for each case."""
    file = record.path / "tables" / "series.csv"
    if not file.is_file():
        return
    series = record.table("series")
    if not {"case", "at_s"} <= set(series):
        return
    values = [str(name) for name in series.select_dtypes("number") if name not in ("at_s", "seed")]
    run.define_metric("series/at_s", hidden=True)
    run.define_metric("series/*", step_metric="series/at_s")
    mean = series.groupby(["at_s", "case"])[values].mean().unstack("case")
    columns: list[Any] = list(mean.columns)
    for at_s, row in zip(mean.index, mean.to_numpy(), strict=True):
        found = {
            f"series/{case}/{name}": float(value)
            for (name, case), value in zip(columns, row, strict=True)
            if value == value
        }
        run.log({"series/at_s": float(at_s), **found})


def _artifact(record: Record) -> Any:
    """The record itself, without pictures and what the tracker wrote."""
    artifact = wandb.Artifact(f"record-{run_id(record)}", type="record")
    for name in _RECORD:
        path = record.path / name
        if path.is_dir():
            artifact.add_dir(str(path), name=name)
        elif path.is_file():
            artifact.add_file(str(path), name=name)
    return artifact


def work(parent: Parent, job: Message) -> None:
    """One job; `stop` instead means that the run ended without a result."""
    if job["kind"] == "stop":
        return
    mirror(
        Record(Path(job["record"])),
        job["configuration"],
        [Path(path) for path in job["figures"]],
        TrackingSpec(**job["spec"]),
    )
    wandb.teardown()  # this process ends without the usual exit, at which W&B would do it
    parent.reply(job)


if __name__ == "__main__":
    run_worker(work)
