"""How much a link may have carried by a given moment, and the queue that waits before it.

Capacity is a cumulative count of bytes, K(t), and a drop-tail queue is then the difference of two counts: what was
accepted and what could have left. One packet's departure is K⁻¹ of the count at its end. Constant rates, schedules,
outages and traces are all just shapes of K, so they need no code of their own, and being cumulative, no rounding of
sleeps can make the rate drift.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from repro.link.spec import Condition

#: Sums of many floats: without this slack the last bit could push a packet beyond an outage that begins at its end.
_ROUNDING_BYTES = 1e-3


class Capacity:
    """K(t) for piecewise-constant rates, counted from `origin_s`, once or repeated for ever."""

    def __init__(self, origin_s: float, pieces: Sequence[tuple[float, float]], repeat: bool = False) -> None:
        """`pieces` are (duration_s, bytes per second); the last one may last for ever."""
        self._origin_s = origin_s
        self._times = [0.0]
        self._counts = [0.0]
        self._rates = [rate for _, rate in pieces]
        for duration, rate in pieces if repeat else pieces[:-1]:
            self._times.append(self._times[-1] + duration)
            self._counts.append(self._counts[-1] + duration * rate)
        self._period_s = self._times.pop() if repeat else math.inf
        self._period_bytes = self._counts.pop() if repeat else math.inf

    def opened(self, now_s: float) -> float:
        """Bytes that could have left by `now_s`."""
        t = now_s - self._origin_s
        if t <= 0:
            return t * self._rates[0]
        rounds = 0.0
        if t >= self._period_s:
            rounds, t = divmod(t, self._period_s)
            rounds *= self._period_bytes
        i = bisect_right(self._times, t) - 1
        return rounds + self._counts[i] + (t - self._times[i]) * self._rates[i]

    def when(self, count: float) -> float:
        """The moment at which `count` bytes have left; infinite if they never do."""
        if count <= _ROUNDING_BYTES:
            return self._origin_s + (count / self._rates[0] if self._rates[0] else 0.0)
        start = self._origin_s
        if count - _ROUNDING_BYTES > self._period_bytes:
            # A count exactly at a boundary belongs to the round that it ends.
            rounds = math.ceil((count - _ROUNDING_BYTES) / self._period_bytes) - 1
            start += rounds * self._period_s
            count -= rounds * self._period_bytes
        # The first piece that reaches the count: an outage before it adds nothing to it.
        i = max(bisect_left(self._counts, count - _ROUNDING_BYTES) - 1, 0)
        rate = self._rates[i]
        if not rate:
            return math.inf
        # Within the slack beyond the piece's end, its own rate would lead into the next piece, which may be far faster.
        reached = min(count, self._counts[i + 1] if i + 1 < len(self._counts) else self._period_bytes)
        return start + self._times[i] + (reached - self._counts[i]) / rate


def capacity(conditions: Sequence[Condition], trace: Sequence[tuple[float, float]], origin_s: float) -> Capacity | None:
    """The capacity that conditions, or a trace in their place, give from `origin_s` on; None is unlimited.

    A spec with an unlimited rate has no changes of rate (`LinkSpec` refuses them), so the first condition tells.
    """
    if trace:
        return Capacity(origin_s, [(duration, rate / 8) for duration, rate in trace], repeat=True)
    if conditions[0].rate_bps is None:
        return None
    ends = [*(condition.at_s for condition in conditions[1:]), math.inf]
    return Capacity(
        origin_s, [(end - c.at_s, (c.rate_bps or 0.0) / 8) for c, end in zip(conditions, ends, strict=True)]
    )


class Serialiser:
    """A drop-tail queue before a capacity. Times are monotonic seconds, never decreasing."""

    def __init__(self, capacity: Capacity | None, limit_bytes: float) -> None:
        self._capacity = capacity
        self._limit_bytes = limit_bytes
        self._accepted = -math.inf

    def follow(self, capacity: Capacity | None, now_s: float) -> None:
        """Go on with another capacity; what is queued stays queued."""
        waiting = self.backlog_bytes(now_s)
        self._capacity = capacity
        self._accepted = -math.inf if capacity is None else capacity.opened(now_s) + waiting

    def backlog_bytes(self, now_s: float) -> float:
        """Bytes accepted that have not left."""
        return 0.0 if self._capacity is None else max(0.0, self._accepted - self._capacity.opened(now_s))

    def room_bytes(self, now_s: float) -> float:
        """What the queue still takes; infinite without a capacity."""
        return max(0.0, self._limit_bytes - self.backlog_bytes(now_s))

    def depart(self, now_s: float, wire_bytes: float) -> float:
        """Accept a packet and say when its last byte leaves."""
        capacity = self._capacity
        if capacity is None:
            return now_s
        opened = capacity.opened(now_s)
        self._accepted = (opened if opened > self._accepted else self._accepted) + wire_bytes
        # A transmitter that never idles finishes at K⁻¹; rounding must not place that in the past.
        return max(now_s, capacity.when(self._accepted))
