"""Input lengths that are no log-normal: mixtures of distributions, and the empirical distribution of a sample.

Both answer the throughput model's questions exactly (a mixture by weighting its parts, a sample by summing), so a trace's lengths can go
through equations 1–8 as the paper's log-normal does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from repro.configuration import Value
from repro.errors import UserError
from repro.workload.lengths import CurveFunction, FloatArray, LengthDistribution


@dataclass(frozen=True)
class Mixture(Value):
    """Each length comes from `parts[i]` with probability `weights[i]` (which are normalised)."""

    parts: tuple[LengthDistribution, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.parts) != len(self.weights) or not self.parts:
            raise UserError("workload.lengths.weights: need as many weights as parts, and one at least")
        if min(self.weights) < 0 or not sum(self.weights) > 0:
            raise UserError(f"workload.lengths.weights: {self.weights} must not be negative, nor all zero")

    @cached_property
    def _shares(self) -> FloatArray:
        return np.array(self.weights, dtype=np.float64) / sum(self.weights)

    @property
    def minimum_tokens(self) -> float:
        """Shortest length of any part."""
        return min(part.minimum_tokens for part in self.parts)

    @property
    def maximum_tokens(self) -> float:
        """Longest length of any part."""
        return max(part.maximum_tokens for part in self.parts)

    @property
    def mean_tokens(self) -> float:
        """E[L]."""
        return float(sum(share * part.mean_tokens for share, part in zip(self._shares, self.parts, strict=True)))

    def fraction_above(self, threshold_tokens: ArrayLike) -> FloatArray:
        """P(L > t)."""
        return np.asarray(
            sum(s * part.fraction_above(threshold_tokens) for s, part in zip(self._shares, self.parts, strict=True))
        )

    def _weighted(
        self, mass: Callable[[LengthDistribution], FloatArray], mean: Callable[[LengthDistribution], FloatArray]
    ) -> FloatArray:
        total = weight = np.asarray(0.0)
        for share, part in zip(self._shares, self.parts, strict=True):
            part_mass = share * mass(part)
            total = total + np.where(part_mass > 1e-15, part_mass * np.nan_to_num(mean(part)), 0.0)
            weight = weight + part_mass
        return _ratio(total, weight)

    def mean_above(self, threshold_tokens: ArrayLike) -> FloatArray:
        """E[L | L > t]."""
        return self._weighted(lambda p: p.fraction_above(threshold_tokens), lambda p: p.mean_above(threshold_tokens))

    def mean_below(self, threshold_tokens: ArrayLike) -> FloatArray:
        """E[L | L ≤ t]."""
        return self._weighted(
            lambda p: 1 - p.fraction_above(threshold_tokens), lambda p: p.mean_below(threshold_tokens)
        )

    def expectation_above(self, function: CurveFunction, threshold_tokens: ArrayLike) -> FloatArray:
        """E[f(L) | L > t]."""
        return self._weighted(
            lambda p: p.fraction_above(threshold_tokens), lambda p: p.expectation_above(function, threshold_tokens)
        )

    def expectation_below(self, function: CurveFunction, threshold_tokens: ArrayLike) -> FloatArray:
        """E[f(L) | L ≤ t]."""
        return self._weighted(
            lambda p: 1 - p.fraction_above(threshold_tokens), lambda p: p.expectation_below(function, threshold_tokens)
        )

    def quantile(self, fraction: ArrayLike) -> FloatArray:
        """Inverse of the distribution function, by bisection to a hundredth of a token."""
        wanted = np.atleast_1d(np.asarray(fraction, dtype=np.float64))
        low = np.full(wanted.shape, float(self.minimum_tokens))
        high = np.full(wanted.shape, float(self.maximum_tokens))
        while float(np.max(high - low)) > 0.01:
            middle = (low + high) / 2
            below = 1 - self.fraction_above(middle) < wanted
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        return np.asarray(((low + high) / 2).reshape(np.shape(fraction)))

    def atoms(self) -> tuple[FloatArray, FloatArray]:
        """The parts' bins, weighted, in increasing order of length."""
        tokens, mass = zip(*(part.atoms() for part in self.parts), strict=True)
        weighted = np.concatenate([share * each for share, each in zip(self._shares, mass, strict=True)])
        together = np.concatenate(tokens)
        order = together.argsort(kind="stable")
        return together[order], weighted[order]

    def sample(self, rng: np.random.Generator, n: int) -> NDArray[np.int64]:
        """A part for each request, then its length."""
        which = rng.choice(len(self.parts), size=n, p=self._shares)
        drawn = np.stack([part.sample(rng, n) for part in self.parts])
        return np.asarray(drawn[which, np.arange(n)])


