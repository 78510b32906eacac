"""Run a sweep: its points side by side or in turn, with progress and failures as they happen, and its own record at the end.

Points without a clock go to as many processes as the machine lends (`processes`), or to where Hydra's launcher says; points that take
times run one after the other, alone on the machine. What is done is never run again, so a sweep that was interrupted goes on with the
same words, and two processes that are given the same words share the points.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace

from repro import runner
from repro.composition import composer
from repro.errors import UserError
from repro.processes import each_in_parallel
from repro.sweeps import launchers, points, record
from repro.sweeps.definition import Sweep
from repro.sweeps.points import Ended, Point

#: How often a point that another process runs is looked at again.
_LOOK_S = 0.3
#: Progress is said at most so often.
_SAY_S = 0.5


@dataclass
class _Progress:
    """Says on stderr how far a sweep is; time left is taken from the points that ran here."""

    total: int
    names: Sequence[str]
    started: float = field(default_factory=time.monotonic)
    ended: dict[int, Ended] = field(default_factory=dict)
    ran: int = 0
    said: float = 0.0

    def take(self, end: Ended) -> None:
        self.ended[end.number] = end
        self.ran += end.state == "ran"
        name = self.names[end.number]
        if end.state == "failed":
            runner.to_stderr(f"error: {name}: {end.error}")
        now, done = time.monotonic(), len(self.ended)
        if now - self.said < _SAY_S and done < self.total:
            return
        self.said = now
        left_s = (now - self.started) / max(self.ran, 1) * (self.total - done)
        after = f"; {left_s:.0f} s left" if done < self.total and self.ran else ""
        word = "was done before" if end.state == "found" else end.state
        runner.to_stderr(f"[{done}/{self.total}] {name}: {word}{after}")


def run(sweep: Sweep, command: list[str]) -> int:
    """Run every point that is not done and write the sweep's record; the exit code is 1 where a point failed.

    The last line of stdout is the sweep's folder.

    Raises:
        UserError: for a value that no point could take, before the first runs.
    """
    names = [_name(sweep, words) for words in sweep.points]
    with composer() as compose:
        points.inherited.append(compose)
        try:
            corners = [compose(words) for words in sweep.corners()]
            settings = corners[0].settings
            record.announce(sweep)
            points.warm(corners[0])
            progress = _Progress(len(names), names)
            try:
                for end in _ended(sweep, _tiers(sweep, compose)):
                    progress.take(end)
            except KeyboardInterrupt as stop:
                stop.add_note(
                    f"{len(progress.ended)} of {len(names)} points are done, and the same words go on from there"
                )
                raise
            ended = [progress.ended[number] for number in range(len(names))]
            folder = record.write(sweep, settings, ended, command)
        finally:
            points.inherited.pop()
    failed = [end for end in ended if end.state == "failed"]
    runner.to_stderr(f"sweep: {len(ended) - len(failed)} of {len(ended)} points finished")
    for end in failed:
        runner.to_stderr(f"  failed: {names[end.number]}: {end.error}")
    if (folder / "report.html").is_file():
        print(f"report: {folder / 'report.html'}")
    print(folder, flush=True)
    return 1 if failed else 0


def dry_run(sweep: Sweep) -> int:
    """Print what would run, and what is done; nothing is written."""
    counts = {"done": 0, "to run": 0, "refused": 0}
    with composer() as compose:
        for words in sweep.points:
            name = _name(sweep, words)
            try:
                prepared = runner.prepare(compose(words))
            except UserError as error:
                state, where = "refused", str(error)
            else:
                state, where = ("done" if prepared.finished() else "to run"), str(prepared.directory.path)
            counts[state] += 1
            print(f"{state:<8}{name}  {where}")
    print(", ".join(f"{count} {state}" for state, count in counts.items() if count), file=sys.stderr)
    print(sweep.folder)
    return 1 if counts["refused"] else 0


def _name(sweep: Sweep, words: Sequence[str]) -> str:
    """A point's own words, as they would be typed."""
    own = words[len(words) - len(sweep.axes) :] if sweep.axes else words
    return " ".join(word.lstrip("+") for word in own)


def _tiers(sweep: Sweep, compose: points.Compose) -> dict[int, bool]:
    """Whether each point takes times; what chooses experiment and tier decides it."""
    choosing = [
        index for index, axis in enumerate(sweep.axes) if axis.key.lstrip("+") in ("experiment", "bench", "tier")
    ]
    offset = len(sweep.words) + len(sweep.how)
    known: dict[tuple[str, ...], bool] = {}
    found = {}
    for number, words in enumerate(sweep.points):
        chosen = tuple(words[offset + index] for index in choosing)
        if chosen not in known:
            try:
                known[chosen] = runner.takes_times(compose(words).settings)
            except UserError:
                known[chosen] = False  # it will be said when the point is tried
        found[number] = known[chosen]
    return found


def _ended(sweep: Sweep, measured: dict[int, bool]) -> Iterator[Ended]:
    since = time.time()
    todo = [Point(number, words, 1, since) for number, words in enumerate(sweep.points)]
    quick = [point for point in todo if not measured[point.number]]
    live = [point for point in todo if measured[point.number]]
    busy: list[Point] = []
    for end in _side_by_side(sweep, quick):
        if end.state == "busy":
            busy.append(todo[end.number])
        else:
            yield end
    for point in live:
        end = points.attempt(point, runner.to_stderr)
        if end.state == "busy":
            busy.append(point)
        else:
            yield end
    if busy:
        runner.to_stderr(f"sweep: waiting for {len(busy)} points that another process runs")
    while busy:
        time.sleep(_LOOK_S)
        again, busy = busy, []
        for point in again:
            end = points.attempt(point)
            if end.state == "busy":
                busy.append(point)
            else:
                yield end


def _side_by_side(sweep: Sweep, todo: list[Point]) -> Iterator[Ended]:
    if not todo:
        return
    cores = launchers.processes(sweep) or max(len(os.sched_getaffinity(0)), 1)
    workers = min(cores, len(todo))
    todo = [replace(point, processes=max(cores // workers, 1)) for point in todo]
    if launchers.elsewhere(sweep):
        yield from launchers.each(sweep, todo)
        return
    if workers == 1:
        yield from map(points.attempt, todo)
        return
    try:
        named = {str(point.number): point for point in todo}
        for _, end in each_in_parallel(_attempt, named, workers):
            yield end
    except BrokenProcessPool as error:
        raise UserError(
            f"processes: one of {workers} was killed, as happens where memory runs out; what has finished is kept; "
            "accepted: fewer processes"
        ) from error


def _attempt(_: str, point: Point) -> Ended:
    return points.attempt(point)
