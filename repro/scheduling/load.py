"""How busy each stage would be at each threshold, and how many requests would be late: equations 3–8 on recent requests.

The grid search asks which t gives the highest Λ_max. A scheduler with λ given asks which t leaves the busiest stage the most room, which
is the same t. With queues, the question becomes at which t the most requests get their first token in time. It sums over requests and is
not the worst stage's: a backlog on the link that no decision can undo must not drag the local queue to its own length. And it counts
each request's own prefill: one that is too long for the slower hardware to prefill in time is not saved by an empty queue there.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import cache
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

#: Thresholds that one search weighs, at equal steps of rank among the recent lengths: finer ones differ by less than the sample's noise.
CANDIDATES = 48


#: Load per unit of work of a stage without instances, or a link without capacity: finite, so that no work is no load.
_UNSERVED = 1e12


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
    """Recent requests by rank of length. Row k: what is no longer than its threshold is local.

    `work` is the mean per request of prefill at PrfaaS, bytes on the link and local prefill (first axis) at each row. The last three
    describe the slices between one row and the next: their share of requests, and (row, slice) whether that row keeps them local, and the
    mean prefill time of a request where it sends them.
    """

    threshold_tokens: FloatArray
    work: FloatArray
    slice_share: FloatArray
    slice_local: NDArray[np.bool_]
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
        self._priced: FloatArray | None = None
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
        """The curve, at most one block of requests old. `costs` are those of the first call: a length is priced once."""
        if self._curve is None or self._new >= self._block:
            n = len(self._lengths)
            new = n if self._priced is None else min(self._new, n)
            priced = _priced(islice(reversed(self._lengths), new), new, costs)
            if self._priced is not None:
                priced = np.concatenate((priced, self._priced[:, : n - new]), axis=1)
            self._priced, self._new = priced, 0
            self._curve = _curve(priced)
        return self._curve


def _priced(lengths: Iterable[float], n: int, costs: Costs) -> FloatArray:
    """Lengths, and what each costs: prefill at PrfaaS, bytes on the link, local prefill."""
    tokens = np.fromiter(lengths, np.int64, n)
    priced = np.empty((4, n))
    priced[0] = tokens
    priced[1], priced[2], priced[3] = costs.prfaas_s(tokens), costs.kv_bytes(tokens), costs.pd_s(tokens)
    return priced


def curve(lengths: Collection[float], costs: Costs) -> Curve:
    """The curve over `lengths`, of which there must be one at least."""
    return _curve(_priced(lengths, len(lengths), costs))


def _curve(priced: FloatArray) -> Curve:
    n = priced.shape[1]
    kept, share, local = _slices(n)
    priced = priced[:, priced[0].argsort()]
    work = np.zeros((3, n + 1))
    priced[1:].cumsum(axis=1, out=work[:, 1:])
    work = work[:, kept]
    work /= n
    each_s = (work[:, 1:] - work[:, :-1]) / share
    # The first two stages get what does not stay.
    work[:2] = work[:2, -1:] - work[:2]
    thresholds = priced[0, kept - 1]
    thresholds[0] = 0.0
    return Curve(thresholds, work, share, local, np.where(local, each_s[2], each_s[0]))


@cache
def _slices(n: int) -> tuple[NDArray[np.int64], FloatArray, NDArray[np.bool_]]:
    """Ranks that rows stand for among `n` lengths, the shares of the slices between, and whether a row keeps a slice local."""
    kept = np.append(np.arange(0, n, -(-n // CANDIDATES)), n)
    slices = len(kept) - 1
    return kept, np.diff(kept) / n, np.tri(slices + 1, slices, -1, dtype=np.bool_)


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
    per_load = _per_load(rate_per_s, capacity)
    if horizon_s is None:
        loads = at.work * per_load
        worth = 1 / np.maximum(np.maximum(loads[0], loads[1]), np.maximum(loads[2], 1e-12))
    else:
        worth = _in_time(at, per_load, capacity, horizon_s, patience_s)
    best = len(worth) - 1 - int(worth[::-1].argmax())
    held = int(at.threshold_tokens.searchsorted(held_tokens, "right")) - 1
    busiest = float((at.work[:, best] * per_load[:, 0]).max())
    return Balance(float(at.threshold_tokens[best]), busiest, float(worth[best]), float(worth[held]))


def _per_load(rate_per_s: float, capacity: Capacity) -> FloatArray:
    """Load of each prefill stage and the link per unit of `Curve.work`; next to infinite where there is nobody to do the work."""
    n_prfaas, n_p, egress_bps = capacity.n_prfaas, capacity.n_p, capacity.egress_bps
    return np.array(
        (
            rate_per_s / n_prfaas if n_prfaas > 0 else _UNSERVED,
            8 * rate_per_s / egress_bps if egress_bps > 0 else _UNSERVED,
            rate_per_s / n_p if n_p > 0 else _UNSERVED,
        )
    )[:, None]


def _in_time(at: Curve, per_load: FloatArray, capacity: Capacity, horizon_s: float, patience_s: float) -> FloatArray:
    """Share of the horizon's requests whose first token comes within `patience_s`, at each row.

    A queue that is q long now grows or shrinks by the excess load, and work arrives unevenly: within the horizon h it strays by about √h,
    which is why a stage loaded to 1 does wait. Its mean wait is (q + √h · softplus((q + h · (load − 1)) / √h)) / 2.
    """
    stray_s = math.sqrt(horizon_s)
    on_link_s = 8 * capacity.backlog_bytes / capacity.egress_bps if capacity.egress_bps > 0 else 0.0
    now_s = np.array((capacity.waiting_prfaas_s, on_link_s, capacity.waiting_pd_s))[:, None]
    wait_s = at.work * (per_load * stray_s)
    wait_s += (now_s - horizon_s) / stray_s
    np.logaddexp(0.0, wait_s, out=wait_s)
    wait_s *= stray_s / 2
    wait_s += now_s / 2 + 1e-9
    away_s = np.maximum(wait_s[0], wait_s[1])
    # A slice waits where its row sends it; waits are taken as exponential.
    late = at.slice_s - patience_s
    np.minimum(late, 0.0, out=late)
    late /= np.where(at.slice_local, wait_s[2][:, None], away_s[:, None])
    # Where no more than e⁻⁵⁰ is late, nobody is; exp would spend most of its time on such values.
    np.maximum(late, -50.0, out=late)
    np.exp(late, out=late)
    return np.asarray(1.0 - late @ at.slice_share)
