"""Nothing outside repro/processes starts a child that lives on, or ties one to its parent."""

from __future__ import annotations

import ast
from pathlib import Path

import repro

ROOT = Path(repro.__file__).parent
#: What starts a process or decides how it ends. `subprocess.run` and its kin return when the program has ended.
OWNED = {
    "Popen",
    "fork",
    "forkpty",
    "posix_spawn",
    "posix_spawnp",
    "prctl",
    "killpg",
    "Process",
    "ProcessPoolExecutor",
    "get_context",
}


def names(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.name for alias in node.names}
    return found


def test_only_one_room_starts_and_ends_child_processes() -> None:
    others = [path for path in ROOT.rglob("*.py") if "processes" not in path.relative_to(ROOT).parts]
    assert len(others) > 100
    offenders = {str(path.relative_to(ROOT)): found for path in others if (found := names(path) & OWNED)}
    # psutil.Process reads what a process used; it starts none.
    offenders = {
        name: found
        for name, found in offenders.items()
        if found != {"Process"} or "psutil" not in (ROOT / name).read_text()
    }
    assert not offenders


def test_the_room_of_processes_is_at_the_bottom() -> None:
    for path in (ROOT / "processes").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("repro"):
                assert (node.module or "").startswith(("repro.processes", "repro.errors")), (
                    f"{path.name}: {node.module}"
                )
