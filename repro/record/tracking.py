"""Weights & Biases: a mirror of the record, never a part of it.

Everything W&B writes stays under the run directory, offline by default. Nothing here may fail a run: whatever goes wrong with the tracker
is one line on stderr, because the record is complete without it.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from repro.record.directory import Record

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrackingSpec:
    """Whether and where a run is mirrored: `offline` writes files that `wandb sync` can upload later."""

    mode: Literal["offline", "online", "disabled"] = "offline"
    project: str = "prfaas-repro"
    entity: str | None = None
    init_timeout_s: float = 20.0


@contextlib.contextmanager
def _environment(folder: Path) -> Iterator[None]:
    """W&B takes its folders from the environment only; without these, artifacts are staged in the user's home."""
    wanted = {
        "WANDB_DATA_DIR": str(folder), "WANDB_CACHE_DIR": str(folder / "cache"), "WANDB_CONFIG_DIR": str(folder / "config"),
        "WANDB_SILENT": "true", "WANDB_CONSOLE": "off",
    }  # fmt: skip
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def mirror(record: Record, configuration: Mapping[str, Any], figures: Sequence[Path], spec: TrackingSpec) -> None:
    """Log a finished run's configuration, metrics, tables and figures; `online` becomes `offline` when the service is out of reach."""
    if spec.mode == "disabled":
        return
    modes: list[Literal["online", "offline"]] = ["online", "offline"] if spec.mode == "online" else ["offline"]
    for mode in modes:
        try:
            _log_run(record, configuration, figures, spec, mode)
            return
        except Exception as error:  # a tracker's failure of any kind must not fail the run
            _log.warning("tracking=%s: %s; the record is complete without it", mode, " ".join(str(error).split()))


def _log_run(
    record: Record,
    configuration: Mapping[str, Any],
    figures: Sequence[Path],
    spec: TrackingSpec,
    mode: Literal["online", "offline"],
) -> None:
    folder = record.path / "wandb"
    folder.mkdir(exist_ok=True)
    with _environment(folder):
        import wandb

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
