"""What a killed run may leave behind, and how the next one finds it.

A link makes nothing with a name: its namespaces, interfaces and rules hang on processes and vanish with the last of
them. So leftovers can only be processes (a program that ran inside the link and survived its owner), and each carries
the run and its owner in its environment. The process table is the only register; there is no file that could be
stale.
"""

from __future__ import annotations

import contextlib
import os
import signal
from dataclasses import dataclass
from pathlib import Path

_VARIABLE = "REPRO_LINK_OWNER"


@dataclass(frozen=True)
class Member:
    """A process that belongs to a run's link, and whether the process that owns that link still lives."""

    pid: int
    run: str
    owner: int
    owner_alive: bool
    command: str


def mark(run: str) -> str:
    """The assignment `NAME=value` that marks a process as belonging to this process's link `run`."""
    pid = os.getpid()
    return f"{_VARIABLE}={pid}:{_started(pid)}:{run}"


def marked(run: str) -> dict[str, str]:
    """This process's environment with the mark, for a helper in Python."""
    name, _, value = mark(run).partition("=")
    # A helper runs the same package as its owner, wherever the owner found it.
    here = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(part for part in (here, os.environ.get("PYTHONPATH", "")) if part)
    return {**os.environ, name: value, "PYTHONPATH": path}


def members() -> list[Member]:
    """Every process of any link that this user may see."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            pairs = (entry / "environ").read_bytes().split(b"\0")
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:  # gone meanwhile, or another user's
            continue
        prefix = f"{_VARIABLE}=".encode()
        value = next((pair[len(prefix) :].decode(errors="replace") for pair in pairs if pair.startswith(prefix)), None)
        if value is None:
            continue
        owner, started, run = value.split(":", 2)
        found.append(Member(int(entry.name), run, int(owner), _started(int(owner)) == int(started), command))
    return found


def clean() -> list[Member]:
    """Kill every process of a link whose owner is dead, and with them its namespaces; returns what was killed."""
    killed = []
    for member in members():
        if member.owner_alive or member.pid == os.getpid():
            continue
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(member.pid, signal.SIGKILL)
            killed.append(member)
    return killed


def _started(pid: int) -> int:
    """When a process began, in clock ticks since boot: with its number, its identity. 0 if gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] == "Z" else int(fields[19])
