"""The study runner: the same results whatever runs the points, and none lost when a study is cut."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from multiprocessing import resource_tracker
from pathlib import Path

import psutil
import pytest

from repro.composition import compose
from repro.errors import UserError
from repro.experiments.base import Context
from repro.experiments.study import forget, run_points
from repro.runner import run


def context(folder: Path, processes: int, lines: list[str] | None = None) -> Context:
    settings = replace(compose(["experiment=burst"]).settings, processes=processes)
    return Context(settings, None, folder / "run", (lines if lines is not None else []).append)


def squared(point: int) -> tuple[int, int]:
    return point * point, os.getpid()


def squared_until_7(point: int) -> int:
    if point == 7:
        raise UserError("options.x: 7 cannot be squared")
    return point * point


def children() -> set[int]:
    """Child processes, zombies included once `active_children` has reaped the pool's; not Python's resource tracker, which stays."""
    multiprocessing.active_children()
    return {child.pid for child in psutil.Process().children()} - {resource_tracker._resource_tracker._pid}


def assert_no_more_children_than(before: set[int]) -> None:
    deadline = time.monotonic() + 5
    while children() - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not children() - before


def killed_at_7(point: int) -> int:
    if point == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return point


def recorded(point: tuple[str, int]) -> int:
    folder, number = point
    with (Path(folder) / "calls").open("a") as file:
        file.write(f"{number}\n")
    if number == 3 and not (Path(folder) / "mended").exists():
        raise UserError("broken")
    return number


def test_points_run_in_several_processes_and_come_back_in_order(tmp_path: Path) -> None:
    found = run_points(context(tmp_path, 2), squared, {f"point {i}": i for i in range(8)})
    assert [value for value, _ in found] == [i * i for i in range(8)]
    assert os.getpid() not in {process for _, process in found}


@pytest.mark.parametrize("processes", [1, 2])
def test_a_failed_point_ends_the_study_in_one_line_with_its_name(tmp_path: Path, processes: int) -> None:
    before = children()
    with pytest.raises(UserError, match=r"^point 7: options.x: 7 cannot be squared$"):
        run_points(context(tmp_path, processes), squared_until_7, {f"point {i}": i for i in range(9)})
    assert_no_more_children_than(before)


def test_a_killed_process_ends_the_study_in_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    before = children()
    with pytest.raises(UserError, match=r"^processes: one of 2 was killed, .* of 9 points are kept"):
        run_points(context(tmp_path, 2), killed_at_7, {f"point {i}": i for i in range(9)})
    assert_no_more_children_than(before)


def test_a_study_that_was_cut_goes_on_where_it_stopped(tmp_path: Path) -> None:
    points = {f"point {i}": (str(tmp_path), i) for i in range(5)}
    lines: list[str] = []
    with pytest.raises(UserError):
        run_points(context(tmp_path, 1), recorded, points)
    (tmp_path / "mended").touch()
    assert run_points(context(tmp_path, 1, lines), recorded, points) == [0, 1, 2, 3, 4]
    assert (tmp_path / "calls").read_text().split() == ["0", "1", "2", "3", "3", "4"]
    assert lines[0] == "3 of 5 points were finished before"
    assert lines[-1] == "[5/5] point 4"
    forget(tmp_path / "run")
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".points")]


@pytest.mark.slow
def test_a_study_has_the_same_bytes_with_one_process_and_with_two(tmp_path: Path) -> None:
    words = ["experiment=burst", "tracking=disabled", "options.seeds=2", "options.duration_s=120"]
    records = [
        run(compose([*words, f"processes={count}", f"results={tmp_path / str(count)}"]), [], lambda line: None)
        for count in (1, 2)
    ]
    one, two = (record.path for record in records)
    assert one.name == two.name, "the number of processes is not part of a run's configuration"
    for name in ("metrics.csv", "requests.parquet", "tables/series.csv", "tables/controls.csv"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert not list(tmp_path.rglob("*.points"))


@pytest.mark.slow
def test_no_process_outlives_a_study_that_is_killed(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "repro",
        "experiment=burst",
        "tracking=disabled",
        "processes=2",
        "options.duration_s=1e6",
    ]
    process = subprocess.Popen([*command, f"results={tmp_path}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    head, deadline = psutil.Process(process.pid), time.monotonic() + 60
    while len(head.children()) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    workers = head.children()
    assert len(workers) == 2
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=5)
    assert not alive


def test_a_study_that_is_interrupted_says_how_much_of_it_is_kept(tmp_path: Path) -> None:
    small = ["experiment=simulation", "options.seeds=2", "options.duration_s=60", "options.warmup_s=10", "processes=1"]

    def stop(line: str) -> None:
        if "[2/" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as stopped:
        run(compose([*small, "tracking=disabled", f"results={tmp_path}"]), ["repro"], stop)
    assert stopped.value.__notes__ == ["simulation: 2 finished points are kept, and the next call goes on from there"]
