"""The live view draws on a terminal, and is silent where there is none."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from itertools import count
from typing import Any

import pytest
from rich.console import Console

from repro.serving.listener import PHASES, View
from repro.serving.live_view import drawn, shown

ROLES = {"prfaas0.0": "prefill", "prfaas0.1": "down", "pd0.0": "prefill", "pd0.1": "decode", "pd0.2": "decode"}


def view(second: int = 0, **changed: Any) -> View:
    phases = dict(zip(PHASES, (4, 2, 1, 7), strict=True))
    held = {name: number for number, name in enumerate(ROLES)}
    at = View(
        19_500.0, False, True, 0.1, phases, held, ROLES, 1.0 * second, 3 * second, 2 * second, 0, 1e9 * second, 1e11
    )
    return at._replace(**changed)


def text(*views: View) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(drawn(views))
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_it_shows_rates_queues_threshold_link_and_instances() -> None:
    shown_ = text(view(0), view(10))
    for words in (
        "3.00/s arrive, 2.00/s answered; 30 in all, 20 answered after 10 s", "prefill 4 · transfer 2 · decode queue 1 · decode 7",
        "19,500 tokens", "8.00 of 100 Gbps of KVCache",
    ):  # fmt: skip
        assert words in shown_
    rows = [line.split() for line in shown_.splitlines()]
    assert ["pd0", "decode", "3", "4"] in rows
    assert ["prfaas0", "down", "1"] in rows
    assert "not answered" not in shown_
    assert "2 not answered" in text(view(), view(10, unanswered=2))
    assert "bandwidth is scarce" in text(view(bandwidth_scarce=True))
    assert ["link", "down"] in [line.split() for line in text(view(link_up=False)).splitlines()]
    alone = {"pd0.0": "prefill"}
    assert "link" not in text(view(roles=alone))


@pytest.fixture
def terminal() -> Iterator[tuple[int, Console]]:
    near, far = pty.openpty()
    with os.fdopen(near, "rb", buffering=0), os.fdopen(far, "w") as file:
        yield near, Console(file=file, width=120, _environ={"TERM": "xterm"})


def asker() -> tuple[Callable[[], Future[View]], threading.Event]:
    """What a router answers; the event is set once it was asked twice."""
    seconds, twice = count(), threading.Event()

    def ask() -> Future[View]:
        found = Future[View]()
        second = next(seconds)
        found.set_result(view(second))
        if second:
            twice.set()
        return found

    return ask, twice


def test_on_a_terminal_it_draws_and_takes_away_what_it_drew(terminal: tuple[int, Console]) -> None:
    near, console = terminal
    ask, twice = asker()
    with shown(ask, console):
        assert twice.wait(10)
    console.print("the end")
    written = b""
    while b"the end" not in written:
        written += os.read(near, 65536)
    assert b"19,500 tokens" in written
    # The lines are erased before what comes next, and the cursor is shown again.
    assert b"\x1b[2K" in written[written.rindex(b"19,500 tokens") :]
    assert b"\x1b[?25h" in written[written.rindex(b"\x1b[?25l") :]
    assert not [thread for thread in threading.enumerate() if thread.name == "live view"]


def test_a_terminal_that_goes_away_ends_the_drawing_and_nothing_else() -> None:
    near, far = pty.openpty()
    ask, twice = asker()
    with contextlib.suppress(OSError), os.fdopen(far, "w") as file:  # of what is left to flush to it
        console = Console(file=file, width=120, _environ={"TERM": "xterm"})
        with shown(ask, console):
            assert twice.wait(10)
            os.close(near)
            until_s = time.monotonic() + 10
            while [one for one in threading.enumerate() if one.name == "live view"] and time.monotonic() < until_s:
                time.sleep(0.05)
            assert not [one for one in threading.enumerate() if one.name == "live view"]


@pytest.mark.parametrize("environment", [{}, {"FORCE_COLOR": "1", "TTY_COMPATIBLE": "1"}], ids=["plain", "forced"])
def test_on_a_pipe_it_asks_nobody_and_writes_nothing(environment: dict[str, str]) -> None:
    near, far = os.pipe()
    ask, twice = asker()
    with os.fdopen(far, "w") as file, shown(ask, Console(file=file, _environ=environment)):
        assert not [thread for thread in threading.enumerate() if thread.name == "live view"]
        assert not twice.wait(1.2)
    with os.fdopen(near, "rb") as read:
        assert read.read() == b""


def test_a_dumb_terminal_is_left_alone() -> None:
    near, far = pty.openpty()
    with os.fdopen(near, "rb", buffering=0), os.fdopen(far, "w") as file:
        ask, twice = asker()
        with shown(ask, Console(file=file, _environ={"TERM": "dumb"})):
            assert not twice.wait(1.2)
