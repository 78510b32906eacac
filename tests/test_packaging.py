"""One lock for every way to install, complete and without surplus; scripts that set up once."""

import os
import re
import shutil
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
LOCK_TEXT = (PROJECT / "requirements.txt").read_text()
LOCK = dict(line.split("==") for line in LOCK_TEXT.splitlines() if line and not line.startswith("#"))

#: What the lock serves: the package, the parallel launcher of sweeps, development, and the editable install itself.
ROOTS = [
    *PYPROJECT["dependencies"],
    *PYPROJECT["optional-dependencies"]["dev"],
    "hydra-joblib-launcher",
    "setuptools",
]


def needed() -> dict[str, str]:
    """Every package that the roots need on this machine, with what needs it."""
    found: dict[str, str] = {}
    seen = set()
    queue = [(text, "", "pyproject.toml") for text in ROOTS]
    while queue:
        text, extra, why = queue.pop()
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        found.setdefault(name, why)
        for wanted in ("", *requirement.extras):
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                queue += [(line, wanted, name) for line in metadata.requires(name) or []]
    return found


def test_the_lock_names_every_package_that_is_needed() -> None:
    # A CUDA build of torch brings its own exact pins, which the lock leaves to it.
    missing = {
        name: why
        for name, why in needed().items()
        if name not in LOCK and not name.startswith(("nvidia-", "cuda-")) and name != "triton"
    }
    assert not missing


def test_the_lock_names_nothing_that_is_not_needed() -> None:
    assert not set(LOCK) - set(needed())


def test_the_lock_is_sorted_and_canonical() -> None:
    assert list(LOCK) == sorted(LOCK)
    assert [canonicalize_name(name) for name in LOCK] == list(LOCK)


def test_every_locked_version_satisfies_pyproject() -> None:
    for text in ROOTS:
        requirement = Requirement(text)
        assert requirement.specifier.contains(LOCK[canonicalize_name(requirement.name)]), text


def test_what_is_installed_here_is_what_the_lock_says() -> None:
    installed = {name: metadata.version(name).split("+")[0] for name in LOCK}
    assert installed == LOCK


@pytest.mark.parametrize("name", ["requirements.txt", "environment.yml", "pyproject.toml"])
def test_no_registry_and_no_machine_is_named(name: str) -> None:
    text = (PROJECT / name).read_text()
    assert not re.search(r"--(extra-)?index-url|--find-links|file:|git\+|@ http", text)
    assert "+cpu" not in text
    assert "+cu" not in text


def test_conda_installs_the_same_lock_and_the_same_python() -> None:
    environment = yaml.safe_load((PROJECT / "environment.yml").read_text())
    *from_conda, from_pip = environment["dependencies"]
    assert from_conda == ["python=3.11", "pip"]
    assert from_pip == {"pip": ["--requirement requirements.txt", "--editable ."]}
    assert PYPROJECT["requires-python"] == ">=3.11"


def test_citation_and_licence_agree_with_pyproject() -> None:
    citation = yaml.safe_load((PROJECT / "CITATION.cff").read_text())
    assert citation["version"] == PYPROJECT["version"]
    assert citation["license"] == PYPROJECT["license"]
    licence = (PROJECT / "LICENSE").read_text()
    assert "Apache License" in licence
    assert "END OF TERMS AND CONDITIONS" in licence


SCRIPTS = sorted(path for path in (*(PROJECT / "scripts").iterdir(), PROJECT / ".ci" / "run") if path.is_file())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_can_be_executed_and_says_what_it_is(script: Path) -> None:
    first, second, *_ = script.read_text().splitlines()
    assert os.access(script, os.X_OK)
    assert first.startswith("#!/usr/bin/env ")
    assert second.startswith(("# ", '"""'))
    if "bash" in first:
        assert subprocess.run(["bash", "-n", script]).returncode == 0


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of what scripts/setup reads, with a package of its own and a lock of nothing, so that it needs no network."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(PROJECT / "scripts" / "setup", tmp_path / "scripts")
    (tmp_path / "requirements.txt").write_text("# nothing==1\n")
    (tmp_path / "pyproject.toml").write_text("")
    return tmp_path


def fake_python(folder: Path) -> Path:
    """An interpreter whose venv is a folder with itself in it and whose pip only counts its calls; everything else is the real Python's."""
    script = folder / "python"
    script.write_text(
        f"""#!/usr/bin/env bash
case "$1 $2" in
    "-m venv") sleep 0.2; rm -rf "$4"; mkdir -p "$4/bin"; cp "$0" "$4/bin/python" ;;
    "-m pip")
        if [[ "$*" == *install* ]]; then echo "$*" >>"{folder}/installs"; fi
        if [[ -e "{folder}/broken" && "$*" == *install* ]]; then exit 1; fi ;;
    *) exec "{shutil.which("python3")}" "$@" ;;
esac
"""
    )
    script.chmod(0o755)
    return script


def setup(project: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [project / "scripts" / "setup"], env={**os.environ, **environment}, capture_output=True, text=True
    )


def installs(project: Path) -> int:
    path = project / "installs"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_setup_installs_once_and_again_only_when_the_lock_changes(project: Path) -> None:
    python = str(fake_python(project))
    assert setup(project, PYTHON=python).returncode == 0
    assert installs(project) == 2
    second = setup(project, PYTHON=python)
    assert (second.returncode, second.stdout, second.stderr, installs(project)) == (0, "", "", 2)
    (project / "requirements.txt").write_text("# other\n")
    assert setup(project, PYTHON=python).returncode == 0
    assert installs(project) == 4


def test_setup_is_redone_after_it_was_cut_short(project: Path) -> None:
    python = str(fake_python(project))
    (project / "broken").touch()
    assert setup(project, PYTHON=python).returncode != 0
    (project / "broken").unlink()
    again = setup(project, PYTHON=python)
    assert again.returncode == 0
    assert "making .venv" in again.stderr


def test_of_two_setups_at_once_the_second_waits_and_installs_nothing(project: Path) -> None:
    python = str(fake_python(project))
    command = [project / "scripts" / "setup"]
    both = [
        subprocess.Popen(command, env={**os.environ, "PYTHON": python}, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert installs(project) == 2
    assert sum("making .venv" in text for text in said) == 1


def test_setup_says_which_python_it_wants(project: Path) -> None:
    done = setup(project, PYTHON="/nonexistent/python")
    assert done.returncode == 2
    assert done.stderr.startswith("error: PYTHON: no Python 3.11 or later")
    assert len(done.stderr.splitlines()) == 1
