"""The instances of a deployment as processes: started on their sides of the link, connected, watched, and gone when it is over.

PrfaaS instances stand on the link's prefill side, PD instances on its decode side; only KVCache crosses. A `Launcher` says how an instance
is started, so that the same deployment runs as processes of this machine or wherever else something can start them.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Protocol, cast

from repro.configuration import plain
from repro.errors import UserError
from repro.link import Link, Side
from repro.link.namespaces import other as across
from repro.processes import Child, Ended, Message, Warm
from repro.serving import messages as say
from repro.serving.afflictions import Affliction, afflict
from repro.serving.clocks import Clocks

#: What instances may take to start that load nothing large.
START_TIMEOUT_S = 120.0
#: One thread per instance: a dozen instances share the cores of a laptop, and none of them computes.
ENVIRONMENT = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


@dataclass(frozen=True)
class Place:
    """An instance of the deployment: its pool's cluster ("prfaas0", "pd0"), its index there, and the link's side that it stands on."""

    cluster: str
    index: int
    side: Side

    @property
    def name(self) -> str:
        """In messages, logs and records."""
        return f"{self.cluster}.{self.index}"


class Config(Protocol):
    """What an instance is started with, a frozen dataclass; `MODULE` is the program that it is for, and so says which engine runs."""

    MODULE: ClassVar[str]

    @property
    def name(self) -> str:
        """The instance."""
        ...

    @property
    def forks(self) -> bool:
        """Whether it may be a fork of a process that has called the program's `warm`, because its start costs seconds otherwise."""
        ...


class Launcher(Protocol):
    """Starts an instance somewhere; `hear` gets what it says and `ended` the news of its end, in threads of the launcher's."""

    def prepare(self, places: Mapping[Place, Config]) -> None:
        """Begin what can be begun for several instances at once: they are about to be started."""
        ...

    def start(
        self, place: Place, config: Config, hear: Callable[[Message], None], ended: Callable[[Ended], None]
    ) -> Child:
        """Start it."""
        ...

    def host(self, place: Place) -> str:
        """The address that an instance there receives on."""
        ...

    def dial(self, place: Place, port: int) -> tuple[str, int]:
        """Where the other side reaches that port of an instance, through the link."""
        ...

    def afflict(self, child: Child, what: Affliction) -> None:
        """Do a fault to an instance that was started."""
        ...

    def measured(self, link: Link) -> dict[str, Any]:
        """Measure what lies between the two sides, for the record: what was asked of the link and what it was found to be."""
        ...

    def close(self) -> None:
        """Give up what was prepared; all instances have ended."""
        ...


class LocalLauncher:
    """Processes of this machine, each in the network of its side of an open link.

    Those that may be forks are forked of a process per side that has imported their program once; where it was killed, which ends them
    too, the next start makes another.
    """

    def __init__(self, link: Link, log_directory: Path) -> None:
        self._link = link
        self._log_directory = log_directory
        self._warm: dict[Side, Warm] = {}

    def prepare(self, places: Mapping[Place, Config]) -> None:
        """Let the imports begin on every side."""
        for place, config in places.items():
            self._program(place, config)

    def start(
        self, place: Place, config: Config, hear: Callable[[Message], None], ended: Callable[[Ended], None]
    ) -> Child:
        """Start the instance's process."""
        program = self._program(place, config)
        child = Child(
            f"instance {place.name}",
            program,
            hear=lambda message, _beside: hear(message),
            environment=None if isinstance(program, Warm) else ENVIRONMENT,
            stderr=self._log_directory / f"{place.name}.log",
        )
        child.on_end(ended)
        child.send("config", **plain(cast(Any, config)))
        return child

    def _program(self, place: Place, config: Config) -> list[str] | Warm:
        """What an instance is started from: a command, or the warm process of its side."""
        if not config.forks:
            return self._link.command(place.side, [sys.executable, "-m", config.MODULE])
        warm = self._warm.get(place.side)
        if warm is None or warm.ended:
            if warm is not None:
                warm.close()
            name = f"warm-{place.side}"
            command = self._link.command(place.side, Warm.program(config.MODULE))
            log = self._log_directory / f"{name}.log"
            self._warm[place.side] = warm = Warm(name, command, plain(cast(Any, config)), ENVIRONMENT, log)
        return warm

    def host(self, place: Place) -> str:
        """The side's address on the link."""
        return self._link.listen_host(place.side)

    def dial(self, place: Place, port: int) -> tuple[str, int]:
        """Through the link."""
        return self._link.dial(port, across(place.side))

    def afflict(self, child: Child, what: Affliction) -> None:
        """Do a fault to its process."""
        afflict(child.pid, what)

    def measured(self, link: Link) -> dict[str, Any]:
        """The link itself."""
        link.check(tolerate=True)
        return link.record()

    def close(self) -> None:
        """End the warm processes."""
        for warm in self._warm.values():
            warm.close()
        self._warm.clear()


