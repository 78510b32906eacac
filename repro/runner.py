"""One experiment from settings to a finished run directory: skip what is done, record what runs, say clearly what failed."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from repro.configuration import build, plain
from repro.errors import UserError
from repro.experiments import base
from repro.experiments.deployment import deployment, operating_points
from repro.record import tracking
from repro.record.directory import Record, RunDirectory, configuration_hash
from repro.report import document
from repro.settings import PRESENTATION, Settings

Progress = Callable[[str], None]

#: Tiers on which times are taken, so that nothing may run beside the experiment.
MEASURED_TIERS = ("emulate", "execute")


def to_stderr(line: str) -> None:
    """Progress belongs on stderr: the last line of stdout is the run directory."""
    print(line, file=sys.stderr, flush=True)


def prepare(settings: Settings) -> tuple[base.Experiment, Settings, RunDirectory]:
    """The experiment, its settings with every option resolved, and its directory; nothing is written.

    Raises:
        UserError: for an experiment, tier, option or profile that does not exist, or a deployment that cannot serve.
    """
    experiment = base.load(settings.name)
    if settings.tier not in experiment.tiers:
        raise UserError(
            f"tier: {settings.tier!r} is not offered by experiment={settings.name}; accepted: {', '.join(experiment.tiers)}"
        )
    options: Any = build(experiment.options, settings.options, "options")
    settings = replace(settings, options=plain(options))
    # What no tier can run must end before a directory exists: the model refuses it in milliseconds.
    operating_points(deployment(settings), settings)
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
    try:
        try:
            directory.begin(plain(settings), command, {"seed": settings.seed})
        except OSError as error:
            raise UserError(f"results: {settings.results} cannot be written ({error.strerror})") from error
        with tracking.Mirror(settings.tracking, directory.path) as mirror:
            if settings.tier not in MEASURED_TIERS:
                mirror.load()
            options: Any = build(experiment.options, settings.options, "options")
            context = base.Context(
                settings, options, directory.path, lambda line: progress(f"{settings.name}: {line}"), tuple(command[1:])
            )
            outcome = experiment.run(context)
            directory.write_metrics(outcome.metrics)
            for name, table in outcome.tables.items():
                directory.write_table(name, table)
            if outcome.requests is not None:
                directory.write_requests(outcome.requests)
            directory.add_provenance({**outcome.provenance, "elapsed_s": round(time.monotonic() - started, 3)})
            record = Record(directory.path)
            figures = draw(experiment, record)
            document.write(
                directory.path, settings.name, base.names()[settings.name], [record, *experiment.parts(record)]
            )
            mirror.log(record, plain(settings), figures)
        directory.complete()
    except BaseException as error:
        directory.fail(error)
        raise
    progress(f"{settings.name}: done in {time.monotonic() - started:.1f} s")
    return record


def draw(experiment: base.Experiment, record: Record) -> list[Path]:
    """Every figure of an experiment into its run directory; returns the PNGs."""
    from repro.report import figures

    return (
        figures.redraw(record, record.path / "figures") if experiment.figures_for(record.configuration["tier"]) else []
    )


def summary(settings: Settings, record: Record) -> str:
    """What a person wants to see at the end: the paper's claims against this record, and where the report is."""
    from repro.report import comparison

    claims = comparison.console(comparison.compare([record, *base.load(settings.name).parts(record)]))
    report = f"report: {record.path / 'report.html'}"
    return f"{claims}\n{report}" if claims else report
