"""What the egress is believed to carry, from what its senders say: bytes that were acknowledged and bytes that wait.

A live router knows nothing else of a link.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from repro.scheduling.observations import LinkReport
from repro.serving.messages import Sending

#: Nothing acknowledged for so long while bytes wait: the link is taken to be down. In seconds of this machine.
_DOWN_AFTER_S = 0.5


class EgressEstimate:
    """Turns senders' counters into the scheduler's `LinkReport`. `sold_bps` is believed until the link was seen full.

    A link is full while bytes wait at both ends of a period; the rate acknowledged over it is then what the link carries, and is averaged
    over a few such periods. One that has not been full since says nothing: the last belief goes back, slowly, to what was sold.
    `bits_per_byte` turns acknowledged bytes per second of this machine into bit/s of the deployment.
    """

    def __init__(self, sold_bps: float, bits_per_byte: float) -> None:
        self._sold_bps = sold_bps
        self._bits = bits_per_byte
        self._capacity_bps = sold_bps
        self._before: tuple[float, int, int] | None = None
        self._progress_s = -math.inf
        self._used_bps = 0.0

    def report(self, now_s: float, said: Sequence[Sending], time_scale: float) -> LinkReport:
        """The link since the last report, from each sender's latest word."""
        if not said:
            return LinkReport(self._capacity_bps, 0.0, 0.0)
        at_s = max(one.at_s for one in said)
        acked, waiting = sum(one.acked_bytes for one in said), sum(one.waiting_bytes for one in said)
        before = self._before
        if before is None or acked > before[1] or not waiting:
            self._progress_s = now_s
        if before is not None and at_s > before[0]:
            self._used_bps = max(acked - before[1], 0) * self._bits / (at_s - before[0])
            if waiting and before[2] and self._used_bps > 0:
                self._capacity_bps += 0.3 * (self._used_bps - self._capacity_bps)
            elif math.isfinite(self._sold_bps):
                self._capacity_bps = max(
                    self._capacity_bps + 0.02 * (self._sold_bps - self._capacity_bps), self._used_bps
                )
        if before is None or at_s > before[0]:
            self._before = (at_s, acked, waiting)
        up = not waiting or now_s - self._progress_s < _DOWN_AFTER_S
        used = min(self._used_bps / self._capacity_bps, 1.0) if math.isfinite(self._capacity_bps) else 0.0
        rtt_s = min((one.rtt_s for one in said if one.rtt_s > 0), default=0.0) * time_scale
        return LinkReport(self._capacity_bps, used, waiting * self._bits * time_scale / 8, rtt_s, up)
