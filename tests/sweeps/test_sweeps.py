"""Sweeps: the words' meaning is Hydra's, points are shared and never lost, and the record has the same bytes however they ran."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest

from repro import app
from repro.composition import compose, composer
from repro.errors import UserError
from repro.presets import choices
from repro.record.directory import RunDirectory
from repro.sweeps import definition, launchers, points

#: Points of some hundredths of a second.
GRID = ["-m", "experiment=figure5", "link.rate_bps=5e9,20e9", "policy.threshold_step_tokens=500,1000"]


def words(folder: Path) -> list[str]:
    return [*GRID, f"results={folder}", "tracking=disabled", "processes=1"]


def sweep(folder: Path, *more: str) -> tuple[int, Path]:
    code = app.main([*words(folder), *more])
    (found,) = (folder / "sweeps").iterdir()
    return code, found


def start(folder: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "repro", *words(folder), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    "own",
    [
        ["experiment=table6", "link.rate_bps=2e9", "options.draws=0"],
        ["experiment=table6", "link=metro", "link.rate_bps=2e9"],
        ["experiment=simulation", "policy=static", "workload=diurnal", "options.load=0.5"],
        ["experiment=cost", "cost.usd_per_gpu_hour.H200=3"],
        ["experiment=split", "model=[kimi_linear,qwen3_235b]", "model.kimi_linear.size=tiny", "options.repeats=2"],
        ["sweep=threshold_split", "experiment=table6", "policy.n_p=2"],
    ],
    ids=" ".join,
)
def test_a_point_composed_for_a_sweep_is_what_the_words_compose_to(own: list[str]) -> None:
    whole = compose(own)
    with composer() as one:
        one(["experiment=table6", "link.rate_bps=9e9"])
        assert one(own) == whole
        assert one(own) == whole


def test_a_mistake_in_a_composed_point_is_said_as_anywhere() -> None:
    with composer() as one, pytest.raises(UserError, match=r"policy\.n_p: Value 'abc'"):
        one(["experiment=table6", "policy.n_p=abc"])
    with composer() as one, pytest.raises(UserError, match=r"link\.bogus: no such key"):
        one(["experiment=table6", "link.bogus=1"])


def test_a_process_that_inherits_no_composer_keeps_one_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.ExitStack() as stack:
        monkeypatch.setattr(points, "_open", stack)
        points._own_composer.cache_clear()
        for seed in (1, 2):
            composed = points._own_composer()(["experiment=table6", f"seed={seed}", "link=metro"])
            assert composed.settings.seed == seed
            gc.collect()  # what nobody holds would be closed
    points._own_composer.cache_clear()


def test_every_combination_is_a_point_and_the_users_words_replace_the_files() -> None:
    found = definition.read(
        ["sweep=threshold_split", "policy.n_p=3,4", "policy.threshold_tokens=8000", "seed=range(2)"]
    )
    assert {axis.key: axis.values for axis in found.axes} == {"policy.n_p": ("3", "4"), "seed": ("0", "1")}
    assert len(found.points) == 4
    assert "policy.threshold_tokens=8000" in found.words
    assert {value for words in found.corners() for value in words} == {
        value for words in found.points for value in words
    }


def test_how_a_sweep_is_run_and_shown_names_no_other_sweep(tmp_path: Path) -> None:
    plain = definition.read(["experiment=table6", "seed=1,2", f"results={tmp_path}"]).folder
    shown = ["tracking=disabled", "label=x", "processes=2", "sweep.metrics=[egress_bps]"]
    assert definition.read(["experiment=table6", "seed=1,2", f"results={tmp_path}", *shown]).folder == plain
    assert definition.read(["experiment=table6", "seed=1,3", f"results={tmp_path}"]).folder != plain


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        (["sweep=nope"], "sweep: 'nope' does not exist; accepted: bandwidth"),
        (["sweep=bandwidth,split"], "sweep: bandwidth,split are several sweeps"),
        (["experiment=table6", "label=a,b"], "label: several values make no difference"),
        (["experiment=table6", "seed=1,2", "policy.n_p=[1"], "policy.n_p=[1: cannot be read"),
    ],
)
def test_a_sweep_that_cannot_be_read_is_refused_in_one_line(mistake: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        definition.read(mistake)
    assert str(caught.value).startswith(said)


def test_a_sweep_is_a_record_with_all_values_in_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, folder = sweep(tmp_path)
    said = capsys.readouterr()
    assert code == 0
    assert Path(said.out.splitlines()[-1]) == folder
    assert "[4/4]" in said.err
    names = {path.name for path in folder.iterdir()}
    assert {
        "DONE",
        "config.yaml",
        "provenance.json",
        "points.csv",
        "metrics.parquet",
        "report.html",
        "figures",
    } <= names
    table = pd.read_parquet(folder / "metrics.parquet")
    assert sorted(set(zip(table["link.rate_bps"], table["policy.threshold_step_tokens"], strict=True))) == [
        (5e9, 500), (5e9, 1000), (2e10, 500), (2e10, 1000),
    ]  # fmt: skip
    listed = pd.read_csv(folder / "points.csv")
    assert list(listed["state"]) == ["done"] * 4
    for path in listed["path"]:
        run = (folder / path).resolve()
        # Figures and report are the sweep's; a point has what they are made from.
        assert sorted(path.name for path in run.iterdir() if path.is_file()) == [
            "DONE", "config.yaml", "metrics.csv", "provenance.json",
        ]  # fmt: skip


def test_a_second_call_runs_nothing_and_a_point_asked_for_alone_gets_its_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    code, _ = sweep(tmp_path)
    assert code == 0
    assert "already done, nothing to run" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    single = ["experiment=figure5", "link.rate_bps=5e9", "policy.threshold_step_tokens=500"]
    assert app.main([*single, f"results={tmp_path}", "tracking=disabled"]) == 0
    said = capsys.readouterr()
    assert "already done" in said.err
    assert (Path(said.out.splitlines()[-1]) / "report.html").is_file()


def test_a_dry_run_says_what_is_done_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main([*words(tmp_path), "--dry-run"]) == 0
    assert capsys.readouterr().out.count("to run") == 4
    assert not list(tmp_path.iterdir())
    single = ["experiment=figure5", "link.rate_bps=5e9", "policy.threshold_step_tokens=500", "tracking=disabled"]
    assert app.main(["--dry-run", *single, f"results={tmp_path}"]) == 0
    assert app.main([*single, f"results={tmp_path}"]) == 0
    assert app.main([*words(tmp_path), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("done ") for line in lines) == 1


def test_failures_are_said_at_once_listed_at_the_end_and_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = ["-m", "experiment=egress", "policy.threshold_tokens=10000,20", f"results={tmp_path}", "tracking=disabled"]
    assert app.main([*bad, "processes=1"]) == 1
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if "policy.threshold_tokens: 20 lies outside" in line]
    assert [line.split(":")[0].strip() for line in lines] == ["error", "failed"]
    assert "sweep: 1 of 2 points finished" in said.err
    (folder,) = (tmp_path / "sweeps").iterdir()
    assert not (folder / "DONE").exists()
    assert json.loads((folder / "FAILED.json").read_text())["points"][0]["number"] == 1
    assert set(pd.read_parquet(folder / "metrics.parquet")["point"]) == {0}


@pytest.mark.slow
def test_a_sweep_that_was_cut_anywhere_ends_with_the_same_bytes(tmp_path: Path) -> None:
    _, whole = sweep(tmp_path / "whole")
    process = start(tmp_path / "cut")
    deadline = time.monotonic() + 60
    while not list((tmp_path / "cut").glob("figure5/*/DONE")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    done = list((tmp_path / "cut").glob("figure5/*/DONE"))
    before = {path: path.stat().st_mtime_ns for path in done}
    code, cut = sweep(tmp_path / "cut")
    assert code == 0
    assert (cut / "metrics.parquet").read_bytes() == (whole / "metrics.parquet").read_bytes()
    assert {path: path.stat().st_mtime_ns for path in done} == before


@pytest.mark.slow
def test_two_at_once_share_the_points_and_both_end_well(tmp_path: Path) -> None:
    both = [start(tmp_path, "policy.threshold_step_tokens=200,300,400,500,1000") for _ in range(2)]
    said = [process.communicate(timeout=100) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert len({out.splitlines()[-1] for out, _ in said}) == 1
    assert len(list(tmp_path.glob("figure5/*/DONE"))) == 10
    assert not list(tmp_path.rglob("FAILED.json"))
    assert not list(tmp_path.rglob(".*.lock"))


def test_a_point_that_another_process_runs_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    single = ("experiment=figure5", "link.rate_bps=5e9", f"results={tmp_path}", "tracking=disabled")
    with composer() as one:
        monkeypatch.setattr(points, "inherited", [one])
        path = Path(points.attempt(points.Point(0, single, 1, 0.0)).path)
        (path / "DONE").unlink()
        other = RunDirectory(path)
        other.begin({}, [], {})
        assert points.attempt(points.Point(0, single, 1, 0.0)).state == "busy"
        other.fail(UserError("the other says why"))
        assert points.attempt(points.Point(0, single, 1, time.time() - 60)).error == "the other says why"
        assert points.attempt(points.Point(0, single, 1, time.time() + 60)).state == "ran"


def test_a_point_that_takes_times_has_the_machine_to_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(points.tempfile, "gettempdir", lambda: str(tmp_path))
    began = threading.Event()

    def alone() -> None:
        with points.machine(alone=True):
            began.set()

    with points.machine(alone=False), points.machine(alone=False):
        other = threading.Thread(target=alone)
        other.start()
        assert not began.wait(0.2)
    assert began.wait(10)
    other.join()


@pytest.mark.parametrize(
    ("given", "expected"),
    [([], None), (["processes=3"], 3), (["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"], 2)],
    ids=str,
)
def test_the_launcher_says_how_many_processes(given: Sequence[str], expected: int | None) -> None:
    found = definition.read(["experiment=table6", "seed=1,2", *given])
    assert launchers.processes(found) == expected
    assert not launchers.elsewhere(found)


def test_named_sweeps_have_their_line_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    app.main(["--help"])
    said = capsys.readouterr().out
    for name in (
        "bandwidth_model",
        "threshold_split",
        "rtt_loss_connections",
        "load_policy",
        "price_ratio",
        "output_length",
    ):
        assert choices("sweep")[name] in said
