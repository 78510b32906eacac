"""What a comparison of policies found, as a sentence that is computed from its record.

A difference counts where its 95 % interval of paired seeds leaves zero out; the others are said to make no measurable difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from repro.experiments.study_figures import case_name
from repro.record.directory import Record

_DIFFERENCE = "goodput_minus_"


class Difference(NamedTuple):
    """Of a case's goodput to its baseline's, in req/s, with its interval."""

    case: str
    baseline: str
    value: float
    low: float
    high: float

    @property
    def shown(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{case_name(self.case)} ({self.value:+.2f} req/s; {self.low:+.2f} to {self.high:+.2f})"


def differences(table: pd.DataFrame) -> list[Difference]:
    """Every paired difference of goodput in a record's metrics, in their order."""
    rows = table[table["metric"].str.startswith(_DIFFERENCE)]
    names, numbers = rows[["case", "metric"]].to_numpy(str), rows[["value", "ci_low", "ci_high"]].to_numpy(float)
    return [
        Difference(str(case), str(metric).removeprefix(_DIFFERENCE), *map(float, own))
        for (case, metric), own in zip(names, numbers, strict=True)
    ]


def goodput(record: Record) -> str:
    """The largest gain and loss of goodput, and what makes no measurable difference, against each baseline."""
    found = differences(record.metrics)
    sentences = []
    for baseline in dict.fromkeys(one.baseline for one in found):
        against = [one for one in found if one.baseline == baseline]
        gains = sorted((one for one in against if one.shown and one.value > 0), key=lambda one: -one.value)
        losses = sorted((one for one in against if one.shown and one.value < 0), key=lambda one: one.value)
        parts = []
        if gains:
            parts.append(f"most is gained by {gains[0]}")
        if losses:
            parts.append(f"most is lost by {losses[0]}")
        if even := [case_name(one.case) for one in against if not one.shown]:
            parts.append(f"no measurable difference by {_listed(even)}")
        sentences.append(f"Goodput against {case_name(baseline)}: {'; '.join(parts)}.")
    return " ".join(sentences)


def _listed(names: Sequence[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
