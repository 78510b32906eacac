"""The process behind `tracking.Mirror`: loads W&B, waits for one job, logs it and ends."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

import wandb

from repro.processes import Message, Parent, run_worker
from repro.record.directory import Record
from repro.record.tracking import TrackingSpec


def mirror(record: Record, configuration: dict[str, Any], figures: list[Path], spec: TrackingSpec) -> None:
    """Log a finished run's configuration, metrics, tables and figures; `online` becomes `offline` when the service is out of reach."""
    modes: list[Literal["online", "offline"]] = ["online", "offline"] if spec.mode == "online" else ["offline"]
    for mode in modes:
        try:
            _log(record, configuration, figures, spec, mode)
            return
        except Exception as error:  # a tracker's failure of any kind must not fail the run
            print(
                f"tracking={mode}: {' '.join(str(error).split())}; the record is complete without it", file=sys.stderr
            )


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
    run = wandb.init(
        project=spec.project, entity=spec.entity, mode=mode, dir=str(record.path), config=dict(configuration),
        name=f"{record.path.parent.name}/{record.path.name}", group=record.path.parent.name, settings=settings,
    )  # fmt: skip
    try:
        table = record.metrics
        known = table.dropna(subset=["value"])
        names = known["tier"] + "/" + known["case"] + "/" + known["metric"]
        run.summary.update(dict(zip(names, known["value"], strict=True)))
        logged: dict[str, Any] = {"metrics": wandb.Table(dataframe=table)}
        for path in sorted((record.path / "tables").glob("*.csv")):
            logged[f"tables/{path.stem}"] = wandb.Table(dataframe=record.table(path.stem))
        for path in figures:
            logged[f"figures/{path.stem}"] = wandb.Image(str(path))
        run.log(logged)
    finally:
        run.finish()


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
