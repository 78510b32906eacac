"""Everything that a live run stands on is watched: who dies or falls silent is named in time, by its true name, and nothing is left.

Each case is tried once; `REPEATS=10 pytest tests/serving/test_deaths.py` tries each ten times.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from warm_workers import WarmWorkers

from repro.engine.base import Request
from repro.engine.torch_engine import EngineSpec
from repro.link import Link, LinkSpec, open_link
from repro.link.leftovers import members
from repro.models import spec as models
from repro.processes import ChildEndedError
from repro.serving.system import System
from repro.transport import TransportSpec

REPEATS = range(int(os.environ.get("REPEATS", "1")))
NAMED_WITHIN_S = {signal.SIGKILL: 2.0, signal.SIGSTOP: 10.0}
WORDS = {signal.SIGKILL: "was killed by SIGKILL", signal.SIGSTOP: "is stopped"}
RUN = "test-deaths"
MODEL = models.load("qwen3_5_397b", "tiny")
ENGINE = EngineSpec(replace(MODEL, parameters=float(MODEL.parameters)), chunk_tokens=64)
TRANSPORT = TransportSpec(connections=2, secret="of this test")
#: 260 kB, of which a slow link carries a part before its end comes.
REQUEST = Request(1, tuple(np.random.default_rng(1).integers(3, 512, 300).tolist()), 3)


@contextlib.contextmanager
def slow_link(backend: str) -> Iterator[Link]:
    spec = LinkSpec(backend=backend, rate_bps=200e3, rtt_s=0.01)
    with open_link(spec, run=RUN) as link:
        yield link


def child_of(link: Link, role: str) -> int:
    """The process that plays this role in the link."""
    assert link.helper is not None
    if role in ("link keeper", "link relay"):
        return link.helper.pid
    # Forked in this order, each with its direction as its only task.
    at = ["link forwarder (prefill to decode)", "link forwarder (decode to prefill)"].index(role)
    return sorted(child.pid for child in psutil.Process(link.helper.pid).children())[at]


def struck(system: System, link: Link, pid: int, number: signal.Signals) -> tuple[str, float]:
    """Strike a process in the middle of a transfer: what the run says, and after how many seconds."""
    at_s: list[float] = []

    def strike() -> None:
        before = link.signals().forward.forwarded_bytes
        while link.signals().forward.forwarded_bytes < before + 20e3:
            time.sleep(0.01)
        at_s.append(time.monotonic())
        os.kill(pid, number)

    thread = threading.Thread(target=strike)
    thread.start()
    try:
        with pytest.raises(ChildEndedError) as raised:
            system.serve([REQUEST], "layerwise")
        return str(raised.value), time.monotonic() - at_s[0]
    finally:
        thread.join()


def left_over(pids: set[int]) -> list[Any]:
    """Processes of the run that are still there a moment later."""
    deadline = time.monotonic() + 3
    while (left := [pid for pid in pids if alive(pid)] + own_members()) and (time.monotonic() < deadline):
        time.sleep(0.02)
    return left


def own_members() -> list[int]:
    return [one.pid for one in members() if one.run == RUN and one.owner == os.getpid()]


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def descendants() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
@pytest.mark.parametrize("side", ["prefill", "decode"])
@pytest.mark.parametrize("repeat", REPEATS)
def test_a_worker_that_dies_or_stops_is_named_in_time_and_nothing_is_left(
    side: Any, number: signal.Signals, repeat: int, tmp_path: Path
) -> None:
    before = descendants()
    with contextlib.ExitStack() as stack:
        link = stack.enter_context(slow_link("relay"))
        system = stack.enter_context(System(ENGINE, TRANSPORT, link, tmp_path))
        pids = descendants() - before
        said, after_s = struck(system, link, system.pid(side), number)
    assert f"worker {side} {WORDS[number]}" in said
    assert f"(pid {system.pid(side)})" in said
    assert after_s < NAMED_WITHIN_S[number]
    assert not left_over(pids)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
@pytest.mark.parametrize(
    ("backend", "role"),
    [
        ("relay", "link relay"),
        ("packet", "link keeper"),
        ("packet", "link forwarder (prefill to decode)"),
        ("packet", "link forwarder (decode to prefill)"),
    ],
)
@pytest.mark.parametrize("repeat", REPEATS)
def test_a_process_of_the_link_that_dies_or_stops_is_named_in_time_and_nothing_is_left(
    backend: str, role: str, number: signal.Signals, repeat: int, warm: WarmWorkers, tmp_path: Path
) -> None:
    before = descendants()
    with contextlib.ExitStack() as stack:
        link = stack.enter_context(slow_link(backend))
        system = stack.enter_context(System(ENGINE, TRANSPORT, warm.on(link), tmp_path))
        pid, pids = child_of(link, role), descendants() - before
        said, after_s = struck(system, link, pid, number)
    assert f"{role} {WORDS[number]}" in said
    assert f"(pid {pid})" in said
    assert after_s < NAMED_WITHIN_S[number]
    assert not left_over(pids)
