"""The egress as its senders see it: bytes that were acknowledged and bytes that wait. A live router knows nothing else of a link."""

from __future__ import annotations

import math
from collections.abc import Sequence

from repro.scheduling.link_estimate import LinkEstimate
from repro.scheduling.observations import LinkReport
from repro.serving.messages import Sending

#: Nothing acknowledged for so long while bytes wait: the link is taken to be down. In seconds of this machine.
_DOWN_AFTER_S = 0.5


class Egress:
    """Turns senders' counters into the scheduler's `LinkReport`, its rate estimated as for the simulated link (`LinkEstimate`).

    `provisioned_bps` is believed until the link was seen full. `byte_scale` and `time_scale` unscale what was counted on this machine.
    """

    def __init__(self, provisioned_bps: float, time_scale: float, byte_scale: float) -> None:
        self._provisioned_bps = provisioned_bps
        self._time_scale = time_scale
        self._byte_scale = byte_scale
        self._estimate = LinkEstimate()
        self._before: tuple[float, int] | None = None
        self._carried_bps = 0.0
        self._progress_s = -math.inf

    def report(self, now_s: float, said: Sequence[Sending]) -> LinkReport:
        """The link since the last report, from each sender's latest word; `now_s` is of CLOCK_MONOTONIC."""
        acked, waiting = sum(one.acked_bytes for one in said), sum(one.waiting_bytes for one in said)
        at_s = max((one.at_s for one in said), default=-math.inf)
        before = self._before
        if before is None or acked > before[1] or not waiting:
            self._progress_s = now_s
        if said and (before is None or at_s > before[0]):
            if before is not None:
                crossed = 8 * max(acked - before[1], 0) * self._byte_scale
                self._carried_bps = crossed / ((at_s - before[0]) * self._time_scale)
            self._before = (at_s, acked)
        up = not waiting or now_s - self._progress_s < _DOWN_AFTER_S
        rtt_s = min((one.rtt_s for one in said if one.rtt_s > 0), default=0.0) * self._time_scale
        backlog_bytes = waiting * self._byte_scale
        if not math.isfinite(self._provisioned_bps):
            return LinkReport(self._provisioned_bps, 0.0, backlog_bytes, rtt_s, up)
        # Counters come in steps, so a period may show more than the link carries.
        used = self._carried_bps / self._provisioned_bps
        seen = LinkReport(self._provisioned_bps, used, backlog_bytes, rtt_s, up)
        return self._estimate.seen(now_s * self._time_scale, seen)
