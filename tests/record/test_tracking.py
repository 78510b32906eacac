"""W&B as a mirror: under the run directory, never in the way of the run."""

from __future__ import annotations

import time
from pathlib import Path

import pandas as pd
import pytest
import yaml

from repro.errors import UserError
from repro.record.directory import Record
from repro.record.metrics import Metric, frame
from repro.record.tracking import Mirror, TrackingSpec


@pytest.fixture
def record(tmp_path: Path) -> Record:
    folder = tmp_path / "table6" / "model-0"
    (folder / "tables").mkdir(parents=True)
    frame([Metric("table6", "model", "prfaas_pd", "lambda_max", 3.2, "req/s", "computed")]).to_csv(
        folder / "metrics.csv", index=False
    )
    pd.DataFrame({"x": [1, 2]}).to_csv(folder / "tables" / "series.csv", index=False)
    (folder / "config.yaml").write_text(yaml.safe_dump({"name": "table6", "tier": "model"}))
    return Record(folder)


def mirrored(record: Record, spec: TrackingSpec) -> None:
    with Mirror(spec, record.path) as mirror:
        mirror.log(record, {"name": "table6"}, [])


def test_offline_run_lies_under_the_run_directory(record: Record, capfd: pytest.CaptureFixture[str]) -> None:
    mirrored(record, TrackingSpec())
    (data,) = record.path.glob("wandb/offline-run-*/run-*.wandb")
    content = data.read_bytes()
    assert b"model/prfaas_pd/lambda_max" in content
    assert capfd.readouterr().err == ""


def test_disabled_tracking_leaves_nothing(record: Record) -> None:
    mirrored(record, TrackingSpec(mode="disabled"))
    assert not (record.path / "wandb").exists()


def test_online_falls_back_to_offline_when_the_service_is_out_of_reach(
    record: Record, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    mirrored(record, TrackingSpec(mode="online", init_timeout_s=3))
    assert list(record.path.glob("wandb/offline-run-*/run-*.wandb"))
    assert "tracking=online: " in capfd.readouterr().err


def test_a_tracker_that_hangs_is_given_up_in_one_line(record: Record, capfd: pytest.CaptureFixture[str]) -> None:
    started = time.monotonic()
    mirrored(record, TrackingSpec(timeout_s=0.01))
    assert time.monotonic() - started < 20
    assert capfd.readouterr().err == "tracking=offline: gave up after 0.01 s; the record is complete without it\n"


def test_a_run_that_fails_takes_its_tracker_with_it(record: Record) -> None:
    mirror = Mirror(TrackingSpec(), record.path)
    mirror.load()
    with pytest.raises(UserError), mirror:
        raise UserError("no result")
    assert mirror._tracker is not None
    assert mirror._tracker.returncode is not None


def test_an_impossible_timeout_is_refused_by_its_key() -> None:
    with pytest.raises(UserError, match=r"tracking\.timeout_s: 0"):
        TrackingSpec(timeout_s=0)
