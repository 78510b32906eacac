"""report.html and report.md of one or several runs: what was found, claims, figures, every value, provenance."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from repro.record.directory import Record
from repro.record.metrics import each
from repro.report import page
from repro.report.comparison import compare, percent, readable
from repro.report.page import PAGE, Cell, Column, Line, Picture, Section, Table
from repro.report.words import label

__all__ = ["PAGE", "write"]

_INPUT = (
    "Input: the paper's value was used to calibrate an input, or is repeated from it, so agreement confirms nothing. The interval is the "
    "spread over the rounding of the paper's inputs and the choice of interpolation where a value is computed, and of 95 % where it is "
    "measured or simulated."
)

_TIERS = (
    "Loads are fractions of each tier's own Λ_max. What simulator and live system say of the very same requests stands among the values of "
    "tier emulate."
)


def write(folder: Path, title: str, question: str, records: Sequence[Record]) -> Path:
    """Write both reports into `folder`; returns the path of report.html.

    Args:
        folder: where the reports go; the first record's provenance is the report's own.
        title: the experiment's name.
        question: the experiment's one line.
        records: the runs to report, each with its figures already drawn.
    """
    claims = compare(records)
    counts = ", ".join(f"{count} {name}" for name, count in claims["verdict"].value_counts().items())
    sections = [
        Section("Claims", (f"{counts}. {_INPUT}",), (), (_claims(claims),)) if len(claims) else Section("Claims"),
        Section("Figures", (), pictures(records)),
        *_tiers(records),
        Section(
            "Values",
            _statistics(records),
            (),
            [_values(record, open=len(records) == 1) for record in records if len(record.metrics)],
        ),
    ]
    provenance = page.provenance_rows(records[0].provenance)
    for record in records[1:]:
        if link := record.provenance.get("link"):
            provenance.append((f"link of {record.configuration['name']}", json.dumps(link)))
    return page.write(folder, title, question, sections, provenance, _findings(records))


def pictures(records: Sequence[Record]) -> list[Picture]:
    """The figures that the records have drawn."""
    return [
        Picture(f"{record.configuration['name']}: {label(path.stem)}", path)
        for record in records
        for path in sorted((record.path / "figures").glob("*.png"))
    ]


#: Of a deployment, what is somebody else's first.
_KEYS = (("link", "rate_bps"), ("workload", "lengths"), ("workload", "output_tokens"), ("cost", "usd_per_gpu_hour"))


def _findings(records: Sequence[Record]) -> list[Line]:
    lines = []
    for record in records:
        known = record.provenance
        if known.get("finding"):
            lines.append(Line(known["finding"], "finding"))
            hinges = f"It hinges on this: {known['hinges_on']} " if known["hinges_on"] else ""
            lines.append(Line(f"{hinges}With your own numbers ({own_numbers(record)}):", code=again(record)))
    return lines


#: Words of a command that say where a run is written and shown; the next one may go elsewhere.
_ELSEWHERE = ("label", "results", "processes", "tracking", "sweep")


def again(record: Record) -> str:
    """The command that repeats a study, for values of one's own to be added to it."""
    words = record.provenance.get("command", ["", f"experiment={record.configuration['name']}"])
    own = [word for word in _command(words)[1:] if word.partition("=")[0] not in _ELSEWHERE]
    return " ".join(["python -m repro", *sorted(own, key=lambda word: not word.startswith("experiment="))])


def own_numbers(record: Record) -> str:
    """Keys that a study reads: profile, checkpoint, link, workload and prices, where it has them, and its own options."""
    known = record.configuration
    keys: list[str] = [key for key in ("profile", "pretrained") if key in known]
    keys += [f"{node}.{key}" for node, key in _KEYS if key in known.get(node, {})]
    return ", ".join([*keys, *(f"options.{key}" for key in known.get("options", {}))])


def _statistics(records: Sequence[Record]) -> list[str]:
    """What the records say of their own statistics; of several records, with whose it is."""
    lines = []
    for record in records:
        whose = f"{record.configuration['name']}: " if len(records) > 1 else ""
        lines += [f"{whose}{line}" for line in record.provenance.get("statistics", ())]
    return lines


