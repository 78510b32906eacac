"""What a run leaves behind: the requests table of the contract, or, for millions of requests, totals and quantile sketches.

Both are fed the same rows in batches. A sketch counts values in bins of 1 % width, so any quantile is within 0.5 % and the memory is fixed,
whatever the number of requests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from repro.record.request_metrics import Sums, Totals, good
from repro.record.requests import ANSWERED, COLUMNS, OUTCOMES, ROUTES
from repro.workload.spec import ServiceLevel

_INTEGERS = ("id", "input_tokens", "cached_tokens", "output_tokens")
_ANSWERED = tuple(OUTCOMES.index(outcome) for outcome in ANSWERED)
_AT = {name: i for i, name in enumerate(COLUMNS)}
#: Pools that a worker's number counts in, by route: who prefilled.
_PREFILL_POOLS = ("pd_p", "prfaas")

Row = tuple[float, ...]


class Sink(Protocol):
    """Takes finished requests, in the order in which they finished."""

    def take(self, rows: Sequence[Row]) -> None:
        """Rows in the order of the schema's columns, route and outcome as indices, workers as numbers within their pool."""
        ...


class Table:
    """Keeps every request."""

    def __init__(self) -> None:
        self._parts: list[NDArray[np.float64]] = []

    def take(self, rows: Sequence[Row]) -> None:
        """Keep them."""
        self._parts.append(_array(rows))

    def frame(self) -> pd.DataFrame:
        """The requests table, sorted by id."""
        data = np.concatenate(self._parts) if self._parts else np.empty((0, len(COLUMNS)))
        data = data[np.argsort(data[:, 0], kind="stable")]
        columns: dict[str, object] = {}
        for i, name in enumerate(COLUMNS):
            column = data[:, i]
            columns[name] = column.astype(np.int64) if name in _INTEGERS else column
        route = data[:, _AT["route"]].astype(int)
        columns["prefill_worker"] = _names(
            data[:, _AT["prefill_worker"]], np.array(_PREFILL_POOLS, dtype=object)[route]
        )
        columns["decode_worker"] = _names(data[:, _AT["decode_worker"]], np.full(len(data), "pd_d", dtype=object))
        columns["route"] = np.array(ROUTES, dtype=object)[route]
        columns["outcome"] = np.array(OUTCOMES, dtype=object)[data[:, _AT["outcome"]].astype(int)]
        return pd.DataFrame(columns)


def _names(numbers: NDArray[np.float64], pools: NDArray[np.object_]) -> NDArray[np.object_]:
    """`prfaas/3` for worker 3 of the PrfaaS pool, and nothing where nobody had the request."""
    keys = pd.Series(pools) + "/" + pd.Series(numbers.astype(np.int64)).astype(str)
    return np.asarray(keys.where(numbers >= 0, "").to_numpy(dtype=object))


def _array(rows: Sequence[Row]) -> NDArray[np.float64]:
    """Rows as an array; from one long iterator, which takes a third of the time of `np.array` on tuples."""
    values = np.fromiter(chain.from_iterable(rows), np.float64, len(rows) * len(COLUMNS))
    return values.reshape(-1, len(COLUMNS))


class Sketch:
    """Counts of positive values in bins of 1 % width from 1 µs to 10⁷ s."""

    _LOW, _STEP = math.log(1e-6), math.log(1.01)
    _BINS = math.ceil((math.log(1e7) - math.log(1e-6)) / math.log(1.01))

    def __init__(self) -> None:
        self.counts = np.zeros(self._BINS, dtype=np.int64)
        self.total = 0.0
        self.n = 0

    def take(self, values: NDArray[np.float64]) -> None:
        """Count them."""
        if len(values):
            at = (np.log(np.maximum(values, 1e-6)) - self._LOW) / self._STEP
            np.add.at(self.counts, np.clip(at.astype(np.int64), 0, self._BINS - 1), 1)
            self.total += float(values.sum())
            self.n += len(values)

    @property
    def mean(self) -> float:
        """Exact mean; nan when empty."""
        return self.total / self.n if self.n else math.nan

    def quantile(self, fraction: float) -> float:
        """Within 0.5 %; nan with fewer values than the quantile needs to lie inside the sample."""
        if self.n < 1 / max(1 - fraction, 1e-12):
            return math.nan
        index = int(np.searchsorted(np.cumsum(self.counts), fraction * self.n, side="left"))
        return math.exp(self._LOW + (min(index, self._BINS - 1) + 0.5) * self._STEP)


class Streaming:
    """Keeps sums and sketches of the requests that arrived in [`from_s`, `until_s`)."""

    def __init__(self, slo: ServiceLevel, from_s: float = 0.0, until_s: float = math.inf) -> None:
        self._slo, self._from_s, self._until_s = slo, from_s, until_s
        self.ttft, self.tpot = Sketch(), Sketch()
        self._sums = Sums()
        self._last_s = from_s

    def take(self, rows: Sequence[Row]) -> None:
        """Count them."""
        data = _array(rows)
        arrival = data[:, _AT["arrival_s"]]
        data = data[(arrival >= self._from_s) & (arrival < self._until_s)]
        if not len(data):
            return
        sums = self._sums
        self._last_s = max(self._last_s, float(data[:, _AT["arrival_s"]].max()))
        done = data[np.isin(data[:, _AT["outcome"]], _ANSWERED)]
        ttft, tpot = done[:, _AT["ttft_s"]], done[:, _AT["tpot_s"]]
        self.ttft.take(ttft)
        self.tpot.take(tpot)
        remote = done[:, _AT["route"]] > 0
        sums.requests += len(data)
        sums.completed += len(done)
        sums.good += int(good(ttft, tpot, self._slo).sum())
        sums.offloaded += int(remote.sum())
        sums.queue_s += float(done[:, _AT["queue_s"]].sum())
        sums.exposed_s += float(done[remote, _AT["transfer_exposed_s"]].sum())
        sums.sent_bytes += float(done[remote, _AT["kv_bytes"]].sum())
        sums.input_tokens += float(done[:, _AT["input_tokens"]].sum())
        sums.cached_tokens += float(done[:, _AT["cached_tokens"]].sum())

    def totals(self) -> Totals:
        """Everything counted so far."""
        span_s = (self._until_s if self._until_s < math.inf else self._last_s) - self._from_s
        return Totals.of(self._sums, self.ttft, self.tpot, span_s, self._slo)
