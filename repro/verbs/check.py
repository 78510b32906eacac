"""Hold records against the schema, each mistake in a line that names the file: check <folder> …."""

from __future__ import annotations

import sys
from pathlib import Path

from repro.arguments import Parser
from repro.errors import UserError
from repro.record.checking import check


def main(argv: list[str]) -> int:
    """Check every record in or below the folders; the exit code is 1 where something is wrong."""
    parser = Parser(prog="check", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    wrong = checked = 0
    for folder in parser.parse_args(argv).folders:
        found = (
            [folder] if (folder / "config.yaml").is_file() else sorted(p.parent for p in folder.rglob("config.yaml"))
        )
        found = [run for run in found if "wandb" not in run.parts]
        if not found:
            raise UserError(f"{folder}: holds no record; accepted: a folder in or below which runs have a config.yaml")
        for run in found:
            mistakes = check(run)
            wrong += bool(mistakes)
            checked += 1
            for line in mistakes:
                print(line)
    print(f"{checked - wrong} of {checked} records are good", file=sys.stderr)
    return 1 if wrong else 0
