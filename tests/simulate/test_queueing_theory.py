"""The simulator where theory has an answer: waits within 2 % of M/M/1, M/G/1, M/D/k and processor sharing."""

import itertools
import math

import numpy as np
import pytest
from tiny import Exponential, Lengths, TinyProfile, local, play

from repro.simulate.events import EventQueue
from repro.simulate.link import SharedLink
from repro.simulate.link_spec import SharedLinkSpec
from repro.workload.arrivals import Poisson
from repro.workload.outputs import FixedOutput, OutputLengths
from repro.workload.stream import Independent

#: Deterministic seeds; the run lengths are such that 2 % is about three standard errors at these loads.
N = 400_000
FINE = TinyProfile(s_per_token=1e-4)


def mean_wait(
    inputs: object, rate: float, servers: int = 1, n: int = N, seed: int = 11, outputs: OutputLengths | None = None
) -> float:
    requests = Independent(Poisson(rate), inputs, outputs or FixedOutput(1), n, seed)  # type: ignore[arg-type]
    table, summary = play(local(FINE, servers), requests)
    assert summary.completed == n
    return float(table["queue_s"].iloc[n // 20 :].mean())


@pytest.mark.slow
def test_prefill_with_exponential_work_waits_as_m_m_1() -> None:
    rho = 0.6
    assert mean_wait(Exponential(10_000), rho) == pytest.approx(rho / (1 - rho), rel=0.02)


@pytest.mark.slow
def test_prefill_with_general_work_waits_as_pollaczek_and_khinchine_say() -> None:
    work = np.array([2_000, 2_000, 2_000, 34_000])
    service = work * 1e-4
    rate = 0.6 / service.mean()
    expected = rate * np.mean(service**2) / (2 * (1 - 0.6))
    assert mean_wait(Lengths(tuple(work.tolist())), rate) == pytest.approx(expected, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("servers", [1, 3])
def test_prefill_with_equal_work_waits_as_m_d_k(servers: int) -> None:
    rate = 0.7 * servers
    assert mean_wait(Lengths((10_000,)), rate, servers) == pytest.approx(m_d_k_wait(rate, servers), rel=0.02)


def m_d_k_wait(rate: float, servers: int) -> float:
    """Mean wait of M/D/k with unit service, from the stationary number in system (Crommelin): it obeys a recursion one service apart."""
    size = 400
    arrivals = np.array([math.exp(-rate + i * math.log(rate) - math.lgamma(i + 1)) for i in range(size)])
    p = np.zeros(size)
    p[0] = 1.0
    for _ in range(20_000):
        left = np.concatenate([[p[: servers + 1].sum()], p[servers + 1 :], np.zeros(servers)])
        after = np.convolve(left, arrivals)[:size]
        if np.abs(after - p).max() < 1e-13:
            break
        p = after
    queue = float((np.maximum(np.arange(size) - servers, 0) * p).sum())
    return queue / rate


def test_the_m_d_k_reference_is_right_where_m_d_1_is_known() -> None:
    assert m_d_k_wait(0.7, 1) == pytest.approx(0.7 / (2 * 0.3), rel=1e-6)


@pytest.mark.slow
def test_transfers_on_the_link_take_as_long_as_processor_sharing_says() -> None:
    """M/G/1 PS: E[T | size x] = x / (1 − ρ), whatever the distribution of sizes."""
    rng = np.random.default_rng(4)
    n, rho = 150_000, 0.6
    sizes = np.where(rng.random(n) < 0.8, 0.4e9, 3.4e9)
    at = np.cumsum(rng.exponential(1 / rho, n))
    events = EventQueue()
    link = SharedLink(SharedLinkSpec(8e9, 0.0, 8e12, 1, 8e12), events)
    ends = np.zeros(n)

    def done(now: float, index: int) -> None:
        ends[index] = now

    import heapq

    for i in range(n):
        while events.heap and events.heap[0][0] <= at[i]:
            now, _, handler, argument = heapq.heappop(events.heap)
            handler(now, argument)
        link.send(float(at[i]), i % 64, float(sizes[i]), done, i)
    while events.heap:
        now, _, handler, argument = heapq.heappop(events.heap)
        handler(now, argument)
    for size in (0.4e9, 3.4e9):
        taken = (ends - at)[n // 20 :][sizes[n // 20 :] == size]
        assert taken.mean() == pytest.approx(size / 1e9 / (1 - rho), rel=0.02)


def test_littles_law_holds_for_the_whole_system() -> None:
    n, rate = 60_000, 0.5
    table, _ = play(local(FINE, 1), Independent(Poisson(rate), Exponential(10_000), FixedOutput(40), n, 2))
    arrivals, finishes = np.sort(table["arrival_s"].to_numpy()), np.sort(table["finish_s"].to_numpy())
    end = arrivals[-1]
    batches = np.linspace(0.05 * end, end, 31)
    differences = []
    for low, high in itertools.pairwise(batches):
        at = np.linspace(low, high, 2000)
        number = float(np.mean(np.searchsorted(arrivals, at) - np.searchsorted(finishes, at)))
        inside = table[(table["arrival_s"] >= low) & (table["arrival_s"] < high)]
        effective = len(inside) / (high - low)
        differences.append(number - effective * float((inside["finish_s"] - inside["arrival_s"]).mean()))
    half = 2.05 * np.std(differences, ddof=1) / math.sqrt(len(differences))
    assert abs(np.mean(differences)) <= half + 1e-3
