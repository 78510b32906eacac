"""One point of a sweep: find it done, run it, or see that another process is running it.

Several processes may work on one sweep. The lock of a run's directory is what keeps two of them from one point, so there is nothing to
clean up after one that was killed. Points on tiers that take times have the machine to themselves: they wait until no other point runs,
and none begins beside them.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

from repro import runner
from repro.composition import Composition, composer
from repro.errors import UserError
from repro.record import provenance
from repro.record.directory import BusyError

Compose = Callable[[Sequence[str]], Composition]
State = Literal["found", "ran", "failed", "busy"]


@dataclass(frozen=True)
class Point:
    """A point by its number in the sweep; `processes` may simulate it, and `since` (Unix time) the sweep has been running."""

    number: int
    words: tuple[str, ...]
    processes: int
    since: float


@dataclass(frozen=True)
class Ended:
    """What became of a point."""

    number: int
    state: State
    path: str = ""
    error: str = ""
    elapsed_s: float = 0.0


#: The composer of the process that a worker was forked from.
inherited: list[Compose] = []


#: Holds what a process has opened for its points until it ends.
_open = contextlib.ExitStack()


@cache
def _own_composer() -> Compose:
    return _open.enter_context(composer())


def _composed(point: Point) -> Composition:
    composition = (inherited[-1] if inherited else _own_composer())(point.words)
    return replace(composition, settings=replace(composition.settings, processes=point.processes))


def seen(point: Point, lost: str) -> Ended:
    """What a point's own directory says of it: that it is done, why it failed, or else that it was `lost`."""
    path = ""
    try:
        prepared = runner.prepare(_composed(point))
        path = str(prepared.directory.path)
        if prepared.finished():
            return Ended(point.number, "ran", path)
        return Ended(point.number, "failed", path, _failed_since(prepared.directory.path, point.since) or lost)
    except UserError as error:
        return Ended(point.number, "failed", path, str(error))


def attempt(point: Point, progress: runner.Progress = lambda line: None) -> Ended:
    """Run a point unless it is done, was found wanting since the sweep began, or is another's."""
    started, path = time.monotonic(), ""
    try:
        prepared = runner.prepare(_composed(point))
        path = str(prepared.directory.path)
        if prepared.finished():
            return Ended(point.number, "found", path)
        if failure := _failed_since(prepared.directory.path, point.since):
            return Ended(point.number, "failed", path, failure)
        with machine(alone=prepared.times):
            runner.run_prepared(prepared, ["repro", *point.words], progress, bare=True)
    except BusyError:
        return Ended(point.number, "busy", path)
    except UserError as error:
        return Ended(point.number, "failed", path, str(error))
    except Exception as error:
        return Ended(point.number, "failed", path, f"{type(error).__name__}: {' '.join(str(error).split())}")
    return Ended(point.number, "ran", path, elapsed_s=time.monotonic() - started)


def warm(composition: Composition) -> None:
    """Read and import here what every point needs, so that workers are forked with it."""
    with contextlib.suppress(UserError):  # it will be said when the point is tried
        runner.prepare(composition)
    provenance.collect([], {})


def _failed_since(path: Path, since: float) -> str | None:
    """What another process that works on the sweep found wrong with a point."""
    file = path / "FAILED.json"
    try:
        if file.stat().st_mtime >= since:
            return str(json.loads(file.read_text())["message"])
    except (OSError, ValueError, KeyError):
        pass
    return None


@contextlib.contextmanager
def machine(*, alone: bool) -> Iterator[None]:
    """Hold this machine's processors with other points of any sweep, or alone; waits until that may be."""
    lock = Path(tempfile.gettempdir()) / f"prfaas-repro-{os.getuid()}.lock"
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield
