"""When a run counts as done, and what a failed, cut or concurrent one leaves."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from repro.errors import UserError
from repro.record import provenance
from repro.record.directory import Record, RunDirectory, configuration_hash
from repro.record.metrics import Metric
from repro.simulate.records import Table

ROW = Metric("table6", "model", "prfaas_pd", "lambda_max", 3.2, "req/s", "computed", paper=3.24)


def requests(*ttft_s: float) -> pd.DataFrame:
    table = Table()
    table.take(
        [(i, 0.0, 9, 0, 2, 0, 0.0, 0.1, 0.0, 0.0, 1.0, 0.0, ttft, 0.02, 1.0, 0, 0, 0) for i, ttft in enumerate(ttft_s)]
    )
    return table.frame()


def complete(directory: RunDirectory) -> Record:
    directory.begin({"name": "x", "seed": 1}, ["repro", "seed=1"], {"seed": 1})
    directory.write_metrics([ROW])
    directory.write_table("series", pd.DataFrame({"x": [1, 2], "y": [0.5, 0.25]}))
    directory.write_requests(requests(0.1, 0.2))
    directory.add_provenance({"link": {"rate_bps": 1e9}})
    return directory.complete()


def test_a_record_reads_back_all_that_was_written(tmp_path: Path) -> None:
    record = complete(RunDirectory(tmp_path / "run"))
    assert record.configuration == {"name": "x", "seed": 1}
    assert record.metrics["value"].tolist() == [3.2]
    assert record.table("series")["y"].tolist() == [0.5, 0.25]
    assert record.requests["ttft_s"].tolist() == [0.1, 0.2]
    known = record.provenance
    assert known["command"] == ["repro", "seed=1"]
    assert known["link"] == {"rate_bps": 1e9}
    assert known["seeds"] == {"seed": 1}
    assert known["start"] <= known["end"]
    assert known["source_digest"] == provenance.source_digest()
    assert {"git", "packages", "machine", "python"} <= set(known)


def test_only_a_completed_run_is_finished(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    assert not directory.finished()
    directory.begin({}, [], {})
    directory.write_metrics([ROW])
    assert not directory.finished()
    directory.complete()
    assert directory.finished()
    assert RunDirectory(tmp_path / "run").finished()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_failed_run_says_why_and_is_not_finished(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.begin({}, [], {})
    directory.fail(UserError("the decode process died"), {"worker": "decode0"})
    failure = json.loads((tmp_path / "run" / "FAILED.json").read_text())
    assert failure["type"] == "UserError"
    assert failure["message"] == "the decode process died"
    assert failure["worker"] == "decode0"
    assert not directory.finished()


def test_a_run_that_starts_again_sees_nothing_of_the_failed_one(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.begin({}, [], {})
    (directory.path / "half-written").touch()
    directory.fail(RuntimeError("x"))
    complete(directory)
    names = {path.name for path in directory.path.iterdir()}
    assert names == {"DONE", "config.yaml", "provenance.json", "metrics.csv", "requests.parquet", "tables"}


@pytest.mark.parametrize("text", ["", "{", '{"source_digest": "other"}', "[]"])
def test_a_done_file_of_other_code_or_of_nothing_finishes_no_run(tmp_path: Path, text: str) -> None:
    directory = RunDirectory(tmp_path / "run")
    complete(directory)
    (directory.path / "DONE").write_text(text)
    assert not directory.finished()


def test_of_two_processes_the_second_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    first, second = RunDirectory(tmp_path / "run"), RunDirectory(tmp_path / "run")
    first.begin({"a": 1}, [], {})
    with pytest.raises(UserError, match="another process") as caught:
        second.begin({"a": 2}, [], {})
    second.fail(caught.value)
    assert not (tmp_path / "run" / "FAILED.json").exists()
    first.complete()
    assert Record(tmp_path / "run").configuration == {"a": 1}


def test_a_lock_whose_file_was_removed_meanwhile_guards_nothing(tmp_path: Path) -> None:
    """A holder removes the lock's file when it ends; who opened it before must not believe that it holds anything."""
    first, second = RunDirectory(tmp_path / "run"), RunDirectory(tmp_path / "run")
    first.begin({}, [], {})
    (lock,) = tmp_path.glob(".*.lock")
    lock.unlink()
    second.begin({}, [], {})
    with pytest.raises(UserError):
        RunDirectory(tmp_path / "run").begin({}, [], {})
    second.complete()


def test_a_killed_run_leaves_neither_verdict_and_can_be_run_again(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from repro.record.directory import RunDirectory\n"
        "RunDirectory(Path(sys.argv[1])).begin({}, [], {}); print('begun', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert not names & {"DONE", "FAILED.json"}
    complete(RunDirectory(tmp_path / "run"))
    assert RunDirectory(tmp_path / "run").finished()


def test_the_hash_covers_configuration_and_the_contents_of_input_files(tmp_path: Path) -> None:
    data = tmp_path / "profile.yaml"
    data.write_text("a")
    base = configuration_hash({"x": 1, "y": {"z": 2}}, [data])
    assert configuration_hash({"y": {"z": 2}, "x": 1}, [data]) == base
    assert configuration_hash({"x": 1, "y": {"z": 3}}, [data]) != base
    data.write_text("b")
    assert configuration_hash({"x": 1, "y": {"z": 2}}, [data]) != base
    assert configuration_hash({"x": 1, "y": {"z": 2}}) != base


def test_the_source_digest_is_the_same_in_another_process() -> None:
    code = "from repro.record.provenance import source_digest; print(source_digest())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.strip() == provenance.source_digest.__wrapped__()
