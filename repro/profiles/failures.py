"""Instances that stop and come back, as the configuration asks for it: at set times, at random, or both; by default never."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from repro.errors import UserError


@dataclass(frozen=True)
class Outage:
    """Instance `instance` of a cluster stops at `at_s`, whatever its role, and is repaired `for_s` later; what it was doing is lost."""

    NODE: ClassVar = "cluster.failures.schedule"
    pool: Literal["prfaas", "pd"]
    instance: int
    at_s: float
    for_s: float

    def __post_init__(self) -> None:
        if self.instance < 0:
            raise UserError(f"{self.NODE}.instance: {self.instance}; accepted: 0 or more")
        if not 0 <= self.at_s < math.inf:
            raise UserError(f"{self.NODE}.at_s: {self.at_s}; accepted: seconds, 0 or more")
        if not 0 < self.for_s < math.inf:
            raise UserError(f"{self.NODE}.for_s: {self.for_s}; accepted: seconds above 0")


@dataclass(frozen=True)
class FailureSpec:
    """The machine-repair model beside a `schedule`: an instance that serves fails after an exponential time of mean `mtbf_s`.

    Its repair takes an exponential time of mean `repair_s`; so many `crews` repair one instance each, in the order in which they failed,
    null as many as there are instances. After a repair, and after an outage of the schedule, an instance loads its weights for
    `cold_start_s` before it serves. What a converted node needs is the policy's `restart_s`.
    """

    schedule: tuple[Outage, ...] = ()
    mtbf_s: float | None = None
    repair_s: float | None = None
    crews: int | None = None
    cold_start_s: float = 0.0

    def __post_init__(self) -> None:
        for key in ("mtbf_s", "repair_s"):
            value = getattr(self, key)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"cluster.failures.{key}: {value}; accepted: seconds above 0, or null for no failures")
        if self.mtbf_s is not None and self.repair_s is None:
            raise UserError("cluster.failures.repair_s: missing; accepted: seconds above 0 beside mtbf_s")
        for key in ("repair_s", "crews"):
            if getattr(self, key) is not None and self.mtbf_s is None:
                raise UserError(f"cluster.failures.{key}: has no effect without mtbf_s")
        if self.crews is not None and self.crews < 1:
            raise UserError(f"cluster.failures.crews: {self.crews}; accepted: 1 or more, or null for one per instance")
        if not 0 <= self.cold_start_s < math.inf:
            raise UserError(f"cluster.failures.cold_start_s: {self.cold_start_s}; accepted: seconds, 0 or more")
        if self.cold_start_s and not self.enabled:
            raise UserError("cluster.failures.cold_start_s: has no effect without mtbf_s or a schedule")

    @property
    def enabled(self) -> bool:
        """Whether anything fails."""
        return bool(self.schedule) or self.mtbf_s is not None
