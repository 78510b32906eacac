"""What a router can know: the request's length and cached prefixes, and measurements of clusters and link that are a moment old.

Nothing here carries an output length, an end time or an arrival to come; a policy that compiles against these types cannot cheat, and
the simulator and the live router fill in the same ones (§3.4.3). Tuples, because one is made per request on the simulator's hot path.
"""

from __future__ import annotations

import math
from typing import NamedTuple


class RequestView(NamedTuple):
    """One request on arrival. `cached_*_tokens` is the prefix that every layer group of that cluster's pool can serve."""

    id: int
    total_tokens: int
    cached_pd_tokens: int = 0
    cached_prfaas_tokens: int = 0


class ClusterView(NamedTuple):
    """One pool of prefill instances: how many serve, and how many seconds of work wait for each of them on average."""

    instances: int
    waiting_s: float = 0.0


class LinkView(NamedTuple):
    """The egress of the PrfaaS cluster over the last measuring period."""

    capacity_bps: float = math.inf
    utilisation: float = 0.0
    backlog_bytes: float = 0.0
    loss_fraction: float = 0.0
    rtt_s: float = 0.0


class SchedulerState(NamedTuple):
    """What the controllers have decided and measured last; the second input of every routing decision."""

    threshold_tokens: float
    bandwidth_scarce: bool
    pd: ClusterView
    prfaas: ClusterView
    link: LinkView = LinkView()


class Route(NamedTuple):
    """Where a request is prefilled, how much of its prefix need not be, and whether that prefix must cross the link first."""

    offload: bool
    cached_tokens: int = 0
    fetch: bool = False


LOCAL = Route(offload=False)
REMOTE = Route(offload=True)


class Sample(NamedTuple):
    """One reading of a PD cluster's controllers, for figures."""

    at_s: float
    home: int
    threshold_tokens: float
    bandwidth_scarce: bool
    n_p: int
    n_d: int
    utilisation: float
    waiting_prfaas_s: float
    waiting_pd_s: float
    waiting_decode: int
