"""What a sweep shows of its points. It changes no point, so it stands in no hash."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SweepSpec:
    """`metrics` are drawn, each in a figure of its own, for `cases`; where none are named, those that the experiment is about.

    `title` heads the report; a named sweep brings its own.
    """

    metrics: tuple[str, ...] = ()
    cases: tuple[str, ...] = ()
    title: str | None = None
