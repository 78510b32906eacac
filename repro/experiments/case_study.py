"""The whole case study (§4) in one run: every table and figure of the paper from its inputs, then the mechanism on real tensors.

Each part is an experiment of its own with its own run directory, so a part that has run is not run again, and the report here is the
claims of all of them side by side.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from repro.errors import UserError
from repro.experiments.base import Context, Experiment, Outcome, names
from repro.record.directory import Record

#: Words of the command line that mean the case study itself and not its parts.
_OWN = ("experiment=", "options.", "label=", "hydra", "tier=", "-")


@dataclass(frozen=True)
class Options:
    """The parts, in order; the report shows them in the same order."""

    experiments: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in self.experiments:
            if name not in names() or name == "case_study":
                raise UserError(
                    f"options.experiments: {name!r} is no part; accepted: {', '.join(set(names()) - {'case_study'})}"
                )


def run(context: Context) -> Outcome:
    """Run or find every part."""
    from hydra import compose

    from repro import runner
    from repro.app import settings_of

    shared = [word for word in context.overrides if not word.startswith(_OWN)]
    records = []
    for index, name in enumerate(context.options.experiments, 1):
        context.progress(f"[{index}/{len(context.options.experiments)}] {name}: {names()[name]}")
        settings = settings_of(compose("config", overrides=[f"experiment={name}", *shared]))
        records.append(runner.run(settings, ["repro", f"experiment={name}", *shared]))
    paths = [os.path.relpath(record.path, context.folder) for record in records]
    return Outcome([], {"parts": pd.DataFrame({"experiment": list(context.options.experiments), "path": paths})})


def parts(record: Record) -> list[Record]:
    """The records that the case study consists of."""
    return [Record(Path(os.path.normpath(record.path / path))) for path in record.table("parts")["path"]]


EXPERIMENT = Experiment(name="case_study", tiers=("model",), run=run, options=Options, parts=parts)
