"""Instances on the nodes of a Ray cluster, so that a deployment stands on more than one machine.

A node says by custom resources on which side of the link it stands: `ray start … --resources '{"prefill": 4}'` has room for four PrfaaS
instances, `{"decode": 4}` for four of the PD cluster. The link is then the network between the nodes, as it is.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from repro.configuration import plain
from repro.errors import UserError
from repro.link import Link, Side
from repro.link.link import DirectLink
from repro.link.namespaces import other
from repro.processes import Child, Ended, Message
from repro.serving.afflictions import Affliction
from repro.serving.fleet import ENVIRONMENT, Config, Place
from repro.serving.ray_bridge import of_side

_BRIDGE = "repro.serving.ray_bridge"
_NODES_TIMEOUT_S = 60.0
_SIDES: tuple[Side, ...] = ("prefill", "decode")


def check_placement(address: str | None, link: Any) -> None:
    """That a placement on Ray has the network of the nodes for its link. Raises UserError naming the key."""
    if address is None:
        return
    if link.backend != "none":
        raise UserError(
            f"ray: link.backend={link.backend} stands on one machine; accepted: link.backend=none, the network of the nodes"
        )
    if link.schedule:
        raise UserError("link.schedule: nothing changes the network between the nodes of ray; accepted with it: []")


class NodesLink(DirectLink):
    """The network between a node of either side, to be measured: programs are started on them by Ray."""

    def __init__(self, launcher: RayLauncher, link: Link, index: int) -> None:
        super().__init__(link.spec, link.run, "none", link.given_up)
        self._launcher = launcher
        self._index = index

    def command(self, side: Side, argv: Sequence[str]) -> list[str]:
        """That module of the kit on the side's node."""
        return self._launcher.command(str(self._index), side, argv[-1], "link probe")

    def listen_host(self, side: Side) -> str:
        """The node's address."""
        return str(self._launcher.node(side, self._index)["host"])

    def dial(self, port: int, side: Side = "prefill") -> tuple[str, int]:
        """The other node's address."""
        return self.listen_host(other(side)), port


class RayLauncher:
    """Places instances on the nodes of a running cluster, one after the other on those of its side.

    `address` is Ray's (`<head>:6379`); `prefix` goes before the commands that join the cluster from here, where that takes one.
    """

    def __init__(self, address: str, log_directory: Path, prefix: Sequence[str] = ()) -> None:
        self._address = address
        self._log_directory = log_directory
        self._prefix = list(prefix)
        self._hosts = dict[str, str]()
        nodes, self._free = self._cluster()
        self._nodes = {side: of_side(nodes, side, address) for side in _SIDES}

    def _cluster(self) -> tuple[list[dict[str, Any]], dict[str, float]]:
        """The nodes that are alive, and what the cluster has free."""
        with Child("ray bridge", self.command()) as bridge:
            answer = bridge.ask("nodes", _NODES_TIMEOUT_S)
        return answer["nodes"], answer["free"]

    def command(self, *arguments: str) -> list[str]:
        """The bridge, with those arguments after the cluster's address."""
        return [*self._prefix, sys.executable, "-m", _BRIDGE, self._address, *arguments]

    def node(self, side: Side, index: int) -> dict[str, Any]:
        """The node for the instance of that index."""
        nodes = self._nodes[side]
        return nodes[index % len(nodes)]

    def prepare(self, places: Mapping[Place, Config]) -> None:
        """Nothing: a node starts each instance as a program of its own."""

    def start(
        self, place: Place, config: Config, hear: Callable[[Message], None], ended: Callable[[Ended], None]
    ) -> Child:
        """Start the process here that stands for the instance, which starts it there."""

        def heard(message: Message, _beside: bytes) -> None:
            if message["kind"] == "placed":
                self._hosts[place.name] = message["host"]
            else:
                hear(message)

        environment = [f"{key}={value}" for key, value in ENVIRONMENT.items()]
        child = Child(
            f"instance {place.name}",
            self.command(str(place.index), place.side, config.MODULE, place.name, *environment),
            hear=heard,
            stderr=self._log_directory / f"{place.name}.log",
        )
        child.on_end(ended)
        child.send("config", **plain(cast(Any, config)))
        return child

    def host(self, place: Place) -> str:
        """The address of the node that it stands on, or will."""
        return self._hosts.get(place.name) or str(self.node(place.side, place.index)["host"])

    def dial(self, place: Place, port: int) -> tuple[str, int]:
        """Its node's address: the network between the nodes is the link."""
        return self.host(place), port

    def afflict(self, child: Child, what: Affliction) -> None:
        """Do a fault to the instance on its node."""
        child.send("afflict", what=what)

    def measured(self, link: Link) -> dict[str, Any]:
        """Measure the network from prefill to decode nodes, each node once at least: what was asked, and what was found by pair."""
        found = {}
        for index in range(max(map(len, self._nodes.values()))):
            pair = NodesLink(self, link, index)
            measured = pair.measure("forward")
            found[f"{pair.listen_host('prefill')} to {pair.listen_host('decode')}"] = plain(measured)
        return {**link.record(), "placed_by": "ray", "measured": found}

    def close(self) -> None:
        """Nothing was prepared."""

    def left(self, within_s: float = 10.0) -> int:
        """How many of the cluster's places for instances are taken that were free when this was made; waits for them to be given back."""
        until_s = time.monotonic() + within_s
        while True:
            _, free = self._cluster()
            left = sum(max(self._free.get(side, 0) - free.get(side, 0), 0) for side in _SIDES)
            if not left or time.monotonic() > until_s:
                return int(left)
