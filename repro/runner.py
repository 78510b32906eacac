"""One experiment from settings to a finished run directory: skip what is done, record what runs, say clearly what failed."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from repro.configuration import build, plain
from repro.errors import UserError
from repro.experiments import base
from repro.record import tracking
from repro.record.directory import Record, RunDirectory, configuration_hash
from repro.settings import PRESENTATION, Settings

Progress = Callable[[str], None]


def to_stderr(line: str) -> None:
    """Progress belongs on stderr: the last line of stdout is the run directory."""
    print(line, file=sys.stderr, flush=True)


def prepare(settings: Settings) -> tuple[base.Experiment, Settings, RunDirectory]:
    """The experiment, its settings with every option resolved, and its directory; nothing is written.

    Raises:
        UserError: for an experiment, tier or option that does not exist.
    """
    experiment = base.load(settings.name)
    if settings.tier not in experiment.tiers:
        raise UserError(f"tier: {settings.tier!r} is not offered by experiment={settings.name}; accepted: {', '.join(experiment.tiers)}")
    options = build(experiment.options, settings.options, "options")
    settings = replace(settings, options=plain(options))
    outcome_keys = {key: value for key, value in plain(settings).items() if key not in PRESENTATION}
    digest = configuration_hash(outcome_keys, experiment.inputs(settings))
    folder = Path(settings.results) / settings.name / f"{settings.label or settings.tier}-{digest}"
    return experiment, settings, RunDirectory(folder)


def run(settings: Settings, command: list[str], progress: Progress = to_stderr) -> Record:
    """Run one experiment, or find that it has run.

    Raises:
        UserError: from the experiment; FAILED.json then says the same.
    """
    experiment, settings, directory = prepare(settings)
    if directory.finished():
        progress(f"{settings.name}: already done, nothing to run")
        return Record(directory.path)
    started = time.monotonic()
    directory.begin(plain(settings), command, {"seed": settings.seed})
    try:
        options = build(experiment.options, settings.options, "options")
        context = base.Context(settings, options, directory.path, lambda line: progress(f"{settings.name}: {line}"))
        outcome = experiment.run(context)
        directory.write_metrics(outcome.metrics)
        for name, table in outcome.tables.items():
            directory.write_table(name, table)
        if outcome.requests is not None:
            directory.write_requests(outcome.requests)
        figures = draw(experiment, Record(directory.path), directory.path / "figures")
        tracking.mirror(Record(directory.path), plain(settings), figures, settings.tracking)
        record = directory.complete({**outcome.provenance, "elapsed_s": round(time.monotonic() - started, 3)})
    except BaseException as error:
        directory.fail(error)
        raise
    progress(f"{settings.name}: done in {time.monotonic() - started:.1f} s")
    return record


def draw(experiment: base.Experiment, record: Record, folder: Path) -> list[Path]:
    """Every figure of an experiment from its record, as PNG and PDF; returns the PNGs."""
    if not experiment.figures:
        return []
    from repro.report import style

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with style.applied():
        for name, figure in experiment.figures.items():
            written.append(style.save(figure(record), folder / name))
    return written
