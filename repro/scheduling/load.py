"""How busy each stage would be at each threshold: equations 3–8 on recent requests, with the queues that already stand.

The grid search asks which t gives the highest Λ_max. A scheduler with λ given asks which t keeps the busiest stage least busy; without
queues that is the same t, since Λ_max = λ / (busiest stage's load). With queues, each stage's backlog counts as work to be done within
`horizon_s`, so a stage that has fallen behind is relieved until it has caught up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]


class Costs(NamedTuple):
    """What a request of l uncached tokens costs: T_prefill on each cluster in seconds, and S_kv in bytes."""

    prfaas_s: Callable[[FloatArray], FloatArray]
    pd_s: Callable[[FloatArray], FloatArray]
    kv_bytes: Callable[[FloatArray], FloatArray]


class Capacity(NamedTuple):
    """Instances of each prefill stage, and what waits in front of each: seconds of work per instance, bytes on the link."""

    n_prfaas: int
    n_p: int
    egress_bps: float
    waiting_prfaas_s: float = 0.0
    waiting_pd_s: float = 0.0
    backlog_bytes: float = 0.0


class Balance(NamedTuple):
    """A threshold, and the load of the busiest prefill stage at it (1 is saturated)."""

    threshold_tokens: float
    load: float


def balance(
    lengths: Sequence[float] | ArrayLike, rate_per_s: float, costs: Costs, capacity: Capacity, horizon_s: float = math.inf
) -> Balance:
    """The threshold between recent incremental `lengths` that keeps the busiest prefill stage least busy; ties to the highest.

    A stage without instances, and a link without capacity, can take nothing. With an empty sample nothing is known: threshold 0, load 0.
    """
    tokens = np.sort(np.asarray(lengths, dtype=np.float64))
    n = len(tokens)
    if n == 0:
        return Balance(0.0, 0.0)
    each = rate_per_s / n
    # Entry i: the i shortest requests stay local, the others are offloaded.
    remote = _load(_longest(costs.prfaas_s(tokens)), each, capacity.n_prfaas, capacity.waiting_prfaas_s * capacity.n_prfaas / horizon_s)
    link = _load(_longest(costs.kv_bytes(tokens)), 8 * each, capacity.egress_bps, 8 * capacity.backlog_bytes / horizon_s)
    local = _load(_shortest(costs.pd_s(tokens)), each, capacity.n_p, capacity.waiting_pd_s * capacity.n_p / horizon_s)
    loads = np.maximum(np.maximum(remote, link), local)
    best = n - int(loads[::-1].argmin())
    return Balance(float(tokens[best - 1]) if best else 0.0, float(loads[best]))


def _shortest(work: FloatArray) -> FloatArray:
    sums: FloatArray = np.zeros(len(work) + 1)
    np.cumsum(work, out=sums[1:])
    return sums


def _longest(work: FloatArray) -> FloatArray:
    return _shortest(work[::-1])[::-1]


def _load(work: FloatArray, scale: float, servers: float, backlog: float) -> FloatArray:
    if servers > 0:
        return np.asarray(work * (scale / servers) + backlog / servers)
    return np.where(work > 0, math.inf, 0.0)
