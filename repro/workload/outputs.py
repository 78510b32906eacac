"""Output lengths. The simulator's future: no policy ever sees one before the request has finished."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from repro.errors import UserError


class OutputLengths(Protocol):
    """Draws how many tokens requests will generate."""

    def sample(self, rng: np.random.Generator, n: int) -> NDArray[np.int64]:
        """`n` lengths of 1 or more whole tokens."""
        ...


@dataclass(frozen=True)
class FixedOutput:
    """Every request generates the same number of tokens (§4.1: 1024)."""

    tokens: int = 1024

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise UserError(f"workload.output_tokens: {self.tokens} is below 1")

    def sample(self, rng: np.random.Generator, n: int) -> NDArray[np.int64]:  # noqa: ARG002
        """Nothing is drawn."""
        return np.full(n, self.tokens, dtype=np.int64)


@dataclass(frozen=True)
class LogNormalOutput:
    """Log-normal with the given mean and coefficient of variation, cut at `maximum_tokens`."""

    mean_tokens: float = 1024.0
    cv: float = 1.0
    maximum_tokens: int = 32_768

    def __post_init__(self) -> None:
        if not (1 <= self.mean_tokens <= self.maximum_tokens and 0 < self.cv < math.inf):
            raise UserError(
                f"workload.output_tokens, workload.output_cv: {self.mean_tokens:g} and {self.cv:g}; accepted with a variation: 1 to "
                f"{self.maximum_tokens:,} tokens, and a positive coefficient"
            )

    def sample(self, rng: np.random.Generator, n: int) -> NDArray[np.int64]:
        """Rounded up to whole tokens."""
        variance = math.log1p(self.cv**2)
        drawn = rng.lognormal(math.log(self.mean_tokens) - variance / 2, math.sqrt(variance), n)
        return np.clip(np.rint(drawn), 1, self.maximum_tokens).astype(np.int64)
