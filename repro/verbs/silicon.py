"""Derive the points of `profile=silicon:…` anew, with the extra `silicon`, and compare them with the committed: `silicon [--write]`."""

from __future__ import annotations

import argparse
import sys

from repro.errors import UserError
from repro.profiles.silicon import FILES, FOLDER
from repro.profiles.silicon_source import derive


def main(argv: list[str]) -> int:
    """Compare every derived table with the committed one; with `--write`, replace it. Prints the folder."""
    parser = argparse.ArgumentParser(prog="silicon", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the derived tables in place of the committed ones")
    arguments = parser.parse_args(argv)
    derived = derive(lambda line: print(line, file=sys.stderr, flush=True))
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, path in FILES.items():
        text = getattr(derived, name).to_csv(index=False)
        if arguments.write:
            path.write_text(text)
        elif not path.is_file() or path.read_text() != text:
            raise UserError(
                f"silicon: {path} differs from what the package gives: {difference(path.read_text(), text)}"
            )
    print(FOLDER)
    return 0


def difference(committed: str, derived: str) -> str:
    """The first row in which two tables differ, in words."""
    old, new = committed.splitlines(), derived.splitlines()
    for number, (left, right) in enumerate(zip(old, new, strict=False), start=1):
        if left != right:
            return f"line {number} is {left!r}, derived {right!r}"
    return f"{len(old)} lines, derived {len(new)}"