def _claims(claims: pd.DataFrame) -> Table:
    columns = [
        Column("claim"), Column("paper", True), Column("ours", True), Column("verdict"), Column("deviation", True),
        Column("interval", True), Column("tolerance", True), Column("where"), Column("run"),
    ]  # fmt: skip
    rows = [
        [
            Cell(row.statement), Cell.of(readable(row.paper, row.unit), row.paper), Cell.of(readable(row.ours, row.unit), row.ours),
            Cell(row.verdict, kind=row.verdict.partition(" ")[0]), Cell.of(percent(row.deviation_pct), row.deviation_pct),
            Cell(_interval(row.low, row.high, row.unit)), Cell(row.tolerance), Cell(row.where),
            Cell(f"{row.experiment}, {row.tier}: {row.source}", link=f"#{page.anchor(f'{row.experiment}, tier {row.tier}')}"),
        ]
        for row in each(claims)
    ]  # fmt: skip
    return Table(columns, rows)


def _tiers(records: Sequence[Record]) -> list[Section]:
    """What several tiers say of one experiment, a column for each beside the paper's; nothing where no experiment ran on two."""
    by_name: dict[str, list[Record]] = {}
    for record in records:
        by_name.setdefault(record.configuration["name"], []).append(record)
    tables = [_side_by_side(own) for own in by_name.values() if len({one.configuration["tier"] for one in own}) > 1]
    return [Section("Tiers side by side", (_TIERS,), (), tables)] if tables else []


def _side_by_side(records: Sequence[Record]) -> Table:
    tables = {record.configuration["tier"]: record.metrics.set_index(["case", "metric"]) for record in records}
    keys = dict.fromkeys(key for one in tables.values() for key in one.index)
    shared = [key for key in keys if sum(key in one.index for one in tables.values()) > 1]
    rows = []
    for case, metric in shared:
        found = {tier: one.loc[(case, metric)] for tier, one in tables.items() if (case, metric) in one.index}
        paper = next((float(row["paper"]) for row in found.values() if math.isfinite(row["paper"])), math.nan)
        unit = next((row["unit"] for row in found.values() if isinstance(row["unit"], str)), "")
        values = {tier: float(found[tier]["value"]) if tier in found else math.nan for tier in tables}
        rows.append([
            Cell(str(case)), Cell(metric), Cell.of(readable(paper, unit), paper),
            *(Cell.of(readable(value, unit), value) for value in values.values()),
        ])  # fmt: skip
    columns = [Column("case"), Column("metric"), Column("paper", True), *(Column(tier, True) for tier in tables)]
    return Table(columns, rows, f"{records[0].configuration['name']} by tier: {len(rows)} values of two tiers or more")


def _values(record: Record, *, open: bool) -> Table:
    configuration, known = record.configuration, record.provenance
    elapsed = known.get("elapsed_s", math.nan)
    took = f", {elapsed:.1f} s" if math.isfinite(elapsed) else ""
    columns = [
        Column("case"), Column("metric"), Column("value", True), Column("interval", True), Column("n", True), Column("paper", True),
        Column("deviation", True), Column("source"),
    ]  # fmt: skip
    rows = []
    for row in each(record.metrics):
        unit = row.unit if isinstance(row.unit, str) else ""
        rows.append([
            Cell(str(row.case)), Cell(row.metric), Cell.of(readable(row.value, unit), row.value),
            Cell(_interval(row.ci_low, row.ci_high, unit)), Cell.of(str(row.n), row.n), Cell.of(readable(row.paper, unit), row.paper),
            Cell.of(percent(row.deviation_pct), row.deviation_pct), Cell(row.source),
        ])  # fmt: skip
    caption = f"{configuration['name']}, tier {configuration['tier']}: {len(rows)} values, run {record.path.name}{took}"
    return Table(columns, rows, caption, open, "python -m " + " ".join(_command(known.get("command", []))))


def _command(words: Sequence[str]) -> list[str]:
    """A command as it would be typed, whichever path the program was started by."""
    return ["repro", *(word for word in words[1:] if not word.startswith("hydra."))]


def _interval(low: float, high: float, unit: str) -> str:
    return f"{readable(low, unit)} to {readable(high, unit)}" if math.isfinite(low) else "–"
