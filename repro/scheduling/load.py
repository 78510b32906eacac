"""How busy each stage would be at each threshold, and how many requests would be late: equations 3–8 on recent requests.

The grid search asks which t gives the highest Λ_max. A scheduler with λ given asks which t leaves the busiest stage the most room, which
is the same t. With queues, the question becomes at which t the most requests get their first token in time. It sums over requests and is
not the worst stage's: a backlog on the link that no decision can undo must not drag the local queue to its own length. And it counts
each request's own prefill: one that is too long for the slower hardware to prefill in time is not saved by an empty queue there.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

#: Thresholds that one search weighs, at equal steps of rank among the recent lengths: finer ones differ by less than the sample's noise.
CANDIDATES = 48


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


class Curve(NamedTuple):
    """Recent requests by rank of length. Row k: the `stay[k]` shortest share is local, mean work per request is …

    The last two describe the slices between one row and the next: their share of requests, and (row, slice) the mean prefill time of a
    request where that row sends it.
    """

    threshold_tokens: FloatArray
    stay: FloatArray
    remote_s: FloatArray
    remote_bytes: FloatArray
    local_s: FloatArray
    slice_share: FloatArray
    slice_s: FloatArray


class Balance(NamedTuple):
    """A threshold, the load of the busiest prefill stage at it (1 is saturated, queues not counted), and its worth.

    `worth` is 1 / load without a horizon (Λ_max over λ), else the share of requests in time; `held_worth` is that of the threshold in
    force, which a search may decide to hold.
    """

    threshold_tokens: float
    load: float
    worth: float
    held_worth: float


class Recent(Collection[float]):
    """The last `size` lengths, and the curve over them, which is computed anew once a sixteenth of them is new."""

    def __init__(self, size: int) -> None:
        self._lengths: deque[float] = deque(maxlen=size)
        self._block = max(size // 16, 1)
        self._new = self._block
        self._curve: Curve | None = None
        self.append = self._lengths.append

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[float]:
        return iter(self._lengths)

    def __contains__(self, length: object) -> bool:
        return length in self._lengths

    def arrived(self, count: int) -> None:
        """So many have been appended since this was last said; appending itself is on the hot path and counts nothing."""
        self._new += count

    def curve(self, costs: Costs) -> Curve:
        """The curve, at most one block of requests old."""
        if self._curve is None or self._new >= self._block:
            self._curve = curve(self._lengths, costs)
            self._new = 0
        return self._curve


def curve(lengths: Collection[float], costs: Costs) -> Curve:
    """The curve over `lengths`, of which there must be one at least."""
    n = len(lengths)
    tokens = np.fromiter(lengths, dtype=np.int64, count=n)
    tokens.sort()
    kept = np.append(np.arange(0, n, -(-n // CANDIDATES)), n)
    counts = np.diff(kept)

    def sums(work: FloatArray) -> FloatArray:
        return np.asarray(np.concatenate(([0.0], work.cumsum()))[kept] / n)

    remote, size, local = sums(costs.prfaas_s(tokens)), sums(costs.kv_bytes(tokens)), sums(costs.pd_s(tokens))
    thresholds = tokens[kept - 1].astype(np.float64)
    thresholds[0] = 0.0
    share = counts / n
    each_s = np.where(_local(len(share)), np.diff(local) / share, np.diff(remote) / share)
    return Curve(thresholds, kept / n, remote[-1] - remote, size[-1] - size, local, share, each_s)


@cache
def _local(slices: int) -> NDArray[np.bool_]:
    """Whether a row (first axis, one more than slices) keeps a slice local."""
    return np.tri(slices + 1, slices, -1, dtype=np.bool_)


def balance(
    lengths: Collection[float],
    rate_per_s: float,
    costs: Costs,
    capacity: Capacity,
    horizon_s: float | None = None,
    patience_s: float = math.inf,
    held_tokens: float = 0.0,
) -> Balance:
    """The best threshold between recent incremental `lengths`; of equals, the highest.

    Without a horizon it is the one that keeps the busiest prefill stage least busy. With one, it is the one at which the most requests
    of that time get their first token within `patience_s`, given today's queues. A stage without instances, and a link without capacity,
    can take nothing. With an empty sample nothing is known: threshold 0, load 0.
    """
    if not lengths:
        return Balance(0.0, 0.0, 0.0, 0.0)
    at = lengths.curve(costs) if isinstance(lengths, Recent) else curve(lengths, costs)
    remote = _load(at.remote_s, rate_per_s, capacity.n_prfaas)
    link = _load(at.remote_bytes, 8 * rate_per_s, capacity.egress_bps)
    local = _load(at.local_s, rate_per_s, capacity.n_p)
    loads = np.maximum(np.maximum(remote, link), local)
    if horizon_s is None:
        worth = 1 / np.maximum(loads, 1e-12)
    else:
        on_link_s = 8 * capacity.backlog_bytes / capacity.egress_bps if capacity.egress_bps > 0 else 0.0
        away_s = np.maximum(_wait(remote, capacity.waiting_prfaas_s, horizon_s), _wait(link, on_link_s, horizon_s))
        home_s = _wait(local, capacity.waiting_pd_s, horizon_s)
        # A slice waits where its row sends it; waits are taken as exponential.
        wait_s = np.where(_local(len(at.slice_share)), home_s[:, None], away_s[:, None])
        in_time = 1 - np.exp(np.minimum(at.slice_s - patience_s, 0.0) / np.maximum(wait_s, 1e-9))
        worth = in_time @ at.slice_share
    best = len(worth) - 1 - int(worth[::-1].argmax())
    held = int(at.threshold_tokens.searchsorted(held_tokens, "right")) - 1
    return Balance(float(at.threshold_tokens[best]), float(loads[best]), float(worth[best]), float(worth[held]))


def _wait(load: FloatArray, waiting_s: float, horizon_s: float) -> FloatArray:
    """Mean wait over the horizon of a queue that is `waiting_s` long now and grows or shrinks by the excess load.

    Work arrives unevenly: within the horizon a queue strays by about its square root, which is why a stage loaded to 1 does wait.
    """
    stray_s = math.sqrt(horizon_s)
    later_s = stray_s * np.logaddexp(0.0, (waiting_s + horizon_s * (load - 1)) / stray_s)
    return np.asarray((waiting_s + later_s) / 2)


def _load(work: FloatArray, scale: float, servers: float) -> FloatArray:
    if servers > 0:
        return np.asarray(work * (scale / servers))
    return np.where(work > 0, math.inf, 0.0)
