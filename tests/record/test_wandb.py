"""The real client against a server on the loopback interface, and offline runs read back with W&B's own tool."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from loopback import Loopback

from repro import app
from repro.record.directory import Record
from repro.record.tracking import Mirror, TrackingSpec

REFERENCE = Path(__file__).resolve().parents[2] / "results" / "reference"


@pytest.fixture
def record(tmp_path: Path) -> Record:
    run = tmp_path / "results" / "cost" / "model-0123456789ab"
    shutil.copytree(REFERENCE / "cost" / "model", run)
    return Record(run)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Loopback]:
    found = Loopback()
    monkeypatch.setenv("WANDB_BASE_URL", found.url)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    yield found
    found.close()


def mirrored(record: Record, mode: Any) -> None:
    with Mirror(TrackingSpec(mode=mode, entity="someone", project="p"), record.path) as mirror:
        mirror.log(record, record.configuration, [])


def test_an_offline_run_read_back_holds_every_metric(record: Record) -> None:
    mirrored(record, "offline")
    (log,) = record.path.glob("wandb/offline-run-*/run-cost-0123456789ab.wandb")
    done = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)],
        capture_output=True,
        text=True,
        check=True,
    )
    known = record.metrics.dropna(subset=["value"])
    for row in known.itertuples(index=False):
        assert f"{row.tier}/{row.case}/{row.metric}" in done.stdout
    assert json.dumps(float(known["value"].iloc[0]))[:8] in done.stdout
    assert "record-cost-0123456789ab" in done.stdout


@pytest.mark.slow
def test_a_second_run_of_a_configuration_updates_the_first(
    record: Record, server: Loopback, capfd: pytest.CaptureFixture[str]
) -> None:
    mirrored(record, "online")
    mirrored(record, "online")
    assert capfd.readouterr().err == ""
    assert list(server.runs) == ["cost-0123456789ab"]
    run = server.runs["cost-0123456789ab"]
    assert run["groupName"] == "cost"
    assert {"cost", "model"} <= set(run["tags"])
    assert "record-cost-0123456789ab" in {one.get("artifactCollectionName") for one in server.artifacts} | {
        name["artifactCollectionName"] if isinstance(name, dict) else name
        for one in server.artifacts
        for name in one.get("artifactCollectionNames") or []
    }
    assert server.unknown == []


@pytest.mark.slow
def test_an_offline_run_is_uploaded_once(record: Record, server: Loopback, capsys: pytest.CaptureFixture[str]) -> None:
    mirrored(record, "offline")
    folder = str(record.path.parents[1])
    assert app.main(["sync", folder]) == 0
    assert list(server.runs) == ["cost-0123456789ab"]
    before = len(server.operations)
    assert app.main(["sync", folder]) == 0
    assert len(server.operations) == before
    assert "is there already" in capsys.readouterr().err
    assert app.main(["sync", folder, "--again"]) == 0
    assert list(server.runs) == ["cost-0123456789ab"]


def test_a_wandb_report_is_a_file_without_a_service(
    record: Record, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    specification = record.path / "wandb-report.json"
    assert app.main(["report", str(record.path), "--wandb"]) == 0
    first = specification.read_bytes()
    assert app.main(["report", str(record.path), "--wandb"]) == 0
    assert specification.read_bytes() == first
    assert b"Paper and measured" in first
    assert b"reproduced" in first
    assert "not saved at W&B" in capsys.readouterr().err


@pytest.mark.slow
def test_a_wandb_report_is_saved_with_panels_where_there_is_a_service(record: Record, server: Loopback) -> None:
    assert app.main(["report", str(record.path), "--wandb", "--entity", "someone", "--project", "p"]) == 0
    (view,) = server.views.values()
    assert view["displayName"] == "cost"
    assert "panel-grid" in str(view["spec"])
