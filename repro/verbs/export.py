"""Values of many records as one file, by its ending .parquet, .csv or .tex: export <folder> … --to <file> [--metric <name> …]."""

from __future__ import annotations

from pathlib import Path

from repro.arguments import Parser
from repro.errors import UserError, writing
from repro.record.loading import load
from repro.report import latex


def main(argv: list[str]) -> int:
    """Write the file; its path is the last line of stdout."""
    parser = Parser(prog="export", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "folders", nargs="+", metavar="FOLDER", help="run directories, sweeps, or glob patterns of them"
    )
    parser.add_argument(
        "--to", type=Path, required=True, metavar="FILE", help="a .parquet, .csv or .tex (booktabs) file"
    )
    parser.add_argument("--metric", nargs="+", default=[], metavar="NAME", help="only these metrics")
    parser.add_argument("--case", nargs="+", default=[], metavar="NAME", help="only these cases")
    options = parser.parse_args(argv)
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
