"""Launchers: jobs get shares of the points, what a lost job finished is kept, and SLURM's tasks share a sweep by its words alone."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hydra.core.config_store import ConfigStore

from repro import app
from repro.errors import UserError
from repro.record.provenance import PROJECT
from repro.sweeps import definition, launcher_nodes, launchers, points

#: Points of some hundredths of a second.
GRID = ["-m", "experiment=figure5", "link.rate_bps=5e9,20e9", "policy.threshold_step_tokens=500,1000"]
SBATCH = PROJECT / "scripts" / "sweep.sbatch"


def sweep(folder: Path, *more: str) -> tuple[int, Path]:
    code = app.main([*GRID, f"results={folder}", "tracking=disabled", "processes=1", *more])
    (found,) = (folder / "sweeps").glob("[!.]*")
    return code, found


def in_this_process(own: Mapping[str, Any], folder: str, shares: Sequence[launchers.Share]) -> Iterator[launchers.Done]:
    """Runs jobs one after the other; the second is lost after its first point."""
    assert own == {"memory": 3}
    assert Path(folder).name == ".jobs"
    for number, share in enumerate(shares):
        if number == own["memory"] - 2:
            launchers.share_of(share[:1], str(Path.cwd()))
            yield share, partial(killed, number)
        else:
            yield share, partial(launchers.share_of, share, str(Path.cwd()))


def killed(number: int) -> list[points.Ended]:
    raise RuntimeError(f"job {number} ran\nout of memory")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher of this test, whose package is there."""
    node = {"_target_": "json_here", "jobs": 2, "memory": 3, "unset": None}
    ConfigStore.instance().store(group="hydra/launcher", name="here", node={**node, "_target_": "x.json_here"})
    monkeypatch.setattr(launchers, "LAUNCHES", {**launchers.LAUNCHES, "json_here": in_this_process})


@pytest.mark.usefixtures("here")
def test_what_a_lost_job_finished_is_kept_and_the_rest_is_run_by_the_next_call(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, folder = sweep(tmp_path, "hydra/launcher=here")
    assert code == 1
    listed = pd.read_csv(folder / "points.csv")
    assert list(listed["state"]) == ["done", "done", "done", "failed"], "jobs take every second point"
    assert listed["error"].iloc[3] == "its job was lost: job 1 ran out of memory"
    assert "error: link.rate_bps=20000000000.0 policy.threshold_step_tokens=1000: its job was lost" in (
        capsys.readouterr().err
    )
    assert sweep(tmp_path)[0] == 0
    assert set(pd.read_csv(folder / "points.csv")["state"]) == {"done"}


def test_a_launcher_that_is_unknown_or_not_installed_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in launcher_nodes.NODES:
        found = definition.read(["experiment=table6", "seed=1,2", f"hydra/launcher={name}"])
        package = name.partition("_")[0]
        with pytest.raises(UserError, match=rf"^hydra/launcher: {name} needs {package}, .*accepted: basic, joblib$"):
            launchers.elsewhere(found)
    ConfigStore.instance().store(group="hydra/launcher", name="other", node={"_target_": "x.OtherLauncher"})
    other = definition.read(["experiment=table6", "seed=1,2", "hydra/launcher=other"])
    with pytest.raises(UserError, match=r"OtherLauncher is not supported; accepted: basic, joblib, submitit_local"):
        launchers.elsewhere(other)
    with pytest.raises(
        UserError, match=r"hydra/launcher: 'nope' does not exist; accepted: basic, .*ray.*submitit_slurm"
    ):
        definition.read(["experiment=table6", "seed=1,2", "hydra/launcher=nope"])


@pytest.mark.parametrize("name", ["submitit_local", "ray"])
def test_a_sweep_runs_as_jobs_of_the_real_launcher(name: str, tmp_path: Path) -> None:
    package = name.partition("_")[0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed; the code around it is tested above")
    jobs = ["hydra.launcher.jobs=2"]
    code, folder = sweep(tmp_path, f"hydra/launcher={name}", *jobs)
    assert code == 0
    assert set(pd.read_csv(folder / "points.csv")["state"]) == {"done"}


def test_the_slurm_file_is_a_sweep_by_its_words(tmp_path: Path) -> None:
    text = SBATCH.read_text()
    assert set(re.findall(r"^#SBATCH --([a-z-]+)=\S+$", text, re.MULTILINE)) == {
        "job-name", "array", "cpus-per-task", "mem", "time",
    }  # fmt: skip
    assert len(re.findall("^#SBATCH", text, re.MULTILINE)) == 5
    done = subprocess.run(
        ["bash", str(SBATCH), "--dry-run", *GRID, f"results={tmp_path}"],
        capture_output=True, text=True, check=True, env={**os.environ, "SLURM_SUBMIT_DIR": str(PROJECT), "SLURM_CPUS_PER_TASK": "2"},
    )  # fmt: skip
    assert done.stdout.count("to run") == 4
    assert done.stdout.splitlines()[-1].startswith(f"{tmp_path}/sweeps/figure5-")
