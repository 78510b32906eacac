"""Arrival processes: every one keeps its rate, its order and its seed."""

import itertools

import numpy as np
import pytest

from repro.errors import UserError
from repro.workload.arrivals import (
    ArrivalProcess,
    Deterministic,
    Diurnal,
    Gamma,
    MarkovModulated,
    Piecewise,
    Poisson,
)

ALL: dict[str, tuple[ArrivalProcess, float]] = {
    "poisson": (Poisson(3.0), 3.0),
    "gamma": (Gamma(3.0, 2.0), 3.0),
    "deterministic": (Deterministic(3.0), 3.0),
    "piecewise": (Piecewise((1.0, 7.0, 0.0), (2.0, 1.0, 1.0)), 9 / 4),
    "diurnal": (Diurnal(3.0, 0.8, 100.0), 3.0),
    "markov_modulated": (MarkovModulated((1.0, 9.0), (3.0, 1.0)), 3.0),
}


def draw(process: ArrivalProcess, n: int = 60_000, size: int = 4096, seed: int = 1) -> np.ndarray:
    chunks = process.times(np.random.default_rng(seed), size)
    return np.concatenate(list(itertools.islice(chunks, -(-n // size))))[:n]


@pytest.mark.parametrize("name", sorted(ALL))
def test_arrivals_come_in_order_at_the_stated_rate(name: str) -> None:
    process, rate = ALL[name]
    times = draw(process)
    assert np.all(np.diff(times) >= 0)
    assert len(times) / times[-1] == pytest.approx(rate, rel=0.03)


@pytest.mark.parametrize("name", sorted(ALL))
def test_the_same_seed_gives_the_same_arrivals(name: str) -> None:
    process, _ = ALL[name]
    assert draw(process, 9_000).tobytes() == draw(process, 9_000).tobytes()


def test_gamma_gaps_have_the_stated_variation() -> None:
    gaps = np.diff(draw(Gamma(3.0, 2.0)))
    assert gaps.std() / gaps.mean() == pytest.approx(2.0, rel=0.05)


def test_a_piecewise_schedule_puts_arrivals_into_its_own_pieces() -> None:
    times = draw(Piecewise((1.0, 7.0, 0.0), (2.0, 1.0, 1.0))) % 4.0
    shares = np.histogram(times, bins=[0.0, 2.0, 3.0, 4.0])[0] / len(times)
    assert shares == pytest.approx([2 / 9, 7 / 9, 0.0], abs=0.01)


def test_a_diurnal_day_peaks_at_a_quarter_of_its_period() -> None:
    counts = np.histogram(draw(Diurnal(3.0, 0.8, 100.0)) % 100.0, bins=4)[0]
    expected = 0.25 + 0.8 / (2 * np.pi) * np.array([1, 1, -1, -1])
    assert counts / counts.sum() == pytest.approx(expected, abs=0.01)


def test_markov_modulated_arrivals_are_more_variable_than_poisson() -> None:
    def dispersion(times: np.ndarray) -> float:
        counts = np.bincount((times / 5).astype(int))
        return float(counts.var() / counts.mean())

    assert dispersion(draw(Poisson(3.0))) == pytest.approx(1.0, abs=0.1)
    assert dispersion(draw(MarkovModulated((1.0, 9.0), (3.0, 1.0)))) > 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Poisson(0.0), r"workload\.arrivals\.rate_per_s"),
        (lambda: Gamma(1.0, -1.0), r"workload\.arrivals\.cv"),
        (lambda: Diurnal(1.0, 2.0), r"workload\.arrivals\.amplitude"),
        (lambda: Piecewise((1.0,), (1.0, 2.0)), "as many rates as durations"),
        (lambda: Piecewise((0.0, 0.0), (1.0, 2.0)), "not all zero"),
        (lambda: Piecewise((float("nan"), 1.0), (1.0, 2.0)), r"workload\.arrivals\.rates"),
        (lambda: MarkovModulated((0.0,), (1.0,)), "nor all zero"),
    ],
)
def test_impossible_processes_are_refused_by_key(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=message):
        make()
