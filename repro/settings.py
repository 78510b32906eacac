"""The whole configuration of one run as one frozen value; `conf/` holds its values, this module its form."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from repro.errors import UserError
from repro.link.spec import LinkSpec
from repro.models.spec import ModelSpec
from repro.profiles.cluster import ClusterSpec, CostSpec
from repro.record.tracking import TrackingSpec
from repro.report.sweep_spec import SweepSpec
from repro.scheduling.spec import PolicySpec
from repro.transport.spec import TransportSpec
from repro.workload.spec import WorkloadSpec

TIERS = ("model", "simulate", "emulate", "execute")


@dataclass(frozen=True)
class Settings:
    """One experiment on one tier.

    `model` holds the models by name: one, or several where an experiment compares; `size` and `pretrained` were handed to each
    of them. `profile` replaces the profiles of both clusters by one that was
    measured; `ray` is the address of a running Ray cluster on whose nodes a live deployment is placed, null for this machine;
    `options` is the experiment's own part, checked against the dataclass that the experiment declares.
    `label` names the run directory beside its hash and changes nothing else; so many `processes` simulate a study's points, null
    for one per core. `sweep` says what a sweep draws of its points.
    """

    name: str
    tier: Literal["model", "simulate", "emulate", "execute"]
    model: dict[str, ModelSpec]
    cluster: ClusterSpec
    link: LinkSpec
    workload: WorkloadSpec
    policy: PolicySpec
    transport: TransportSpec
    cost: CostSpec
    tracking: TrackingSpec
    size: str = "tiny"
    pretrained: str | None = None
    profile: str | None = None
    ray: str | None = None
    seed: int = 0
    label: str | None = None
    results: str = "results"
    processes: int | None = None
    sweep: SweepSpec = field(default_factory=SweepSpec)
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise UserError(f"seed: {self.seed} is negative; accepted: 0 or more")
        if self.processes is not None and self.processes < 1:
            raise UserError(f"processes: {self.processes}; accepted: 1 or more, or null for one per core")
        if self.label is not None and (not self.label or "/" in self.label or self.label.startswith(".")):
            raise UserError(f"label: {self.label!r} cannot name a folder")


#: Keys that say where a run is written and shown, and cannot change its outcome. Every experiment takes them.
PRESENTATION = ("tracking", "label", "results", "processes", "sweep")
