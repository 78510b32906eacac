"""SIGKILL of the head of a live run: a moment later none of its processes, links and sockets is left, nor a file outside its folder."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest
from small import every, words

from repro.experiments import base

#: What runs on a whole link and transport, and the benchmark that has a process on each side of one.
LIVE = [
    (name, tier)
    for name, tier in every()
    if {"link", "transport"} <= set(base.load(name).reads.get(tier, ()))
    or (name, tier) == ("bench_transport", "emulate")
]
#: Sizes of `small` that would be over before anybody can kill them.
LONGER = {
    "live_stress": ["options.requests=400"], "tiers": ["options.requests=400"], "split": ["options.repeats=200"],
    "overlap": ["options.repeats=200"],
    "bench_transport": ["options.seconds=20"],
}  # fmt: skip
_STARTED_WITHIN_S, _GONE_WITHIN_S, _AT_WORK_S = 120.0, 15.0, 4.0


def marked(mark: str) -> list[psutil.Process]:
    """Every process that has the mark in its environment, whoever started it."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            environment = Path(f"/proc/{process.pid}/environ").read_bytes()
            if mark.encode() in environment and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def shared_memory(processes: list[psutil.Process]) -> set[str]:
    """Named shared memory that they have mapped."""
    found = set()
    for process in processes:
        with contextlib.suppress(psutil.Error, OSError):
            lines = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
            found |= {line.split()[-1] for line in lines if "/dev/shm/" in line and not line.endswith("(deleted)")}
    return found


def namespaces_held() -> set[str]:
    """Namespaces that a mount keeps alive without any process."""
    return {line for line in Path("/proc/self/mountinfo").read_text().splitlines() if " nsfs " in line}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tier"), LIVE, ids=str)
def test_nothing_is_left_of_a_live_run_whose_head_is_killed(name: str, tier: str, tmp_path: Path) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    # torch's own cache is its, whoever imports it.
    mark, cache, held = f"NOTHING_LEFT={uuid.uuid4().hex}", tmp_path / "cache", namespaces_held()
    environment = {
        **os.environ, **dict([mark.split("=")]), "TMPDIR": str(temporary), "TORCHINDUCTOR_CACHE_DIR": str(cache),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }  # fmt: skip
    argv = [sys.executable, "-m", "repro", *words(name, tier, tmp_path), *LONGER.get(name, [])]
    with (tmp_path / "errors").open("w") as errors:
        head = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=errors, env=environment, start_new_session=True)
    try:
        until_s = time.monotonic() + _STARTED_WITHIN_S
        while len(before := marked(mark)) < 3:
            assert head.poll() is None, (tmp_path / "errors").read_text()
            assert time.monotonic() < until_s, "it has no processes of its own"
            time.sleep(0.05)
        head_s = time.monotonic()
        while len(seen := marked(mark)) >= 3 and time.monotonic() < head_s + _AT_WORK_S:
            before = seen
            time.sleep(0.05)
        memory = shared_memory(before)
        head.kill()
        head.wait()
        until_s = time.monotonic() + _GONE_WITHIN_S
        while (left := marked(mark)) and time.monotonic() < until_s:
            time.sleep(0.1)
        assert not left
        assert not [path for path in memory if Path(path).exists()]
        assert not [path.name for path in temporary.iterdir() if not path.name.endswith(".lock")]
        assert namespaces_held() <= held
    finally:
        for process in marked(mark):
            process.kill()
        head.wait()
