"""Compare runs value by value, within seeds where they agree, and say what is noise: compare <A> <B> … [--all] [--to <file.tex>]."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pandas as pd

from repro.arguments import Parser
from repro.errors import UserError, writing
from repro.record import pairing
from repro.record.loading import differing, flat, records
from repro.record.metrics import each
from repro.record.pairing import Side
from repro.report import comparison_document, latex
from repro.report.comparison import percent, readable
from repro.report.words import label

#: Differences of these are no finding.
_QUIET = (pairing.EQUAL,)


def main(argv: list[str]) -> int:
    """Compare every further side with the first; the last line of stdout is the folder with the table and the report."""
    parser = Parser(prog="compare", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "sides", nargs="+", metavar="RUN", help="a run directory, or a pattern of runs that differ in seed alone"
    )
    parser.add_argument("--all", action="store_true", help="values that are equal, too")
    parser.add_argument("--metric", nargs="+", default=[], metavar="NAME", help="only these metrics")
    parser.add_argument("--to", type=Path, metavar="FILE", help="the table as LaTeX (.tex) or CSV (.csv), too")
    parser.add_argument("--results", type=Path, default=Path("results"), help="where comparisons are kept")
    options = parser.parse_args(argv)
    if len(options.sides) < 2:
        raise UserError("compare: one run alone; accepted: two or more")
    sides = [_side(name) for name in options.sides]
    tables = []
    for index, other in enumerate(sides[1:]):
        table = pairing.compare(sides[0], other)
        if options.metric:
            table = table[table["metric"].isin(options.metric)]
        print(f"A: {sides[0].name}\nB: {other.name}")
        for line in _changes(sides[0], other):
            print(f"  {line}")
        print(_text(table if options.all else table[~table["verdict"].isin(_QUIET)]))
        print(pairing.describe(table), end="\n\n")
        tables.append(table.assign(side=index + 1))
    together = pd.concat(tables, ignore_index=True)
    if options.to is not None:
        _export(options.to, together, sides)
    digest = hashlib.sha256("\n".join([*options.sides, *options.metric]).encode()).hexdigest()[:12]
    folder = options.results / "comparisons" / digest
    with writing(folder):
        changes = [_changes(sides[0], other) for other in sides[1:]]
        page = comparison_document.write(folder, sides, together, changes)
    print(f"report: {page}")
    print(folder)
    return 0


def _side(name: str) -> Side:
    found = records(name)
    if not found:
        raise UserError(f"{name}: no finished run; accepted: a run directory with a DONE file, or a pattern of them")
    return Side.of(name, found)


def _changes(a: Side, b: Side) -> list[str]:
    own = [flat(side.records[0].configuration) for side in (a, b)]
    keys = [key for key in differing(own) if key != "seed" or len(a.records) == len(b.records) == 1]
    return [f"{key}: {own[0].get(key)} → {own[1].get(key)}" for key in keys[:12]]


def _text(table: pd.DataFrame) -> str:
    if table.empty:
        return "  all values are equal"
    lines = [f"{'case':<30}{'metric':<30}{'A':>14}{'B':>14}{'difference':>12}{'interval':>24}  verdict"]
    for row in each(table):
        interval = f"{percent(100 * row.low / abs(row.a))} to {percent(100 * row.high / abs(row.a))}" if row.a else "–"
        interval = "–" if interval.startswith("–") else interval
        case, metric = label(str(row.case))[:29], label(str(row.metric))[:29]
        lines.append(
            f"{case:<30}{metric:<30}{readable(row.a, row.unit):>14}{readable(row.b, row.unit):>14}"
            f"{percent(row.difference_pct):>12}{interval:>24}  {row.verdict}"
        )
    return "\n".join(lines)


def _export(target: Path, table: pd.DataFrame, sides: list[Side]) -> None:
    with writing(target):
        if target.suffix == ".tex":
            target.write_text(latex.differences(table, sides[0].name, ", ".join(side.name for side in sides[1:])))
        elif target.suffix == ".csv":
            table.to_csv(target, index=False, float_format="%.10g")
        else:
            raise UserError(f"--to: {target.name!r} has no known ending; accepted: .tex, .csv")
