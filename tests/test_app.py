"""The command line: one clear line for every mistake, the run directory as the last line, sweeps that hide no failure."""

import csv
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from repro import app
from repro.experiments import base
from repro.presets import choices
from repro.record import provenance

#: What mistakes are made in.
TABLE_6 = ["experiment=table6", "tracking=disabled", "options.draws=0"]
#: A run of a second, and one that takes until it is stopped.
QUICK = ["experiment=table5", "tracking=disabled"]
ENDLESS = ["experiment=table6", "tracking=disabled", "options.draws=1000000"]


@pytest.fixture
def call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """The command line in this process, with results below a folder of its own."""
    before = signal.getsignal(signal.SIGTERM)

    def run(*arguments: str) -> tuple[int, str, str]:
        code = app.main([*arguments, f"results={tmp_path}"])
        said = capsys.readouterr()
        return code, said.out, said.err

    yield run
    signal.signal(signal.SIGTERM, before)


def start(results: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "repro", *arguments, f"results={results}"]

    def as_in_a_terminal() -> None:
        # A shell starts background jobs with SIGINT ignored, and a child would inherit that.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=as_in_a_terminal
    )


@pytest.mark.parametrize(
    ("override", "key", "accepted"),
    [
        ("experiment=nope", "experiment: 'nope'", "table6"),
        ("tier=foo", "tier: 'foo'", "simulate"),
        ("tier=execute", "tier: 'execute'", "model"),
        ("link=nope", "link: 'nope'", "vpc_100g"),
        ("foo=1", "foo: no such key", "cluster"),
        ("+foo=1", "foo: no such key", "cluster"),
        ("cluster.bogus=1", "cluster.bogus: no such key", "homogeneous_instances"),
        ("options.bogus=1", "options.bogus: no such key", "draws"),
        ("options.draws=abc", "options.draws: 'abc'", "a whole number"),
        ("workload.lengths.sigma=abc", "workload.lengths.sigma: Value 'abc'", "a number"),
        ("policy.n_p=1.5", "policy.n_p: Value '1.5'", "a whole number or null"),
        ("policy.lengths=foo", "policy.lengths: 'foo'", "'true_mean'"),
        ("policy.threshold_tokens=5", "policy.threshold_tokens: 5 ", "128 to 131072"),
        ("policy.n_p=8", "policy.n_p: 8 ", "0 to 7"),
        ("link.rate_bps=-1", "link.rate_bps: -1", "above 0"),
        ("cluster.pd.instances=-3", "cluster.pd.instances: -3", "1 or more"),
        ("cluster.prfaas.profile=missing", "cluster.prfaas.profile: 'missing'", "paper_1t_h200"),
        ("profile=missing", "profile: 'missing'", "paper_1t_h20"),
        ("seed=-1", "seed: -1", "0 or more"),
        ("label=a/b", "label: 'a/b'", ""),
        ("experiment=null", "experiment: null chooses nothing", "table6"),
        ("link=null", "link: null chooses nothing", "vpc_100g"),
        ("link.rate_bps=1e400", "link.rate_bps: inf is no finite number", "null"),
        ("workload.output_tokens=inf", "workload.output_tokens: inf is no finite number", "finite"),
        ("workload.lengths.mu=nan", "workload.lengths.mu: nan is no finite number", "finite"),
        ("policy.n_p=[1", "policy.n_p=[1: cannot be read as key=value", ""),
        ("reprodcue", "'reprodcue': neither a verb nor key=value", "--help"),
        ("--bogus", "unrecognized arguments: --bogus", "--help"),
        ("tier=model,simulate", "", "--multirun"),
    ],
)
def test_a_mistake_ends_in_one_line_that_names_the_key_and_what_is_accepted(
    call: Callable[..., tuple[int, str, str]], tmp_path: Path, override: str, key: str, accepted: str
) -> None:
    code, out, err = call(*TABLE_6, override)
    assert code == 2
    assert out == ""
    assert err.startswith(f"error: {key}")
    assert accepted in err
    assert len(err.splitlines()) == 1, err
    assert not list(tmp_path.iterdir())


