"""Tables for a paper: LaTeX with booktabs, ready to \\input."""

from __future__ import annotations

import math
import re

import pandas as pd

from repro.record.metrics import COLUMNS, each
from repro.report.comparison import percent, readable
from repro.report.words import label, value_label

_SPECIAL = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--", "−": "$-$", "×": r"$\times$", "÷": r"$\div$", "Λ": r"$\Lambda$",
    "Θ": r"$\Theta$", "Φ": r"$\Phi$", "µ": r"$\mu$", "≤": r"$\le$", "≥": r"$\ge$", "…": r"\dots{}", "·": r"$\cdot$", "→": r"$\to$",
}  # fmt: skip


def escape(text: object) -> str:
    """A text with LaTeX's special characters and the paper's Greek letters written out."""
    text = str(text).replace("Λ_max", "\0")
    text = re.sub("|".join(map(re.escape, _SPECIAL)), lambda found: _SPECIAL[found.group()], text)
    return text.replace("\0", r"$\Lambda_{\max}$")


def table(header: list[str], rows: list[list[str]], numbers: set[int], caption: str) -> str:
    """A booktabs table; the columns in `numbers` are set flush right."""
    columns = "".join("r" if index in numbers else "l" for index in range(len(header)))
    lines = [
        "% needs \\usepackage{booktabs}",
        "\\begin{table}",
        "\\centering",
        f"\\caption{{{escape(caption)}}}",
        f"\\begin{{tabular}}{{{columns}}}",
        "\\toprule",
        " & ".join(map(escape, header)) + r" \\",
        "\\midrule",
        *(" & ".join(map(escape, row)) + r" \\" for row in rows),
        "\\bottomrule",
        "\\end{tabular}",
        "\\end{table}",
    ]
    return "\n".join(lines) + "\n"


def values(frame: pd.DataFrame) -> str:
    """Values of records as `repro.record.load` gives them: the runs' differing keys, case, metric, value with interval, the paper's."""
    keys = [str(name) for name in frame if name not in COLUMNS and name != "run"]
    keys = [key for key in ("experiment", "tier", *keys) if frame[key].nunique() > 1]
    header = [*map(label, keys), "case", "metric", "value", "95 % interval", "paper", "deviation"]
    rows = []
    for row in frame.to_dict("records"):
        unit = row["unit"] if isinstance(row["unit"], str) else ""
        interval = "–"
        if math.isfinite(row["ci_low"]):
            interval = f"{readable(row['ci_low'], unit)} to {readable(row['ci_high'], unit)}"
        rows.append([
            *(value_label(key, row[key]) for key in keys), label(str(row["case"])), label(str(row["metric"])),
            readable(row["value"], unit), interval, readable(row["paper"], unit), percent(row["deviation_pct"]),
        ])  # fmt: skip
    numbers = {len(keys) + index for index in (2, 3, 4, 5)}
    return table(header, rows, numbers, "Values of the records.")


def claims(frame: pd.DataFrame) -> str:
    """The paper's claims beside what was found, as `repro.report.comparison.compare` gives them."""
    rows = [
        [str(row.statement).rstrip("."), readable(row.paper, row.unit), readable(row.ours, row.unit), percent(row.deviation_pct),
         row.verdict]
        for row in each(frame)
    ]  # fmt: skip
    return table(
        ["claim", "paper", "ours", "deviation", "verdict"], rows, {1, 2, 3}, "The paper's claims and what was found."
    )


def differences(frame: pd.DataFrame, a: str, b: str) -> str:
    """A comparison of two sides."""
    rows = [
        [label(str(row.case)), label(str(row.metric)), readable(row.a, row.unit), readable(row.b, row.unit),
         percent(row.difference_pct), row.verdict]
        for row in each(frame)
    ]  # fmt: skip
    return table(["case", "metric", "A", "B", "difference", "verdict"], rows, {2, 3, 4}, f"A: {a}; B: {b}.")
