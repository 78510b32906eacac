"""What the pages of docs/ and the README name: metrics with their units, keys, files and tests."""

from __future__ import annotations

import re
from pathlib import Path

from repro.record.provenance import PROJECT

PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]
#: Units that are written in more ways than one.
_UNITS = {"": "1", "nan": "1", "B": "bytes"}


def quoted(page: Path) -> list[str]:
    """What stands between backticks, and the lines of code blocks, of which one that ends in a backslash is one with the next."""
    blocks = page.read_text().replace("\\\n", "").split("```")
    lines = [line for block in blocks[1::2] for line in block.splitlines()[1:]]
    return [*lines, *(word for block in blocks[::2] for word in re.findall(r"`([^`]+)`", block))]


def metrics() -> dict[str, set[str]]:
    """Metrics of docs/metrics.md with the units that their row gives."""
    found: dict[str, set[str]] = {}
    for line in (PROJECT / "docs" / "metrics.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if line.startswith("| `") and len(cells) > 4:
            for name in re.findall(r"`([^`]+)`", cells[1]):
                found.setdefault(name, set()).update(unit.strip() for unit in cells[2].split(","))
    return found


def unknown(metric: str, unit: str, known: dict[str, set[str]]) -> bool:
    """Whether the page has no row for a metric, or not with that unit."""
    unit = _UNITS.get(unit, unit)
    names = [metric, metric.partition("_minus_")[0]]
    names += [name for name in known if "<kind>" in name and re.fullmatch(name.replace("<kind>", r"[a-z_]+"), metric)]
    return not any(unit in known.get(name, ()) for name in names)


def commands(page: Path) -> list[str]:
    """Every command of the kit that a page gives, in a block or between backticks, without its comment."""
    found = []
    for line in quoted(page):
        word = re.split(r"\s+#\s", line)[0].strip()
        if word.startswith(("python -m repro ", "scripts/bench ")):
            found.append(word)
    return list(dict.fromkeys(found))
