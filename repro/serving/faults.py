"""Faults of a live deployment, by a schedule: instances that are killed, stopped or slow, at times of the deployment.

They are done to the processes from outside (SIGKILL, SIGSTOP): the system has to notice them by itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from repro.errors import UserError
from repro.serving import messages as say
from repro.serving.fleet import Fleet
from repro.serving.scale import Scale


@dataclass(frozen=True)
class LiveFault:
    """At `at_s` an instance ("prfaas0.1", "pd0.3") is killed, stopped, or takes `factor` times as long; it is well again `for_s` later.

    A killed instance is started anew then; a stopped one goes on, unless it was taken for dead meanwhile and replaced.
    """

    instance: str
    at_s: float
    for_s: float
    kind: Literal["kill", "stop", "slow"] = "kill"
    factor: float = 10.0

    def __post_init__(self) -> None:
        if self.kind not in ("kill", "stop", "slow"):
            raise UserError(f"faults.kind: {self.kind!r} is unknown; accepted: kill, stop, slow")
        if self.at_s < 0 or not self.for_s > 0 or not self.factor > 0:
            raise UserError("faults: at_s must not be negative, for_s and factor must be positive")


class FaultSchedule:
    """Does the faults while a run goes on; `replace(name)` starts an instance anew. A context manager around the run."""

    def __init__(self, faults: Sequence[LiveFault], fleet: Fleet, scale: Scale, replace: Callable[[str], None]) -> None:
        if unknown := sorted({fault.instance for fault in faults} - set(fleet.names)):
            raise UserError(f"faults.instance: {unknown[0]!r} is none; accepted: {', '.join(fleet.names)}")
        self._fleet = fleet
        self._scale = scale
        self._replace = replace
        steps: list[tuple[float, Callable[[LiveFault], None], LiveFault]] = []
        for fault in faults:
            steps += [(fault.at_s, self._begin, fault), (fault.at_s + fault.for_s, self._end, fault)]
        self._steps = sorted(steps, key=lambda step: step[0])
        self._ill: list[LiveFault] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="faults", daemon=True)

    def __enter__(self) -> FaultSchedule:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End, and make everyone well who is not."""
        self._over.set()
        self._thread.join()
        for fault in self._ill:
            self._end(fault)

    def _run(self) -> None:
        for at_s, do, fault in self._steps:
            if self._over.wait(max(self._scale.wall_s(at_s) - time.monotonic(), 0.0)):
                return
            (self._ill.remove if fault in self._ill else self._ill.append)(fault)
            do(fault)

    def _begin(self, fault: LiveFault) -> None:
        if fault.kind == "slow":
            self._fleet.tell(fault.instance, say.Slow(fault.factor))
        else:
            self._signal(fault.instance, signal.SIGKILL if fault.kind == "kill" else signal.SIGSTOP)

    def _end(self, fault: LiveFault) -> None:
        if fault.kind == "slow":
            self._fleet.tell(fault.instance, say.Slow(1.0))
        elif fault.kind == "stop" and self._fleet.is_alive(fault.instance):
            self._signal(fault.instance, signal.SIGCONT)
        else:
            self._replace(fault.instance)

    def _signal(self, name: str, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._fleet.pid(name), number)
