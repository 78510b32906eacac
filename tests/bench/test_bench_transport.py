"""The transport's benchmark compares what is here, and says at the start what is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from repro import app, runner
from repro.bench import transport
from repro.composition import compose

SHORT = [
    "bench=transport", "tracking=disabled", "options.connections=[1]", "options.seconds=0.2", "options.warm_s=0.1",
    "options.repeats=1", "options.piece_bytes=1048576",
]  # fmt: skip


def test_a_machine_without_iperf3_leaves_it_out_in_one_line_and_measures_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport.shutil, "which", lambda program: None if program == "iperf3" else f"/bin/{program}")
    lines: list[str] = []
    record = runner.run(
        compose([*SHORT, "options.only=[iperf3,tcp]", f"results={tmp_path}"]), ["repro", *SHORT], lines.append
    )
    assert [line for line in lines if "iperf3" in line] == ["bench_transport: iperf3 is left out: iperf3 not installed"]
    assert "left out" in lines[0]
    assert set(record.metrics["case"]) == {"tcp_1"}
    assert record.configuration["name"] == "bench_transport"
    assert record.provenance["machine"]["cores"] >= 1


def test_a_choice_of_nothing_that_can_run_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(transport.shutil, "which", lambda _program: None)
    assert app.main([*SHORT, "options.only=[iperf3]", f"results={tmp_path}"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: options.only: iperf3: nothing of that can run here"
