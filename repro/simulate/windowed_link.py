"""The shared link where TCP counts: a transfer's windows open from what a rest left of them, a doubling per round trip (RFC 5681).

Each pair of instances has connections of its own, as the live system's have, and these rest between transfers. So each transfer has a
rate that rises to the steady one, which is `SharedLink`'s cap per transfer; under loss that is what the law of `repro.link.tcp_model`
leaves. Shares are max-min fair over transfers as in `SharedLink`, but every event touches every transfer under way: this class is used
where loss or congestion control is asked for, and its cost arises there alone.
"""

from __future__ import annotations

import math
from typing import Any

from repro.simulate.events import EventQueue
from repro.simulate.link import Done, Flow, Sender, SharedLink, fill
from repro.simulate.link_spec import SharedLinkSpec, WindowSpec


class WindowedFlow(Flow):
    """A transfer whose windows carry `cap` bytes/s until `opens_s`, then twice that, up to the steady rate."""

    __slots__ = ("cap", "opens_s", "session")

    def __init__(
        self, sender: Sender, size_bytes: float, supply: float, began_s: float, done: Done, payload: Any
    ) -> None:
        super().__init__(sender, size_bytes, supply, began_s, done, payload)
        self.cap = 0.0
        self.opens_s = math.inf
        self.session: tuple[int, int] = (0, 0)


class WindowedLink(SharedLink):
    """One direction of a link during a run, its transfers paced by TCP's windows; the same calls as `SharedLink`."""

    def __init__(self, spec: SharedLinkSpec, events: EventQueue, window: WindowSpec) -> None:
        super().__init__(spec, events)
        self._window = window
        self._under_way: dict[WindowedFlow, None] = {}
        self._turns: dict[int, int] = {}
        self._busy: dict[tuple[int, int], int] = {}
        self._left: dict[tuple[int, int], tuple[float, float]] = {}  # a session's last byte, and its windows then

    def produce(self, now_s: float, sender: int, size_bytes: float, supply: float, done: Done, payload: Any) -> Flow:
        """Begin a transfer whose prefill makes `supply` bytes/s from now on, until `drain` is called."""
        return self._begin(now_s, sender, WindowedFlow(self._sender(sender), size_bytes, supply, now_s, done, payload))

    def send(self, now_s: float, sender: int, size_bytes: float, done: Done, payload: Any) -> Flow:
        """Begin a transfer of bytes that are all there already."""
        flow = WindowedFlow(self._sender(sender), size_bytes, 0.0, now_s, done, payload)
        flow.draining = True
        return self._begin(now_s, sender, flow)

    def drain(self, now_s: float, flow: Flow) -> None:
        """The prefill has ended: all that is unsent may go."""
        self._advance(now_s)
        flow.draining = True
        self._divide(now_s)

    def cancel(self, now_s: float, flow: Flow) -> None:
        """Forget a transfer; what it has sent stays sent."""
        self._advance(now_s)
        assert isinstance(flow, WindowedFlow)
        if flow in self._under_way:
            self.offered_bytes -= flow.size_bytes - flow.sent
            self._end(now_s, flow)
        self._divide(now_s)

    def backlog_bytes(self, now_s: float) -> float:
        """Bytes that could be sent now but have not been."""
        self._advance(now_s)
        waiting = 0.0
        for flow in self._under_way:
            waiting += max(self._available(flow) - flow.sent, 0.0)
        return waiting

    def flows(self) -> list[Flow]:
        """Every transfer under way."""
        return list(self._under_way)

    def _begin(self, now_s: float, sender: int, flow: WindowedFlow) -> WindowedFlow:
        """Give a transfer the connections to the next receiver in turn, with the windows that they have after their rest."""
        self._advance(now_s)
        turn = self._turns.get(sender, 0)
        self._turns[sender] = turn + 1
        session = (sender, turn % self._window.receivers)
        if self._busy.get(session, 0):
            flow.cap = self._flow_cap
        else:
            flow.cap = min(self._flow_cap, self._rested(now_s, session))
        self._busy[session] = self._busy.get(session, 0) + 1
        flow.session = session
        if flow.cap < self._flow_cap:
            flow.opens_s = now_s + self.spec.rtt_s
        self._under_way[flow] = None
        self.offered_bytes += flow.size_bytes
        self._divide(now_s)
        return flow

    def _rested(self, now_s: float, session: tuple[int, int]) -> float:
        window = self._window
        last = self._left.get(session)
        if last is None:
            return window.first_bps / 8
        at_s, reached = last
        if not window.restarts:
            return reached
        halvings = min((now_s - at_s) / window.rto_s, 1000.0)
        return max(window.first_bps / 8, reached * math.pow(2.0, -halvings))

    def _end(self, now_s: float, flow: WindowedFlow) -> None:
        del self._under_way[flow]
        self._busy[flow.session] -= 1
        self._left[flow.session] = (now_s, flow.cap)

    def _available(self, flow: Flow) -> float:
        return flow.size_bytes if flow.draining else flow.supply * (self._at_s - flow.began_s)

    def _advance(self, now_s: float) -> None:
        elapsed = now_s - self._at_s
        if elapsed <= 0:
            return
        self._at_s = now_s
        self.bytes_sent += self._total_rate * elapsed
        self._could_send += self.capacity * elapsed
        for flow in self._under_way:
            flow.sent = min(flow.sent + flow.rate * elapsed, self._available(flow))

    def _divide(self, now_s: float) -> None:
        """Set every rate for the time until the next change, and ask to be woken at that change."""
        asks: dict[Sender, list[float]] = {}
        for flow in self._under_way:
            behind = flow.draining or self._available(flow) - flow.sent > 1e-6
            flow.rate = flow.cap if behind else min(flow.supply, flow.cap)
            asks.setdefault(flow.sender, []).append(flow.rate)
        levels = fill(self.capacity, self._nic, self._flow_cap, {sender: (rates, 0) for sender, rates in asks.items()})
        total = 0.0
        wake_s = math.inf
        for flow in self._under_way:
            flow.rate = min(flow.rate, levels[flow.sender])
            total += flow.rate
            if flow.draining:
                if flow.rate > 0:
                    wake_s = min(wake_s, now_s + (flow.size_bytes - flow.sent) / flow.rate)
            elif flow.rate > flow.supply * (1 + 1e-12):
                wake_s = min(wake_s, now_s + max(self._available(flow) - flow.sent, 0.0) / (flow.rate - flow.supply))
            wake_s = min(wake_s, flow.opens_s)
        self._total_rate = total
        if wake_s != self._wake_s:
            self._wake_s = wake_s
            if wake_s < math.inf:
                self._events.at(wake_s, self._on_wake)

    def _settle_flows(self, resolution_s: float) -> list[Flow]:
        """Open the windows whose round trip is over, and take out the transfers that have ended, which are returned."""
        now_s, ended = self._at_s, list[Flow]()
        for flow in list(self._under_way):
            if flow.opens_s <= now_s + resolution_s:
                flow.cap = min(2 * flow.cap, self._flow_cap)
                flow.opens_s = now_s + self.spec.rtt_s if flow.cap < self._flow_cap else math.inf
            if self._available(flow) - flow.sent <= flow.rate * resolution_s + 1e-6:
                flow.sent = self._available(flow)
                if flow.draining:
                    ended.append(flow)
                    self._end(now_s, flow)
        return ended


def made(spec: SharedLinkSpec, events: EventQueue) -> SharedLink:
    """The link of that form: with windows where the specification has them."""
    return SharedLink(spec, events) if spec.window is None else WindowedLink(spec, events, spec.window)
