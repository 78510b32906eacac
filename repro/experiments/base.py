"""What an experiment is: a run that yields rows, and figures drawn from the rows alone.

Each module of this folder ends in `EXPERIMENT = Experiment(…)` and has a file of the same name in conf/experiment, whose second line says
in a sentence what it answers (`--help` prints it). A figure gets the record and nothing else, so it can be redrawn years later
without running anything.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from repro.errors import UserError
from repro.record.directory import Record
from repro.record.metrics import Metric

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from repro.settings import Settings


@dataclass(frozen=True)
class NoOptions:
    """For experiments that need nothing beyond the shared configuration."""


@dataclass(frozen=True)
class Context:
    """What a run is given: its settings, its own options, a folder for side products and a way to say how far it is.

    `overrides` are the words of the command line, for an experiment that runs others.
    """

    settings: Settings
    options: Any
    folder: Path
    progress: Callable[[str], None]
    overrides: tuple[str, ...] = ()

    def metric(
        self,
        case: str,
        metric: str,
        value: float,
        unit: str,
        source: str,
        *,
        interval: tuple[float, float] = (math.nan, math.nan),
        n: int = 1,
        paper: float = math.nan,
    ) -> Metric:
        """A row of metrics.csv for this experiment and tier."""
        low, high = interval
        settings = self.settings
        return Metric(
            settings.name,
            settings.tier,
            case,
            metric,
            float(value),
            unit,
            source,
            float(low),
            float(high),
            n,
            float(paper),
        )


@dataclass(frozen=True)
class Outcome:
    """What a run yields; the application writes it to the run directory."""

    metrics: Sequence[Metric]
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    requests: pd.DataFrame | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Experiment:
    """One artefact: `run` answers it on any of `tiers`, `figures` draw it from its record.

    `options` is a frozen dataclass of the experiment's own settings (the configuration's `options` node); `inputs` names the files outside
    the configuration whose contents change the outcome; `tier_figures` replaces `figures` on a tier whose record has another form; `parts`
    are the records of other experiments that the report of this one shows.
    """

    name: str
    tiers: tuple[str, ...]
    run: Callable[[Context], Outcome]
    figures: Mapping[str, Callable[[Record], Figure]] = field(default_factory=dict)
    options: type = NoOptions
    inputs: Callable[[Settings], Sequence[Path]] = lambda settings: ()
    tier_figures: Mapping[str, Mapping[str, Callable[[Record], Figure]]] = field(default_factory=dict)
    parts: Callable[[Record], Sequence[Record]] = lambda record: ()

    def figures_for(self, tier: str) -> Mapping[str, Callable[[Record], Figure]]:
        """The figures that a record of this tier can draw."""
        return self.tier_figures.get(tier, self.figures)


CONFIGURATION = Path(__file__).resolve().parents[2] / "conf"


def names(group: str = "experiment") -> dict[str, str]:
    """Every experiment's (or sweep's) name and its one line, from the comments of its file in conf."""
    found = {}
    for path in sorted((CONFIGURATION / group).glob("*.yaml")):
        comments = [line[1:].strip() for line in path.read_text().splitlines()[:4] if line.startswith("#")]
        found[path.stem] = next((line for line in comments if not line.startswith("@package")), "")
    return found


def load(name: str) -> Experiment:
    """The experiment of that name.

    Raises:
        UserError: naming the experiments that exist.
    """
    if name not in names():
        raise UserError(f"experiment: {name!r} does not exist; accepted: {', '.join(names())}")
    module = importlib.import_module(f"repro.experiments.{name}")
    experiment = module.EXPERIMENT
    assert isinstance(experiment, Experiment)
    return experiment
