"""Two sides of records compared value by value: the difference, its interval, and whether it is more than noise.

A side is one run, or several that differ in nothing but their seed. Where both sides hold the same seeds the difference is taken within
seeds; where each has an interval of its own, those are combined as of independent samples; a computed value has neither, and any
difference of it is real.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from repro.errors import UserError
from repro.record.directory import Record
from repro.record.loading import differing, flat
from repro.record.metrics import each
from repro.record.statistics import CONFIDENCE, Estimate, repeats_for

#: Verdicts. `one sample`: neither side says how it scatters.
NOISE, HIGHER, LOWER, EQUAL, ONE_SAMPLE = "noise", "higher", "lower", "equal", "one sample"
COLUMNS = (
    "case", "metric", "unit", "a", "b", "difference", "low", "high", "difference_pct", "how", "n", "verdict", "repeats_for_2_pct",
)  # fmt: skip
#: A computed value has no noise; this much is rounding.
_ROUNDING = 1e-9
#: The difference for which the number of repeats is stated, as a share of the value.
_SOUGHT = 0.02


@dataclass(frozen=True)
class Side:
    """Runs that differ in their seed alone, or a single one."""

    name: str
    records: tuple[Record, ...]

    @staticmethod
    def of(name: str, records: Sequence[Record]) -> Side:
        """A side from its runs.

        Raises:
            UserError: where they differ in more than their seed.
        """
        keys = [key for key in differing([flat(record.configuration) for record in records]) if key != "seed"]
        if keys:
            raise UserError(
                f"{name}: its {len(records)} runs differ in {', '.join(keys[:3])}; accepted: one run, or runs that differ in seed alone"
            )
        return Side(name, tuple(records))

    def samples(self) -> pd.DataFrame:
        """Values by seed: case, metric, seed, value; empty where a single run kept none."""
        if len(self.records) > 1:
            tables = [
                record.metrics[["case", "metric", "value"]].assign(seed=record.configuration.get("seed", 0))
                for record in self.records
            ]
            return pd.concat(tables, ignore_index=True)
        if (self.records[0].path / "tables" / "samples.csv").is_file():
            return self.records[0].table("samples")
        return pd.DataFrame(columns=["case", "metric", "seed", "value"])

    def values(self) -> pd.DataFrame:
        """One row per case and metric, means over the runs."""
        table = pd.concat([record.metrics for record in self.records], ignore_index=True)
        return table.groupby(["case", "metric"], sort=False, as_index=False).agg(
            value=("value", "mean"), unit=("unit", "first"), ci_low=("ci_low", "first"), ci_high=("ci_high", "first"),
            n=("n", "first"), source=("source", "first"),
        )  # fmt: skip


def compare(a: Side, b: Side) -> pd.DataFrame:
    """B − A of every value that both have, in the order in which A has them.

    Raises:
        UserError: where they have none in common.
    """
    both = a.values().merge(b.values(), on=["case", "metric"], suffixes=("_a", "_b"))
    both = both.dropna(subset=["value_a", "value_b"])
    if both.empty:
        raise UserError(f"{a.name}, {b.name}: no case and metric in common; accepted: runs of the same experiment")
    seeds_a, seeds_b = _by_seed(a), _by_seed(b)
    rows = []
    for row in each(both):
        key = (row.case, row.metric)
        rows.append(_row(row, seeds_a.get(key, {}), seeds_b.get(key, {}), len(a.records) * len(b.records) > 1))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _by_seed(side: Side) -> dict[tuple[object, object], dict[int, float]]:
    found: dict[tuple[object, object], dict[int, float]] = {}
    for row in each(side.samples().dropna(subset=["value"])):
        found.setdefault((row.case, row.metric), {})[int(row.seed)] = float(row.value)
    return found


def _row(row: Any, a: dict[int, float], b: dict[int, float], several: bool) -> dict[str, object]:
    value_a, value_b = float(row.value_a), float(row.value_b)
    seeds = sorted(set(a) & set(b))
    needed: float = math.nan
    if len(seeds) > 1:
        found = Estimate.paired([b[seed] for seed in seeds], [a[seed] for seed in seeds])
        value_a, value_b = (sum(side[seed] for seed in seeds) / len(seeds) for side in (a, b))
        how, difference, low, high, n = "paired", found.value, found.low, found.high, found.n
        scatter = float(pd.Series([b[seed] - a[seed] for seed in seeds]).std())
        if scatter > 0 and value_a:
            needed = repeats_for(scatter, _SOUGHT * abs(value_a))
    else:
        difference = value_b - value_a
        half = math.hypot(_half(row, "a"), _half(row, "b"))
        low, high = difference - half, difference + half
        how, n = ("independent" if math.isfinite(half) else "exact" if _exact(row) and not several else "single"), 1
    return {
        "case": row.case, "metric": row.metric, "unit": row.unit_a if isinstance(row.unit_a, str) else "",
        "a": value_a, "b": value_b, "difference": difference, "low": low, "high": high,
        "difference_pct": 100 * difference / abs(value_a) if value_a else math.nan,
        "how": how, "n": n, "verdict": _verdict(difference, low, high, how, max(abs(value_a), abs(value_b))),
        "repeats_for_2_pct": needed,
    }  # fmt: skip


def _half(row: Any, side: str) -> float:
    """Half of a value's 95 % interval; a spread over rounding is none."""
    low, high = getattr(row, f"ci_low_{side}"), getattr(row, f"ci_high_{side}")
    return (high - low) / 2 if getattr(row, f"source_{side}") in ("measured", "simulated", "emulated") else math.nan


def _exact(row: Any) -> bool:
    return all(getattr(row, f"source_{side}") not in ("measured", "simulated", "emulated") for side in "ab")


def _verdict(difference: float, low: float, high: float, how: str, size: float) -> str:
    if abs(difference) <= _ROUNDING * size:
        return EQUAL
    if how == "single":
        return ONE_SAMPLE
    if how != "exact" and low <= 0 <= high:
        return NOISE
    return HIGHER if difference > 0 else LOWER


def describe(table: pd.DataFrame) -> str:
    """What the verdicts rest on, in a sentence or two."""
    ways = {
        "paired": "within seeds",
        "independent": "as of independent samples",
        "exact": "of computed values, which have no noise",
        "single": "of single samples, which say nothing of noise",
    }
    counts = table["how"].value_counts()
    parts = [f"{counts[how]} differences {words}" for how, words in ways.items() if how in counts]
    text = f"{'; '.join(parts)}; intervals of {CONFIDENCE:.0%}."
    if table["repeats_for_2_pct"].notna().any():
        main = table[table["metric"].isin(["goodput", "ttft_mean_s"])]["repeats_for_2_pct"].dropna()
        if len(main):
            text += f" To see a difference of 2 % in goodput or mean TTFT takes {main.min():.0f} to {main.max():.0f} seeds here."
    return text
