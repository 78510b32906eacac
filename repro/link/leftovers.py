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

from repro.processes.proc import started_at

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
    return "=".join(*marked(run).items())


def marked(run: str) -> dict[str, str]:
    """As `mark`, as an addition to a helper's environment."""
    pid = os.getpid()
    return {_VARIABLE: f"{pid}:{started_at(pid)}:{run}"}


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
        found.append(Member(int(entry.name), run, int(owner), started_at(int(owner)) == int(started), command))
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