class Empirical:
    """The distribution of a sample of lengths in tokens."""

    def __init__(self, tokens: ArrayLike) -> None:
        self._tokens = np.sort(np.asarray(tokens, dtype=np.float64))
        if not len(self._tokens) or self._tokens[0] <= 0:
            raise UserError("workload.lengths: an empirical distribution needs one or more lengths, all positive")

    @property
    def minimum_tokens(self) -> float:
        """One token below the shortest of the sample: as with a continuous law, no request is that short."""
        return float(self._tokens[0]) - 1

    @property
    def maximum_tokens(self) -> float:
        """The longest of the sample."""
        return float(self._tokens[-1])

    @property
    def mean_tokens(self) -> float:
        """The sample's mean."""
        return float(self._tokens.mean())

    def fraction_above(self, threshold_tokens: ArrayLike) -> FloatArray:
        """Share of the sample above t."""
        n = len(self._tokens)
        return np.asarray((n - np.searchsorted(self._tokens, threshold_tokens, side="right")) / n)

    def mean_above(self, threshold_tokens: ArrayLike) -> FloatArray:
        """Mean of those above t."""
        return self.expectation_above(lambda x: x, threshold_tokens)

    def mean_below(self, threshold_tokens: ArrayLike) -> FloatArray:
        """Mean of those up to t."""
        return self.expectation_below(lambda x: x, threshold_tokens)

    def _sums(self, function: CurveFunction, threshold_tokens: ArrayLike) -> tuple[FloatArray, float, NDArray[np.intp]]:
        sums = np.concatenate([[0.0], np.cumsum(function(self._tokens))])
        at = np.asarray(np.searchsorted(self._tokens, threshold_tokens, side="right"))
        return np.asarray(sums[at]), float(sums[-1]), at

    def expectation_above(self, function: CurveFunction, threshold_tokens: ArrayLike) -> FloatArray:
        """Mean of f over those above t."""
        below, total, at = self._sums(function, threshold_tokens)
        left = len(self._tokens) - at
        return _ratio(total - below, left)

    def expectation_below(self, function: CurveFunction, threshold_tokens: ArrayLike) -> FloatArray:
        """Mean of f over those up to t."""
        below, _, at = self._sums(function, threshold_tokens)
        return _ratio(below, at)

    def quantile(self, fraction: ArrayLike) -> FloatArray:
        """Inverse of the sample's distribution function."""
        rank = np.ceil(np.asarray(fraction, dtype=np.float64) * len(self._tokens)) - 1
        return np.asarray(self._tokens[np.clip(rank, 0, len(self._tokens) - 1).astype(np.intp)])

    def atoms(self) -> tuple[FloatArray, FloatArray]:
        """Each length that occurs, and its share of the sample."""
        tokens, counts = np.unique(self._tokens, return_counts=True)
        return tokens, counts / len(self._tokens)

    def sample(self, rng: np.random.Generator, n: int) -> NDArray[np.int64]:
        """Draws with replacement."""
        return np.rint(self._tokens[rng.integers(len(self._tokens), size=n)]).astype(np.int64)


def _ratio(numerator: ArrayLike, denominator: ArrayLike) -> FloatArray:
    """Elementwise quotient; nan where nothing lies on that side of a threshold."""
    top, bottom = np.broadcast_arrays(np.asarray(numerator, np.float64), np.asarray(denominator, np.float64))
    out: FloatArray = np.full(bottom.shape, np.nan)
    np.divide(top, bottom, out=out, where=bottom > 1e-15)
    return out
