"""A running deployment in the terminal: rates, queues, threshold, link and instances, drawn twice a second where stderr is a terminal.

Where it is none (a pipe, a file, a worker of a sweep) nothing is drawn and no thread is started, so that logs stay logs and a run that
measures is not looked at. It shows what the router knows (`View`), asked for in the router's own thread, and tells nobody anything.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from itertools import groupby

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from repro.processes import beside
from repro.serving.listener import View

_EVERY_S = 0.5
#: Rates are means over so many views.
_VIEWS = 11
#: A router that does not answer for so long, in seconds, is asked again later.
_PATIENCE_S = 2.0


@contextmanager
def shown(view: Callable[[], Future[View]], console: Console | None = None) -> Iterator[None]:
    """Within, draw what `view` says on a terminal: by default the one of stderr. What others print there goes above it."""
    console = console or Console(stderr=True)
    if not console.file.isatty() or console.is_dumb_terminal or multiprocessing.parent_process() is not None:
        yield
        return

    def run(over: threading.Event) -> None:
        views: deque[View] = deque(maxlen=_VIEWS)
        # A terminal that goes away takes the drawing along, not the run.
        with contextlib.suppress(OSError), Live(console=console, auto_refresh=False, transient=True) as live:
            while not over.wait(_EVERY_S) and console.file.isatty():
                with contextlib.suppress(TimeoutError):
                    views.append(view().result(_PATIENCE_S))
                    live.update(drawn(views), refresh=True)

    with beside(run, name="live view"):
        yield


def drawn(views: Sequence[View]) -> Table:
    """The latest view, with rates since the first; times, bytes and rates are the deployment's, unscaled."""
    first, last = views[0], views[-1]
    span_s = last.at_s - first.at_s

    def rate(now: float, then: float) -> float:
        return (now - then) / span_s if span_s > 0 else 0.0

    table = Table.grid(padding=(0, 2))
    came, left = rate(last.arrived, first.arrived), rate(last.answered, first.answered)
    table.add_row("requests", f"{came:.2f}/s arrive, {left:.2f}/s answered; {_total(last)}")
    table.add_row("queues", " · ".join(f"{phase.replace('_', ' ')} {held}" for phase, held in last.phases.items()))
    if any(name.startswith("prfaas") for name in last.roles):
        table.add_row("threshold", f"{last.threshold_tokens:,.0f} tokens")
        table.add_row("link", _link(last, 8 * rate(last.crossed_bytes, first.crossed_bytes)))
    for (cluster, role), names in groupby(
        sorted(last.roles, key=lambda one: _pool(last, one)), lambda one: _pool(last, one)
    ):
        held = " ".join(str(last.held[name]) for name in names)
        table.add_row(f"{cluster} {role}", Text(held, style="red" if role == "down" else ""))
    return table


def _pool(view: View, name: str) -> tuple[str, str]:
    return name.partition(".")[0], view.roles[name]


def _total(view: View) -> str:
    counted = f"{view.arrived} in all, {view.answered} answered after {max(view.at_s, 0):,.0f} s"
    return f"{counted}, {view.unanswered} not answered" if view.unanswered else counted


def _link(view: View, carried_bps: float) -> Text:
    if not view.link_up:
        return Text("down", style="red")
    sold = f" of {view.link_bps / 1e9:g}" if view.link_bps < float("inf") else ""
    scarce = ", bandwidth is scarce" if view.bandwidth_scarce else ""
    return Text(f"{carried_bps / 1e9:.2f}{sold} Gbps of KVCache{scarce}", style="yellow" if scarce else "")
