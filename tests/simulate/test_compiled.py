"""The optional build of the hot modules: never stale, never needed, never different."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_invariants import busy, everything, play

from repro import native
from repro.errors import UserError


def test_an_edit_of_any_compiled_source_leaves_the_build_aside(tmp_path: Path) -> None:
    copies = [Path(shutil.copy(path, tmp_path)) for path in native.sources()]
    assert native.folder(copies) == native.folder()
    for path in copies:
        before = path.read_bytes()
        path.write_bytes(before + b"\n")
        assert native.folder(copies) != native.folder(), path.name
        path.write_bytes(before)


def digest() -> str:
    table, summary = play(everything(), busy(4, 800))
    numbers = table.to_csv().encode()
    return hashlib.sha256(numbers + repr(summary).encode()).hexdigest()


def elsewhere(**environment: str) -> tuple[bool, str]:
    """Whether another process runs the compiled modules, and what it computes."""
    code = "from test_compiled import digest, native; print(native.active(), digest())"
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path} | environment, capture_output=True, text=True, check=True
    )
    compiled, found = done.stdout.split()
    return compiled == "True", found


def test_without_a_build_the_sources_run_as_python_with_the_same_result() -> None:
    compiled, found = elsewhere(REPRO_COMPILED="0")
    assert not compiled
    assert found == digest()


def test_a_build_gives_the_same_bytes() -> None:
    if not native.folder().is_dir():
        pytest.skip("the simulator is not compiled; python -m repro compile does it")
    assert elsewhere(REPRO_COMPILED="1") == (True, digest())


def test_a_missing_compiler_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "folder", lambda: tmp_path / "pycache" / "compiled-0")
    monkeypatch.setattr(native, "_SCRIPT", "import sys; sys.exit('No module named mypyc')")
    with pytest.raises(UserError, match="compile: No module named mypyc; needed: mypy, and a C compiler"):
        native.build()
    assert list((tmp_path / "pycache").iterdir()) == []
