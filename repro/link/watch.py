"""The link's own signals as a time series: what the scheduler reads and the record keeps.

One thread asks the backend for its queue and drops at a set interval. Readers take the newest sample or the whole
series; neither ever waits for the link.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from typing import Protocol

from repro.errors import UserError
from repro.link.link import LinkSignals
from repro.link.spec import Direction

log = logging.getLogger("repro.link")


class Signalling(Protocol):
    """What has signals: an open link."""

    def signals(self) -> LinkSignals:
        """The counters now."""


class Series:
    """Samples in the order in which they were taken, each with its moment in monotonic seconds."""

    def __init__(self) -> None:
        self._samples: list[LinkSignals] = []

    def add(self, sample: LinkSignals) -> None:
        """Keep one more."""
        self._samples.append(sample)

    @property
    def latest(self) -> LinkSignals | None:
        """The newest sample, None before the first."""
        return self._samples[-1] if self._samples else None

    def rows(self, direction: Direction = "forward", origin_s: float = 0.0) -> list[dict[str, float]]:
        """One row per sample for the record: `at_s` from the origin, the counters of a direction, and the rate since the sample before."""
        found: list[dict[str, float]] = []
        before: LinkSignals | None = None
        for sample in list(self._samples):
            now = getattr(sample, direction)
            rate = 0.0
            if before is not None and sample.at_s > before.at_s:
                carried = now.forwarded_bytes - getattr(before, direction).forwarded_bytes
                rate = 8 * carried / (sample.at_s - before.at_s)
            found.append({
                "at_s": sample.at_s - origin_s,
                "forwarded_bps": rate,
                "queue_bytes": now.queue_bytes,
                "dropped_segments": now.dropped_segments,
                "lost_segments": now.lost_segments,
                "overrun_packets": now.overrun_packets,
            })  # fmt: skip
            before = sample
        return found


@contextlib.contextmanager
def watching(link: Signalling, interval_s: float = 0.1) -> Iterator[Series]:
    """Sample a link inside the block. A link that dies meanwhile ends the series, not the block: others will notice.

    Raises:
        UserError: if the interval is not positive.
    """
    if interval_s <= 0:
        raise UserError(f"link: sampling every {interval_s:g} s; accepted: above 0")
    series, over = Series(), threading.Event()

    def sample() -> None:
        while not over.wait(interval_s):
            try:
                series.add(link.signals())
            except UserError as error:
                log.warning("link: no more signals (%s)", error)
                return

    thread = threading.Thread(target=sample, name="link signals", daemon=True)
    thread.start()
    try:
        yield series
    finally:
        over.set()
        thread.join()
