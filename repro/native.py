"""The hot modules of scheduler and simulator, compiled from their own source: an optional speed-up that cannot change a result.

`python -m repro compile` lets mypyc compile `MODULES` into a folder that is named by a digest of their sources and of this Python. Import
looks for the folder of the sources as they are, and for nothing else: after an edit they run as Python again until they are compiled
again, and without a compiler they always do. Routers, controllers and caches are not among them, so writing a policy takes no compiler.
`REPRO_COMPILED=0` leaves a build aside.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from repro.errors import UserError

MODULES = (
    *(f"scheduling.{name}" for name in ("clusters", "loops", "scheduler", "tables")),
    *(f"simulate.{name}" for name in ("control", "decode", "decode_memory", "dispatch", "events", "faults", "job", "ledger", "lifecycle")),
    *(f"simulate.{name}" for name in ("colocated", "link", "prefill", "rebalance", "resources", "simulation", "windowed_link")),
)  # fmt: skip
_HERE = Path(__file__).resolve().parent
_GROUP = "repro_native"


def sources() -> list[Path]:
    """What is compiled."""
    return [_HERE.joinpath(*name.split(".")).with_suffix(".py") for name in MODULES]


def folder(files: Sequence[Path] | None = None) -> Path:
    """Where the build of these sources by this Python lies, or would lie."""
    digest = hashlib.sha256(f"{sys.version} {sysconfig.get_platform()} {_HERE}".encode())
    for path in files or sources():
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return _HERE / "__pycache__" / f"compiled-{digest.hexdigest()[:24]}"


class _Finder(MetaPathFinder):
    """Finds the compiled modules by their full names."""

    def __init__(self, files: dict[str, Path]) -> None:
        self._files = files

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        """The compiled module of that name."""
        file = self._files.get(fullname)
        return importlib.util.spec_from_file_location(fullname, file) if file else None


@functools.cache
def prefer() -> None:
    """Let imports find the build, if there is one of today's sources; called by both rooms before any of them is imported."""
    if os.environ.get("REPRO_COMPILED") == "0" or not (built := folder()).is_dir():
        return
    files = {
        ".".join((*file.relative_to(built).parent.parts, file.name.split(".")[0])): file
        for file in built.rglob("*" + sysconfig.get_config_var("EXT_SUFFIX"))
    }
    finder = _Finder(files)
    sys.meta_path.insert(0, finder)
    try:
        importlib.import_module(f"{_GROUP}__mypyc")
    except ImportError:  # of another C library, say: then everything runs as Python
        sys.meta_path.remove(finder)


@functools.cache
def active() -> bool:
    """Whether this process runs the compiled modules."""
    return not str(importlib.import_module("repro.simulate.simulation").__file__).endswith(".py")


def build() -> Path:
    """Compile, unless it has been done; returns the folder. Earlier builds are removed.

    Raises:
        UserError: when mypy or a C compiler is missing, or compilation fails.
    """
    target = folder()
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"compile: {target.parent} cannot be written ({error.strerror})") from error
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="compiling-") as made:
        done = subprocess.run(
            [sys.executable, "-c", _SCRIPT, made, *(str(path.relative_to(_HERE.parent)) for path in sources())],
            cwd=_HERE.parent, env=os.environ | {"REPRO_COMPILED": "0"}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
            raise UserError(f"compile: {last}; needed: mypy, and a C compiler with this Python's headers")
        for old in target.parent.glob("compiled-*"):
            shutil.rmtree(old, ignore_errors=True)
        (Path(made) / "lib").rename(target)
    return target


# In a process of its own, because a build changes its process for good; everything that it writes goes to the folder of its first argument.
_SCRIPT = f"""
import sys
from mypyc.build import mypycify
from setuptools import Distribution
made, *sources = sys.argv[1:]
mypy = ["--strict", "--ignore-missing-imports", "--follow-imports=silent", "--cache-dir", made + "/mypy"]
modules = mypycify(mypy + sources, group_name="{_GROUP}", target_dir=made + "/c", debug_level="0", opt_level="3")
command = Distribution({{"ext_modules": modules}}).get_command_obj("build_ext")
command.build_lib, command.build_temp = made + "/lib", made + "/o"
command.ensure_finalized()
command.run()
"""
