"""Links that the kernel makes in the router: netem where it is built in, else token buckets for the rate and nftables
for the loss.

Kernel queues count Ethernet frames and `LinkSpec` counts IP packets; rates are raised by the ratio for full packets.
Changes of a schedule are made by this process when they are due, a few milliseconds late.
"""

from __future__ import annotations

import json
import math
import subprocess
import time
from typing import Any

from repro.errors import UserError
from repro.link.namespaces import ROUTER_END
from repro.link.segments import ETHERNET_BYTES
from repro.link.spec import Condition, Direction, LinkSpec

#: An interface shapes what leaves by it: the way forward leaves towards decode.
_EGRESS: dict[Direction, str] = {"forward": ROUTER_END["decode"], "reverse": ROUTER_END["prefill"]}
#: A token bucket needs a positive rate; an outage is one frame in some minutes.
_OUTAGE_BPS = 64.0
_SMALLEST_BURST_BYTES = 1 << 16


class KernelWire:
    """Queueing disciplines on the router's interfaces, for backend `netem` or `tbf`."""

    def __init__(self, spec: LinkSpec, backend: str) -> None:
        self._spec, self._backend = spec, backend
        self._now: dict[Direction, Condition] = {direction: spec.base(direction) for direction in _EGRESS}
        self._coming: dict[Direction, list[Condition]] = {direction: [] for direction in _EGRESS}
        self._origin_s = 0.0
        for direction in _EGRESS:
            self._apply(direction, "add")
        if backend == "tbf":
            self._lose()

    def start(self, at_s: float) -> None:
        """Begin the schedule."""
        self._origin_s = at_s
        self._coming = {direction: list(self._spec.conditions(direction)) for direction in _EGRESS}
        self.follow()

    def next_due_s(self) -> float | None:
        """When the next change is due."""
        due = [coming[0].at_s for coming in self._coming.values() if coming]
        return self._origin_s + min(due) if due else None

    def follow(self) -> None:
        """Make the changes that are due."""
        for direction, coming in self._coming.items():
            while coming and self._origin_s + coming[0].at_s <= time.monotonic():
                before, self._now[direction] = self._now[direction], coming.pop(0)
                if before != self._now[direction]:
                    self._apply(direction, "change")
                    if self._backend == "tbf" and before.loss != self._now[direction].loss:
                        self._lose()

    def signals(self) -> dict[str, Any]:
        """Backlog and drops of the queueing disciplines."""
        return {direction: self._counters(interface) for direction, interface in _EGRESS.items()}

    def lost(self) -> None:
        """Nothing: the kernel does the work."""

    def close(self) -> None:
        """Nothing to do: disciplines and rules end with their namespace."""

    def _apply(self, direction: Direction, verb: str) -> None:
        discipline = (self._netem if self._backend == "netem" else self._tbf)(direction)
        if discipline:
            _run("tc", "qdisc", verb, "dev", _EGRESS[direction], "root", *discipline)

    @property
    def _frame_share(self) -> float:
        """Ethernet frame ÷ IP packet, for full packets."""
        return (self._spec.mtu_bytes + ETHERNET_BYTES) / self._spec.mtu_bytes

    def _frame_rate(self, condition: Condition) -> int:
        return round(max(condition.rate_bps or 0.0, _OUTAGE_BPS) * self._frame_share)

    def _tbf(self, direction: Direction) -> list[str]:
        condition = self._now[direction]
        if condition.rate_bps is None:
            return []
        rate = self._frame_rate(condition)
        # A bucket holds a millisecond, but never less than one super-packet.
        burst = max(_SMALLEST_BURST_BYTES, int(rate / 8 * 1e-3))
        limit = int(self._spec.queue_limit_bytes(direction) * self._frame_share)
        return ["tbf", "rate", f"{rate}bit", "burst", str(burst), "limit", str(limit)]

    def _netem(self, direction: Direction) -> list[str]:
        spec, condition = self._spec, self._now[direction]
        # netem's limit counts packets and includes those that are under way.
        pipe = (condition.rate_bps or 0.0) * condition.delay_s / 8
        queue = spec.queue_limit_bytes(direction)
        limit = 1_000_000 if math.isinf(queue) else max(16, int((pipe + queue) / spec.mtu_bytes))
        words = ["netem", "limit", str(limit)]
        if condition.delay_s > 0 or spec.jitter_s > 0:
            words += ["delay", f"{condition.delay_s * 1e6:.0f}us"]
            if spec.jitter_s > 0:
                words += [f"{spec.jitter_s * 1e6:.0f}us", "distribution", "normal"]
        if condition.loss > 0:
            words += self._netem_loss(condition.loss)
        if condition.rate_bps is not None:
            words += ["rate", f"{self._frame_rate(condition)}bit"]
        return words

    def _netem_loss(self, loss: float) -> list[str]:
        spec = self._spec
        if spec.loss_burst_segments <= 1:
            return ["loss", "random", f"{loss * 100:.6f}%"]
        leave = 1 / spec.loss_burst_segments
        share = loss / spec.loss_in_burst
        enter = leave * share / (1 - share)
        numbers = (enter, leave, spec.loss_in_burst, 0.0)
        return ["loss", "gemodel", *(f"{number * 100:.6f}%" for number in numbers)]

    def _lose(self) -> None:
        """Random loss by rules of a table that exists only in this namespace."""
        _run("nft", "add", "table", "ip", "link")
        _run("nft", "flush", "table", "ip", "link")
        _run("nft", "add", "chain", "ip", "link", "lose", "{ type filter hook forward priority 0 ; }")
        for direction, interface in _EGRESS.items():
            threshold = round(self._now[direction].loss * (1 << 24))
            if threshold:
                match = ["oifname", interface, "numgen", "random", "mod", str(1 << 24), "<", str(threshold)]
                _run("nft", "add", "rule", "ip", "link", "lose", *match, "counter", "drop")

    def _counters(self, interface: str) -> dict[str, Any]:
        found = json.loads(_run("tc", "-s", "-j", "qdisc", "show", "dev", interface))[0]
        lost = self._rule_counter(interface) if self._backend == "tbf" else 0
        return {
            "queue_bytes": float(found.get("backlog", 0)),
            # netem counts what it lost on purpose and what found no room as one.
            "dropped_segments": int(found.get("drops", 0)),
            "lost_segments": lost,
            "forwarded_bytes": float(found.get("bytes", 0)),
        }

    def _rule_counter(self, interface: str) -> int:
        for item in json.loads(_run("nft", "-j", "list", "table", "ip", "link"))["nftables"]:
            expressions = item.get("rule", {}).get("expr", [])
            if any(e.get("match", {}).get("right") == interface for e in expressions):
                return sum(int(e["counter"]["packets"]) for e in expressions if "counter" in e)
        return 0


def _run(*words: str) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError(f"`{words[0]}` is not installed") from None
    if done.returncode != 0:
        raise UserError(f"`{' '.join(words[:7])}` refused: {' '.join(done.stderr.split())}")
    return done.stdout
