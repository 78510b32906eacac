"""A benchmark leaves a record with provenance, and says where."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from repro.bench import capture, search, simulate
from repro.record.directory import Record
from repro.record.metrics import value


@pytest.mark.parametrize(
    ("bench", "arguments"),
    [
        (search, ["--repeats", "10"]),
        (simulate, ["--requests", "2000"]),
        (capture, ["--model", "qwen3_235b", "--tokens", "64", "--pairs", "2"]),
    ],
    ids=["search", "simulate", "capture"],
)
def test_the_last_line_is_a_finished_record(
    bench: ModuleType, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main([*arguments, "--results", str(tmp_path)]) == 0
    record = Record(Path(capsys.readouterr().out.splitlines()[-1]))
    assert (record.path / "DONE").is_file()
    assert json.loads((record.path / "provenance.json").read_text())["machine"]["cores"] >= 1
    assert len(record.metrics)
    if bench is simulate:
        assert value(record.metrics, "completed") == 2000
