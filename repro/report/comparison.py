"""The claims held against records: one row per claim, with what the paper says, what we found and what follows."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import pandas as pd

from repro.paper.claims import CLAIMS, VERDICTS, Claim
from repro.record.directory import Record
from repro.record.metrics import Metric, each


def _row(claim: Claim, table: pd.DataFrame, others: Collection[tuple[str, str]]) -> dict[str, object]:
    found = table[
        (table["experiment"] == claim.experiment)
        & (table["tier"] == claim.tier)
        & (table["case"] == claim.case)
        & (table["metric"] == claim.metric)
    ]
    common = {
        "claim": claim.name, "statement": claim.statement, "where": claim.where, "paper": claim.paper, "unit": claim.unit,
        "tolerance": claim.tolerance.describe(), "experiment": claim.experiment, "tier": claim.tier,
    }  # fmt: skip
    if len(found) != 1:
        return {
            **common,
            "ours": math.nan,
            "low": math.nan,
            "high": math.nan,
            "deviation_pct": math.nan,
            "source": "",
            "verdict": "not run",
        }
    row = found.iloc[0]
    ours = float(row["value"])
    deviation = Metric("", "", "", "", ours, "", "computed", paper=claim.paper).deviation_pct
    return {
        **common, "ours": ours, "low": row["ci_low"], "high": row["ci_high"], "deviation_pct": deviation, "source": row["source"],
        "verdict": "other configuration" if (claim.experiment, claim.tier) in others else claim.verdict(ours, str(row["source"])),
    }  # fmt: skip


def compare(records: Sequence[Record], *, only_run: bool = True) -> pd.DataFrame:
    """Every claim against the records; a run of another configuration than the paper's is not judged.

    With `only_run`, claims of experiments that are not among the records are left out.
    """
    table = pd.concat([record.metrics for record in records], ignore_index=True)
    experiments = {(record.configuration["name"], record.configuration["tier"]) for record in records}
    others = {
        (record.configuration["name"], record.configuration["tier"])
        for record in records
        if record.provenance.get("other_configuration")
    }
    claims = [claim for claim in CLAIMS if not only_run or (claim.experiment, claim.tier) in experiments]
    columns = [
        "claim",
        "statement",
        "where",
        "paper",
        "ours",
        "low",
        "high",
        "deviation_pct",
        "unit",
        "tolerance",
        "experiment",
        "tier",
        "source",
        "verdict",
    ]
    return pd.DataFrame([_row(claim, table, others) for claim in claims], columns=columns)


_SCALES = (
    ("bit/s", ((1e12, "Tbps"), (1e9, "Gbps"), (1e6, "Mbps"), (1e3, "kbps"))),
    ("bytes", ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))),
)


def readable(value: float, unit: str) -> str:
    """A value with its unit as a person would write it: 4 significant digits, Gbps and MiB instead of bit/s and bytes."""
    if not math.isfinite(value):
        return "–"
    for base, scales in _SCALES:
        if unit == base:
            for factor, name in scales:
                if abs(value) >= factor:
                    return f"{value / factor:.4g} {name}"
    if unit == "tokens" and abs(value) >= 1000:
        return f"{value:,.0f} tokens"
    number = f"{value:.4g}" if abs(value) < 1e5 else f"{value:.4e}"
    return f"{number} {unit}".strip()


def percent(value: float) -> str:
    """A deviation with its sign; a dash where there is none, and no sign on what rounds to zero."""
    if not math.isfinite(value):
        return "–"
    return f"{value:+.1f} %" if abs(value) >= 0.05 else "0.0 %"


def console(table: pd.DataFrame) -> str:
    """The claims table as text of at most about 120 columns."""
    if table.empty:
        return ""
    lines = [f"{'claim':<66}{'paper':>14}{'ours':>14}{'deviation':>11}  verdict"]
    for row in each(table):
        statement = str(row.statement).rstrip(".")
        statement = statement if len(statement) <= 65 else statement[:64] + "…"
        paper, ours = readable(row.paper, row.unit), readable(row.ours, row.unit)
        lines.append(f"{statement:<66}{paper:>14}{ours:>14}{percent(row.deviation_pct):>11}  {row.verdict}")
    counts = table["verdict"].value_counts()
    lines.append(", ".join(f"{counts[name]} {name}" for name in VERDICTS if name in counts))
    return "\n".join(lines)
