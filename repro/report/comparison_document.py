"""A comparison of runs as a folder: its table, and a report in the form of a run's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from repro.record.pairing import Side


def write(folder: Path, sides: Sequence[Side], table: pd.DataFrame) -> Path:
    """comparison.csv; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / "comparison.csv", index=False, float_format="%.10g")
    (folder / "sides.txt").write_text("".join(f"{side.name}\n" for side in sides))
    return folder
