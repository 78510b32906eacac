"""The near end of a Ray placement: `python -m repro.serving.ray_bridge`, a child that stands for an instance on a node of a Ray cluster.

To the fleet it is a child as any other. It joins the cluster as a driver of its own, places one actor on the node that it was told, and
passes messages both ways. So each end ends as any other fault: with this process Ray ends its actor, and with the actor the instance goes;
when the actor's worker, its node or the instance ends, this process says so and goes.
"""

from __future__ import annotations

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


def work(parent: Parent, first: Message) -> None:
    """Answer what nodes there are, or stand for an instance until it ends."""
    address, *rest = sys.argv[1:]
    ray = connected(address)
    if first["kind"] == "nodes":
        parent.reply(first, nodes=[
            {"id": node["NodeID"], "host": node["NodeManagerAddress"], "resources": node["Resources"]}
            for node in ray.nodes() if node["Alive"]
        ])  # fmt: skip
        return
    node, side, module, name, *environment = rest
    pinned = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False)
    remote = ray.remote(concurrency_groups={"tell": 1, "said": 1})(Host)
    host = remote.options(num_cpus=0, resources={side: 1}, scheduling_strategy=pinned).remote(
        module, name, dict(one.split("=", 1) for one in environment)
    )
    stopping = threading.Event()

    def tell(message: Message) -> None:
        if message["kind"] == "stop":
            stopping.set()
        host.tell.options(concurrency_group="tell").remote(json.dumps(message))

    tell(first)
    parent.deliver(tell)
    while True:
        try:
            found = json.loads(ray.get(host.said.options(concurrency_group="said").remote()))
        except ray.exceptions.RayError as error:
            raise UserError(f"its Ray worker has ended: {type(error).__name__}") from None
        for message in found:
            if message["kind"] != "ended":
                parent.send_text(json.dumps(message).encode())
            elif stopping.is_set():
                return
            else:
                words = {key: message[key] for key in ("role", "pid", "how", "rank")}
                parent.send("failed", **words)
                os._exit(1)


if __name__ == "__main__":
    run_worker(work)
