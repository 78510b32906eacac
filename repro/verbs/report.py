"""Write the report of runs anew from their records, or a W&B Report of them: report <folder> … [--wandb] [--to <folder>]."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from repro.arguments import Parser
from repro.errors import UserError, writing
from repro.experiments import base
from repro.presets import choice_of, choices
from repro.record.directory import Record
from repro.record.loading import records
from repro.report import document, figures, wandb_report
from repro.runner import parts_of


def main(argv: list[str]) -> int:
    """Draw the figures of each run and write one report of all; the last line of stdout is its folder."""
    parser = Parser(prog="report", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folders", nargs="+", metavar="FOLDER")
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="where it goes; by default into the run's own folder")
    parser.add_argument("--title", help="what heads it; by default the first run's experiment")
    parser.add_argument(
        "--wandb", action="store_true", help="a W&B Report, too: saved there where WANDB_API_KEY is set"
    )
    parser.add_argument("--entity", default=os.environ.get("WANDB_ENTITY", ""), help="whose W&B project")
    parser.add_argument("--project", default=os.environ.get("WANDB_PROJECT", "prfaas-repro"), help="the W&B project")
    options = parser.parse_args(argv)
    found = records(*options.folders)
    if not found:
        raise UserError(f"{', '.join(options.folders)}: no finished run; accepted: run directories with a DONE file")
    found = [
        *found,
        *(part for record in found for part in parts_of(record) if part.path not in [r.path for r in found]),
    ]
    target: Path = options.to or found[0].path
    name = str(found[0].configuration["name"])
    group, choice = choice_of(name)
    with writing(target):
        for record in found:
            drawn = base.load(record.configuration["name"]).figures_for(record.configuration["tier"])
            figures.redraw(record, record.path / "figures", drawn)
        page = document.write(target, options.title or name, choices(group).get(choice, ""), found)
        if options.wandb:
            _wandb(options.entity, options.project, options.title or name, found, target)
    print(f"report: {page}")
    print(target)
    return 0


def _wandb(entity: str, project: str, title: str, found: Sequence[Record], target: Path) -> None:
    online = bool(os.environ.get("WANDB_API_KEY"))
    if online and not entity:
        raise UserError("--entity: a W&B Report is saved in somebody's project; accepted: --entity <name>")
    specification = target / "wandb-report.json"
    offline = wandb_report.build(found, title, entity or "offline", project, panels=False)
    specification.write_text(wandb_report.specification(offline))
    print(f"specification: {specification}", file=sys.stderr)
    if not online:
        print(
            "not saved at W&B, for WANDB_API_KEY is not set; the specification and report.html hold it", file=sys.stderr
        )
        return
    try:
        report = wandb_report.build(found, title, entity, project, panels=True)
        report.save()
        print(f"W&B Report: {report.url}", file=sys.stderr)
    except Exception as error:
        raise UserError(f"--wandb: not saved: {' '.join(str(error).split())[:300]}") from error
