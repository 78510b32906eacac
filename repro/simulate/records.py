"""What a run leaves behind: the requests table of the contract, or, for millions of requests, totals and quantile sketches.

Both are fed the same rows in batches. A sketch counts values in bins of 1 % width, so any quantile is within 0.5 % and the memory is fixed,
whatever the number of requests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from repro.workload.spec import ServiceLevel

#: Columns of requests.parquet, in the order of the simulator's rows.
COLUMNS = (
    "id", "arrival_s", "input_tokens", "cached_tokens", "output_tokens", "route", "queue_s", "prefill_s", "transfer_s",
    "transfer_exposed_s", "kv_bytes", "decode_queue_s", "ttft_s", "tpot_s", "finish_s", "outcome", "prefill_worker", "decode_worker",
)  # fmt: skip
_INTEGERS = ("id", "input_tokens", "cached_tokens", "output_tokens", "prefill_worker", "decode_worker")
_AT = {name: i for i, name in enumerate(COLUMNS)}
OUTCOMES = ("ok", "failed", "timed_out", "fell_back")
ROUTES = ("pd", "prfaas")

Row = tuple[float, ...]


class Sink(Protocol):
    """Takes finished requests, in the order in which they finished."""

    def take(self, rows: Sequence[Row]) -> None:
        """Rows in the order of `COLUMNS`, route and outcome as indices."""
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
        columns["route"] = np.array(ROUTES, dtype=object)[data[:, _AT["route"]].astype(int)]
        columns["outcome"] = np.array(OUTCOMES, dtype=object)[data[:, _AT["outcome"]].astype(int)]
        return pd.DataFrame(columns)


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


@dataclass(frozen=True)
class Totals:
    """A run in numbers; rates are per second of the measured window, in which the counted requests arrived."""

    requests: int
    completed: int
    offered_per_s: float
    goodput: float
    good_fraction: float
    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p90_s: float
    ttft_p99_s: float
    tpot_mean_s: float
    tpot_p99_s: float
    queue_mean_s: float
    transfer_exposed_s: float
    offload_fraction: float
    egress_bps: float
    cached_fraction: float


class Streaming:
    """Keeps sums and sketches of the requests that arrived in [`from_s`, `until_s`)."""

    def __init__(self, slo: ServiceLevel, from_s: float = 0.0, until_s: float = math.inf) -> None:
        self._slo, self._from_s, self._until_s = slo, from_s, until_s
        self.ttft, self.tpot = Sketch(), Sketch()
        self._requests = self._good = self._offloaded = 0
        self._queue_s = self._exposed_s = self._bytes = self._input = self._cached = 0.0
        self._last_s = from_s

    def take(self, rows: Sequence[Row]) -> None:
        """Count them."""
        data = _array(rows)
        arrival = data[:, _AT["arrival_s"]]
        data = data[(arrival >= self._from_s) & (arrival < self._until_s)]
        if not len(data):
            return
        self._requests += len(data)
        self._last_s = max(self._last_s, float(data[:, _AT["arrival_s"]].max()))
        self._input += float(data[:, _AT["input_tokens"]].sum())
        done = data[np.isin(data[:, _AT["outcome"]], (0, 3))]
        ttft, tpot = done[:, _AT["ttft_s"]], done[:, _AT["tpot_s"]]
        self.ttft.take(ttft)
        self.tpot.take(tpot)
        self._good += int(good(ttft, tpot, self._slo).sum())
        remote = done[:, _AT["route"]] > 0
        self._offloaded += int(remote.sum())
        self._queue_s += float(done[:, _AT["queue_s"]].sum())
        self._exposed_s += float(done[remote, _AT["transfer_exposed_s"]].sum())
        self._bytes += float(done[remote, _AT["kv_bytes"]].sum())
        self._cached += float(done[:, _AT["cached_tokens"]].sum())

    def totals(self) -> Totals:
        """Everything counted so far."""
        span = (self._until_s if self._until_s < math.inf else self._last_s) - self._from_s
        n, done = self._requests, self.ttft.n
        per_s = 1 / span if span > 0 else math.nan
        return Totals(
            requests=n,
            completed=done,
            offered_per_s=n * per_s,
            goodput=self._good * per_s,
            good_fraction=self._good / n if n else math.nan,
            ttft_mean_s=self.ttft.mean,
            ttft_p50_s=self.ttft.quantile(0.5),
            ttft_p90_s=self.ttft.quantile(0.9),
            ttft_p99_s=self.ttft.quantile(0.99),
            tpot_mean_s=self.tpot.mean,
            tpot_p99_s=self.tpot.quantile(0.99),
            queue_mean_s=self._queue_s / done if done else math.nan,
            transfer_exposed_s=self._exposed_s / self._offloaded if self._offloaded else math.nan,
            offload_fraction=self._offloaded / done if done else math.nan,
            egress_bps=8 * self._bytes * per_s,
            cached_fraction=self._cached / self._input if self._input else math.nan,
        )


def good(ttft_s: NDArray[np.float64], tpot_s: NDArray[np.float64], slo: ServiceLevel) -> NDArray[np.bool_]:
    """Whether each request met the service level; a part in 10⁹ of tolerance, so that a step of exactly 1/40 s passes."""
    return (ttft_s <= slo.ttft_s) & (tpot_s <= (1 + 1e-9) / slo.tokens_per_s)
