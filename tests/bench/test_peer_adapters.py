"""Other simulators beside ours: tried on tiny programs that a test writes in their shape, and on tables made by hand."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
from huggingface_hub import snapshot_download

from repro import runner
from repro.bench import simulate
from repro.bench._simulate_ours import stream
from repro.bench._simulate_peers import SplitwiseSim, Vidur, Workload, peer_of
from repro.composition import compose
from repro.errors import UserError
from repro.record.directory import Record
from repro.record.metrics import value

SPLITWISE_LOOP = """
class Simulator:
    def run(self):
        self.done = [row.split(",") for row in self.rows]


class TraceSimulator(Simulator):
    def __init__(self, rows):
        self.rows = rows

    def run(self):
        super().run()
"""

SPLITWISE_RUN = """
import pathlib, sys
from simulator import TraceSimulator

given = dict(word.split("=", 1) for word in sys.argv[1:])
requests = pathlib.Path(given["trace.dir"]) / (given["trace.filename"] + ".csv")
simulation = TraceSimulator(requests.read_text().splitlines()[1:])
simulation.run()
out = pathlib.Path(given["hydra.run.dir"]) / "detailed"
out.mkdir(parents=True)
(out / "0.csv").write_text("\\n".join(["request_ids,ttft_times", *(f"{row[0]},1.0" for row in simulation.done[LOST:])]))
"""

VIDUR_MAIN = """
import json, pathlib, sys
from vidur.simulator import Simulator

words = sys.argv[1:]
given = {word: words[at + 1] for at, word in enumerate(words) if at + 1 < len(words)}
trace = "--trace_request_generator_config_trace_file"
simulation = Simulator(pathlib.Path(given[trace]).read_text().splitlines()[1:])
simulation.run()
out = pathlib.Path(given["--metrics_config_output_dir"]) / "today"
out.mkdir(parents=True)
(out / "request_metrics.csv").write_text("\\n".join(["Request Id", *map(str, range(simulation.done))]))
"""

VIDUR_LOOP = """
class Simulator:
    def __init__(self, rows):
        self.rows = rows

    def run(self):
        self.done = len(self.rows)
"""


def splitwise(folder: Path, lost: int = 0, run: str = SPLITWISE_RUN) -> Path:
    """A checkout in splitwise-sim's shape, whose program loses the first `lost` requests."""
    (folder / "configs" / "start_state").mkdir(parents=True)
    (folder / "data").mkdir()
    (folder / "run.py").write_text(run.replace("LOST", str(lost)))
    (folder / "simulator.py").write_text(SPLITWISE_LOOP)
    (folder / "configs" / "start_state" / "splitwise.yaml").touch()
    (folder / "data" / "perf_model.csv").touch()
    return folder


def vidur(folder: Path) -> Path:
    """An environment in which a package of Vidur's shape is installed."""
    packages = folder / "packages"
    (packages / "vidur").mkdir(parents=True)
    (packages / "vidur" / "main.py").write_text(VIDUR_MAIN)
    (packages / "vidur" / "simulator.py").write_text(VIDUR_LOOP)
    (packages / "vidur-9.8.dist-info").mkdir()
    (packages / "vidur-9.8.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: vidur\nVersion: 9.8\n")
    (folder / "bin").mkdir()
    (folder / "bin" / "python").write_text(f'#!/bin/sh\nPYTHONPATH={packages} exec {sys.executable} "$@"\n')
    (folder / "bin" / "python").chmod(0o755)
    return folder


def test_splitwise_sim_is_given_our_requests_and_its_checkout_is_left_as_it_was(tmp_path: Path) -> None:
    checkout, scratch = splitwise(tmp_path / "checkout"), tmp_path / "scratch"
    scratch.mkdir()
    before = sorted(checkout.rglob("*"))
    workload = Workload.of(stream(300, 0.9))
    played = SplitwiseSim(checkout, Path(sys.executable)).play(workload, scratch)
    assert played.completed == 300
    assert played.wall_s > 0
    given = pd.read_csv(scratch / "requests.csv")
    chunk = next(iter(stream(300, 0.9)))
    np.testing.assert_allclose(given["arrival_timestamp"], chunk.arrival_s)
    np.testing.assert_array_equal(given["prompt_size"], chunk.input_tokens)
    assert set(given["token_size"]) == {1024}
    assert sorted(checkout.rglob("*")) == before


