"""The rate that a link could carry, from what it did carry: a router is never told it, in the simulator as little as on a live link.

While a sender has more waiting than crosses in a period, the link was never idle in it, and what crossed is its rate. Else nothing
is learned but a lower bound, and the estimate returns towards the rate that was provisioned, so that a link that has recovered is tried
again. `adaptive` policies plan with this; simulator and live router feed it the same reports.
"""

from __future__ import annotations

import math

from repro.scheduling.observations import LinkReport

#: Time after which a low estimate that nothing confirms is a factor e nearer to the provisioned rate.
_PROBE_S = 60.0


class LinkEstimate:
    """One link's rate. The first report's capacity is the provisioned one; of later ones, what crossed and what waits count."""

    __slots__ = ("_at_s", "_backlog_bytes", "_last", "_provisioned_bps", "rate_bps")

    def __init__(self) -> None:
        self._at_s = -math.inf
        self._backlog_bytes = self._provisioned_bps = self.rate_bps = 0.0
        self._last: LinkReport | None = None

    def seen(self, now_s: float, report: LinkReport) -> LinkReport:
        """The report with the estimated rate in place of what its maker believes; the same again for a second one at that time."""
        last, elapsed_s = self._last, now_s - self._at_s
        if last is not None and elapsed_s <= 0:
            return last
        carried_bps = report.utilisation * report.capacity_bps
        if last is None:
            self._provisioned_bps = self.rate_bps = report.capacity_bps
        elif self._backlog_bytes > 0 and 8 * self._backlog_bytes >= carried_bps * elapsed_s:
            self.rate_bps = carried_bps
        else:
            missing = self._provisioned_bps - self.rate_bps
            probed = self._provisioned_bps - missing * math.exp(-elapsed_s / _PROBE_S)
            self.rate_bps = max(probed, carried_bps)
        self._at_s, self._backlog_bytes = now_s, report.backlog_bytes
        rate = self.rate_bps
        self._last = report._replace(capacity_bps=rate, utilisation=min(carried_bps / rate, 1.0) if rate > 0 else 1.0)
        return self._last
