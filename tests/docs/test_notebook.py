"""The example notebook runs from its first cell to its last, as it is committed: without outputs, in the order in which it stands."""

from __future__ import annotations

import ast
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from repro.record.provenance import PROJECT

NOTEBOOK = PROJECT / "docs" / "records.ipynb"


def cells() -> list[str]:
    """The sources of the code cells."""
    book = json.loads(NOTEBOOK.read_text())
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    assert all(cell["outputs"] == [] for cell in book["cells"] if cell["cell_type"] == "code")
    assert len({cell["id"] for cell in book["cells"]}) == len(book["cells"])
    return ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]


def run(sources: list[str]) -> list[object]:
    """What each cell shows: the value of its last line."""
    names: dict[str, object] = {}
    shown = []
    for source in sources:
        tree = ast.parse(source)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "notebook", "exec"), names)
        shown.append(eval(compile(ast.Expression(last.value), "notebook", "eval"), names) if last else None)  # type: ignore[attr-defined]
    return shown


def test_the_notebook_runs_and_shows_what_it_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PRFAAS_REPRO", str(PROJECT))
    head, table, differences, figure = run(cells())
    assert len(head) == 5  # type: ignore[arg-type]
    assert abs(table.loc["prfaas_pd", "model"] / table.loc["prfaas_pd", "paper"] - 1) < 0.02  # type: ignore[attr-defined]
    assert set(differences["how"]) == {"paired"}  # type: ignore[index]
    png = io.BytesIO()
    figure.savefig(png)  # type: ignore[attr-defined]
    assert png.getvalue().startswith(b"\x89PNG")


def test_the_notebook_needs_neither_torch_nor_hydra() -> None:
    code = "\n".join([*cells(), "import sys; print({'torch', 'hydra'} & set(sys.modules))"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PROJECT)
    assert done.stdout.strip() == "set()"
