"""`experiment=split` from the command line: a killed worker fails the run in words, the next call runs it, a third does not."""

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest

COMMAND = [
    sys.executable, "-m", "repro", "experiment=split", "link=loopback", "link.name=loopback", "link.rate_bps=null",
    "link.rtt_s=0", "link.backend=none", "tracking=disabled", "+options.input_tokens=[40]", "+options.repeats=1",
    "+options.output_tokens=2", "options.codec.default=zstd",
]  # fmt: skip


def find_decode(command: psutil.Process, within_s: float = 60) -> psutil.Process:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        for child in command.children(recursive=True):
            with contextlib.suppress(psutil.Error):  # short-lived children come and go
                if "repro.serving.decode" in " ".join(child.cmdline()):
                    return child
        time.sleep(0.05)
    raise AssertionError("no decode worker was started")


@pytest.mark.slow
def test_a_killed_run_fails_in_words_is_run_again_and_then_is_done(tmp_path: Path) -> None:
    command = [*COMMAND, f"results={tmp_path}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as killed:
        decode = find_decode(psutil.Process(killed.pid))
        family = psutil.Process(killed.pid).children(recursive=True)
        decode.kill()
        _, said = killed.communicate(timeout=60)
    assert killed.returncode not in (0, None)
    assert "worker decode was killed by SIGKILL" in said
    assert "Traceback" not in said
    assert not [process for process in family if process.is_running()]
    (failure,) = tmp_path.glob("split/*/FAILED.json")
    assert "killed by SIGKILL" in json.loads(failure.read_text())["message"]

    again = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    folder = Path(again.stdout.splitlines()[-1])
    assert folder == failure.parent
    assert (folder / "DONE").exists()
    assert not failure.exists()
    assert json.loads((folder / "trace.json").read_text())["traceEvents"]
    metrics = pd.read_csv(folder / "metrics.csv").set_index(["case", "metric"])["value"]
    for mode in ("bulk", "layerwise"):
        assert metrics["kimi_linear/" + mode, "codec_ratio"] > 1
        assert metrics["kimi_linear/" + mode, "codec_lossless"] == 1
        assert metrics["kimi_linear/" + mode, "tokens_match"] == 1
        assert metrics["kimi_linear/" + mode, "kv_bytes_match"] == 1
    written = (folder / "metrics.csv").stat().st_mtime_ns

    third = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "already done" in third.stderr
    assert (folder / "metrics.csv").stat().st_mtime_ns == written
