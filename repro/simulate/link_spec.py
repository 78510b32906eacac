"""The shared link of a simulated PrfaaS cluster as values; apart from what simulates it, so that they can be sent to another process."""

from __future__ import annotations

import math
from dataclasses import dataclass

from repro.errors import UserError


@dataclass(frozen=True)
class CapacityChange:
    """From `at_s` on the link carries `rate_bps`; 0 is an outage."""

    at_s: float
    rate_bps: float

    def __post_init__(self) -> None:
        if self.at_s < 0 or self.rate_bps < 0:
            raise UserError(f"link.changes: at_s {self.at_s} and rate_bps {self.rate_bps} must not be negative")


@dataclass(frozen=True)
class WindowSpec:
    """TCP's windows after a rest: the connections of a pair of instances carry `first_bps` when new, twice that a round trip later.

    With `restarts` an idle window is halved per `rto_s`. A sender's transfers go to so many `receivers` in turn, each over connections
    of its own.
    """

    first_bps: float
    rto_s: float
    restarts: bool = True
    receivers: int = 1

    def __post_init__(self) -> None:
        if not (self.first_bps > 0 and self.rto_s > 0 and self.receivers >= 1):
            raise UserError(
                f"link: windows of {self.first_bps} bit/s, {self.rto_s} s, {self.receivers} receivers; accepted: above 0"
            )


@dataclass(frozen=True)
class SharedLinkSpec:
    """The egress of one PrfaaS cluster. `connection_bps` caps each of a transfer's `connections` (window ÷ RTT, or loss);
    `pieces` is how many layers the model sends one after the other. Without a `window` connections are always at that cap.
    """

    rate_bps: float = 100e9
    rtt_s: float = 0.002
    nic_bps: float = 400e9
    connections: int = 8
    connection_bps: float = 25e9
    pieces: int = 57
    changes: tuple[CapacityChange, ...] = ()
    window: WindowSpec | None = None

    def __post_init__(self) -> None:
        for key in ("rate_bps", "nic_bps", "connection_bps"):
            if not getattr(self, key) > 0:
                raise UserError(f"link.{key}: {getattr(self, key)} is not a positive rate")
        for key in ("connections", "pieces"):
            if getattr(self, key) < 1:
                raise UserError(f"link.{key}: {getattr(self, key)} is below 1")
        if not 0 <= self.rtt_s < math.inf:
            raise UserError(f"link.rtt_s: {self.rtt_s} is not a time")
        if self.window is not None and not self.rtt_s > 0:
            raise UserError("link.rtt_s: 0; accepted: above 0 where windows open by round trips")
