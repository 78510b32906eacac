"""Instances on the nodes of a Ray cluster, so that a deployment stands on more than one machine.

A node says by custom resources on which side of the link it stands: `ray start … --resources '{"prefill": 4}'` has room for four PrfaaS
instances, `{"decode": 4}` for four of the PD cluster. The link is then the network between the nodes, as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from repro.configuration import plain
from repro.errors import UserError
from repro.processes import Child, Ended, Message
from repro.serving.fleet import ENVIRONMENT, Config, Place

_BRIDGE = "repro.serving.ray_bridge"
_NODES_TIMEOUT_S = 60.0


class RayLauncher:
    """Places instances on the nodes of a running cluster, one after the other on those of its side.

    `address` is Ray's (`<head>:6379`); `prefix` goes before the commands that join the cluster from here, where that takes one.
    """

    def __init__(self, address: str, log_directory: Path, prefix: Sequence[str] = ()) -> None:
        self._address = address
        self._log_directory = log_directory
        self._prefix = list(prefix)
        with Child("ray bridge", self._command()) as bridge:
            nodes: list[dict[str, Any]] = bridge.ask("nodes", _NODES_TIMEOUT_S)["nodes"]
        self._nodes = {
            side: sorted(
                (node for node in nodes if node["resources"].get(side, 0) >= 1), key=lambda node: str(node["id"])
            )
            for side in ("prefill", "decode")
        }

    def _command(self, *arguments: str) -> list[str]:
        return [*self._prefix, sys.executable, "-m", _BRIDGE, self._address, *arguments]

    def start(
        self, place: Place, config: Config, hear: Callable[[Message], None], ended: Callable[[Ended], None]
    ) -> Child:
        """Start the process here that stands for the instance, which starts it there."""
        environment = [f"{key}={value}" for key, value in ENVIRONMENT.items()]
        child = Child(
            f"instance {place.name}",
            self._command(self._node(place)["id"], place.side, config.MODULE, place.name, *environment),
            hear=lambda message, _beside: hear(message),
            stderr=self._log_directory / f"{place.name}.log",
        )
        child.on_end(ended)
        child.send("config", **plain(cast(Any, config)))
        return child

    def host(self, place: Place) -> str:
        """The address of the node that it stands on."""
        return str(self._node(place)["host"])

    def dial(self, place: Place, port: int) -> tuple[str, int]:
        """Its node's address: the network between the nodes is the link."""
        return self.host(place), port

    def _node(self, place: Place) -> dict[str, Any]:
        nodes = self._nodes[place.side]
        if not nodes:
            raise UserError(
                f"ray: no node of {self._address} has the resource {place.side!r}; accepted: nodes of `ray start … --resources "
                f"'{{\"{place.side}\": 4}}'`"
            )
        return nodes[place.index % len(nodes)]
