"""One experiment from its composition to a finished run directory: skip what is done, record what runs, say clearly what failed."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

from repro.composition import Composition, compose
from repro.configuration import build, plain
from repro.errors import UserError, writing
from repro.experiments import base
from repro.experiments.deployment import accelerators
from repro.experiments.study import forget, kept_points
from repro.models.checkpoint import checkpoint_files
from repro.presets import GLOBAL_GROUPS, choice_of, choices, groups, preset, typed
from repro.record import tracking
from repro.record.directory import Record, RunDirectory, configuration_hash
from repro.record.provenance import other_versions
from repro.report import document
from repro.settings import PRESENTATION, Settings

Progress = Callable[[str], None]

#: Tiers on which times are taken, so that nothing may run beside the experiment.
MEASURED_TIERS = ("emulate", "execute")


def takes_times(settings: Settings) -> bool:
    """Whether a run's results are times of this machine, so that nothing may run beside it."""
    return settings.tier in MEASURED_TIERS or base.load(settings.name).timed


def to_stderr(line: str) -> None:
    """Progress belongs on stderr: the last line of stdout is the run directory."""
    print(line, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Prepared:
    """A run that is known to be possible: its experiment, settings with every option resolved, and its directory, still unwritten.

    `configuration` is what the record holds: the keys that are read. `other_configuration` are those of them that differ from the
    experiment's own file, so that the paper's claims do not apply. `parts` are the prepared runs that a composite consists of, `unread`
    the keys of chosen presets that have no meaning on this tier.
    """

    experiment: base.Experiment
    settings: Settings
    options: Any
    directory: RunDirectory
    configuration: Mapping[str, Any]
    other_configuration: tuple[str, ...] = ()
    parts: tuple[Prepared, ...] = ()
    unread: tuple[str, ...] = ()

    @property
    def times(self) -> bool:
        """Whether its results are times of this machine, so that nothing may run beside it."""
        return takes_times(self.settings)

    def finished(self) -> bool:
        """Whether it has run to its end, and all its parts, with the code as it is now."""
        return self.directory.finished() and all(part.finished() for part in self.parts)


def prepare(composition: Composition) -> Prepared:
    """Everything that can be known before a run; nothing is written.

    Raises:
        UserError: for an experiment, tier, option or profile that does not exist, a key that is not read, or settings that cannot run.
    """
    settings = composition.settings
    experiment = base.load(settings.name)
    if settings.tier not in experiment.tiers:
        raise UserError(
            f"tier: {settings.tier!r} is not offered by {typed(settings.name)}; accepted: {', '.join(experiment.tiers)}"
        )
    options: Any = build(experiment.options, settings.options, "options")
    base.refuse_unread(experiment, settings.tier, composition.asked)
    settings = replace(settings, options=plain(options))
    _refuse_hidden(settings, composition.asked, clusters=experiment.reads_key("cluster.pd", settings.tier))
    experiment.check(settings, options)
    chosen = _chosen(experiment, settings.tier, options)
    parts = tuple(prepare(compose(_words_for(part, composition.words))) for part in chosen)
    configuration = base.restricted(plain(settings), experiment, settings.tier)
    if parts:
        configuration["parts"] = {name: part.directory.path.name for name, part in zip(chosen, parts, strict=True)}
    outcome_keys = {key: value for key, value in configuration.items() if key not in PRESENTATION}
    digest = configuration_hash(outcome_keys, [*checkpoint_files(settings.model), *experiment.inputs(settings)])
    folder = Path(settings.results) / settings.name / f"{settings.label or settings.tier}-{digest}"
    unread = () if parts else _unread_of_choices(composition, experiment)
    others = _other_configuration(experiment, settings, configuration)
    return Prepared(experiment, settings, options, RunDirectory(folder), configuration, others, parts, unread)


def _refuse_hidden(settings: Settings, asked: Sequence[str], *, clusters: bool) -> None:
    """Refuse what another key takes the place of: clusters' own profiles, a workload's lengths, and prices that nothing here costs."""
    for key in ("cluster.prfaas.profile", "cluster.pd.profile"):
        if settings.profile is not None and key in asked:
            raise UserError(f"{key}: has no effect beside profile={settings.profile}; accepted: one of the two")
    for key in asked:
        if settings.workload.trace is not None and (
            key == "workload.output_tokens" or key.startswith("workload.lengths")
        ):
            raise UserError(
                f"{key}: has no effect beside workload.trace, which brings its own; accepted: one of the two"
            )
        node, _, accelerator = key.partition("usd_per_gpu_hour.")
        if clusters and node == "cost." and accelerator not in (known := accelerators(settings)):
            raise UserError(f"{key}: no cluster here has that accelerator; accepted: {', '.join(sorted(known))}")


def _unread_of_choices(composition: Composition, experiment: base.Experiment) -> tuple[str, ...]:
    """Of presets that were chosen on the command line: keys that they set and the experiment does not read."""
    found = []
    for word in composition.words:
        group, _, choice = word.partition("=")
        if group not in groups() or group in GLOBAL_GROUPS or group == "model" or choice not in choices(group):
            continue
        for key in flat(preset(group, choice), group):
            if key.rpartition(".")[2] not in base.DESCRIPTIONS and not experiment.reads_key(
                key, composition.settings.tier
            ):
                found.append(key)
    return tuple(found)


def _chosen(experiment: base.Experiment, tier: str, options: Any) -> Sequence[str]:
    """The parts of a composite that are to run."""
    parts = experiment.parts.get(tier, ())
    if not isinstance(options, base.PartsOptions) or options.parts is None:
        return parts
    for part in options.parts:
        if part not in parts:
            raise UserError(f"options.parts: {part!r} is no part on tier={tier}; accepted: {', '.join(parts)}")
    return options.parts


def _words_for(part: str, words: Sequence[str]) -> list[str]:
    """The words of a composite that its part takes: those whose key it reads, and where results go."""
    experiment, tier = base.part_of(part)
    own = ("experiment", "tier", "label", "sweep")
    kept = []
    for word in words:
        key = word.lstrip("+~").partition("=")[0].replace("/", ".")
        if key not in own and not key.startswith(("options", "hydra")) and experiment.reads_key(key, tier):
            kept.append(word)
    on = [f"tier={tier}"] if "@" in part else []
    return [f"experiment={experiment.name}", *on, *kept]


def _other_configuration(
    experiment: base.Experiment, settings: Settings, configuration: Mapping[str, Any]
) -> tuple[str, ...]:
    """Keys in which a run differs from what its experiment's file says, effort and descriptions aside."""
    own, papers = flat(configuration), _usual(experiment.name, settings.tier)
    aside = (*PRESENTATION, *experiment.effort, "parts")
    found = {key for key in {**own, **papers} if own.get(key) != papers.get(key)}
    return tuple(
        sorted(
            key
            for key in found
            if key.rpartition(".")[2] not in base.DESCRIPTIONS
            and not any(key == out or key.startswith(f"{out}.") for out in aside)
        )
    )


@cache
def _usual(name: str, tier: str) -> dict[str, Any]:
    """What an experiment reads on a tier when nothing is set, by dotted key."""
    experiment = base.load(name)
    usual = compose([typed(name), f"tier={tier}"]).settings
    usual = replace(usual, options=plain(build(experiment.options, usual.options, "options")))
    return flat(base.restricted(plain(usual), experiment, tier))


def flat(values: Mapping[str, Any], key: str = "") -> dict[str, Any]:
    """A nested mapping's values by dotted key."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        where = f"{key}.{name}" if key else name
        found |= flat(value, where) if isinstance(value, Mapping) else {where: value}
    return found


def run(composition: Composition, command: list[str], progress: Progress = to_stderr) -> Record:
    """Run one experiment, or find that it has run.

    Raises:
        UserError: from the experiment; FAILED.json then says the same.
    """
    return run_prepared(prepare(composition), command, progress)


def run_prepared(prepared: Prepared, command: list[str], progress: Progress, *, bare: bool = False) -> Record:
    """Run what is prepared, or find that it has run; a `bare` run leaves figures, report and tracker to the sweep that it belongs to.

    A bare run that is asked for again by itself gets them then, from its record.
    """
    experiment, settings, directory = prepared.experiment, prepared.settings, prepared.directory
    if prepared.finished():
        record = Record(directory.path)
        if not bare:
            progress(f"{settings.name}: already done, nothing to run")
            if not (directory.path / document.PAGE).is_file():
                with tracking.Mirror(settings.tracking, directory.path) as mirror:
                    _present(prepared, record, mirror)
        return record
    if prepared.unread:
        progress(f"{settings.name}: tier={settings.tier} does not read {', '.join(prepared.unread)} of what was chosen")
    if settings.tier == "execute" and (others := other_versions()):
        progress(f"{settings.name}: warning: {', '.join(others)}; the record names the versions that ran")
    started = time.monotonic()
    try:
        try:
            directory.begin(prepared.configuration, command, {"seed": settings.seed})
        except OSError as error:
            raise UserError(f"results: {settings.results} cannot be written ({error.strerror})") from error
        with writing(directory.path), tracking.Mirror(settings.tracking, directory.path) as mirror:
            if not prepared.times and not prepared.parts and not bare:
                mirror.load()
            context = base.Context(
                settings, prepared.options, directory.path, lambda line: progress(f"{settings.name}: {line}")
            )
            outcome = _run_parts(prepared, context, progress) if prepared.parts else experiment.run(context)
            directory.write_metrics(outcome.metrics)
            for name, table in outcome.tables.items():
                directory.write_table(name, table)
            if outcome.requests is not None:
                directory.write_requests(outcome.requests)
            if outcome.failure:
                raise UserError(outcome.failure)
            known = {"other_configuration": list(prepared.other_configuration)}
            directory.add_provenance({**outcome.provenance, **known, "elapsed_s": round(time.monotonic() - started, 3)})
            record = Record(directory.path)
            if experiment.finding is not None:
                found = {"finding": experiment.finding(record), "hinges_on": experiment.hinges_on}
                directory.add_provenance(found)
                record = Record(directory.path)
            if not bare:
                _present(prepared, record, mirror)
        directory.complete()
        forget(directory.path)
    except BaseException as error:
        directory.fail(error)
        if isinstance(error, KeyboardInterrupt):
            error.add_note(_after_interrupt(prepared))
        raise
    progress(f"{settings.name}: done in {time.monotonic() - started:.1f} s")
    return record


def _after_interrupt(prepared: Prepared) -> str:
    """What the next call of a run that was stopped will find."""
    name, points = prepared.settings.name, kept_points(prepared.directory.path)
    if prepared.parts:
        return f"{name}: the next call runs the parts that are not finished"
    if points:
        return f"{name}: {points} finished points are kept, and the next call goes on from there"
    return f"{name}: the next call starts it afresh"


def _present(prepared: Prepared, record: Record, mirror: tracking.Mirror) -> None:
    """Figures, report and tracker of a run, from its record."""
    name = prepared.settings.name
    figures = draw(prepared.experiment, record)
    group, choice = choice_of(name)
    document.write(record.path, name, choices(group)[choice], [record, *parts_of(record)])
    mirror.log(record, dict(prepared.configuration), figures)


def _run_parts(prepared: Prepared, context: base.Context, progress: Progress) -> base.Outcome:
    """Run or find every part of a composite; its own record holds where they are."""
    rows = []
    for index, part in enumerate(prepared.parts, 1):
        name, tier = part.settings.name, part.settings.tier
        context.progress(f"[{index}/{len(prepared.parts)}] {name} on tier {tier}: {choices('experiment')[name]}")
        on = [] if tier == part.experiment.tiers[0] else [f"tier={tier}"]
        record = run_prepared(part, ["repro", f"experiment={name}", *on], progress)
        rows.append({"experiment": name, "path": os.path.relpath(record.path, context.folder)})
    return base.Outcome([], {"parts": pd.DataFrame(rows)})


def parts_of(record: Record) -> list[Record]:
    """The records that a composite's record consists of; none for any other."""
    if not base.load(record.configuration["name"]).parts:
        return []
    return [Record(Path(os.path.normpath(record.path / path))) for path in record.table("parts")["path"]]


def draw(experiment: base.Experiment, record: Record) -> list[Path]:
    """Every figure of an experiment into its run directory; returns the PNGs."""
    from repro.report import figures

    drawn = experiment.figures_for(record.configuration["tier"])
    return figures.redraw(record, record.path / "figures", drawn) if drawn else []


def summary(record: Record) -> str:
    """What a person wants to see at the end: the paper's claims against this record, and where the report is."""
    from repro.report import comparison

    claims = comparison.console(comparison.compare([record, *parts_of(record)]))
    report = f"report: {record.path / 'report.html'}"
    return f"{claims}\n{report}" if claims else report
