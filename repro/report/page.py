"""One form for every report, of a run, a sweep or a comparison: sections of texts, figures and tables, and where it all came from.

report.html is one file without a remote asset: figures stand in it, tables are sorted by their heads, colours follow the reader's light or
dark, and on a phone each row of a table becomes a card. It reads the same without its script. report.md has the same words.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

#: The report's name in a run directory.
PAGE = "report.html"
_TEMPLATES = Path(__file__).parent / "templates"
#: A vector figure above this makes the page slower than a picture of it would.
_MOST_SVG_BYTES = 1 << 20


@dataclass(frozen=True)
class Picture:
    """A figure: its title, and its PNG, beside which an SVG may lie."""

    title: str
    path: Path

    @property
    def data_uri(self) -> str:
        """The figure inside the page, as SVG where there is one."""
        vector = self.path.with_suffix(".svg")
        if vector.is_file() and vector.stat().st_size <= _MOST_SVG_BYTES:
            return "data:image/svg+xml;base64," + base64.b64encode(vector.read_bytes()).decode()
        return "data:image/png;base64," + base64.b64encode(self.path.read_bytes()).decode()


@dataclass(frozen=True)
class Column:
    """A table's column."""

    title: str
    number: bool = False


@dataclass(frozen=True)
class Cell:
    """A text; `order` sorts in its place, `kind` colours it, `link` leads to another part of the page."""

    text: str
    order: float | None = None
    kind: str = ""
    link: str = ""

    @staticmethod
    def of(text: str, number: float) -> Cell:
        """A number as it is written, sorted by its value; one that is missing comes first."""
        return Cell(text, number if math.isfinite(number) else -1e308)


@dataclass(frozen=True)
class Table:
    """Rows under heads; with a caption it can be folded. `code` is the command that repeats it."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    open: bool = True
    code: str = ""

    @property
    def anchor(self) -> str:
        """Its name for links."""
        return anchor(self.caption.partition(":")[0])


@dataclass(frozen=True)
class Card:
    """A part of the page in a sentence and a small picture, which leads there."""

    title: str
    text: str
    picture: Picture | None

    @property
    def anchor(self) -> str:
        """Where it leads."""
        return anchor(self.title)


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    title: str
    texts: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    cards: Sequence[Card] = ()

    @property
    def anchor(self) -> str:
        """Its name for links."""
        return anchor(self.title)


@dataclass(frozen=True)
class Line:
    """A sentence at the head of the page; `finding` is set large."""

    text: str
    kind: str = "question"
    code: str = ""


def anchor(text: str) -> str:
    """A text as the name of a place in the page."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def write(
    folder: Path,
    title: str,
    question: str,
    sections: Sequence[Section],
    provenance: Sequence[tuple[str, str]],
    lead: Sequence[Line] = (),
) -> Path:
    """Write report.html and report.md into `folder`; returns the path of the former."""
    context = {
        "title": title, "question": question, "lead": lead, "provenance": provenance,
        "sections": [section for section in sections if section.texts or section.pictures or section.tables or section.cards],
    }  # fmt: skip
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=lambda name: bool(name and name.endswith(".html.j2")),
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text(environment.get_template("page.md.j2").render(context))
    page = folder / PAGE
    page.write_text(environment.get_template("page.html.j2").render(context))
    return page


def provenance_rows(known: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a record knows of its making, in words."""
    machine, git = known.get("machine", {}), known.get("git", {})
    rows = [
        ("command", " ".join(known.get("command", []))),
        (
            "commit",
            f"{git.get('commit') or 'not in a repository'}{', with uncommitted changes' if git.get('dirty') else ''}",
        ),
        ("time", f"{known.get('start', '')} to {known.get('end', '')}"),
        (
            "machine",
            f"{machine.get('cpu')}, {machine.get('cores')} cores, {machine.get('memory_gib')} GiB, "
            f"{', '.join(machine.get('gpus', [])) or 'no GPU'}, {machine.get('system')} {machine.get('kernel')}",
        ),
        (
            "packages",
            ", ".join(
                [f"Python {known.get('python')}", *(f"{name} {v}" for name, v in known.get("packages", {}).items())]
            ),
        ),
        ("seeds", ", ".join(f"{name} {seed}" for name, seed in known.get("seeds", {}).items())),
    ]
    if known.get("link"):
        rows.append(("link", json.dumps(known["link"])))
    return [(name, text) for name, text in rows if text]
