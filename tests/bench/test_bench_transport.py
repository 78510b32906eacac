"""The transport's benchmark compares what is here, and says at the start what is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from repro.bench import transport
from repro.record.directory import Record


def test_a_machine_without_iperf3_leaves_it_out_in_one_line_and_measures_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(transport.shutil, "which", lambda program: None if program == "iperf3" else f"/bin/{program}")
    short = ["--connections", "1", "--seconds", "0.2", "--warm", "0.1", "--repeats", "1", "--piece-bytes", "1048576"]
    assert transport.main([*short, "--only", "iperf3,tcp", "--results", str(tmp_path)]) == 0
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert [line for line in lines if "iperf3" in line] == ["iperf3 is left out: iperf3 not installed"]
    assert "left out" in lines[0]
    assert set(Record(Path(said.out.splitlines()[-1])).metrics["case"]) == {"tcp_1"}


def test_a_choice_of_nothing_that_can_run_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport.shutil, "which", lambda _program: None)
    with pytest.raises(transport.UserError, match="--only iperf3: nothing of that can run here"):
        transport.main(["--only", "iperf3", "--results", str(tmp_path)])
