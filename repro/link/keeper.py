"""The process that holds a link: its three namespaces, and what works in the middle one.

Run as `python -m repro.link.keeper` by the Link, spoken to in JSON lines: the first is {"spec": …, "backend": …};
then {"signals": …} answers the counters and {"start": t} begins the schedule. When its input ends, it ends, and
everything it holds is gone.
"""

from __future__ import annotations

import json
import mmap
import os
import select
import signal
import socket
import sys
import time
from typing import Any, Protocol

from repro.configuration import build
from repro.errors import UserError
from repro.link import kernel, namespaces
from repro.link.forwarder import Board, forward, wire_end
from repro.link.kernel_qdisc import KernelWire
from repro.link.namespaces import ROUTER_END, Namespaces
from repro.link.spec import Direction, LinkSpec, Side


class Wire(Protocol):
    """What works between the router's two interfaces."""

    def start(self, at_s: float) -> None:
        """Begin the schedule."""

    def signals(self) -> dict[str, Any]:
        """Counters per direction."""

    def next_due_s(self) -> float | None:
        """When `follow` is to be called next (monotonic), None for never."""

    def follow(self) -> None:
        """Do what the schedule asks for now."""

    def close(self) -> None:
        """End what works here; it is gone when this returns."""


class PacketWire:
    """A forwarder process per direction, which follow the schedule by themselves."""

    def __init__(self, spec: LinkSpec) -> None:
        ends = {side: wire_end(interface) for side, interface in ROUTER_END.items()}
        self.buffer_bytes = min(end.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) for end in ends.values())
        self._boards: dict[Direction, memoryview[float]] = {}
        self._forwarders: list[int] = []
        self.cores = _own_cores()
        ways: tuple[tuple[Direction, Side, Side], ...] = (
            ("forward", "prefill", "decode"),
            ("reverse", "decode", "prefill"),
        )
        for direction, source, sink in ways:
            board = memoryview(mmap.mmap(-1, Board.CELLS * 8)).cast("d")
            self._boards[direction] = board
            self._forwarders.append(os.fork())
            if self._forwarders[-1] == 0:
                kernel.die_with_parent()
                if self.cores:
                    os.sched_setaffinity(0, self.cores)
                forward(ends[source], ends[sink], spec, direction, board)
        for end in ends.values():
            end.close()

    def facts(self) -> dict[str, Any]:
        """What the record says of the forwarders."""
        for board in self._boards.values():
            while not board[Board.LATEST]:  # each reports as soon as it forwards
                time.sleep(0.001)
        return {
            "forwarder_cores": sorted(self.cores) or "shared",
            "forwarder_buffer_bytes": self.buffer_bytes,
            "realtime": all(board[Board.FIRST] for board in self._boards.values()),
        }

    def start(self, at_s: float) -> None:
        """Tell both forwarders."""
        for board in self._boards.values():
            board[Board.START] = at_s

    def signals(self) -> dict[str, Any]:
        """What the forwarders count; `overrun_packets` came faster than the forwarder could take them."""
        return {
            direction: {
                "queue_bytes": board[Board.QUEUE],
                "dropped_segments": int(board[Board.DROPPED]),
                "lost_segments": int(board[Board.LOST]),
                "forwarded_bytes": board[Board.FORWARDED],
                "overrun_packets": int(board[Board.OVERRUN]),
                "cpu_s": board[Board.CPU],
            }
            for direction, board in self._boards.items()
        }

    def next_due_s(self) -> float | None:
        """Never."""
        return None

    def follow(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Kill both forwarders and wait for their end."""
        for forwarder in self._forwarders:
            os.kill(forwarder, signal.SIGKILL)
            os.waitpid(forwarder, 0)


def _own_cores() -> set[int]:
    """The last two cores where there are enough to leave the rest of the run its own; else none in particular."""
    allowed = sorted(os.sched_getaffinity(0))
    return set(allowed[-2:]) if len(allowed) >= 6 else set()


def main() -> None:
    """Make the link, say so, serve until standard input ends."""
    request = json.loads(sys.stdin.readline())
    try:
        spec = build(LinkSpec, request["spec"], "link")
        backend = request["backend"]
        held = namespaces.make()
        wire, facts = _wire(held, spec, backend)
        facts_of_tcp, lost = namespaces.tune_tcp(held, spec)
        if backend == "packet" and not facts["realtime"]:
            lost.append(
                "no right to real-time priority: where other work fills the cores, packets wait for a time slice"
            )
        if backend == "packet" and facts["forwarder_buffer_bytes"] < 1 << 20:
            kib = facts["forwarder_buffer_bytes"] >> 10
            lost.append(
                f"rootless: the forwarder's buffer is {kib} KiB, bursts beyond it are lost and counted as overrun"
            )
    except (UserError, OSError) as error:
        _say({"unavailable": str(error)})
        return
    _say({"rootless": held.rootless, "facts": facts | facts_of_tcp, "lost": lost})
    try:
        _serve(wire)
    finally:
        wire.close()


def _wire(held: Namespaces, spec: LinkSpec, backend: str) -> tuple[Wire, dict[str, Any]]:
    if backend == "packet":
        namespaces.connect(held, spec, routed=False, segment=False)
        packet = PacketWire(spec)
        return packet, packet.facts()
    # The kernel loses what it is handed, so where there is loss it must be handed single segments.
    segment = any(condition.loss > 0 for condition in spec.conditions("forward"))
    namespaces.connect(held, spec, routed=True, segment=segment)
    return KernelWire(spec, backend), {"segmented_by": "host" if segment else "receiver"}


def _serve(wire: Wire) -> None:
    """Answer questions and follow the schedule. Reads raw bytes: a buffered line would hide from select."""
    pending = b""
    while True:
        due_s = wire.next_due_s()
        ready, _, _ = select.select([0], [], [], None if due_s is None else max(0.0, due_s - time.monotonic()))
        if not ready:
            wire.follow()
            continue
        chunk = os.read(0, 65536)
        if not chunk:
            return
        *lines, pending = (pending + chunk).split(b"\n")
        for line in lines:
            question = json.loads(line)
            if "start" in question:
                wire.start(question["start"])
                _say({})
            else:
                _say({"at_s": time.monotonic()} | wire.signals())


def _say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main()
