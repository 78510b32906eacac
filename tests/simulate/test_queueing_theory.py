"""The simulator where theory has an answer: M/M/1, M/G/1, M/D/k and processor sharing.

Each case has two steps. The simulator gives, request by request, the times of a recursion of a few lines that obeys the queue's
definition; and the mean of that recursion over hundreds of thousands of requests is the one that theory gives, within 2 %, which is about
three standard errors at these loads. The recursion is fast, so that the long run costs little, and the first step is exact.
"""

import heapq
import itertools
import math

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny import Exponential, Lengths, TinyProfile, local, play

from repro.simulate.events import EventQueue
from repro.simulate.link import SharedLink
from repro.simulate.link_spec import SharedLinkSpec
from repro.workload.arrivals import Poisson
from repro.workload.outputs import FixedOutput
from repro.workload.stream import Independent, RequestBatch

#: Deterministic seeds.
N, SIMULATED = 400_000, 20_000
FINE = TinyProfile(s_per_token=1e-4)


def first_come_first_served(
    at_s: NDArray[np.float64], work_s: NDArray[np.float64], servers: int
) -> NDArray[np.float64]:
    """Waits in a queue of which each request takes the server that is free first (Kiefer and Wolfowitz)."""
    free_s = [0.0] * servers
    waits = np.empty(len(at_s))
    for index, (now_s, own_s) in enumerate(zip(at_s.tolist(), work_s.tolist(), strict=True)):
        start_s = max(now_s, free_s[0])
        waits[index] = start_s - now_s
        heapq.heapreplace(free_s, start_s + own_s)
    return waits


def mean_wait(inputs: object, rate: float, servers: int = 1, seed: int = 11) -> float:
    """The mean over the long run, of which the simulator has played the beginning request by request."""
    batches = list(Independent(Poisson(rate), inputs, FixedOutput(1), N, seed))  # type: ignore[arg-type]
    at_s, tokens = (np.concatenate([batch[column] for batch in batches]) for column in (0, 1))
    waits = first_come_first_served(at_s, tokens * FINE.s_per_token, servers)
    beginning = RequestBatch(at_s[:SIMULATED], tokens[:SIMULATED], np.ones(SIMULATED, np.int64))
    table, summary = play(local(FINE, servers), [beginning])
    assert summary.completed == SIMULATED
    np.testing.assert_allclose(table["queue_s"], waits[:SIMULATED], rtol=0, atol=1e-6)
    return float(waits[N // 20 :].mean())


def test_prefill_with_exponential_work_waits_as_m_m_1() -> None:
    rho = 0.6
    assert mean_wait(Exponential(10_000), rho) == pytest.approx(rho / (1 - rho), rel=0.02)


def test_prefill_with_general_work_waits_as_pollaczek_and_khinchine_say() -> None:
    work = np.array([2_000, 2_000, 2_000, 34_000])
    service = work * 1e-4
    rate = 0.6 / service.mean()
    expected = rate * np.mean(service**2) / (2 * (1 - 0.6))
    assert mean_wait(Lengths(tuple(work.tolist())), rate) == pytest.approx(expected, rel=0.02)


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


def processor_sharing(at_s: NDArray[np.float64], size_s: NDArray[np.float64]) -> NDArray[np.float64]:
    """When each transfer ends, if those that are under way share the link equally: all have had the same since they began."""
    ends = np.empty(len(at_s))
    under_way: list[tuple[float, int]] = []
    now_s, each_has_s = 0.0, 0.0
    for index, arrival_s in enumerate([*at_s.tolist(), math.inf]):
        while under_way and (left_s := (under_way[0][0] - each_has_s) * len(under_way)) <= arrival_s - now_s:
            now_s += left_s
            each_has_s, done = heapq.heappop(under_way)
            ends[done] = now_s
        if index < len(at_s):
            each_has_s += (arrival_s - now_s) / max(len(under_way), 1)
            now_s = arrival_s
            heapq.heappush(under_way, (each_has_s + float(size_s[index]), index))
    return ends


def on_the_link(at_s: NDArray[np.float64], size_bytes: NDArray[np.float64]) -> NDArray[np.float64]:
    """When each transfer ends on a simulated link of a gigabyte per second."""
    events = EventQueue()
    link = SharedLink(SharedLinkSpec(8e9, 0.0, 8e12, 1, 8e12), events)
    ends = np.zeros(len(at_s))

    def done(now: float, index: int) -> None:
        ends[index] = now

    for i in range(len(at_s)):
        while events.heap and events.heap[0][0] <= at_s[i]:
            now, _, handler, argument = heapq.heappop(events.heap)
            handler(now, argument)
        link.send(float(at_s[i]), i % 64, float(size_bytes[i]), done, i)
    while events.heap:
        now, _, handler, argument = heapq.heappop(events.heap)
        handler(now, argument)
    return ends


def test_transfers_on_the_link_take_as_long_as_processor_sharing_says() -> None:
    """M/G/1 PS: E[T | size x] = x / (1 − ρ), whatever the distribution of sizes."""
    rng = np.random.default_rng(4)
    n, rho = 150_000, 0.6
    sizes = np.where(rng.random(n) < 0.8, 0.4e9, 3.4e9)
    at_s = np.cumsum(rng.exponential(1 / rho, n))
    ends = processor_sharing(at_s, sizes / 1e9)
    # What is under way when the last of these is done has met none of the later ones.
    simulated = on_the_link(at_s[:SIMULATED], sizes[:SIMULATED])
    alike = ends[:SIMULATED] < at_s[SIMULATED]
    assert alike.sum() > 0.99 * SIMULATED
    np.testing.assert_allclose(simulated[alike], ends[:SIMULATED][alike], rtol=0, atol=1e-5)
    for size in (0.4e9, 3.4e9):
        taken = (ends - at_s)[n // 20 :][sizes[n // 20 :] == size]
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
