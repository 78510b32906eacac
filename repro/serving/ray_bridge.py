"""The near end of a Ray placement: `python -m repro.serving.ray_bridge`, a child that stands for a program on a node of a Ray cluster.

To the fleet it is a child as any other. It joins the cluster as a driver of its own, places one actor on a node of the side that it was
told, and passes messages both ways. So each end ends as any other fault: with this process Ray ends its actor, and with the actor the
program goes; when the actor's worker, its node or the program ends or falls silent, this process says so and goes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
import threading
from typing import Any

from repro.errors import UserError
from repro.processes import Message, Parent, run_worker
from repro.serving.ray_host import Host

#: What an actor's methods are grouped by: one thread each.
_GROUPS = ("tell", "ask", "said", "afflict")
#: How long a worker may take to start on its node, and to answer afterwards: it does so once a second.
_START_TIMEOUT_S, _SILENT_AFTER_S = 60.0, 10.0


def connected(address: str) -> Any:
    """Ray's module, connected to a running cluster. Raises UserError where it is not installed or there is no cluster."""
    try:
        import ray
    except ImportError:
        raise UserError("ray is not installed; `pip install 'prfaas-repro[ray]'` adds it") from None
    host, _, port = address.rpartition(":")
    try:
        # Ray itself asks for a minute before it says that nobody is there.
        socket.create_connection((host, int(port)), timeout=5.0).close()
        ray.init(address=address, log_to_driver=False, configure_logging=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"no Ray cluster at {address}: {str(error).splitlines()[0]}") from None
    return ray


def alive(ray: Any) -> list[dict[str, Any]]:
    """The nodes of the cluster, always in the same order."""
    nodes = [
        {"id": node["NodeID"], "host": node["NodeManagerAddress"], "resources": node["Resources"]}
        for node in ray.nodes()
        if node["Alive"]
    ]
    return sorted(nodes, key=lambda node: str(node["id"]))


def of_side(nodes: list[dict[str, Any]], side: str, address: str) -> list[dict[str, Any]]:
    """Those of them that stand on a side of the link. Raises UserError where none does."""
    found = [node for node in nodes if node["resources"].get(side, 0) >= 1]
    if not found:
        raise UserError(
            f"ray: no node of {address} has the resource {side!r}; accepted: nodes of `ray start … --resources '{{\"{side}\": 4}}'`"
        )
    return found


class Bridge:
    """Messages between the process that started this one and an actor."""

    def __init__(self, parent: Parent, ray: Any, host: Any, address: str) -> None:
        self._parent = parent
        self._ray = ray
        self._host = host
        self._address = address
        self._stopping = threading.Event()

    def tell(self, message: Message) -> None:
        """Pass a message on to the far end: an order, a question that is answered from there, or a fault."""
        match message["kind"]:
            case "afflict":
                self._host.afflict.options(concurrency_group="afflict").remote(message["what"])
                return
            case "stop":
                self._stopping.set()
            case "config" if message["host"] is not None:
                message = {**message, "host": self._address}
        if "number" in message:
            threading.Thread(target=self._ask, args=(message,), daemon=True).start()
        else:
            self._host.tell.options(concurrency_group="tell").remote(json.dumps(message))

    def _ask(self, question: Message) -> None:
        asking = self._host.ask.options(concurrency_group="ask").remote(json.dumps(question))
        with contextlib.suppress(self._ray.exceptions.RayError):  # `listen` says so
            self._parent.reply(question, **json.loads(self._ray.get(asking)))

    def listen(self) -> None:
        """Pass on what the far end says, until it was told to stop and has. Raises UserError where it is gone."""
        timeout_s = _START_TIMEOUT_S
        while True:
            said = self._host.said.options(concurrency_group="said").remote()
            try:
                found = json.loads(self._ray.get(said, timeout=timeout_s))
            except self._ray.exceptions.GetTimeoutError:
                raise UserError(f"its Ray worker is silent for {timeout_s:g} s") from None
            except self._ray.exceptions.RayError as error:
                raise UserError(f"its Ray worker has ended: {type(error).__name__}") from None
            timeout_s = _SILENT_AFTER_S
            for message in found:
                if message["kind"] != "ended":
                    self._parent.send_text(json.dumps(message).encode())
                elif self._stopping.is_set():
                    return
                else:
                    self._parent.send("failed", **{key: value for key, value in message.items() if key != "kind"})
                    os._exit(1)


def work(parent: Parent, first: Message) -> None:
    """Answer what nodes there are and what they have free, or stand for a program until it ends."""
    address, *rest = sys.argv[1:]
    ray = connected(address)
    if first["kind"] == "nodes":
        parent.reply(first, nodes=alive(ray), free=ray.available_resources())
        return
    index, side, module, name, *environment = rest
    # Of the nodes that are alive now: a program that is started anew goes elsewhere where its node has ended.
    nodes = of_side(alive(ray), side, address)
    node = nodes[int(index) % len(nodes)]
    pinned = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node["id"], soft=False)
    remote = ray.remote(concurrency_groups=dict.fromkeys(_GROUPS, 1))(Host)
    host = remote.options(num_cpus=0, resources={side: 1}, scheduling_strategy=pinned).remote(
        module, name, dict(one.split("=", 1) for one in environment)
    )
    parent.send("placed", host=node["host"])
    bridge = Bridge(parent, ray, host, node["host"])
    bridge.tell(first)
    parent.deliver(bridge.tell)
    bridge.listen()


if __name__ == "__main__":
    run_worker(work)
