"""report.html and report.md of one or several runs: claims, figures, every value, provenance. One file each, no remote asset, no script."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from repro.record.directory import Record
from repro.report.comparison import compare, percent, readable

#: The report's name in a run directory.
PAGE = "report.html"
_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Picture:
    """A figure for the report: its title, and its PNG."""

    title: str
    path: Path

    @property
    def data_uri(self) -> str:
        """The picture inside the page."""
        return "data:image/png;base64," + base64.b64encode(self.path.read_bytes()).decode()


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=lambda name: bool(name and name.endswith(".html.j2")),
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters["readable"] = readable
    environment.filters["percent"] = percent
    return environment


def _rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(key): item for key, item in row.items()} for row in table.to_dict("records")]


def write(folder: Path, title: str, question: str, records: Sequence[Record]) -> Path:
    """Write both reports into `folder`; returns the path of report.html.

    Args:
        folder: where the reports go; the first record's provenance is the report's own.
        question: the experiment's one line.
        records: the runs to report, each with its figures already drawn.
    """
    claims = compare(records)
    pictures = [
        Picture(f"{record.configuration['name']}: {path.stem}", path)
        for record in records
        for path in sorted((record.path / "figures").glob("*.png"))
    ]
    runs = [
        {
            "name": record.configuration["name"], "tier": record.configuration["tier"], "folder": record.path.name,
            "elapsed_s": record.provenance.get("elapsed_s", math.nan), "metrics": _rows(record.metrics),
            "link": record.provenance.get("link"),
        }
        for record in records
    ]  # fmt: skip
    context = {
        "title": title, "question": question, "claims": _rows(claims), "pictures": pictures, "runs": runs,
        "counts": {name: int(count) for name, count in claims["verdict"].value_counts().items()} if len(claims) else {},
        "provenance": records[0].provenance, "isfinite": math.isfinite,
    }  # fmt: skip
    context["findings"] = [
        {
            "sentence": record.provenance["finding"], "hinges_on": record.provenance["hinges_on"],
            "command": f"python -m repro experiment={record.configuration['name']} …",
        }
        for record in records
        if record.provenance.get("finding")
    ]  # fmt: skip
    environment = _environment()
    (folder / "report.md").write_text(environment.get_template("report.md.j2").render(context))
    page = folder / PAGE
    page.write_text(environment.get_template("report.html.j2").render(context))
    return page
