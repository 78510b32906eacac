"""An open link, whatever makes it: where to bind, where to dial, how to start a program on either side, what it
measured.

A program that uses a link never knows the backend: it is started with `command`, binds `listen_host`, and dials
`dial`. Both ends are ordinary processes with ordinary sockets, so a serving engine or iperf3 crosses the link
unchanged.
"""

from __future__ import annotations

import logging
import shutil
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from repro.configuration import plain
from repro.errors import UserError
from repro.link.leftovers import mark, marked
from repro.link.measurement import LinkMeasurement, measure
from repro.link.namespaces import ADDRESSES, inside, other
from repro.link.spec import Direction, LinkSpec, Side
from repro.processes import Child

log = logging.getLogger("repro.link")

_START_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class DirectionSignals:
    """Counters of one direction since the link was made.

    Dropped: no room in the queue. Lost: by the link's loss. Overrun: came faster than the forwarder could take it,
    which no link was asked for. `cpu_s`: what the forwarder has used.
    """

    queue_bytes: float = 0.0
    dropped_segments: int = 0
    lost_segments: int = 0
    forwarded_bytes: float = 0.0
    overrun_packets: int = 0
    cpu_s: float = 0.0


@dataclass(frozen=True)
class LinkSignals:
    """What the link itself shows at a moment (monotonic seconds)."""

    at_s: float
    forward: DirectionSignals = DirectionSignals()
    reverse: DirectionSignals = DirectionSignals()


class Unavailable(UserError):  # noqa: N818 - the name says it
    """This machine or this user cannot have that backend; `why` in a few words."""

    def __init__(self, backend: str, why: str) -> None:
        super().__init__(f"link.backend: {backend} is not available: {why}")
        self.why = why


class Link(ABC):
    """A link that is up. Use it as a context manager; closing it twice is harmless."""

    def __init__(self, spec: LinkSpec, run: str, backend: str, given_up: Sequence[str]) -> None:
        self.spec = spec
        self.run = run
        self.backend = backend
        self.given_up = tuple(given_up)
        self.facts: dict[str, Any] = {}
        self.measured: dict[Direction, LinkMeasurement] = {}
        #: The process that the link stands on, for whoever must know of its end; it speaks for the forwarders too.
        self.helper: Child | None = None

    def command(self, side: Side, argv: Sequence[str]) -> list[str]:
        """`argv`, prefixed so that it runs on that side of the link."""
        _known(side)
        return list(argv)

    @abstractmethod
    def listen_host(self, side: Side) -> str:
        """The address that a server on that side binds."""

    @abstractmethod
    def dial(self, port: int, side: Side = "prefill") -> tuple[str, int]:
        """Where a client on `side` connects to reach `port` of the other side through the link."""

    def start(self, elapsed_s: float = 0.0) -> float:
        """Begin the schedule and the capacity trace, as if `elapsed_s` ago; returns that moment, monotonic. Before, all is constant.

        Begun again, it goes to another moment of the schedule.
        """
        return time.monotonic() - elapsed_s

    def signals(self) -> LinkSignals:
        """The link's own counters now."""
        return LinkSignals(time.monotonic())

    def measure(self, direction: Direction = "forward", rate_s: float = 1.0, pings: int = 100) -> LinkMeasurement:
        """Measure one direction now, with a program on each side; about 2 s and a few round trips. Keeps the result for the record."""
        self.measured[direction] = measure(self, direction, rate_s, pings)
        return self.measured[direction]

    def check(self, *, tolerate: bool = False) -> list[str]:
        """Measure the link and hold it against what was asked; returns a warning for each thing that is slightly off.

        Raises:
            UserError: naming what this machine was measured to hold, if the link is off by more than a tenth and not
            `tolerate`.
        """
        symmetric = self.spec.base("forward").rate_bps == self.spec.base("reverse").rate_bps
        directions: list[Direction] = ["forward"] if symmetric else ["forward", "reverse"]
        warnings, refusals = [], []
        for direction in directions:
            found = self.measure(direction)
            if self.backend != "none":
                warnings += [f"link ({direction}): {line}" for line in found.warnings(self.spec)]
                refusals += found.refusals(self.spec)
        if refusals and not tolerate:
            raise UserError("; ".join(refusals))
        for line in warnings:
            log.warning("%s", line)
        return warnings

    def record(self) -> dict[str, Any]:
        """What was asked, what makes it, what it gave up and what was measured, for the provenance of a run."""
        return {
            "backend": self.backend,
            "given_up": list(self.given_up),
            "asked": plain(self.spec),
            "measured": {direction: plain(found) for direction, found in self.measured.items()},
            **self.facts,
        }

    def close(self) -> None:  # noqa: B027 - plain loopback has nothing to take down
        """Take the link down: processes, sockets and namespaces are gone when this returns."""

    def __enter__(self) -> Link:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class DirectLink(Link):
    """No link at all: loopback as it is."""

    def listen_host(self, side: Side) -> str:
        """Loopback."""
        _known(side)
        return "127.0.0.1"

    def dial(self, port: int, side: Side = "prefill") -> tuple[str, int]:
        """The port itself."""
        return self.listen_host(side), port


