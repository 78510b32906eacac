"""What /proc tells of another process."""

from __future__ import annotations

import os
from pathlib import Path

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def usage(pid: int) -> tuple[str, float]:
    """A process's state (R, S, D, T, t, Z; X when it is gone) and the processor seconds of all its threads."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "X", 0.0
    return fields[0], (int(fields[11]) + int(fields[12])) * _TICK_S


def started_at(pid: int) -> int:
    """When a process began, in clock ticks since boot: with its number, its identity. 0 if it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] == "Z" else int(fields[19])
