"""The pages say what is: every metric, key, choice, file and test that they name exists, and every metric has its row."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from pages import PAGES, metrics, quoted, unknown

from repro.configuration import accepted
from repro.experiments import base
from repro.presets import CONF, choices, groups, runs
from repro.record.directory import REFERENCE
from repro.record.metrics import read
from repro.record.provenance import PROJECT
from repro.record.request_metrics import UNITS
from repro.settings import Settings

NODES = ("cluster", "link", "workload", "policy", "transport", "cost", "tracking")
KEY = re.compile(rf"\b((?:{'|'.join(NODES)})(?:\.\w+)+)")
CHOICE = re.compile(rf"(?<![\w.])({'|'.join(groups())})=([\w,]+)")
CHOSEN = re.compile(r"(?:experiment=|(bench=|scripts/bench ))(\w+)")
METRICS = metrics()


def page_id(page: Path) -> str:
    return page.name


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_key_that_a_page_names_exists(page: Path) -> None:
    keys = {key for word in quoted(page) for key in KEY.findall(word)}
    keys -= {key for key in keys if key.endswith((".py", ".yaml", ".md", ".csv"))}
    wrong = [key for key in sorted(keys) if "typing.Any" in accepted(Settings, key) or not known(key)]
    assert not wrong


def known(key: str) -> bool:
    """Whether the schema has the key; below a dictionary of the user's own names anything goes."""
    from dataclasses import fields, is_dataclass
    from typing import Any, get_args, get_type_hints

    hint: Any = Settings
    for name in key.split("."):
        inner = [item for item in (hint, *get_args(hint)) if is_dataclass(item)]
        if not inner:
            return str(hint).startswith("dict")
        if name not in {item.name for item in fields(inner[0])}:
            return False
        hint = get_type_hints(inner[0])[name]
    return True


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_option_that_a_page_sets_is_one_of_its_experiments(page: Path) -> None:
    wrong = []
    for command in "\n".join(quoted(page)).replace("\\\n", "").splitlines():
        names = [f"bench_{name}" if bench else name for bench, name in CHOSEN.findall(command)]
        if len(names) != 1 or names[0] not in runs():
            continue
        fields = set(getattr(base.load(names[0]).options, "__dataclass_fields__", {}))
        wrong += [f"{names[0]}: {key}" for key in re.findall(r"\boptions\.(\w+)", command) if key not in fields]
    assert not wrong


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_choice_that_a_page_makes_exists(page: Path) -> None:
    wrong = []
    for word in quoted(page):
        for group, chosen in CHOICE.findall(word):
            wrong += [
                f"{group}={one}" for one in chosen.split(",") if one and one not in choices(group) and one != "table9"
            ]
        for name in re.findall(r"scripts/bench (\w+)", word):
            wrong += [] if name in choices("bench") else [f"scripts/bench {name}"]
    assert not wrong


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_file_that_a_page_names_or_links_to_exists(page: Path) -> None:
    text = page.read_text()
    named = {word for word in quoted(page) for word in re.findall(r"^(?:repro|tests|conf|scripts|docs)/[\w./-]+", word)}
    missing = [name for name in sorted(named) if "<" not in name and not (PROJECT / name.rstrip("/.")).exists()]
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    missing += [link for link in links if link and not (page.parent / link).exists()]
    assert not [name for name in missing if not name.endswith("/") or not any(CONF.parent.glob(name + "*"))]


def test_every_test_that_a_page_names_exists() -> None:
    named = [word for page in PAGES for word in quoted(page) if word.startswith("tests/") and "::" in word]
    assert len(named) > 30
    missing = []
    for word in named:
        path, _, name = word.partition("::")
        tree = ast.parse((PROJECT / path).read_text()) if (PROJECT / path).is_file() else ast.Module([], [])
        if name not in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}:
            missing.append(word)
    assert not missing


def test_every_page_is_found_from_the_readme() -> None:
    text = (PROJECT / "README.md").read_text()
    assert not [page.name for page in PAGES[1:] if f"(docs/{page.name})" not in text]


def test_every_metric_of_a_reference_record_has_a_row_with_its_unit() -> None:
    missing = set()
    for path in sorted((PROJECT / REFERENCE).rglob("metrics.csv")):
        for row in read(path).itertuples():
            # Records from before every value had a unit leave some empty.
            if unknown(str(row.metric), str(row.unit), METRICS) and (
                str(row.unit) != "nan" or row.metric not in METRICS
            ):
                missing.add((row.metric, row.unit, row.experiment))
    assert not missing


def test_every_metric_that_the_sources_name_has_a_row() -> None:
    named = set(UNITS)
    for path in (*(PROJECT / "repro" / "experiments").glob("*.py"), *(PROJECT / "repro" / "bench").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and called(node) in ("metric", "row", "_row"):
                at = 1 if called(node) == "metric" else 2
                if (
                    len(node.args) > at
                    and isinstance(name := node.args[at], ast.Constant)
                    and isinstance(name.value, str)
                ):
                    named.add(name.value)
    assert len(named) > 80
    assert not {name for name in named if name not in METRICS}


def called(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def test_every_room_has_its_paragraph_and_its_place_in_the_picture() -> None:
    text, picture = ((PROJECT / "docs" / name).read_text() for name in ("architecture.md", "architecture.svg"))
    rooms = {path.parent.name for path in (PROJECT / "repro").glob("*/__init__.py")}
    assert not {room for room in rooms if f"**{room}**" not in text}
    assert not {room for room in rooms if f">{room}/<" not in picture}
