"""Hands out processor cores: each computing thread alone on its own, everything else on the others.

A forward pass shares its core with nobody gladly: a staging, transport or forwarding thread that the kernel wakes there stretches
T_prefill by a quarter and more, although these threads need little time. So the threads that compute, or that launch kernels, get cores
of their own, and everything else of a run shares what is left. Only what this process may use is handed out: its affinity, and no more
cores than its control group has processor time for.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CPUS = Path("/sys/devices/system/cpu")
_GROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Core:
    """A physical core: its logical processors that may be used, and the NUMA node that it belongs to."""

    processors: tuple[int, ...]
    node: int = 0


@dataclass(frozen=True)
class Cores:
    """Logical processors by role, and those for everything else; `how` says in words what was decided. Empty means any."""

    computing: Mapping[str, tuple[int, ...]]
    others: tuple[int, ...]
    how: str

    def record(self) -> dict[str, Any]:
        """Plain values for a run's provenance."""
        return {
            **{role: list(cores) or "any" for role, cores in self.computing.items()},
            "everything else": list(self.others) or "any",
            "how": self.how,
        }


def hand_out(threads: Mapping[str, int], machine: Collection[Core] | None = None) -> Cores:
    """Cores for roles that compute in so many threads each.

    A role gets whole physical cores, of one NUMA node where one has enough; the hyper-threads beside a computing thread stay idle where
    others have cores enough. At least one core is left for everything else. With fewer cores than threads the roles share those that
    compute, which costs nothing where they take turns; with one core, or fewer than one role needs, nothing is handed out.
    """
    cores = sorted(usable() if machine is None else machine, key=lambda core: (core.node, core.processors))
    needed, widest = sum(threads.values()), max(threads.values())
    if len(cores) - 1 < widest:
        how = f"{len(cores)} core(s) for {widest} computing thread(s) and everything else: handed out to nobody"
        return Cores(dict.fromkeys(threads, ()), (), how)
    if len(cores) - 1 < needed:
        shared, others = cores[:widest], cores[widest:]
        computing = dict.fromkeys(threads, tuple(core.processors[0] for core in shared))
        return Cores(computing, _all(others), f"{len(cores)} cores: the roles share the computing cores, taking turns")
    computing, left = {}, cores
    for role, count in threads.items():
        own = _near(left, count)
        computing[role] = tuple(core.processors[0] for core in own)
        left = [core for core in left if core not in own]
    return Cores(computing, _all(left), f"{len(cores)} cores: each computing thread has its own")


def usable() -> list[Core]:
    """The physical cores that this process may use, and has processor time for."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for processor in sorted(os.sched_getaffinity(0)):
        groups.setdefault(_siblings(processor), []).append(processor)
    cores = sorted((Core(tuple(own), _node(own[0])) for own in groups.values()), key=lambda core: core.node)
    return cores[: math.ceil(_quota())] if _quota() < len(cores) else cores


def place(processors: Collection[int]) -> None:
    """This thread on these processors from now on, and what it starts without `background`; empty means no change."""
    if processors:
        os.sched_setaffinity(0, processors)


def begin_on(processors: Collection[int]) -> None:
    """This process on these processors, as if it had been started there: for a fork, which has begun elsewhere."""
    global _BEGAN_WITH
    os.sched_setaffinity(0, processors)
    _BEGAN_WITH = set(processors)


@contextlib.contextmanager
def placed(processors: Collection[int]) -> Iterator[None]:
    """This thread on these processors only, and with it every thread and process that it starts; empty means no change."""
    before = os.sched_getaffinity(0)
    place(processors)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def background(target: Callable[..., None], *arguments: Any, name: str) -> None:
    """Start a daemon thread beside the computing one: on the processors that the process began with, wherever it is started from."""

    def run() -> None:
        os.sched_setaffinity(0, _BEGAN_WITH)
        target(*arguments)

    threading.Thread(target=run, name=name, daemon=True).start()


_BEGAN_WITH = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set[int]()


def _near(cores: list[Core], count: int) -> list[Core]:
    """So many cores, of the first node that has enough, else of several."""
    for node in sorted({core.node for core in cores}):
        # One must stay for everything else, whichever node it is of.
        if len(found := [core for core in cores if core.node == node]) >= count:
            return found[:count]
    return cores[:count]


def _all(cores: Collection[Core]) -> tuple[int, ...]:
    return tuple(sorted(processor for core in cores for processor in core.processors))


def _siblings(processor: int) -> tuple[int, ...]:
    with contextlib.suppress(OSError, ValueError):
        return _parsed((_CPUS / f"cpu{processor}/topology/thread_siblings_list").read_text())
    return (processor,)


def _parsed(text: str) -> tuple[int, ...]:
    """The kernel's lists: `0,4` or `0-3,8`."""
    found: list[int] = []
    for part in text.strip().split(","):
        low, _, high = part.partition("-")
        found += range(int(low), int(high or low) + 1)
    return tuple(found)


def _node(processor: int) -> int:
    with contextlib.suppress(OSError):
        for entry in (_CPUS / f"cpu{processor}").iterdir():
            if entry.name.startswith("node") and entry.name[4:].isdigit():
                return int(entry.name[4:])
    return 0


def _quota() -> float:
    """Processors' worth of time that this process's control groups allow; infinite where there is no limit."""
    least = math.inf
    with contextlib.suppress(OSError):
        own = next(
            (line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::")), "/"
        )
        group = _GROUP / own.strip("/")
        for folder in (group, *group.parents):
            if folder == _GROUP.parent:
                break
            with contextlib.suppress(OSError, ValueError):
                quota, period = (folder / "cpu.max").read_text().split()
                if quota != "max":
                    least = min(least, int(quota) / int(period))
    with contextlib.suppress(OSError, ValueError):  # the first version of control groups
        quota_us = int((_GROUP / "cpu/cpu.cfs_quota_us").read_text())
        if quota_us > 0:
            least = min(least, quota_us / int((_GROUP / "cpu/cpu.cfs_period_us").read_text()))
    return least