class RelayLink(DirectLink):
    """A relay process between loopback ports; each `dial` of a new port makes a listener."""

    def __init__(self, spec: LinkSpec, run: str, given_up: Sequence[str]) -> None:
        super().__init__(spec, run, "relay", given_up)
        self._ports: dict[tuple[int, Side], int] = {}
        self._relay = self.helper = _helper("relay", run)
        self.facts = dict(_asked(self._relay, spec=plain(spec))["facts"])

    def dial(self, port: int, side: Side = "prefill") -> tuple[str, int]:
        """The relay's port that leads there."""
        _known(side)
        if (port, side) not in self._ports:
            direction: Direction = "forward" if side == "prefill" else "reverse"
            answer = self._relay.ask("dial", host="127.0.0.1", port=port, direction=direction)
            self._ports[port, side] = int(answer["port"])
        return "127.0.0.1", self._ports[port, side]

    def start(self, elapsed_s: float = 0.0) -> float:
        """Begin the schedule."""
        at_s = time.monotonic() - elapsed_s
        self._relay.ask("start", at_s=at_s)
        return at_s

    def signals(self) -> LinkSignals:
        """Bytes that wait for capacity; nothing is ever dropped."""
        return signals_of(self._relay.ask("signals"))

    def close(self) -> None:
        """End the relay and every connection through it."""
        self._relay.end()


class NamespacedLink(Link):
    """Two hosts in network namespaces of their own and a router between them, held by a keeper process."""

    def __init__(self, spec: LinkSpec, run: str, backend: str, given_up: Sequence[str]) -> None:
        if shutil.which("nsenter") is None:
            raise Unavailable(backend, "`nsenter` of util-linux is not installed")
        keeper = _helper("keeper", run)
        hello = _asked(keeper, spec=plain(spec), backend=backend)
        if "unavailable" in hello:
            keeper.end()
            raise Unavailable(backend, hello["unavailable"])
        super().__init__(spec, run, backend, [*given_up, *hello["lost"]])
        self._keeper = self.helper = keeper
        self.facts = {"rootless": hello["rootless"], **hello["facts"]}

    def command(self, side: Side, argv: Sequence[str]) -> list[str]:
        """`argv` in that side's namespace. Both prefixes replace themselves, so the process keeps its number."""
        _known(side)
        return ["env", mark(self.run), *inside(self._keeper.pid, side, argv)]

    def listen_host(self, side: Side) -> str:
        """The side's address on the link."""
        _known(side)
        return ADDRESSES[side]

    def dial(self, port: int, side: Side = "prefill") -> tuple[str, int]:
        """The far side's address; the port is the same."""
        _known(side)
        return ADDRESSES[other(side)], port

    def start(self, elapsed_s: float = 0.0) -> float:
        """Begin the schedule and the trace."""
        at_s = time.monotonic() - elapsed_s
        self._keeper.ask("start", at_s=at_s)
        return at_s

    def signals(self) -> LinkSignals:
        """Counters of the router."""
        return signals_of(self._keeper.ask("signals"))

    def close(self) -> None:
        """End the keeper; with it and the programs that ran inside, the namespaces are gone."""
        self._keeper.end()


def _helper(name: str, run: str) -> Child:
    return Child(f"link {name}", [sys.executable, "-m", f"repro.link.{name}"], environment=marked(run))


def _asked(helper: Child, **values: Any) -> dict[str, Any]:
    """What a helper answers to the order to make the link. It is gone where it refuses."""
    try:
        return helper.ask("open", _START_TIMEOUT_S, **values)
    except BaseException:
        helper.kill()
        raise


def signals_of(answer: dict[str, Any]) -> LinkSignals:
    """Signals from a helper's answer."""
    return LinkSignals(answer["at_s"], DirectionSignals(**answer["forward"]), DirectionSignals(**answer["reverse"]))


def _known(side: str) -> None:
    if side not in ("prefill", "decode"):
        raise UserError(f"link: there is no side {side!r}; accepted: prefill, decode")
