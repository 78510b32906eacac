"""KVCache over a shared link: processor sharing, divided anew at every change, overlapped with prefill piece by piece (§3.3).

A transfer has two phases. While its prefill runs, bytes become available at a steady rate, and the flow asks for no more than that
unless a backlog has formed. When prefill has ended, the last piece and any backlog drain greedily. Rates are max-min fair over
flows, under three caps: the link, the sender's NIC, and the flow's connections.

Why it is fast: as long as every running prefill's flow gets what it asks for (the usual state: 13 % utilisation in the case study),
nothing about it is computed until its prefill ends. Only congestion makes a division touch every sender, and the draining flows of one
sender share a virtual clock, so that no division touches them one by one.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from typing import Any

from repro.scheduling.observations import LinkReport
from repro.simulate.events import EventQueue
from repro.simulate.link_spec import SharedLinkSpec

Done = Callable[[float, Any], None]


class Flow:
    """One transfer: `supply` is the rate at which its prefill makes bytes, `rate` its present share, both in bytes/s."""

    __slots__ = (
        "began_s",
        "done",
        "draining",
        "end_clock",
        "payload",
        "rate",
        "sender",
        "sent",
        "size_bytes",
        "supply",
    )

    def __init__(
        self, sender: Sender, size_bytes: float, supply: float, began_s: float, done: Done, payload: Any
    ) -> None:
        self.sender = sender
        self.size_bytes = size_bytes
        self.supply = supply
        self.began_s = began_s
        self.done = done
        self.payload = payload
        self.sent = 0.0
        self.rate = supply
        self.draining = False
        self.end_clock = math.inf


class Sender:
    """One instance's NIC: flows whose prefill runs, and draining flows on a virtual clock of bytes per flow."""

    __slots__ = ("clock", "drains", "heap", "producing", "rate")

    def __init__(self) -> None:
        self.producing: dict[Flow, None] = {}
        self.heap: list[tuple[float, int, Flow]] = []
        self.drains = 0
        self.clock = 0.0
        self.rate = 0.0


