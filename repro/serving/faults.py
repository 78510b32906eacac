"""Faults of a live deployment, by a schedule: instances killed, stopped, slow, without memory or disk, and the router started anew.

They are done to the processes from outside (SIGKILL, SIGSTOP, limits of the kernel) or told to the instance itself: the system has to
notice what they do by itself. Faults of the link are its own schedule.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from repro.errors import UserError
from repro.serving import messages as say
from repro.serving.afflictions import Affliction
from repro.serving.fleet import Fleet
from repro.serving.scale import Scale

Kind = Literal["kill", "stop", "slow", "out_of_memory", "disk_full", "restart"]
#: What the router is called where an instance has its name.
ROUTER = "router"


@dataclass(frozen=True)
class LiveFault:
    """A fault at `at_s` of an instance ("prfaas0.1", "pd0.3"), or of the router; all is well again `for_s` later.

    `kill`: started anew then. `stop`: goes on, unless it was taken for dead meanwhile and replaced. `slow`: takes `factor` times as
    long. `out_of_memory`: a PD instance takes no request into its batch. `disk_full`: what it writes to files fails. `restart`: the
    router is gone for so long, then begins with nothing but what its clients ask again.
    """

    instance: str
    at_s: float
    for_s: float
    kind: Kind = "kill"
    factor: float = 10.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UserError(f"faults.kind: {self.kind!r} is unknown; accepted: {', '.join(get_args(Kind))}")
        if self.at_s < 0 or not self.for_s > 0 or not self.factor > 0:
            raise UserError("faults: at_s must not be negative, for_s and factor must be positive")
        if (self.kind == "restart") != (self.instance == ROUTER):
            raise UserError(
                f"faults.instance: {self.instance!r} for {self.kind}; accepted: restart of the {ROUTER} alone"
            )
        if self.kind == "out_of_memory" and not self.instance.startswith("pd"):
            raise UserError(
                f"faults.instance: {self.instance!r} decodes nothing; accepted for out_of_memory: pd0.<index>"
            )


class Restartable(Protocol):
    """The router, as far as faults are concerned."""

    def go_down(self) -> None:
        """End it."""
        ...

    def come_up(self) -> None:
        """Start it anew."""
        ...

    def note(self, words: str) -> None:
        """Put an event into the record."""
        ...


class FaultSchedule:
    """Does the faults while a run goes on; `replace(name)` starts an instance anew. A context manager around the run."""

    def __init__(
        self,
        faults: Sequence[LiveFault],
        fleet: Fleet,
        router: Restartable,
        scale: Scale,
        replace: Callable[[str], None],
    ) -> None:
        if unknown := sorted({fault.instance for fault in faults} - {*fleet.names, ROUTER}):
            raise UserError(f"faults.instance: {unknown[0]!r} is none; accepted: {', '.join((*fleet.names, ROUTER))}")
        self._fleet = fleet
        self._router = router
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
        self._router.note(f"fault {fault.kind} of {fault.instance}")
        match fault.kind:
            case "kill" | "stop":
                self._afflict(fault.instance, fault.kind)
            case "slow":
                self._fleet.tell(fault.instance, say.Slow(fault.factor))
            case "out_of_memory":
                self._fleet.tell(fault.instance, say.Memory(full=True))
            case "disk_full":
                self._afflict(fault.instance, "fill_disk")
            case "restart":
                self._router.go_down()

    def _end(self, fault: LiveFault) -> None:
        match fault.kind:
            case "kill":
                self._replace(fault.instance)
            case "stop" if self._fleet.is_alive(fault.instance):
                self._afflict(fault.instance, "continue")
            case "stop":
                self._replace(fault.instance)
            case "slow":
                self._fleet.tell(fault.instance, say.Slow(1.0))
            case "out_of_memory":
                self._fleet.tell(fault.instance, say.Memory(full=False))
            case "disk_full":
                self._afflict(fault.instance, "free_disk")
            case "restart":
                self._router.come_up()

    def _afflict(self, name: str, what: Affliction) -> None:
        try:
            self._fleet.afflict(name, what)
        except PermissionError as error:
            self._router.note(f"{what} of {name} could not be done: {error.strerror}")
