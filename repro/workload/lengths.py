"""Input-length distributions, with exact moments: the L of the throughput model (paper §3.4.1 and §4.1).

The router splits L at a threshold t, so everything the equations need is a moment of L on one side of t: P(L > t), E[L | L > t],
E[L | L ≤ t], and the same for a function of L such as T_prefill. They are integrals of the density, never samples, because the grid
search compares thresholds whose Λ_max differ by less than sampling noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr, ndtri

from repro.configuration import Value
from repro.errors import UserError

FloatArray = NDArray[np.float64]
CurveFunction = Callable[[FloatArray], FloatArray]

# Bins of equal width in log-length for integrals of T_prefill. Within a bin the integrand is taken at the bin's own mean length, which
# makes the error second order: 4,096 bins agree with adaptive quadrature to nine digits (tests/workload/test_lengths.py).
_BINS = 4096


class LengthDistribution(Protocol):
    """What the throughput model may ask of a distribution of uncached input lengths in tokens."""

    def __hash__(self) -> int:
        """A value, so that what is derived from it can be kept."""
        ...

    @property
    def minimum_tokens(self) -> float:
        """Shortest length."""
        ...

    @property
    def maximum_tokens(self) -> float:
        """Longest length."""
        ...

    @property
    def mean_tokens(self) -> float:
        """E[L]."""
        ...

    def fraction_above(self, threshold_tokens: ArrayLike) -> FloatArray:
        """P(L > t) for each threshold."""
        ...

    def mean_above(self, threshold_tokens: ArrayLike) -> FloatArray:
        """E[L | L > t] for each threshold; nan where P(L > t) is 0."""
        ...

    def mean_below(self, threshold_tokens: ArrayLike) -> FloatArray:
        """E[L | L ≤ t] for each threshold; nan where P(L ≤ t) is 0."""
        ...

    def expectation_above(self, function: CurveFunction, threshold_tokens: ArrayLike) -> FloatArray:
        """E[f(L) | L > t] for each threshold; nan where P(L > t) is 0."""
        ...

    def expectation_below(self, function: CurveFunction, threshold_tokens: ArrayLike) -> FloatArray:
        """E[f(L) | L ≤ t] for each threshold; nan where P(L ≤ t) is 0."""
        ...

    def atoms(self) -> tuple[FloatArray, FloatArray]:
        """Lengths in increasing order and the probability of each: the distribution as fine bins at their mean lengths."""
        ...

    def quantile(self, fraction: ArrayLike) -> FloatArray:
        """Length below which `fraction` of the requests lie."""
        ...

    def sample(self, rng: np.random.Generator, n: int) -> NDArray[np.int64]:
        """`n` independent lengths in whole tokens."""
        ...


@dataclass(frozen=True)
class TruncatedLogNormal(Value):
    """exp(N(μ, σ²)) conditioned on [minimum_tokens, maximum_tokens] (§4.1: μ = 9.90, σ = 1.00 on [128, 128K])."""

    mu: float
    sigma: float
    minimum_tokens: float
    maximum_tokens: float

    def __post_init__(self) -> None:
        if not self.sigma > 0:
            raise UserError(f"workload.lengths.sigma: {self.sigma} is not positive")
        if not 0 < self.minimum_tokens < self.maximum_tokens:
            raise UserError(
                "workload.lengths.minimum_tokens: must be positive and below workload.lengths.maximum_tokens "
                f"(got {self.minimum_tokens} and {self.maximum_tokens})"
            )
        if not self._mass > 1e-12:
            raise UserError(
                f"workload.lengths.mu: {self.mu} with sigma {self.sigma} leaves no probability in "
                f"[{self.minimum_tokens}, {self.maximum_tokens}] tokens"
            )

    def _z(self, tokens: ArrayLike) -> FloatArray:
        return (np.log(np.asarray(tokens, dtype=np.float64)) - self.mu) / self.sigma

    def _clip(self, tokens: ArrayLike) -> FloatArray:
        return np.clip(np.asarray(tokens, dtype=np.float64), self.minimum_tokens, self.maximum_tokens)

    @cached_property
    def _mass(self) -> float:
        return float(ndtr(self._z(self.maximum_tokens)) - ndtr(self._z(self.minimum_tokens)))

    @cached_property
    def mean_tokens(self) -> float:
        """E[L], about 27K for the paper's workload."""
        return float(self._partial_mean(self.minimum_tokens, self.maximum_tokens))

    def _cdf(self, tokens: ArrayLike) -> FloatArray:
        return (ndtr(self._z(self._clip(tokens))) - ndtr(self._z(self.minimum_tokens))) / self._mass

    def _partial_mean(self, low: ArrayLike, high: ArrayLike) -> FloatArray:
        """E[L · 1(low < L ≤ high)]: the log-normal's partial moment in closed form."""
        shift = ndtr(self._z(self._clip(high)) - self.sigma) - ndtr(self._z(self._clip(low)) - self.sigma)
        return np.asarray(np.exp(self.mu + self.sigma**2 / 2) * shift / self._mass)

    def fraction_above(self, threshold_tokens: ArrayLike) -> FloatArray:
        """P(L > t)."""
        return 1.0 - self._cdf(threshold_tokens)

    def mean_above(self, threshold_tokens: ArrayLike) -> FloatArray:
        """E[L | L > t], the paper's l_long."""
        return _ratio(self._partial_mean(threshold_tokens, self.maximum_tokens), self.fraction_above(threshold_tokens))

    def mean_below(self, threshold_tokens: ArrayLike) -> FloatArray:
        """E[L | L ≤ t], the paper's l_short."""
        return _ratio(self._partial_mean(self.minimum_tokens, threshold_tokens), self._cdf(threshold_tokens))

    @cached_property
    def _bins(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        edges = np.geomspace(self.minimum_tokens, self.maximum_tokens, _BINS + 1)
        cdf = self._cdf(edges)
        mass = np.diff(cdf)
        centre = _ratio(self._partial_mean(edges[:-1], edges[1:]), mass)
        return edges, mass, np.where(np.isfinite(centre), centre, np.sqrt(edges[:-1] * edges[1:]))

    def atoms(self) -> tuple[FloatArray, FloatArray]:
        """Mean length and probability of each bin."""
        _, mass, centre = self._bins
        return centre, mass

    def _integral_below(self, function: CurveFunction, threshold_tokens: ArrayLike) -> tuple[FloatArray, float]:
        """E[f(L) · 1(L ≤ t)] for each t, and E[f(L)]."""
        edges = self._bins[0]
        cumulative = _cumulative(self, function)
        threshold = self._clip(threshold_tokens)
        index = np.clip(np.searchsorted(edges, threshold, side="right") - 1, 0, _BINS - 1)
        # Inside the bin that t cuts, the remaining mass sits at its own exact mean.
        cut_mass = self._cdf(threshold) - self._cdf(edges[index])
        cut_mean = _ratio(self._partial_mean(edges[index], threshold), cut_mass)
        cut = np.where(cut_mass > 0, cut_mass * function(np.where(np.isfinite(cut_mean), cut_mean, threshold)), 0.0)
        return cumulative[index] + cut, float(cumulative[-1])

    def expectation_above(self, function: CurveFunction, threshold_tokens: ArrayLike) -> FloatArray:
        """E[f(L) | L > t]."""
        below, total = self._integral_below(function, threshold_tokens)
        return _ratio(total - below, self.fraction_above(threshold_tokens))

    def expectation_below(self, function: CurveFunction, threshold_tokens: ArrayLike) -> FloatArray:
        """E[f(L) | L ≤ t]."""
        below, _ = self._integral_below(function, threshold_tokens)
        return _ratio(below, self._cdf(threshold_tokens))

    def quantile(self, fraction: ArrayLike) -> FloatArray:
        """Inverse of the distribution function."""
        low = ndtr(self._z(self.minimum_tokens))
        inner = low + np.asarray(fraction, dtype=np.float64) * self._mass
        return self._clip(np.exp(self.mu + self.sigma * ndtri(inner)))

    def sample(self, rng: np.random.Generator, n: int) -> NDArray[np.int64]:
        """Inverse-transform samples, rounded to whole tokens."""
        return np.rint(self.quantile(rng.random(n))).astype(np.int64)


# Kept, because the points of a sweep and the variants of a spread ask for the same integrals at other thresholds.
@lru_cache(maxsize=64)
def _cumulative(law: TruncatedLogNormal, function: CurveFunction) -> FloatArray:
    """E[f(L) · 1(L ≤ edge)] at each edge of the law's bins."""
    _, mass, centre = law._bins
    return np.concatenate([[0.0], np.cumsum(mass * function(centre))])


def _ratio(numerator: ArrayLike, denominator: ArrayLike) -> FloatArray:
    """Elementwise quotient; nan, without a warning, where the denominator is 0 (an empty side of a threshold)."""
    top, bottom = np.broadcast_arrays(np.asarray(numerator, np.float64), np.asarray(denominator, np.float64))
    return np.asarray(np.divide(top, bottom, out=np.full(bottom.shape, np.nan), where=bottom > 1e-15))
