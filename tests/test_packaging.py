"""One lock for every way to install, complete and without surplus; scripts that set up once."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
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


#: Distributions that the package needs without importing them, and who does.
IMPORTED_BY_OTHERS = {
    "pyarrow": "pandas, to read and write requests.parquet",
}


def imported(*folders: str) -> set[str]:
    """Distributions that the modules below these folders import."""
    names = set()
    for path in (path for folder in folders for path in (PROJECT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.partition(".")[0])
    known = metadata.packages_distributions()
    return {canonicalize_name(found) for name in names - {"repro"} for found in known.get(name, [])}


def test_what_the_package_imports_is_what_pyproject_declares() -> None:
    declared = {canonicalize_name(Requirement(text).name) for text in PYPROJECT["dependencies"]}
    optional = {
        canonicalize_name(Requirement(text).name)
        for extra, lines in PYPROJECT["optional-dependencies"].items()
        if extra != "dev"
        for text in lines
    }
    found = imported("repro")
    assert found - optional <= declared
    assert declared - found == set(IMPORTED_BY_OTHERS)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the built wheel's contents: what an installation elsewhere would hold."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(PROJECT / name, source)
    for name in ("repro", "conf"):
        shutil.copytree(PROJECT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        folder,
        source,
    ]
    subprocess.run(command, check=True, capture_output=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        archive.extractall(folder / "installed")
    return folder / "installed"


def from_wheel(wheel: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(wheel)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )


@pytest.mark.slow
def test_an_installed_wheel_runs_an_experiment_in_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    done = from_wheel(wheel, tmp_path, "-m", "repro", "experiment=table5", "tracking=disabled")
    assert (tmp_path / done.stdout.splitlines()[-1] / "DONE").is_file()
    where = from_wheel(wheel, tmp_path, "-c", "from repro.presets import CONF; print(CONF)").stdout.strip()
    assert Path(where) == wheel / "repro" / "conf"


@pytest.mark.slow
def test_every_module_of_an_installed_wheel_can_be_imported(wheel: Path, tmp_path: Path) -> None:
    code = """
import importlib, pkgutil, repro
for module in pkgutil.walk_packages(repro.__path__, "repro."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
        print(module.name)
"""
    names = from_wheel(wheel, tmp_path, "-c", code).stdout.split()
    sources = {path for path in (PROJECT / "repro").rglob("*.py") if path.name not in ("__init__.py", "__main__.py")}
    assert len(names) >= len(sources) > 150


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
