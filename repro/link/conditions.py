"""One link under several conditions in turn, for programs on its sides that take long to start.

The conditions are a schedule of which every entry lasts longer than any run: beginning the schedule as if it had begun that long ago
goes to the entry. The buffer before the link is sized for the first condition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from repro.link.link import Link
from repro.link.measurement import LinkMeasurement, measure
from repro.link.spec import LinkChange, LinkSpec, Side

#: Longer than anybody stays at one condition.
_STAY_S: Final = 1e5


def scheduled(conditions: Sequence[LinkSpec]) -> LinkSpec:
    """A link that can be brought to each of these; they differ in rate and RTT alone."""
    first, *others = conditions
    changes = tuple(
        LinkChange(number * _STAY_S, rate_bps=spec.rate_bps, rtt_s=spec.rtt_s)
        for number, spec in enumerate(others, start=1)
    )
    return replace(first, schedule=changes)


def go_to(link: Link, number: int) -> None:
    """Bring a link that was opened with `scheduled` to its condition of that number, counted from 0."""
    link.start(number * _STAY_S + 1.0)


def measured(link: Link, condition: LinkSpec) -> LinkMeasurement:
    """What the link is now, held against the condition that it was brought to."""
    return measure(_Seen(condition, link))


class _Seen:
    """A link as if its condition were all that was asked of it."""

    def __init__(self, spec: LinkSpec, link: Link) -> None:
        self.spec, self.link, self.backend = spec, link, link.backend

    def command(self, side: Side, argv: Sequence[str]) -> list[str]:
        return self.link.command(side, argv)

    def listen_host(self, side: Side) -> str:
        return self.link.listen_host(side)

    def dial(self, port: int, side: Side = "prefill") -> tuple[str, int]:
        return self.link.dial(port, side)
