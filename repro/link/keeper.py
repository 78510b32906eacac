"""The process that holds a link: its three namespaces, and what works in the middle one.

Run as `python -m repro.link.keeper` by the Link. The first question, `open`, brings the spec and the backend; then `signals` answers
the counters and `start` begins the schedule. It exits on `stop` and on EOF, and everything it holds is gone then. It watches its
forwarders: the death or the silence of one is the end of the link, told by the forwarder's name.
"""

from __future__ import annotations

import mmap
import os
import socket
import time
from functools import partial
from typing import Any, Protocol

from repro.configuration import build
from repro.errors import UserError
from repro.link import namespaces
from repro.link.forwarder import Board, forward, wire_end
from repro.link.kernel_qdisc import KernelWire
from repro.link.namespaces import ROUTER_END, Namespaces
from repro.link.spec import Direction, LinkSpec, Side
from repro.processes import Forked, Message, Parent, run_worker
from repro.processes.child import DIED, SILENT
from repro.processes.proc import usage

_LOOK_S = 0.25
_SILENT_AFTER_S = 4.0


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

    def lost(self) -> dict[str, Any] | None:
        """The process that the wire stood on and that is dead or silent, as fields of a `failed` message; None while all is well."""

    def close(self) -> None:
        """End what works here; it is gone when this returns."""


class PacketWire:
    """A forwarder process per direction, which follow the schedule by themselves."""

    def __init__(self, spec: LinkSpec) -> None:
        ends = {side: wire_end(interface) for side, interface in ROUTER_END.items()}
        self.buffer_bytes = min(end.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) for end in ends.values())
        self._boards: dict[Direction, memoryview[float]] = {}
        self._forwarders: dict[Direction, Forked] = {}
        self.cores = _own_cores()
        ways: tuple[tuple[Direction, Side, Side], ...] = (
            ("forward", "prefill", "decode"),
            ("reverse", "decode", "prefill"),
        )
        for direction, source, sink in ways:
            board = memoryview(mmap.mmap(-1, Board.CELLS * 8)).cast("d")
            self._boards[direction] = board
            work = partial(forward, ends[source], ends[sink], spec, direction, board)
            self._forwarders[direction] = Forked(f"link forwarder ({source} to {sink})", work, self.cores)
        for end in ends.values():
            end.close()

    def facts(self) -> dict[str, Any]:
        """What the record says of the forwarders."""
        for direction, board in self._boards.items():
            while not board[Board.LATEST]:  # each reports as soon as it forwards
                if (how := self._forwarders[direction].ended()) is not None:
                    raise UserError(f"its forwarder {how}")
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

    def lost(self) -> dict[str, Any] | None:
        """A forwarder that has ended, or has not reported for four seconds: it does so several times a second."""
        for direction, forwarder in self._forwarders.items():
            named = {"role": forwarder.role, "pid": forwarder.pid}
            if (how := forwarder.ended()) is not None:
                return {**named, "how": how, "rank": DIED}
            quiet_s = time.monotonic() - self._boards[direction][Board.LATEST]
            if quiet_s > _SILENT_AFTER_S:
                stopped = "stopped" if usage(forwarder.pid)[0] in "Tt" else "silent"
                return {**named, "how": f"is {stopped}: it has forwarded nothing for {quiet_s:.0f} s", "rank": SILENT}
        return None

    def close(self) -> None:
        """Kill both forwarders and wait for their end."""
        for forwarder in self._forwarders.values():
            forwarder.kill()


def _own_cores() -> set[int]:
    """The last two cores where there are enough to leave the rest of the run its own; else none in particular."""
    allowed = sorted(os.sched_getaffinity(0))
    return set(allowed[-2:]) if len(allowed) >= 6 else set()


def work(parent: Parent, asked: Message) -> None:
    """Make the link, say so, serve until told to stop."""
    try:
        spec = build(LinkSpec, asked["spec"], "link")
        backend = asked["backend"]
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
        parent.reply(asked, unavailable=str(error))
        return
    parent.reply(asked, rootless=held.rootless, facts=facts | facts_of_tcp, lost=lost)
    parent.beat()
    try:
        _serve(parent, wire)
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


def _serve(parent: Parent, wire: Wire) -> None:
    """Answer questions, follow the schedule, and watch what the link stands on."""
    while True:
        due_s = wire.next_due_s()
        wait_s = _LOOK_S if due_s is None else min(_LOOK_S, max(0.0, due_s - time.monotonic()))
        asked = parent.read_within(wait_s)
        if (lost := wire.lost()) is not None:
            parent.send("failed", **lost)
            return
        wire.follow()
        match asked:
            case None:
                pass
            case {"kind": "stop"}:
                return
            case {"kind": "start"}:
                wire.start(asked["at_s"])
                parent.reply(asked)
            case _:
                parent.reply(asked, at_s=time.monotonic(), **wire.signals())


if __name__ == "__main__":
    # Namespaces are left by a process of one thread only, so the heartbeat begins later.
    run_worker(work, beat=False)
