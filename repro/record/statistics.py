"""Estimates over repeats and seeds: one rule for every interval that the kit prints.

- A mean has the 95 % interval of Student's t.
- A quantity that cannot be negative (seconds, rates, shares) never gets a bound below zero, and none at zero from values that are all above
  it: where Student's interval would reach there, as it does with few and scattered repeats, it is taken on the logarithms. Where a value
  is zero there is no logarithm, and the interval begins at zero; that of a share ends at one.
- A difference may have either sign and keeps Student's interval; it is paired, value by value, where both sides met the same requests.
- A quantile has the interval of the bias-corrected bootstrap, and no value at all from fewer samples than put one beyond it.
- Warm-up is cut where the standard error of what is left is smallest (MSER-5, White 1997), where nobody says how long it takes.
- How many repeats a difference needs follows from how paired differences scatter: power 0.8 at the interval's confidence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri, stdtrit

CONFIDENCE = 0.95
#: The chance to see a difference that is there, for which the number of repeats is stated.
POWER = 0.8


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval over `n` samples; bounds are nan where there are too few for any."""

    value: float
    low: float
    high: float
    n: int

    @staticmethod
    def of(values: Sequence[float], most: float = math.inf) -> Estimate:
        """The mean of a quantity that cannot be negative, nor above `most`."""
        found = Estimate.of_signed(values)
        data = np.asarray(values, np.float64)
        if found.n < 2 or not (data >= 0).all():
            return found
        low, high = found.low, found.high
        if low <= 0 and (data > 0).all():
            logs = np.log(data)
            half = _half_width(logs)
            low, high = math.exp(float(logs.mean()) - half), math.exp(float(logs.mean()) + half)
            low, high = min(low, found.value), max(high, found.value)
        return Estimate(found.value, max(low, 0.0), min(high, most), found.n)

    @staticmethod
    def of_signed(values: Sequence[float]) -> Estimate:
        """The mean of a quantity that may have either sign."""
        data = np.asarray(values, dtype=np.float64)
        n, mean = len(data), float(np.mean(data))
        if n < 2:
            return Estimate(mean, math.nan, math.nan, n)
        half = _half_width(data)
        return Estimate(mean, mean - half, mean + half, n)

    @staticmethod
    def paired(values: Sequence[float], others: Sequence[float]) -> Estimate:
        """The mean of `values` − `others`, sample by sample."""
        return Estimate.of_signed([value - other for value, other in zip(values, others, strict=True)])

    @staticmethod
    def geometric(values: Sequence[float]) -> Estimate:
        """The geometric mean of positive values, as of ratios and rates."""
        found = Estimate.of_signed([math.log(value) for value in values])
        return Estimate(math.exp(found.value), math.exp(found.low), math.exp(found.high), found.n)

    @staticmethod
    def of_quantile(values: ArrayLike, fraction: float, seed: int = 0) -> Estimate:
        """A quantile with its bootstrap interval."""
        from scipy.stats import bootstrap  # half a second of imports that only this needs

        data = np.asarray(values, np.float64)
        value = quantile(data, fraction)
        if not math.isfinite(value) or np.ptp(data) == 0:
            return Estimate(value, math.nan, math.nan, len(data))
        found = bootstrap(
            (data,),
            lambda sample, axis: np.quantile(sample, fraction, axis=axis),
            confidence_level=CONFIDENCE,
            n_resamples=999,
            rng=np.random.default_rng(seed),
        ).confidence_interval
        return Estimate(value, float(found.low), float(found.high), len(data))


def _half_width(data: NDArray[np.float64]) -> float:
    n = len(data)
    return float(stdtrit(n - 1, (1 + CONFIDENCE) / 2) * data.std(ddof=1) / math.sqrt(n))


def quantile(values: NDArray[np.float64], fraction: float) -> float:
    """A quantile; nan where there are fewer samples than put one beyond it (100 for P99)."""
    return float(np.quantile(values, fraction)) if len(values) * (1 - fraction) > 1 - 1e-9 else math.nan


def least_samples(fraction: float) -> int:
    """How many samples a quantile needs: so many that one lies beyond it (100 for P99)."""
    return math.ceil(1 / (1 - fraction) - 1e-9)


def warm_up(values: ArrayLike) -> int:
    """How many of the first values of a series to cut by MSER-5: batches of five, and the cut after which the standard error is smallest.

    Never more than half is cut; where the rule would, the series has not settled, and -1 says so.
    """
    data = np.asarray(values, np.float64)
    batches = data[: len(data) // 5 * 5].reshape(-1, 5).mean(axis=1)
    if len(batches) < 4:
        return 0
    errors = [float(batches[cut:].var() / (len(batches) - cut)) for cut in range(len(batches) - 1)]
    best = int(np.argmin(errors))
    return 5 * best if best <= len(batches) // 2 else -1


def repeats_for(scatter: float, difference: float) -> int:
    """How many paired repeats show a `difference` of values that scatter with that standard deviation; 2 at least."""
    if not (difference > 0 and math.isfinite(scatter)):
        raise ValueError(f"difference {difference} and scatter {scatter} give no number of repeats")
    wanted = float(ndtri((1 + CONFIDENCE) / 2) + ndtri(POWER)) * scatter / difference
    repeats = max(2, math.ceil(wanted**2))
    while repeats < 30:  # few repeats have Student's wider interval
        t = float(stdtrit(repeats - 1, (1 + CONFIDENCE) / 2) + stdtrit(repeats - 1, POWER))
        if (t * scatter / difference) ** 2 <= repeats:
            break
        repeats += 1
    return repeats
