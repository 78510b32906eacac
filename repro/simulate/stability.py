"""Λ_max of a simulated deployment: the highest arrival rate whose queues do not grow, by bisection, once per seed.

The number in the system is compared between the second and the last quarter of a run. Below Λ_max it fluctuates around a level; above, it
grows by the excess rate. Arrivals of one seed are the same at every rate but for their spacing, so within a seed stability changes
once, and the spread between seeds gives the confidence interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from repro.record.requests import COLUMNS
from repro.record.statistics import Estimate
from repro.simulate.records import Row
from repro.simulate.simulation import Simulation
from repro.simulate.spec import SimulationSpec
from repro.workload.stream import RequestBatch

_ARRIVAL, _FINISH = tuple(COLUMNS).index("arrival_s"), tuple(COLUMNS).index("finish_s")

#: Growth of the number in the system, as a share of arrivals, that still counts as none.
TOLERANCE = 0.005


class _Times:
    """Arrival and finish of every request."""

    def __init__(self) -> None:
        self._parts: list[NDArray[np.float64]] = []

    def take(self, rows: Sequence[Row]) -> None:
        self._parts.append(np.array([(row[_ARRIVAL], row[_FINISH]) for row in rows]))

    def growth(self) -> float:
        """Growth of the number in the system per arrival."""
        times = np.concatenate(self._parts)
        return growth_of(times[:, 0], times[:, 1])


def growth_of(arrival_s: NDArray[np.float64], finish_s: NDArray[np.float64]) -> float:
    """Growth of the number in the system per arrival, between the second and the last quarter of a run; unfinished are nan."""
    arrivals, finishes = np.sort(arrival_s), np.sort(finish_s[np.isfinite(finish_s)])
    end = arrivals[-1]

    def level(low: float, high: float) -> float:
        at = np.linspace(low * end, high * end, 400)
        return float(np.mean(np.searchsorted(arrivals, at) - np.searchsorted(finishes, at)))

    between = np.searchsorted(arrivals, 0.875 * end) - np.searchsorted(arrivals, 0.375 * end)
    return (level(0.75, 1.0) - level(0.25, 0.5)) / max(float(between), 1.0)


def growth(spec: SimulationSpec, requests: Iterable[RequestBatch]) -> float:
    """Growth of the number in the system per arrival; infinite for a run that was cut as overloaded."""
    times = _Times()
    batches = list(requests)
    # A stable system's number stays far below a tenth of all its requests.
    limit = max(2000, sum(len(batch.arrival_s) for batch in batches) // 10)
    summary = Simulation(replace(spec, drain_s=0.0, limit_requests=limit), times).run(batches)
    return math.inf if summary.overloaded else times.growth()


def lambda_max(
    spec: SimulationSpec,
    requests: Callable[[float, int], Iterable[RequestBatch]],
    guess_per_s: float,
    seeds: Sequence[int],
    width: float = 0.001,
) -> Estimate:
    """Highest stable rate over seeds, in the unit of `requests(rate, seed)`, which makes the stream: requests or sessions per second.

    A seed's streams at two rates must differ in their spacing only. The guess only says where to look first; the answer is
    within half of `width` of where the seed's runs stop being stable.
    """

    def of_seed(seed: int) -> float:
        return sum(bisect(lambda rate: growth(spec, requests(rate, seed)) <= TOLERANCE, guess_per_s, width)) / 2

    return Estimate.of([of_seed(seed) for seed in seeds])


def bisect(stable: Callable[[float], bool], guess: float, width: float, near: float = 0.1) -> tuple[float, float]:
    """The highest rate that is `stable` and the lowest that is not, within `width` of each other, looked for around a guess."""
    low, high = guess * (1 - near), guess * (1 + near)
    while not stable(low):
        low, high = low * 0.8, low
    while stable(high):
        low, high = high, high * 1.25
    while high - low > width * low:
        middle = (low + high) / 2
        low, high = (middle, high) if stable(middle) else (low, middle)
    return low, high
