"""An open link, whatever makes it: where to bind, where to dial, how to start a program on either side, what it
measured.

A program that uses a link never knows the backend: it is started with `command`, binds `listen_host`, and dials
`dial`. Both ends are ordinary processes with ordinary sockets, so a serving engine or iperf3 crosses the link
unchanged.
"""

from __future__ import annotations

import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from repro.configuration import plain
from repro.errors import UserError
from repro.link.child import Child
from repro.link.leftovers import mark
from repro.link.namespaces import ADDRESSES, other
from repro.link.spec import Direction, LinkSpec, Side


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

    def start(self) -> float:
        """Begin the schedule and the capacity trace; returns that moment, monotonic. Before, all is constant."""
        return time.monotonic()

    def signals(self) -> LinkSignals:
        """The link's own counters now."""
        return LinkSignals(time.monotonic())

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
        self._relay = Child("repro.link.relay", run, plain(spec))
        self._ports: dict[tuple[int, Side], int] = {}

    def dial(self, port: int, side: Side = "prefill") -> tuple[str, int]:
        """The relay's port that leads there."""
        _known(side)
        if (port, side) not in self._ports:
            direction: Direction = "forward" if side == "prefill" else "reverse"
            answer = self._relay.ask({"dial": ["127.0.0.1", port, direction]})
            self._ports[port, side] = int(answer["port"])
        return "127.0.0.1", self._ports[port, side]

    def start(self) -> float:
        """Begin the schedule."""
        at_s = time.monotonic()
        self._relay.ask({"start": at_s})
        return at_s

    def signals(self) -> LinkSignals:
        """Bytes that wait for capacity; nothing is ever dropped."""
        return signals_of(self._relay.ask({"signals": True}))

    def close(self) -> None:
        """End the relay and every connection through it."""
        self._relay.close()


class NamespacedLink(Link):
    """Two hosts in network namespaces of their own and a router between them, held by a keeper process."""

    def __init__(self, spec: LinkSpec, run: str, backend: str, given_up: Sequence[str]) -> None:
        if shutil.which("nsenter") is None:
            raise Unavailable(backend, "`nsenter` of util-linux is not installed")
        self._keeper = Child("repro.link.keeper", run, {"spec": plain(spec), "backend": backend})
        hello = self._keeper.hello
        if "unavailable" in hello:
            self._keeper.close()
            raise Unavailable(backend, hello["unavailable"])
        super().__init__(spec, run, backend, [*given_up, *hello["lost"]])
        self.facts = {"rootless": hello["rootless"], **hello["facts"]}
        self._sides: dict[Side, str] = hello["sides"]

    def command(self, side: Side, argv: Sequence[str]) -> list[str]:
        """`argv` in that side's namespace. Both prefixes replace themselves, so the process keeps its number."""
        _known(side)
        user = ["--preserve-credentials", f"--user=/proc/{self._keeper.pid}/ns/user"] if self.facts["rootless"] else []
        return ["env", mark(self.run), "nsenter", *user, f"--net={self._sides[side]}", "--", *argv]

    def listen_host(self, side: Side) -> str:
        """The side's address on the link."""
        _known(side)
        return ADDRESSES[side]

    def dial(self, port: int, side: Side = "prefill") -> tuple[str, int]:
        """The far side's address; the port is the same."""
        _known(side)
        return ADDRESSES[other(side)], port

    def start(self) -> float:
        """Begin the schedule and the trace."""
        at_s = time.monotonic()
        self._keeper.ask({"start": at_s})
        return at_s

    def signals(self) -> LinkSignals:
        """Counters of the router."""
        return signals_of(self._keeper.ask({"signals": True}))

    def close(self) -> None:
        """End the keeper; with it and the programs that ran inside, the namespaces are gone."""
        self._keeper.close()


def signals_of(answer: dict[str, Any]) -> LinkSignals:
    """Signals from a helper's answer."""
    return LinkSignals(answer["at_s"], DirectionSignals(**answer["forward"]), DirectionSignals(**answer["reverse"]))


def _known(side: str) -> None:
    if side not in ("prefill", "decode"):
        raise UserError(f"link: there is no side {side!r}; accepted: prefill, decode")
