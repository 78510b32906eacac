"""How busy each stage would be at each threshold: equations 3–8 on recent requests, with the queues that already stand.

The grid search asks which t gives the highest Λ_max. A scheduler with λ given asks which t keeps the busiest stage least busy; that is
the same t, since Λ_max = λ / (busiest stage's load). With queues, the question becomes which t loses the fewest requests to waiting. It
sums over requests and is not the worst stage's: a backlog on the link that no decision can undo must not drag the local queue to its
own length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

#: Thresholds that one search weighs, at equal steps of rank among the recent lengths: finer ones differ by less than the sample's noise.
CANDIDATES = 128


class Costs(NamedTuple):
    """What a request of l uncached tokens costs: T_prefill on each cluster in seconds, and S_kv in bytes."""

    prfaas_s: Callable[[NDArray[np.int64]], FloatArray]
    pd_s: Callable[[NDArray[np.int64]], FloatArray]
    kv_bytes: Callable[[NDArray[np.int64]], FloatArray]


class Capacity(NamedTuple):
    """Instances of each prefill stage, and what waits in front of each: seconds of work per instance, bytes on the link."""

    n_prfaas: int
    n_p: int
    egress_bps: float
    waiting_prfaas_s: float = 0.0
    waiting_pd_s: float = 0.0
    backlog_bytes: float = 0.0


class Balance(NamedTuple):
    """A threshold, and the load of the busiest prefill stage at it (1 is saturated), queues not counted."""

    threshold_tokens: float
    load: float


def balance(
    lengths: Collection[float],
    rate_per_s: float,
    costs: Costs,
    capacity: Capacity,
    horizon_s: float | None = None,
    patience_s: float = math.inf,
) -> Balance:
    """The best threshold between recent incremental `lengths`; of equals, the highest.

    Without a horizon it is the one that keeps the busiest prefill stage least busy. With one, it is the one at which requests lose
    least by waiting over that time, given today's queues; a wait beyond `patience_s` has lost the request, and how far beyond hardly
    matters. A stage without instances, and a link without capacity, can take nothing. With an empty sample nothing is known:
    threshold 0, load 0.
    """
    n = len(lengths)
    if n == 0:
        return Balance(0.0, 0.0)
    tokens = np.fromiter(lengths, dtype=np.int64, count=n)
    tokens.sort()
    each = rate_per_s / n
    # Entry i: the kept[i] shortest requests stay local, the others are offloaded.
    kept = _ranks(n)
    remote = _load(_longest(costs.prfaas_s(tokens), kept), each, capacity.n_prfaas)
    link = _load(_longest(costs.kv_bytes(tokens), kept), 8 * each, capacity.egress_bps)
    local = _load(_shortest(costs.pd_s(tokens), kept), each, capacity.n_p)
    loads = np.maximum(np.maximum(remote, link), local)
    cost = loads
    if horizon_s is not None:
        on_link_s = 8 * capacity.backlog_bytes / capacity.egress_bps if capacity.egress_bps > 0 else 0.0
        stay = kept / n
        away_s = np.maximum(_wait(remote, capacity.waiting_prfaas_s, horizon_s), _wait(link, on_link_s, horizon_s))
        home_s = _wait(local, capacity.waiting_pd_s, horizon_s)
        away, home = _loss(away_s, patience_s), _loss(home_s, patience_s)
        cost = np.where(stay < 1, (1 - stay) * away, 0.0) + np.where(stay > 0, stay * home, 0.0)
    at = len(cost) - 1 - int(cost[::-1].argmin())
    best = int(kept[at])
    return Balance(float(tokens[best - 1]) if best else 0.0, float(loads[at]))


def _wait(load: FloatArray, waiting_s: float, horizon_s: float) -> FloatArray:
    """Mean wait over the horizon of a queue that is `waiting_s` long now and grows or shrinks by the excess load.

    Work arrives unevenly: within the horizon a queue strays by about its square root, which is why a stage loaded to 1 does wait.
    """
    stray_s = math.sqrt(horizon_s)
    later_s = stray_s * np.logaddexp(0.0, (waiting_s + horizon_s * (load - 1)) / stray_s)
    return np.asarray((waiting_s + later_s) / 2)


def _loss(wait_s: FloatArray, patience_s: float) -> FloatArray:
    return np.asarray(np.minimum(wait_s, patience_s) + 0.01 * wait_s)


@cache
def _ranks(n: int) -> NDArray[np.int64]:
    return np.append(np.arange(0, n, -(-n // CANDIDATES)), n)


def _shortest(work: FloatArray, kept: NDArray[np.int64]) -> FloatArray:
    sums: FloatArray = work.cumsum()[kept - 1]
    sums[0] = 0.0
    return sums


def _longest(work: FloatArray, kept: NDArray[np.int64]) -> FloatArray:
    shorter = _shortest(work, kept)
    return np.asarray(shorter[-1] - shorter)


def _load(work: FloatArray, scale: float, servers: float) -> FloatArray:
    if servers > 0:
        return np.asarray(work * (scale / servers))
    return np.where(work > 0, math.inf, 0.0)
