"""Values of many records as one file, or fragments for a paper: export <folder> … --to <file>.parquet|.csv|.tex or --paper <folder>."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from repro.arguments import Parser
from repro.errors import UserError, writing
from repro.experiments import base
from repro.record.loading import load, records
from repro.report import latex, paper_document, style


def main(argv: list[str]) -> int:
    """Write the file; its path is the last line of stdout."""
    parser = Parser(prog="export", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "folders", nargs="+", metavar="FOLDER", help="run directories, sweeps, or glob patterns of them"
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--to", type=Path, metavar="FILE", help="a .parquet, .csv or .tex (booktabs) file")
    where.add_argument(
        "--paper", type=Path, metavar="FOLDER", help="claims.tex, figures.tex, and paper.tex that holds them"
    )
    parser.add_argument("--column", choices=style.COLUMNS, default="single", help="how wide figures of --paper are set")
    parser.add_argument("--metric", nargs="+", default=[], metavar="NAME", help="only these metrics")
    parser.add_argument("--case", nargs="+", default=[], metavar="NAME", help="only these cases")
    options = parser.parse_args(argv)
    if options.paper is not None:
        if options.metric or options.case:
            raise UserError("--metric, --case: choose values of --to; accepted beside --paper: --column")
        print(_paper(options.folders, options.paper, options.column))
        return 0
    table = load(*options.folders)
    for column, wanted in (("metric", options.metric), ("case", options.case)):
        unknown = [name for name in wanted if name not in set(table[column])]
        if unknown:
            raise UserError(
                f"--{column}: {unknown[0]!r} is in none of the records; accepted: {', '.join(sorted(set(table[column]))[:20])}"
            )
        if wanted:
            table = table[table[column].isin(wanted)]
    target: Path = options.to
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.suffix == ".parquet":
            # A column may hold numbers in one record and texts in another, which a column of a file may not.
            mixed = [name for name in table if table[name].map(type).nunique() > 1 and table[name].dtype == object]
            table.astype(dict.fromkeys(mixed, str)).to_parquet(target, index=False)
        elif target.suffix == ".csv":
            table.to_csv(target, index=False, float_format="%.10g")
        elif target.suffix == ".tex":
            target.write_text(latex.values(table))
        else:
            raise UserError(f"--to: {target.name!r} has no known ending; accepted: .parquet, .csv, .tex")
    print(target)
    return 0


def _paper(folders: Sequence[str], target: Path, column: style.Column) -> Path:
    found = records(*folders)
    if not found:
        raise UserError(f"{', '.join(folders)}: no finished run; accepted: run directories with a DONE file")
    kinds = [(record.configuration["name"], record.configuration["tier"]) for record in found]
    twice = next((kind for kind in kinds if kinds.count(kind) > 1), None)
    if twice is not None:
        raise UserError(f"--paper: several runs of experiment={twice[0]} tier={twice[1]}; accepted: one of each")
    figures = [base.load(name).figures_for(tier) for name, tier in kinds]
    with writing(target):
        return paper_document.write(target, found, figures, column)
