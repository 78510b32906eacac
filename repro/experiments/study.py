"""The study runner: independent points of a simulated study, in parallel, resumable, and the same whatever ran them.

A study is seeds × cases × loads. Each point is a value that is simulated without looking at any other, so points go to as many
processes as the machine lends (`processes`), and their results come back in the order of the points: the record has the same bytes with
one process as with ten. A finished point is kept beside the run directory until the study is done; a study that was cut goes on from there.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from repro.errors import UserError
from repro.experiments.base import Context
from repro.processes import each_in_parallel
from repro.record import provenance
from repro.simulate.records import Table
from repro.simulate.simulation import Simulation, Summary
from repro.simulate.spec import SimulationSpec
from repro.workload.stream import RequestBatch

P = TypeVar("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Point:
    """One simulation: a case under one seed, with its requests. `stream` draws them when iterated."""

    case: str
    seed: int
    spec: SimulationSpec
    stream: Iterable[RequestBatch]


def run_once(spec: SimulationSpec, stream: Iterable[RequestBatch]) -> tuple[pd.DataFrame, Summary]:
    """One run: its requests and how it ended."""
    table = Table()
    summary = Simulation(spec, table).run(stream)
    return table.frame(), summary


def run_points(context: Context, work: Callable[[P], R], points: Mapping[str, P]) -> list[R]:
    """`work` of every named point, in their order; in this process where one is asked for, or one point is left.

    Raises:
        UserError: from a point, with its name, or where a process was killed; the points that were finished by then are kept.
    """
    store = _Store(context.folder)
    names = list(points)
    keys = {name: _key(work, point) for name, point in points.items()}
    results: dict[str, R] = {name: found for name in names if (found := store.load(keys[name])) is not None}
    if results:
        context.progress(f"{len(results)} of {len(names)} points were finished before")
    left = [name for name in names if name not in results]
    started, done_before = time.monotonic(), len(results)

    def finished(name: str, result: R) -> None:
        store.save(keys[name], result)
        results[name] = result
        done, elapsed_s = len(results), time.monotonic() - started
        left_s = elapsed_s / (done - done_before) * (len(names) - done)
        after = f"; {left_s:.0f} s left" if done < len(names) else ""
        context.progress(f"[{done}/{len(names)}] {name}{after}")

    workers = min(_processes(context.settings.processes), len(left))
    if workers <= 1:
        for name in left:
            finished(name, _named(work, name, points[name]))
    else:
        try:
            for name, result in each_in_parallel(partial(_named, work), {name: points[name] for name in left}, workers):
                finished(name, result)
        except BrokenProcessPool as error:
            raise UserError(
                f"processes: one of {workers} was killed, as happens where memory runs out; {len(results)} of {len(names)} points are "
                "kept, and the next call goes on from there (processes=1 takes the least memory)"
            ) from error
    return [results[name] for name in names]


def forget(folder: Path) -> None:
    """Remove the kept points of a study whose record is written."""
    shutil.rmtree(_folder(folder), ignore_errors=True)


def kept_points(folder: Path) -> int:
    """How many finished points of a study that was cut wait for the next call."""
    return sum(1 for path in _folder(folder).glob("[!.]*"))


def _named(work: Callable[[P], R], name: str, point: P) -> R:
    try:
        return work(point)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def _processes(asked: int | None) -> int:
    return asked if asked is not None else max(len(os.sched_getaffinity(0)), 1)


def _key(work: Callable[[Any], Any], point: Any) -> str:
    """A name for a point's result: what is computed, of what, by which code."""
    digest = hashlib.sha256(provenance.source_digest().encode())
    digest.update(pickle.dumps((work, point), protocol=4))
    return digest.hexdigest()[:24]


def _folder(run: Path) -> Path:
    return run.parent / f".{run.name}.points"


class _Store:
    """Results of finished points, each a file that appears whole."""

    def __init__(self, run: Path) -> None:
        self._folder = _folder(run)

    def load(self, key: str) -> Any:
        """The result, or None where the point has not finished."""
        try:
            return pickle.loads((self._folder / key).read_bytes())
        except (OSError, pickle.UnpicklingError, EOFError, AttributeError):
            return None

    def save(self, key: str, result: Any) -> None:
        """Keep a result."""
        self._folder.mkdir(exist_ok=True)
        partial = self._folder / f".{key}.{os.getpid()}"
        partial.write_bytes(pickle.dumps(result, protocol=4))
        partial.replace(self._folder / key)


def seeds_of(context: Context, count: int) -> Sequence[int]:
    """The seeds of a study: the configured one and those that follow."""
    return range(context.settings.seed, context.settings.seed + count)
