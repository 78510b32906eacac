"""What the scheduler is told: reports that a worker or a sender can make of itself, each with the time at which it is true.

The simulator makes them from its stages, a live router from its workers' messages and its connections. Nothing here says what a request
will cost or when something will end, except what an instance has promised.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class InstanceReport(NamedTuple):
    """One instance: requests that it holds, queued or running. `busy_until_s` replaces what the scheduler believes of a prefill
    instance; null where nothing but the scheduler gives it work, whose own account is then exact.
    """

    instance: int
    requests: int
    busy_until_s: float | None = None


class PdReport(NamedTuple):
    """A PD cluster: its instances, how many requests have finished since the start with how many output tokens in sum, and how many wait
    for a place in any decode batch.
    """

    prefill: Sequence[InstanceReport]
    decode: Sequence[InstanceReport]
    finished: int
    finished_tokens: int
    waiting_decode: int = 0


class LinkReport(NamedTuple):
    """The egress of one PrfaaS cluster over the time since the last report.

    This is the only place at which the scheduler learns of a link: `capacity_bps` is whatever its sender believes that the link could
    have carried (the simulator knows, a live sender estimates), `utilisation` the used part of it, `backlog_bytes` what waits now.
    `up` is false while nothing crosses.
    """

    capacity_bps: float
    utilisation: float
    backlog_bytes: float
    rtt_s: float = 0.0
    up: bool = True


class StalledTransfer(NamedTuple):
    """A request whose prefill at PrfaaS has ended and whose KVCache waits for the link; `chain` is its prefix's keys, if known."""

    id: int
    pd: int
    input_tokens: int
    chain: Sequence[int] | None