class Fleet:
    """All instances, by name; a context manager, after which every one is gone.

    `hands_over`: PD instances send each other KVCache too, within the cluster, as engines that compute have to. `copies`: every instance
    receives, and prefixes cross the link both ways. Whoever does not serve within `start_timeout_s` is taken to have failed.
    `heard(name, said)` gets what instances say, its moments on this process's clock, and `ended(name, how)` the news of an end;
    both are called in the launcher's threads.
    """

    def __init__(
        self,
        launcher: Launcher,
        heard: Callable[[str, say.FromInstance], None],
        ended: Callable[[str, Ended], None],
        *,
        hands_over: bool = False,
        copies: bool = False,
        start_timeout_s: float = START_TIMEOUT_S,
    ) -> None:
        self._launcher = launcher
        self._start_timeout_s = start_timeout_s
        self._hands_over = hands_over
        self._copies = copies
        self._heard = heard
        self._ended = ended
        self._children: dict[str, Child] = {}
        self._places: dict[str, Place] = {}
        self._ports: dict[str, int] = {}
        self._changed = threading.Condition()
        self._connections = set[tuple[str, str]]()
        self._failure: Ended | None = None
        self._serving = False
        self._coming = set[str]()
        #: How each instance's clock stands to this process's.
        self.clocks = Clocks()
        #: Every process that it ever started.
        self.pids = set[int]()

    def start(self, places: Mapping[Place, Config]) -> None:
        """Start all instances at once, compare their clocks, and connect whoever sends to every PD instance; returns when they serve.

        Raises:
            UserError: naming an instance that ended or did not come up in time.
        """
        self._launcher.prepare(places)
        for place, config in places.items():
            self._start(place, config)
        self._wait(lambda: all(place.name in self._ports for place in places), "start")
        self._wait(lambda: all(self.clocks.measured(place.name) for place in places), "tell the time")
        pairs = [(one, other) for one in places for other in places if self._sends(one, other)]
        for one, other in pairs:
            self._connect(one, other)
        wanted = {(one.name, other.name) for one, other in pairs}
        self._wait(lambda: wanted <= self._connections, "connect")
        self._serving = True

    def _start(self, place: Place, config: Config) -> None:
        self._places[place.name] = place
        child = self._launcher.start(place, config, partial(self._hear, place.name), partial(self._end, place.name))
        self._children[place.name] = child
        self.pids.add(child.pid)

    def _sends(self, one: Place, other: Place) -> bool:
        if one.side != other.side:
            return other.side == "decode" or self._copies
        return other.side == "decode" and one != other and self._hands_over

    def _connect(self, sender: Place, receiver: Place) -> None:
        port = self._ports[receiver.name]
        over_link = sender.side != receiver.side
        host, port = self._launcher.dial(receiver, port) if over_link else (self._launcher.host(receiver), port)
        self.tell(sender.name, say.Connect(receiver.name, host, port))

    def replace(self, name: str, config: Config) -> None:
        """Start an instance anew in place of one that has ended or is silent; once it is connected, `Ready` is heard of it."""
        self._children[name].kill()
        self.clocks.forget(name)
        with self._changed:
            self._ports.pop(name, None)
            self._connections = {pair for pair in self._connections if name not in pair}
            self._coming.add(name)
        self._start(self._places[name], config)

    def tell(self, name: str, said: say.ToInstance) -> None:
        """Give an instance a message; one that has ended does not hear it."""
        self._children[name].send_text(say.encoded(said))

    def tell_all(self, said: say.ToInstance) -> None:
        """Give every instance a message."""
        for name in self._children:
            self.tell(name, said)

    def pid(self, name: str) -> int:
        """The process of an instance, or the one that stands for it here."""
        return self._children[name].pid

    def afflict(self, name: str, what: Affliction) -> None:
        """Do a fault to an instance, wherever it stands. Raises PermissionError where that is not allowed."""
        self._launcher.afflict(self._children[name], what)

    def wait(self) -> None:
        """Wait until everyone who was started anew serves.

        Raises:
            UserError: where somebody does not in time.
        """
        self._wait(lambda: not self._coming, "come back")

    def is_alive(self, name: str) -> bool:
        """Whether an instance's process has neither ended nor been taken for dead."""
        return self._children[name].ended is None

    @property
    def names(self) -> list[str]:
        """All instances."""
        return list(self._places)

    def _hear(self, name: str, message: Message) -> None:
        heard_s = time.monotonic()
        said = say.from_instance(message)
        if not isinstance(said, say.Ready | say.Connected | say.Time):
            self._heard(name, self.clocks.corrected(name, said))
            if self.clocks.is_due(name):
                self.tell(name, self.clocks.question(name))
            return
        with self._changed:
            if isinstance(said, say.Ready):
                self._ports[name] = said.port
                if name in self._coming:
                    self._reconnect(self._places[name])
                self.tell(name, self.clocks.question(name))
            elif isinstance(said, say.Time):
                self.clocks.note(name, said, heard_s)
                if not self.clocks.measured(name):
                    self.tell(name, self.clocks.question(name))
            else:
                self._connections.add((name, said.name))
            ready = [
                one
                for one in self._coming
                if one in self._ports and self.clocks.measured(one) and self._is_connected(self._places[one])
            ]
            self._coming.difference_update(ready)
            self._changed.notify_all()
        for one in ready:
            self._heard(one, say.Ready(self._ports[one]))

    def _reconnect(self, place: Place) -> None:
        for one, other in self._pairs(place):
            self._connect(one, other)

    def _is_connected(self, place: Place) -> bool:
        return all((one.name, other.name) in self._connections for one, other in self._pairs(place))

    def _pairs(self, place: Place) -> list[tuple[Place, Place]]:
        """Who sends to that instance and whom it sends to, of those that listen."""
        others = [one for one in self._places.values() if one.name in self._ports and one != place]
        pairs = [(one, place) for one in others] + [(place, one) for one in others]
        return [(one, other) for one, other in pairs if self._sends(one, other)]

    def _end(self, name: str, how: Ended) -> None:
        with self._changed:
            if not self._serving:
                self._failure = self._failure or how
            self._changed.notify_all()
        self._ended(name, how)

    def _wait(self, done: Callable[[], bool], what: str) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None or done(), self._start_timeout_s)
            if self._failure is not None:
                raise UserError(str(self._failure))
            if not done():
                raise UserError(f"fleet: not every instance could {what} within {self._start_timeout_s:g} s")

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        children = list(self._children.values())
        if kind is None:
            for child in children:
                child.ask_to_stop()
            for child in children:
                child.wait(3.0)
        for child in children:
            child.kill()
        self._launcher.close()
