"""What an experiment is: the keys that it reads, a run that yields rows, and figures drawn from the rows alone.

Each module of this folder ends in `EXPERIMENT = Experiment(…)` and has a file of the same name in conf/experiment, whose second line says
in a sentence what it answers (`--help` prints it). A figure gets the record and nothing else, so it can be redrawn years later
without running anything.

`reads` is the contract between an experiment and the configuration: on each tier, the keys that can change its result. A key that somebody
sets and the experiment does not read is refused by name; the record holds the keys that are read, and no other.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from repro.errors import UserError
from repro.presets import choice_of, choices, runs, typed
from repro.record.directory import Record
from repro.record.metrics import Metric
from repro.settings import PRESENTATION
from repro.transport.spec import TransportSpec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from repro.settings import Settings

#: Keys of the models that a run builds or counts.
MODEL = ("model", "size", "pretrained")
#: Of a trace, what decides which lengths it has.
TRACE_LENGTHS = tuple(
    f"workload.trace.{key}" for key in ("path", "format", "time_unit", "columns", "start_s", "duration_s", "requests")
)
#: What the equations 3–8 take: the clusters' profiles, the link's rate, lengths, and how threshold and split are found.
EQUATIONS = (
    "profile", "cluster.prfaas", "cluster.pd", "link.rate_bps", "workload.lengths", "workload.mixture", *TRACE_LENGTHS,
    "workload.output_tokens", "policy.threshold_tokens", "policy.n_p", "policy.threshold_step_tokens", "policy.lengths",
)  # fmt: skip
#: The cluster that both are compared with.
HOMOGENEOUS = "cluster.homogeneous_instances"
#: What decides how much of the simulated link TCP leaves to a transfer (`repro.link.tcp_model`).
TCP_LAW = ("link.loss", "link.loss_burst_segments", "link.congestion_control", "transport.connections")
#: What a simulated deployment takes beside the equations: what the link does over time, both parts of the SLO, the scheduler.
SIMULATED = (
    *(key for key in EQUATIONS if key != "policy.lengths"), "link.rtt_s", "link.schedule", *TCP_LAW, "workload.slo", "seed",
)  # fmt: skip
#: What decides the decode batch of a simulated deployment beside BS_max: measured steps, and memory.
DECODE = "cluster.decode"
#: Instances of a simulated deployment that stop and come back.
FAILURES = "cluster.failures"
#: PrfaaS clusters beside the first one, each behind a link of its own.
SITES = "cluster.also_prfaas"
#: The scheduler beside threshold and split.
SCHEDULER = (
    "policy.router", "policy.offload_share", "policy.placement", "policy.admission", "policy.short_term", "policy.long_term",
    "policy.adaptive", "policy.fallback_s",
)  # fmt: skip
#: How large prefix caches are, and how they are evened out; whether they exist is a case of the studies that read these.
CACHES = tuple(f"policy.cache.{key}" for key in ("capacity_gb", "block_tokens", "checkpoint_blocks", "eviction"))
REBALANCE = tuple(f"policy.rebalance.{key}" for key in ("period_s", "link_share", "at_least_blocks"))
#: The emulated link and what crosses it.
WIRE = ("link", "transport")
#: Of the transport, what a benchmark does not vary itself, as it does backend, connections and encryption.
TCP = tuple(
    f"transport.{item.name}" for item in fields(TransportSpec) if item.name not in ("backend", "connections", "tls")
)
#: Texts that describe a choice. They are kept where the node is read, and change nothing.
DESCRIPTIONS = ("name", "title", "source")


@dataclass(frozen=True)
class NoOptions:
    """For experiments that need nothing beyond the shared configuration."""


@dataclass(frozen=True)
class PartsOptions:
    """Of a composite: which of its parts to run, all of them by default."""

    parts: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Context:
    """What a run is given: its settings, its own options, a folder for side products and a way to say how far it is."""

    settings: Settings
    options: Any
    folder: Path
    progress: Callable[[str], None]

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
    """What a run yields; the application writes it to the run directory.

    `failure` says what must not have been, in a run that came to its end: its numbers are kept and it counts as failed.
    """

    metrics: Sequence[Metric]
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    requests: pd.DataFrame | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    failure: str = ""


@dataclass(frozen=True)
class Experiment:
    """One artefact: `run` answers it on any of the tiers that `reads` has keys for, `figures` draw it from its record.

    `reads` names keys or whole nodes; `options` stands for all of the experiment's own. `effort` are keys that say how long or how
    often, not what: the paper's claims are judged whatever they are. `options` is a frozen dataclass of the experiment's own settings
    (the configuration's `options` node); `check` refuses settings that cannot run before anything is written; `inputs` names the
    files outside the configuration whose contents change the outcome; `tier_figures` replaces `figures` on a tier whose record has
    another form. `parts` are other experiments that run in place of `run`, by tier, each written as its name or as name@tier, with the
    keys that each reads; their records are in the report. `timed` says that results are times of this machine on whichever tier, so that
    no two runs are the same. `finding` says in a sentence what a record shows, and `hinges_on` which assumption would change it; both
    stand at the head of the report.
    """

    name: str
    reads: Mapping[str, tuple[str, ...]]
    run: Callable[[Context], Outcome]
    figures: Mapping[str, Callable[[Record], Figure]] = field(default_factory=dict)
    options: type = NoOptions
    check: Callable[[Settings, Any], object] = lambda settings, options: None
    inputs: Callable[[Settings], Sequence[Path]] = lambda settings: ()
    tier_figures: Mapping[str, Mapping[str, Callable[[Record], Figure]]] = field(default_factory=dict)
    effort: tuple[str, ...] = ("seed", "options.seeds", "options.repeats")
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    timed: bool = False
    finding: Callable[[Record], str] | None = None
    hinges_on: str = ""

    @property
    def tiers(self) -> tuple[str, ...]:
        """The tiers that it runs on."""
        return tuple(self.reads)

    def figures_for(self, tier: str) -> Mapping[str, Callable[[Record], Figure]]:
        """The figures that a record of this tier can draw."""
        return self.tier_figures.get(tier, self.figures)

    def reads_key(self, key: str, tier: str) -> bool:
        """Whether a key can change the result on that tier, or, for a node, whether something below it can."""
        return _wanted(key, (*self.reads[tier], *_ALWAYS))


def composite(context: Context) -> Outcome:
    """What an experiment with `parts` has for `run`: the runner runs the parts, each into a directory of its own."""
    raise AssertionError(f"{context.settings.name} is run by its parts")


#: Where the modules of a group lie.
_ROOMS = {"experiment": "experiments", "bench": "bench"}
_ALWAYS = ("name", "tier", *PRESENTATION)


# Kept, because the points of a sweep ask for the same keys.
@lru_cache(maxsize=1 << 14)
def _wanted(key: str, reads: tuple[str, ...]) -> bool:
    """Whether a key, or something below it, is among those that are read, or describes one of them."""
    node, _, last = key.rpartition(".")
    described = last in DESCRIPTIONS and any(_within(read, node) for read in reads)
    return described or any(_within(key, read) or _within(read, key) for read in reads)


@lru_cache(maxsize=1 << 14)
def _whole(key: str, reads: tuple[str, ...]) -> bool:
    """Whether a key is read with all that is below it."""
    return any(_within(key, read) for read in reads)


def _within(key: str, node: str) -> bool:
    return key == node or key.startswith((f"{node}.", f"{node}["))


def part_of(part: str) -> tuple[Experiment, str]:
    """A part of a composite, and the tier that it runs on: the one behind its name's @, else its first."""
    name, _, tier = part.partition("@")
    experiment = load(name)
    return experiment, tier or experiment.tiers[0]


def part_reads(part: str, key: str) -> bool:
    """Whether a part of a composite reads a key."""
    experiment, tier = part_of(part)
    return experiment.reads_key(key, tier)


def refuse_unread(experiment: Experiment, tier: str, asked: Iterable[str]) -> None:
    """Refuse the first asked key that the experiment does not read on this tier.

    Raises:
        UserError: naming the key and the experiments that read it.
    """
    for key in asked:
        if experiment.reads_key(key, tier):
            continue
        if any(part_reads(part, key) for part in experiment.parts.get(tier, ())):
            continue
        readers = []
        for name in runs():
            other = load(name)
            tiers = [reading for reading in other.tiers if not other.parts and other.reads_key(key, reading)]
            if tiers and key.split(".")[0] != "options":
                group, choice = choice_of(name)
                readers.append(f"{choice if group == 'experiment' else typed(name)} ({', '.join(tiers)})")
        known = f"; read by: {', '.join(readers)}" if readers else ""
        raise UserError(f"{key}: not read by {typed(experiment.name)} on tier={tier}{known}")


def restricted(values: Mapping[str, Any], experiment: Experiment, tier: str) -> dict[str, Any]:
    """The part of a plain configuration that the experiment reads on this tier: what a record holds and a hash covers."""
    reads = (*experiment.reads[tier], *_ALWAYS)

    def kept(value: Any, key: str) -> Any:
        if isinstance(value, Mapping) and not _whole(key, reads) and any(_within(read, key) for read in reads):
            below = ((name, item, f"{key}.{name}") for name, item in value.items())
            return {name: kept(item, where) for name, item, where in below if _wanted(where, reads)}
        return value

    return {name: kept(value, name) for name, value in values.items() if _wanted(name, reads)}


def load(name: str) -> Experiment:
    """The experiment, or the benchmark, of that name.

    Raises:
        UserError: naming those that exist.
    """
    group, choice = choice_of(name)
    if choice not in choices(group):
        raise UserError(f"{group}: {choice!r} does not exist; accepted: {', '.join(choices(group))}")
    module = importlib.import_module(f"repro.{_ROOMS[group]}.{choice}")
    experiment = module.EXPERIMENT
    assert isinstance(experiment, Experiment)
    return experiment
