"""What a run's requests amount to: goodput, TTFT, TPOT, offloading, egress. Every tier's numbers come from here.

A request counts by its arrival in the measured window. One that was never answered counts as missing the service level, not as absent. A
request is good when it meets both parts of the service level. Means and quantiles are over the answered ones.

Each quantity is defined once, in `Totals.of`, over sums and two distributions; these are exact where every request is kept
(`summarise`) and sketched where there are millions (`Streaming`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from repro.record.requests import ANSWERED
from repro.record.statistics import Estimate, quantile
from repro.workload.spec import ServiceLevel

#: Metric → its unit.
UNITS: Mapping[str, str] = MappingProxyType({
    "requests": "requests", "completed": "requests", "offered_per_s": "req/s", "goodput": "req/s", "good_fraction": "",
    "completed_fraction": "", "ttft_mean_s": "s", "ttft_p50_s": "s", "ttft_p90_s": "s", "ttft_p99_s": "s", "tpot_mean_s": "s",
    "tpot_p99_s": "s", "tpot_slo_ratio": "", "queue_mean_s": "s", "transfer_exposed_s": "s", "offload_fraction": "", "egress_bps": "bit/s",
    "cached_fraction": "",
})  # fmt: skip


def over_runs(metric: str, values: Sequence[float]) -> Estimate:
    """A metric's mean over runs, with an interval within what it can be: none is negative, and no share is above 1."""
    return Estimate.of(values, most=1.0 if metric.endswith("_fraction") else math.inf)


class Distribution(Protocol):
    """Values of which a mean and quantiles are asked."""

    @property
    def mean(self) -> float:
        """Their mean; nan when there are none."""
        ...

    def quantile(self, fraction: float) -> float:
        """A quantile; nan with fewer values than it needs."""
        ...


@dataclass
class Sums:
    """What is added up over the requests of the window: counts, seconds, bytes and tokens.

    `input_tokens` and `cached_tokens` are of answered requests, the exposed transfers and bytes of those that were offloaded.
    """

    requests: int = 0
    completed: int = 0
    good: int = 0
    offloaded: int = 0
    queue_s: float = 0.0
    exposed_s: float = 0.0
    sent_bytes: float = 0.0
    input_tokens: float = 0.0
    cached_tokens: float = 0.0


@dataclass(frozen=True)
class Totals:
    """A run in numbers; rates are per second of the measured window. `tpot_slo_ratio` is the mean TPOT over the longest allowed."""

    requests: int
    completed: int
    offered_per_s: float
    goodput: float
    good_fraction: float
    completed_fraction: float
    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p90_s: float
    ttft_p99_s: float
    tpot_mean_s: float
    tpot_p99_s: float
    tpot_slo_ratio: float
    queue_mean_s: float
    transfer_exposed_s: float
    offload_fraction: float
    egress_bps: float
    cached_fraction: float

    @staticmethod
    def of(sums: Sums, ttft: Distribution, tpot: Distribution, span_s: float, slo: ServiceLevel) -> Totals:
        """From sums and distributions over a window of `span_s` seconds; rates are nan from one request, or within a microsecond."""
        if sums.requests < 2 or span_s < 1e-6:
            span_s = math.nan

        def share(part: float, whole: float) -> float:
            return part / whole if whole else math.nan

        return Totals(
            requests=sums.requests,
            completed=sums.completed,
            offered_per_s=share(sums.requests, span_s),
            goodput=share(sums.good, span_s),
            good_fraction=share(sums.good, sums.requests),
            completed_fraction=share(sums.completed, sums.requests),
            ttft_mean_s=ttft.mean,
            ttft_p50_s=ttft.quantile(0.5),
            ttft_p90_s=ttft.quantile(0.9),
            ttft_p99_s=ttft.quantile(0.99),
            tpot_mean_s=tpot.mean,
            tpot_p99_s=tpot.quantile(0.99),
            tpot_slo_ratio=tpot.mean * slo.tokens_per_s,
            queue_mean_s=share(sums.queue_s, sums.completed),
            transfer_exposed_s=share(sums.exposed_s, sums.offloaded),
            offload_fraction=share(sums.offloaded, sums.completed),
            egress_bps=share(8 * sums.sent_bytes, span_s),
            cached_fraction=share(sums.cached_tokens, sums.input_tokens),
        )

    def values(self) -> dict[str, float]:
        """Every metric by name."""
        return {item.name: float(getattr(self, item.name)) for item in fields(self)}


@dataclass(frozen=True)
class Exact:
    """A distribution that keeps every value."""

    data: NDArray[np.float64]

    @property
    def mean(self) -> float:
        """Their mean; nan when there are none."""
        return float(self.data.mean()) if len(self.data) else math.nan

    def quantile(self, fraction: float) -> float:
        """A quantile; nan with fewer values than it needs."""
        return quantile(self.data, fraction)


def good(ttft_s: NDArray[np.float64], tpot_s: NDArray[np.float64], slo: ServiceLevel) -> NDArray[np.bool_]:
    """Whether each request met the service level; a part in 10⁹ of tolerance, so that a step of exactly 1/40 s passes."""
    return (ttft_s <= slo.ttft_s) & (tpot_s <= (1 + 1e-9) / slo.tokens_per_s)


def summarise(requests: pd.DataFrame, window_s: tuple[float, float], slo: ServiceLevel) -> Totals:
    """A requests table over the requests that arrived in the window."""
    low, high = window_s
    seen = requests[(requests["arrival_s"] >= low) & (requests["arrival_s"] < high)]
    done = seen[seen["outcome"].isin(ANSWERED)]
    ttft, tpot = done["ttft_s"].to_numpy(np.float64), done["tpot_s"].to_numpy(np.float64)
    remote = done[done["route"] == "prfaas"]
    sums = Sums(
        requests=len(seen),
        completed=len(done),
        good=int(good(ttft, tpot, slo).sum()),
        offloaded=len(remote),
        queue_s=float(done["queue_s"].sum()),
        exposed_s=float(remote["transfer_exposed_s"].sum()),
        sent_bytes=float(remote["kv_bytes"].sum()),
        input_tokens=float(done["input_tokens"].sum()),
        cached_tokens=float(done["cached_tokens"].sum()),
    )
    return Totals.of(sums, Exact(ttft), Exact(tpot), high - low, slo)