def test_vidur_finds_a_table_of_times_where_it_would_have_downloaded_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIDUR", str(vidur(tmp_path / "environment")))
    peer = peer_of("vidur")
    assert isinstance(peer, Vidur)
    assert peer.version() == "9.8"
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    assert peer.play(Workload.of(stream(40, 0.9)), scratch).completed == 40
    found = snapshot_download(
        "project-vajra/dev-staging-meta-llama-llama-3-8b-h100",
        repo_type="dataset",
        cache_dir=scratch / "cache" / "profiling_data" / "compute",
        local_files_only=True,
    )
    times = pd.read_csv(Path(found) / "attention.csv.xz")
    assert (times["time_stats.attn_decode.median"] > 0).all()


def beside(checkout: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[Record, list[str]]:
    """A run of the benchmark beside splitwise-sim, and what it said."""
    monkeypatch.setenv("SPLITWISE_SIM", str(checkout))
    given = ["bench=simulate", "options.peers=[splitwise-sim]", "options.compiled=false", *words]
    lines: list[str] = []
    record = runner.run(compose([*given, "tracking=disabled", f"results={folder}"]), ["repro", *given], lines.append)
    return record, lines


def test_a_run_beside_a_peer_leaves_both_rates_their_ratio_and_what_was_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout = splitwise(tmp_path / "checkout")
    record, lines = beside(checkout, tmp_path, monkeypatch, "options.requests=[400]", "options.repeats=2")
    ours, theirs = (value(record.metrics, "requests_per_s", f"{who}400 requests") for who in ("", "splitwise-sim, "))
    assert value(record.metrics, "requests_per_s_ratio") == pytest.approx(ours / theirs)
    assert value(record.metrics, "completed", "splitwise-sim, 400 requests") == 400
    assert record.provenance["peers"]["splitwise-sim"].startswith("sources ")
    assert record.provenance["compiled"] is False
    assert str(checkout) not in (record.path / "config.yaml").read_text()
    assert str(checkout) not in (record.path / "provenance.json").read_text()
    assert len(record.table("rounds")) == 4
    assert any("bar of 35,000 req/s: " in line for line in lines)


def test_a_peer_that_loses_requests_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout = splitwise(tmp_path / "checkout", lost=3)
    with pytest.raises(UserError, match="splitwise-sim: 197 of 200 requests completed"):
        beside(checkout, tmp_path, monkeypatch, "options.requests=[200]", "options.repeats=1")


def test_a_peer_that_fails_is_quoted(tmp_path: Path) -> None:
    checkout = splitwise(tmp_path / "checkout", run="raise SystemExit('no cluster of that name')")
    with pytest.raises(UserError, match=r"splitwise-sim: exit status 1; .*no cluster of that name"):
        SplitwiseSim(checkout, Path(sys.executable)).play(Workload.of(stream(5, 0.9)), tmp_path)


def test_a_peer_that_ends_without_having_run_its_loop_is_refused(tmp_path: Path) -> None:
    checkout = splitwise(tmp_path / "checkout", run="print('nothing to do')")
    with pytest.raises(UserError, match="exit status 0; its last words: nothing to do"):
        SplitwiseSim(checkout, Path(sys.executable)).play(Workload.of(stream(5, 0.9)), tmp_path)


@pytest.mark.parametrize(
    ("name", "place", "message"),
    [
        ("simgrid", "/tmp", "options.peers: 'simgrid'; accepted: splitwise-sim, vidur"),
        ("vidur", "", r"options.peers: vidur: VIDUR is not set; accepted: VIDUR=FOLDER\[:PYTHON\]"),
        ("splitwise-sim", "/nowhere", "/nowhere is no checkout of it: run.py is missing; accepted: a whole clone"),
        ("splitwise-sim", "{checkout}:/nowhere/python", "/nowhere/python cannot be run; accepted: the interpreter"),
        ("vidur", "/nowhere", "/nowhere does not have it; accepted: an environment with vidur installed"),
    ],
)
def test_a_peer_that_is_not_there_is_refused_by_name(
    name: str, place: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "{checkout}" in place:
        place = place.format(checkout=splitwise(tmp_path / "checkout"))
    monkeypatch.setenv(name.upper().replace("-", "_"), place)
    with pytest.raises(UserError, match=message):
        peer_of(name)


def test_a_peer_named_twice_is_refused() -> None:
    with pytest.raises(UserError, match="each simulator once"):
        simulate.Options(peers=("vidur", "vidur"))


def test_a_clone_is_named_by_its_commit_and_other_sources_by_their_digest(tmp_path: Path) -> None:
    checkout = splitwise(tmp_path / "checkout")
    peer = SplitwiseSim(checkout, Path(sys.executable))
    first = peer.version()
    (checkout / "simulator.py").write_text(SPLITWISE_LOOP + "\n")
    assert peer.version() != first
    git = ["git", "-C", str(checkout), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *words], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert peer.version() == commit
    (checkout / "run.py").write_text("")
    assert peer.version() == f"{commit}-dirty"


def test_a_peer_dies_with_the_process_that_started_it(tmp_path: Path) -> None:
    marker = tmp_path / "pid"
    run = f"import os, pathlib, time\npathlib.Path({str(marker)!r}).write_text(str(os.getpid()))\ntime.sleep(60)"
    checkout = splitwise(tmp_path / "checkout", run=run)
    where = f"Path({sys.executable!r}), Path({str(checkout)!r})"
    timed = f"_timed('peer', {where}, 'simulator:Simulator.run', ['run.py'], Path({str(tmp_path)!r}))"
    code = f"from pathlib import Path\nfrom repro.bench._simulate_peers import _timed\n{timed}"
    with subprocess.Popen([sys.executable, "-c", code]) as parent:
        while not (marker.is_file() and marker.read_text()):
            time.sleep(0.02)
        child = psutil.Process(int(marker.read_text()))
        os.kill(parent.pid, signal.SIGKILL)
    psutil.wait_procs([child], timeout=20)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def measured(factor: float, slowness: list[float]) -> pd.DataFrame:
    """Rounds in which the machine is ever slower, and ours always `factor` times as fast as the peer."""
    rows = []
    for index, slow in enumerate(slowness):
        for who, rate in (("peer", 4000 / slow), (simulate.OURS, factor * 4000 / slow)):
            rates = {"requests_per_s": rate, "requests_per_cpu_s": rate}
            ours = (
                {"peak_memory_mb": 200.0, "ttft_mean_s": 1.0, "ttft_p99_s": 2.0, "goodput": 3.0}
                if who == "ours"
                else {}
            )
            rows.append({"round": index, "who": who, "requests": 1000, "completed": 1000, **rates, **ours})
    return pd.DataFrame(rows)


def test_what_slows_the_machine_for_all_leaves_the_ratio_as_it_is() -> None:
    rows = {(row.case, row.metric): row for row in simulate.summarise(measured(11, [1, 2, 3, 1.5]))}
    ratio = rows["peer, 1000 requests", "requests_per_s_ratio"]
    assert (ratio.value, ratio.ci_low, ratio.ci_high) == pytest.approx((11, 11, 11))
    assert ratio.n == 4
    rate = rows["1000 requests", "requests_per_s"]
    assert 0 < rate.ci_low < 20_000 < rate.ci_high


@pytest.mark.parametrize(
    ("factor", "slowness", "bar", "ten_times"),
    [(11, [1, 1], "met", "met"), (9, [1.1, 1.1], "missed", "missed"), (10.5, [1, 1.5], "undecided", "met")],
)
def test_a_verdict_is_given_only_where_the_whole_interval_agrees(
    factor: float, slowness: list[float], bar: str, ten_times: str
) -> None:
    per_peer, last = simulate.verdicts(simulate.summarise(measured(factor, slowness)), [1000])
    assert last.startswith(f"bar of 35,000 req/s: {bar} at 1000 requests")
    assert f"10 times: {ten_times}," in per_peer