def test_an_option_that_the_experiments_file_leaves_at_its_default_is_set_like_any_other(
    call: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    code, _, err = call("experiment=overlap", "options.repeats=0")
    assert code == 2
    assert err.startswith("error: options.repeats"), err
    code, _, err = call("experiment=overlap", "options.bogus=1")
    assert code == 2
    assert err.startswith("error: options.bogus: no such key; accepted: chunk_tokens, codec, decode"), err
    assert not list(tmp_path.iterdir())


def test_two_values_that_do_not_go_together_are_refused(
    call: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    code, _, err = call(*TABLE_6, "policy.n_p=0", "policy.threshold_tokens=20000")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "policy.n_p: 0 leaves no PD-P instance" in err
    assert "accepted: 1 or more" in err
    code, _, err = call(*TABLE_6, "cluster.prfaas.instances=0", "policy.threshold_tokens=20000")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "cluster.prfaas.instances is 0" in err
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main([*TABLE_6, "results=/proc/nowhere"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: results: /proc/nowhere cannot be written")


def on_a_small_disk(folder: Path, size: str, filler_bytes: int, words: list[str]) -> subprocess.CompletedProcess[str]:
    """The command line, with results on a disk of that size which nobody else sees, some of it taken."""
    alone = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--user", "--map-root-user"]
    mount = f"mount -t tmpfs -o size={size} tmpfs {folder}"
    probe = subprocess.run([*alone, "sh", "-c", mount], capture_output=True, text=True, check=False)
    if probe.returncode:
        pytest.skip(f"no disk of one's own here: {probe.stderr.strip()}")
    script = f'{mount} && head -c {filler_bytes} /dev/zero > {folder}/filler && exec "$@"'
    command = [sys.executable, "-m", "repro", *words, f"results={folder}", "tracking=disabled"]
    return subprocess.run([*alone, "sh", "-c", script, "sh", *command], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("size", "filler_bytes", "words"),
    [
        ("4k", 4096, ["experiment=figure2"]),
        ("12k", 0, ["experiment=figure2"]),
        ("4k", 4096, ["-m", "experiment=figure2", "seed=1,2"]),
    ],
    ids=["at the start", "later", "of a sweep"],
)
def test_a_full_disk_is_one_line_that_names_the_path(
    tmp_path: Path, size: str, filler_bytes: int, words: list[str]
) -> None:
    done = on_a_small_disk(tmp_path, size, filler_bytes, words)
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: results: {tmp_path}/")
    assert line.endswith("cannot be written (No space left on device)")
    assert (done.returncode, done.stdout) == (2, "")


def test_an_interrupt_while_importing_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupting:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "repro.app":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "repro.app")
    monkeypatch.setattr(sys, "meta_path", [Interrupting(), *sys.meta_path])
    with pytest.raises(SystemExit) as left:
        runpy.run_module("repro", run_name="__main__")
    assert left.value.code == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_help_lists_every_experiment_and_verb_with_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, answer in [*choices("experiment").items(), *choices("bench").items(), *app.verbs().items()]:
        assert answer
        assert any(line.split() == [name, *answer.split()] for line in lines), name


@pytest.mark.parametrize("where", [0, 1, 3])
def test_the_configuration_can_be_printed_without_running(
    call: Callable[..., tuple[int, str, str]], tmp_path: Path, where: int
) -> None:
    words = [*QUICK, "seed=7"]
    code, out, _ = call(*words[:where], "--cfg", "job", *words[where:])
    assert code == 0
    assert "seed: 7" in out
    assert not list(tmp_path.iterdir())


def test_a_run_ends_with_its_directory_and_a_second_call_changes_nothing(
    call: Callable[..., tuple[int, str, str]],
) -> None:
    code, out, err = call(*QUICK)
    folder = Path(out.splitlines()[-1])
    assert code == 0
    assert folder.is_dir()
    assert (folder / "DONE").exists()
    assert "done in" in err
    assert json.loads((folder / "provenance.json").read_text())["command"][1:3] == QUICK
    before = {path: path.stat().st_mtime_ns for path in folder.parent.rglob("*")}
    code, out, err = call(*QUICK)
    assert (code, Path(out.splitlines()[-1])) == (0, folder)
    assert "already done" in err
    assert {path: path.stat().st_mtime_ns for path in folder.parent.rglob("*")} == before


def test_what_only_presents_a_result_does_not_name_another_run(call: Callable[..., tuple[int, str, str]]) -> None:
    first = Path(call(*TABLE_6)[1].splitlines()[-1])
    other = Path(call(*TABLE_6, "seed=1")[1].splitlines()[-1])
    labelled = Path(call(*TABLE_6, "label=mine", "tracking=offline", "tracking.project=x")[1].splitlines()[-1])
    assert first != other
    assert labelled.name == f"mine-{first.name.rpartition('-')[2]}"


def test_a_run_of_other_code_is_made_again(
    call: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    call(*QUICK)
    monkeypatch.setattr(provenance, "source_digest", lambda: "other")
    code, _, err = call(*QUICK)
    assert code == 0
    assert "already done" not in err


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_a_sweep_runs_every_point_and_names_the_ones_that_failed(tmp_path: Path, launcher: str) -> None:
    arguments = [
        "experiment=egress",
        "tracking=disabled",
        "policy.threshold_tokens=10000,20,20000",
        f"hydra/launcher={launcher}",
    ]
    process = start(tmp_path, *arguments, "-m")
    out, err = process.communicate()
    assert process.returncode == 1
    assert "sweep: 2 of 3 points finished" in err
    assert err.count("failed: ") == 1
    assert "policy.threshold_tokens: 20 lies outside" in err
    assert "Traceback" not in err
    folder = Path(out.splitlines()[-1])
    with (folder / "points.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["state"] for row in rows] == ["done", "failed", "done"]
    for row in rows[::2]:
        run = folder / row["path"]
        assert (run / "DONE").exists()
        command = json.loads((run / "provenance.json").read_text())["command"]
        assert f"policy.threshold_tokens={float(row['policy.threshold_tokens']):.0f}" in command
    assert sum(path.name == "DONE" for path in tmp_path.rglob("*")) == 2


def test_a_mistake_in_any_job_ends_the_sweep_before_the_first(
    tmp_path: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, err = call("-m", *QUICK, "seed=1,2", "policy.n_p=abc")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith("error: policy.n_p: ")
    assert not list(tmp_path.rglob("DONE"))


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_stopped_run_says_so_is_marked_as_failed_and_runs_again(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path, *ENDLESS)
    wait_for(lambda: any(tmp_path.glob("table6/*/provenance.json")), process)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    reason = "terminated" if number is signal.SIGTERM else "interrupted"
    assert err.splitlines()[-1] == f"error: {reason}; table6: the next call starts it afresh"
    assert "Traceback" not in err
    (folder,) = tmp_path.glob("table6/model-*")
    assert json.loads((folder / "FAILED.json").read_text())["type"] == "KeyboardInterrupt"
    assert not (folder / "DONE").exists()


def test_a_run_that_fails_by_what_it_measured_keeps_what_it_measured(
    tmp_path: Path, call: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    table5 = base.load("table5")

    def failing(context: base.Context) -> base.Outcome:
        seen = pd.DataFrame({"request": [7], "outcome": ["timed_out"]})
        return replace(table5.run(context), tables={"seen": seen}, failure="one was lost")

    monkeypatch.setattr(base, "load", lambda name: replace(table5, run=failing))
    code, _, err = call(*QUICK)
    assert (code, err.splitlines()[-1]) == (2, "error: one was lost")
    (failed,) = tmp_path.rglob("FAILED.json")
    names = {path.name for path in failed.parent.rglob("*")}
    assert {"metrics.csv", "seen.csv"} <= names
    assert "DONE" not in names


def test_a_killed_run_leaves_no_verdict_and_its_lock_does_not_outlive_it(
    tmp_path: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    process = start(tmp_path, *ENDLESS)
    wait_for(lambda: any(tmp_path.glob("table6/*/provenance.json")), process)
    other = start(tmp_path, *ENDLESS)
    _, err = other.communicate(timeout=60)
    assert other.returncode == 2
    assert "another process is running this configuration" in err
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    (folder,) = tmp_path.glob("table6/model-*")
    assert not {"DONE", "FAILED.json"} & {path.name for path in folder.iterdir()}
    again = start(tmp_path, *ENDLESS)
    wait_for(lambda: any(tmp_path.glob("table6/*/provenance.json")), again)
    again.terminate()
    assert "another process" not in again.communicate(timeout=60)[1]


@pytest.mark.slow
def test_the_console_script_is_the_same_program(tmp_path: Path) -> None:
    script = shutil.which("prfaas-repro", path=str(Path(sys.executable).parent))
    if script is None:
        pytest.skip("prfaas-repro is not installed in this environment; scripts/setup installs it")
    done = subprocess.run([script, "experiment=nope"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: experiment: 'nope' does not exist")
