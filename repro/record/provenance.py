"""Where a result came from: code, packages, machine, seeds and time. Artifact reviewers ask for all of it, per claim."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = (
    "torch", "transformers", "accelerate", "hydra-core", "omegaconf", "wandb", "numpy", "scipy", "pandas", "pyarrow", "matplotlib",
    "seaborn", "zstandard", "lz4", "xxhash", "flash-linear-attention", "mooncake-transfer-engine-non-cuda", "nixl", "numba",
)  # fmt: skip

#: The version of a record's form; see `repro.record.checking`.
SCHEMA = 2

PROJECT = Path(__file__).resolve().parents[2]


def _git(*arguments: str) -> str | None:
    return _git_in(PROJECT, *arguments)


@cache
def _git_in(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


@cache
def source_digest() -> str:
    """SHA-256 over the package's sources: a result is stale once the code that made it has changed."""
    digest = hashlib.sha256()
    root = PROJECT / "repro"
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode())
        digest.update(b"\0")
        digest.update(path.read_bytes())
    return digest.hexdigest()


@cache
def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


@cache
def _gpus() -> list[str]:
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=20, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


@cache
def _packages() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


#: Series that the kit is tested with (the lock's). Others run as well: a GPU machine often has builds of its own.
TESTED = {"torch": "2.13", "transformers": "5.23"}


def other_versions() -> list[str]:
    """Of packages that a model's results hang on, those whose version is not of the tested series, in words."""
    found = _packages()
    return [
        f"{name} {found[name]} (tested with {series})"
        for name, series in TESTED.items()
        if name in found and not f"{found[name]}.".startswith(f"{series}.")
    ]


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def collect(command: list[str], seeds: dict[str, int]) -> dict[str, Any]:
    """Everything known at the start of a run; the run directory adds the end, and an experiment what it measured of its link."""
    diff = _git("diff", "HEAD")
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "schema": SCHEMA,
        "command": command,
        "git": {
            "commit": (_git("rev-parse", "HEAD") or "").strip() or None,
            "dirty": bool((_git("status", "--porcelain") or "").strip()),
            "diff": diff or "",
        },
        "source_digest": source_digest(),
        "python": sys.version.split()[0],
        "packages": _packages(),
        "machine": {
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "memory_gib": round(memory_bytes / 2**30, 1),
            "gpus": _gpus(),
            "kernel": platform.release(),
            "system": platform.system(),
        },
        "seeds": seeds,
        "start": now(),
    }
