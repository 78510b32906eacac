"""A plan that is known in advance: which threshold and split are to hold from when on, as an operator or an oracle lays it down.

Where the loops decide from what they see, a timetable is followed whatever happens. Its conversions cost what any do: a node that
changes its role drains and restarts first, so a plan takes hold some time after its moment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from repro.errors import UserError

#: How often a timetable is looked at; at each look one node at most leaves its role.
PERIOD_S = 1.0


@dataclass(frozen=True)
class Planned:
    """From `at_s` on: this threshold, and so many PD instances that prefill while the others decode."""

    at_s: float
    threshold_tokens: float
    n_p: int

    def __post_init__(self) -> None:
        if not (self.at_s >= 0 and self.threshold_tokens >= 0 and self.n_p >= 0):
            raise UserError(f"timetable: {self}; accepted: no negative time, threshold or number of instances")


def planned(timetable: Sequence[Planned], now_s: float) -> Planned | None:
    """What is to hold now; null before the first moment. The moments are in order."""
    found = None
    for entry in timetable:
        if entry.at_s > now_s:
            break
        found = entry
    return found


def step(coming_n_p: int, turning: int, wanted: Planned) -> int:
    """Nodes to convert from decode to prefill now: 1, 0, or −1; no node turns while others go the other way.

    `coming_n_p` counts the nodes that prefill once those under way have arrived, of which `turning` go to prefill (below 0: to decode).
    """
    way = (wanted.n_p > coming_n_p) - (wanted.n_p < coming_n_p)
    return 0 if way * turning < 0 else way
