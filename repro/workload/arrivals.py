"""Arrival processes: Poisson, gamma, Markov-modulated, diurnal, piecewise and deterministic.

All but gamma and deterministic are one idea: a Poisson process of rate 1 seen through a changing clock, the cumulative rate Λ(t).
Drawing on that clock and inverting Λ gives any rate profile exactly, without rejection.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from repro.errors import UserError

FloatArray = NDArray[np.float64]


class ArrivalProcess(Protocol):
    """An endless sequence of arrival times in seconds, increasing, in arrays of `size`."""

    def times(self, rng: np.random.Generator, size: int) -> Iterator[FloatArray]:
        """Arrays of arrival times, each going on where the one before ended."""
        ...


def _positive(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise UserError(f"workload.arrivals.{name}: {value} is not a positive number")


def _unit_poisson(rng: np.random.Generator, size: int) -> Iterator[FloatArray]:
    at = 0.0
    while True:
        times = at + np.cumsum(rng.exponential(size=size))
        at = float(times[-1])
        yield times


@dataclass(frozen=True)
class Poisson:
    """Independent arrivals."""

    rate_per_s: float

    def __post_init__(self) -> None:
        _positive("rate_per_s", self.rate_per_s)

    def times(self, rng: np.random.Generator, size: int) -> Iterator[FloatArray]:
        """Exponential gaps."""
        return (times / self.rate_per_s for times in _unit_poisson(rng, size))


@dataclass(frozen=True)
class Gamma:
    """Gamma-distributed gaps with coefficient of variation `cv`: above 1 bursty, below 1 regular, 1 is Poisson."""

    rate_per_s: float
    cv: float

    def __post_init__(self) -> None:
        _positive("rate_per_s", self.rate_per_s)
        _positive("cv", self.cv)

    def times(self, rng: np.random.Generator, size: int) -> Iterator[FloatArray]:
        """Gaps of shape 1/cv²."""
        shape, at = 1 / self.cv**2, 0.0
        while True:
            times = at + np.cumsum(rng.gamma(shape, 1 / (shape * self.rate_per_s), size))
            at = float(times[-1])
            yield times


@dataclass(frozen=True)
class Deterministic:
    """One arrival every 1 / rate seconds."""

    rate_per_s: float

    def __post_init__(self) -> None:
        _positive("rate_per_s", self.rate_per_s)

    def times(self, rng: np.random.Generator, size: int) -> Iterator[FloatArray]:  # noqa: ARG002
        """Equal gaps; nothing is drawn."""
        for chunk in itertools.count():
            yield (1 + chunk * size + np.arange(size)) / self.rate_per_s


@dataclass(frozen=True)
class Piecewise:
    """Poisson arrivals whose rate follows a repeating schedule: `rates_per_s[i]` for `durations_s[i]`. Bursts are made of this."""

    rates_per_s: tuple[float, ...]
    durations_s: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.rates_per_s) != len(self.durations_s) or not self.rates_per_s:
            raise UserError(
                "workload.arrivals.rates, workload.arrivals.durations_s: need as many rates as durations, and one at least"
            )
        for duration in self.durations_s:
            _positive("durations_s", duration)
        if not all(0 <= rate < math.inf for rate in self.rates_per_s) or not any(self.rates_per_s):
            raise UserError(
                f"workload.arrivals.rates: {list(self.rates_per_s)}; accepted: finite, not negative, and not all zero"
            )

    @property
    def mean_per_s(self) -> float:
        """Arrivals per second over the whole schedule."""
        return float(np.dot(self.rates_per_s, self.durations_s) / sum(self.durations_s))

    def times(self, rng: np.random.Generator, size: int) -> Iterator[FloatArray]:
        """The schedule's clock, inverted period by period."""
        ends = np.concatenate([[0.0], np.cumsum(self.durations_s)])
        mass = np.concatenate([[0.0], np.cumsum(np.multiply(self.rates_per_s, self.durations_s))])
        for unit in _unit_poisson(rng, size):
            period = np.floor(unit / mass[-1])
            yield period * ends[-1] + _invert(unit - period * mass[-1], ends, mass)


@dataclass(frozen=True)
class Diurnal:
    """rate · (1 + amplitude · sin(2πt / period)): a day in whatever length."""

    rate_per_s: float
    amplitude: float = 0.5
    period_s: float = 86_400.0

    def __post_init__(self) -> None:
        _positive("rate_per_s", self.rate_per_s)
        _positive("period_s", self.period_s)
        if not 0 <= self.amplitude <= 1:
            raise UserError(f"workload.arrivals.amplitude: {self.amplitude} lies outside 0 to 1")

    def times(self, rng: np.random.Generator, size: int) -> Iterator[FloatArray]:
        """The sine's clock on 4,096 points per period."""
        phase = np.linspace(0.0, 1.0, 4097)
        clock = phase + self.amplitude / (2 * np.pi) * (1 - np.cos(2 * np.pi * phase))
        for unit in _unit_poisson(rng, size):
            turns = unit / (self.rate_per_s * self.period_s)
            yield (np.floor(turns) + np.interp(turns % 1.0, clock, phase)) * self.period_s


@dataclass(frozen=True)
class MarkovModulated:
    """A Poisson process whose rate jumps between states, each held for an exponential time (MMPP), in turn."""

    rates_per_s: tuple[float, ...]
    mean_hold_s: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.rates_per_s) != len(self.mean_hold_s) or not self.rates_per_s:
            raise UserError(
                "workload.arrivals.rates_per_s, mean_hold_s: need as many rates as holding times, and one at least"
            )
        for hold in self.mean_hold_s:
            _positive("mean_hold_s", hold)
        if min(self.rates_per_s) < 0 or not max(self.rates_per_s) > 0:
            raise UserError(f"workload.arrivals.rates_per_s: {self.rates_per_s} must not be negative, nor all zero")

    def times(self, rng: np.random.Generator, size: int) -> Iterator[FloatArray]:
        """A random clock, drawn as far ahead as each array needs."""
        states = len(self.rates_per_s)
        ends, mass, state = [0.0], [0.0], 0
        for unit in _unit_poisson(rng, size):
            while mass[-1] <= unit[-1]:
                hold = float(rng.exponential(self.mean_hold_s[state]))
                ends.append(ends[-1] + hold)
                mass.append(mass[-1] + hold * self.rates_per_s[state])
                state = (state + 1) % states
            yield _invert(unit, np.array(ends), np.array(mass))
            ends, mass = ends[-2:], mass[-2:]


def _invert(unit: FloatArray, ends: FloatArray, mass: FloatArray) -> FloatArray:
    """Times at which a piecewise linear clock shows `unit`; pieces of rate 0 are jumped over."""
    piece = np.clip(np.searchsorted(mass, unit, side="left") - 1, 0, len(ends) - 2)
    step = mass[piece + 1] - mass[piece]
    part = np.divide(unit - mass[piece], step, out=np.zeros_like(unit), where=step > 0)
    return np.asarray(ends[piece] + part * (ends[piece + 1] - ends[piece]))
