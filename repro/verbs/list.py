"""What is there: every record with its state, when it ran, how long it took and what became of its claims: list [<folder> …]."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from repro.arguments import Parser
from repro.errors import UserError
from repro.record import provenance
from repro.record.directory import Record
from repro.record.metrics import each
from repro.report.comparison import compare


def main(argv: list[str]) -> int:
    """Print one line per record, the newest last."""
    parser = Parser(prog="list", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folders", type=Path, nargs="*", metavar="FOLDER", default=[Path("results")])
    found = []
    for folder in parser.parse_args(argv).folders:
        for config in sorted(folder.rglob("config.yaml")):
            if "wandb" not in config.parts and (config.parent / "provenance.json").is_file():
                found.append(_row(config.parent))
    if not found:
        raise UserError("results: holds no record; accepted: a folder below which runs have a config.yaml")
    table = pd.DataFrame(found).sort_values(["start", "run"])
    widths = {str(name): max(len(str(name)), *(len(str(value)) for value in table[name])) for name in table}
    print("  ".join(f"{name:<{width}}" for name, width in widths.items()).rstrip())
    for row in each(table):
        print("  ".join(f"{value!s:<{width}}" for value, width in zip(row, widths.values(), strict=True)).rstrip())
    return 0


def _row(folder: Path) -> dict[str, Any]:
    record = Record(folder)
    configuration = yaml.safe_load((folder / "config.yaml").read_text()) or {}
    known = record.provenance
    elapsed = known.get("elapsed_s")
    state = _state(folder)
    return {
        "start": str(known.get("start", ""))[:19],
        "took": f"{elapsed:.0f} s" if isinstance(elapsed, (int, float)) else "",
        "state": state,
        "experiment": configuration.get("name") or configuration.get("sweep") or folder.parent.name,
        "tier": configuration.get("tier") or configuration.get("kind") or "",
        "claims": _claims(record) if state in ("done", "older code") and "name" in configuration else "",
        "run": str(folder),
    }


def _state(folder: Path) -> str:
    if (folder / "FAILED.json").is_file():
        return "failed"
    try:
        done = json.loads((folder / "DONE").read_text())
    except (OSError, ValueError):
        return "cut or running"
    return "done" if done.get("source_digest") == provenance.source_digest() else "older code"


def _claims(record: Record) -> str:
    verdicts = compare([record])["verdict"].value_counts()
    return ", ".join(f"{count} {name}" for name, count in verdicts.items())