class SharedLink:
    """One direction of a link during a run. Inside, rates are in bytes/s. `changed(up)`, if set, is called at every change of its rate."""

    def __init__(self, spec: SharedLinkSpec, events: EventQueue) -> None:
        self.spec = spec
        self.changed: Callable[[bool], None] | None = None
        self.capacity = spec.rate_bps / 8
        self.bytes_sent = 0.0
        self.offered_bytes = 0.0
        self._nic = spec.nic_bps / 8
        self._flow_cap = spec.connections * spec.connection_bps / 8
        self._events = events
        self._senders: dict[int, Sender] = {}
        self._producing: dict[Flow, None] = {}
        self._active: dict[Sender, None] = {}
        self._supply = 0.0
        self._greediest = 0.0
        self._total_rate = 0.0
        self._could_send = 0.0
        self._measured = (0.0, 0.0, 0.0)
        self._last = (spec.rate_bps, 0.0)
        self._calm = True
        self._at_s = 0.0
        self._wake_s = math.inf
        self._order = 0
        self._on_wake = self._wake
        for change in spec.changes:
            events.at(change.at_s, self._change, change.rate_bps / 8)

    # What the simulation asks for.

    def produce(self, now_s: float, sender: int, size_bytes: float, supply: float, done: Done, payload: Any) -> Flow:
        """Begin a transfer whose prefill makes `supply` bytes/s from now on, until `drain` is called."""
        self._advance(now_s)
        owner = self._sender(sender)
        flow = Flow(owner, size_bytes, supply, now_s, done, payload)
        owner.producing[flow] = None
        self._producing[flow] = None
        self._supply += supply
        self._greediest = max(self._greediest, supply)
        self.offered_bytes += size_bytes
        self._divide(now_s)
        return flow

    def drain(self, now_s: float, flow: Flow) -> None:
        """The prefill has ended: all that is unsent may go."""
        self._advance(now_s)
        if self._calm:
            flow.sent = min(flow.supply * (now_s - flow.began_s), flow.size_bytes)
        self._stop_producing(flow)
        self._queue(flow)
        self._divide(now_s)

    def send(self, now_s: float, sender: int, size_bytes: float, done: Done, payload: Any) -> Flow:
        """Begin a transfer of bytes that are all there already."""
        self._advance(now_s)
        flow = Flow(self._sender(sender), size_bytes, 0.0, now_s, done, payload)
        self.offered_bytes += size_bytes
        self._queue(flow)
        self._divide(now_s)
        return flow

    def cancel(self, now_s: float, flow: Flow) -> None:
        """Forget a transfer; what it has sent stays sent."""
        self._advance(now_s)
        sender = flow.sender
        if flow.draining:
            if flow.end_clock < math.inf:
                self.offered_bytes -= max(flow.end_clock - sender.clock, 0.0)
                sender.heap = [entry for entry in sender.heap if entry[2] is not flow]
                heapq.heapify(sender.heap)
                self._one_drain_less(sender)
        elif flow in self._producing:
            sent = flow.supply * (now_s - flow.began_s) if self._calm else flow.sent
            self.offered_bytes -= flow.size_bytes - sent
            self._stop_producing(flow)
        self._divide(now_s)

    def backlog_bytes(self, now_s: float) -> float:
        """Bytes that could be sent now but have not been."""
        self._advance(now_s)
        waiting = 0.0
        for sender in self._active:
            for end, _, _ in sender.heap:
                waiting += end - sender.clock
        if not self._calm:
            waiting += sum(max(self._available(flow) - flow.sent, 0.0) for flow in self._producing)
        return waiting

    def measure(self, now_s: float) -> LinkReport:
        """What a sender's kernel would report: capacity averaged over the period, and the part of it that was used."""
        backlog = self.backlog_bytes(now_s)
        since_s, could, sent = self._measured
        elapsed = now_s - since_s
        if elapsed > 0:
            capacity, used = self._could_send - could, self.bytes_sent - sent
            self._measured = (now_s, self._could_send, self.bytes_sent)
            self._last = (8 * capacity / elapsed, used / capacity if capacity > 0 else 1.0)
        return LinkReport(self._last[0], self._last[1], backlog, self.spec.rtt_s)

    def settle(self, now_s: float) -> float:
        """Bytes sent until now."""
        self._advance(now_s)
        return self.bytes_sent

    def unused_bytes(self, now_s: float) -> float:
        """Bytes that could have crossed until now, and did not."""
        self._advance(now_s)
        return self._could_send - self.bytes_sent

    def flows(self) -> list[Flow]:
        """Every transfer under way."""
        return [*self._producing, *(flow for sender in self._active for _, _, flow in sender.heap)]

    # How it moves.

    def _sender(self, number: int) -> Sender:
        sender = self._senders.get(number)
        if sender is None:
            sender = self._senders[number] = Sender()
        return sender

    def _change(self, now_s: float, capacity: float) -> None:
        self._advance(now_s)
        self.capacity = capacity
        self._divide(now_s)
        if self.changed is not None:
            self.changed(capacity > 0)

    def _available(self, flow: Flow) -> float:
        return flow.supply * (self._at_s - flow.began_s)

    def _stop_producing(self, flow: Flow) -> None:
        del self._producing[flow]
        del flow.sender.producing[flow]
        # An exact zero, not what float subtraction leaves behind.
        self._supply = self._supply - flow.supply if self._producing else 0.0

    def _queue(self, flow: Flow) -> None:
        sender = flow.sender
        flow.draining = True
        flow.end_clock = sender.clock + flow.size_bytes - flow.sent
        self._order += 1
        heapq.heappush(sender.heap, (flow.end_clock, self._order, flow))
        sender.drains += 1
        self._active[sender] = None

    def _one_drain_less(self, sender: Sender) -> None:
        sender.drains -= 1
        if not sender.drains:
            sender.clock = 0.0
            del self._active[sender]

    def _advance(self, now_s: float) -> None:
        elapsed = now_s - self._at_s
        if elapsed <= 0:
            return
        self._at_s = now_s
        self.bytes_sent += self._total_rate * elapsed
        self._could_send += self.capacity * elapsed
        for sender in self._active:
            sender.clock += sender.rate * elapsed
        if not self._calm:
            for flow in self._producing:
                flow.sent = min(flow.sent + flow.rate * elapsed, self._available(flow))

    def _divide(self, now_s: float) -> None:
        """Set every rate for the time until the next change, and ask to be woken at that change."""
        if not (self._calm and self._divide_calmly()):
            if self._calm:
                self._calm = False
                for flow in self._producing:
                    flow.sent = self._available(flow)
            self._divide_fully()
        wake = math.inf
        for sender in self._active:
            if sender.rate > 0:
                soon = (sender.heap[0][0] - sender.clock) / sender.rate
                wake = soon if soon < wake else wake
        if not self._calm:
            for flow in self._producing:
                if flow.rate > flow.supply * (1 + 1e-12):
                    wake = min(wake, max(self._available(flow) - flow.sent, 0.0) / (flow.rate - flow.supply))
        wake_s = now_s + max(wake, 0.0)
        if wake_s != self._wake_s:
            self._wake_s = wake_s
            if wake_s < math.inf:
                self._events.at(wake_s, self._on_wake)

    def _wake(self, now_s: float, _: None) -> None:
        if now_s != self._wake_s:
            return  # the division that asked for this has been replaced
        self._wake_s = math.inf
        self._advance(now_s)
        # A drain ends when what is left would pass within the clock's own resolution.
        ended = self._settle_flows(1e-9 + 1e-15 * now_s)
        self._divide(now_s)
        for flow in ended:
            flow.end_clock = math.inf
            flow.done(now_s, flow.payload)

    def _settle_flows(self, resolution_s: float) -> list[Flow]:
        """Take out the drains that have ended, and end the backlogs that have; returns the former."""
        ended: list[Flow] = []
        for sender in list(self._active):
            limit = sender.clock + sender.rate * resolution_s + 1e-6
            while sender.heap and sender.heap[0][0] <= limit:
                ended.append(heapq.heappop(sender.heap)[2])
                self._one_drain_less(sender)
        if not self._calm:
            for flow in self._producing:
                if self._available(flow) - flow.sent <= flow.rate * resolution_s + 1e-6:
                    flow.sent = self._available(flow)
        return ended

    def _divide_calmly(self) -> bool:
        """Divide what running prefills leave over, and say whether none of them is short of anything."""
        spare = self.capacity - self._supply
        if spare < 0 or self._greediest > self._flow_cap or self._greediest > self._nic:
            return False
        if not self._active:
            self._total_rate = self._supply
            return True
        if len(self._active) == 1:
            (sender,) = self._active
            own = 0.0
            for flow in sender.producing:
                own += flow.supply
            rate = min(spare / sender.drains, self._flow_cap, (self._nic - own) / sender.drains)
            if rate < self._greediest:
                return False
            sender.rate = rate
            self._total_rate = self._supply + rate * sender.drains
            return True
        level = spare / sum(sender.drains for sender in self._active)
        for sender in self._active:
            own = sum(flow.supply for flow in sender.producing)
            if min(level, self._flow_cap) * sender.drains + own > self._nic:
                return False
        if level < self._greediest:
            return False
        level = min(level, self._flow_cap)
        total = self._supply
        for sender in self._active:
            sender.rate = level
            total += level * sender.drains
        self._total_rate = total
        return True

    def _divide_fully(self) -> None:
        """Max-min fair rates by progressive filling over the tree of flows, NICs and the link."""
        asking: dict[Sender, list[Flow]] = {sender: [] for sender in self._active}
        greedy: dict[Sender, int] = {sender: sender.drains for sender in self._active}
        for flow in self._producing:
            behind = self._available(flow) - flow.sent > 1e-6
            flow.rate = -1.0 if behind else min(flow.supply, self._flow_cap)  # −1: as much as it can get
            asking.setdefault(flow.sender, []).append(flow)
            greedy.setdefault(flow.sender, 0)
            if behind:
                greedy[flow.sender] += 1
        levels = fill(
            self.capacity,
            self._nic,
            self._flow_cap,
            {s: ([f.rate for f in asking[s] if f.rate >= 0], greedy[s]) for s in asking},
        )
        total = 0.0
        self._calm = True
        for sender, level in levels.items():
            sender.rate = level
            total += level * sender.drains
            for flow in asking[sender]:
                flow.rate = level if flow.rate < 0 else min(flow.rate, level)
                total += flow.rate
                if flow.rate != flow.supply:
                    self._calm = False
        self._total_rate = total


def fill(capacity: float, nic: float, flow_cap: float, senders: dict[Any, tuple[list[float], int]]) -> dict[Any, float]:
    """The level up to which each sender's flows are filled: flows that ask for less get what they ask, the others the level.

    `senders` maps a sender to the rates that its modest flows ask for and the number of its greedy flows. Rounds fix flows that ask
    for less than the level, and senders whose NIC is full; both only raise the level of the rest, so nothing is fixed wrongly.
    """
    levels: dict[Any, float] = {}
    remaining = capacity
    unsettled = {key: (sorted(asks), count) for key, (asks, count) in senders.items()}
    fixed = dict.fromkeys(senders, 0)
    while unsettled:
        flows = sum(len(asks) - fixed[key] + count for key, (asks, count) in unsettled.items())
        level = min(max(remaining, 0.0) / flows if flows else math.inf, flow_cap)
        changed = False
        for key, (asks, _) in unsettled.items():
            i = fixed[key]
            while i < len(asks) and asks[i] <= level:
                remaining -= asks[i]
                i += 1
                changed = True
            fixed[key] = i
        if changed:
            continue
        for key, (asks, count) in list(unsettled.items()):
            modest = sum(asks[: fixed[key]])
            if modest + (len(asks) - fixed[key] + count) * level > nic * (1 + 1e-12):
                levels[key] = fill(nic, math.inf, flow_cap, {key: (asks, count)})[key]
                remaining += modest - nic
                del unsettled[key]
                changed = True
        if not changed:
            for key in unsettled:
                levels[key] = level
            break
    return levels
