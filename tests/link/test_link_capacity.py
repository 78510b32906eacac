import itertools
import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from repro.link.capacity import Capacity, Serialiser, capacity
from repro.link.spec import LinkChange, LinkSpec

pieces = st.lists(
    st.tuples(st.floats(0.01, 5), st.one_of(st.just(0.0), st.floats(1e3, 1e9))), min_size=1, max_size=8
).filter(lambda found: found[-1][1] > 0)


@settings(max_examples=200, deadline=None)
@example([(1.2453684263594473, 1000.0), (1.0, 33556865.0)], False, 1.2453684263594473)
@given(pieces, st.booleans(), st.floats(0, 60))
def test_a_count_leaves_at_the_first_moment_at_which_it_could_have(
    found: list[tuple[float, float]], repeat: bool, t: float
) -> None:
    carried = Capacity(100.0, found, repeat=repeat)
    count = carried.opened(100.0 + t)
    moment = carried.when(count)
    assert moment <= 100.0 + t + 1e-6
    assert carried.opened(moment) == pytest.approx(count, rel=1e-9, abs=1e-3)


@settings(max_examples=100, deadline=None)
@given(pieces, st.booleans(), st.lists(st.floats(0, 60), min_size=2, max_size=20))
def test_capacity_never_runs_backwards(found: list[tuple[float, float]], repeat: bool, moments: list[float]) -> None:
    carried = Capacity(0.0, found, repeat=repeat)
    counts = [carried.opened(moment) for moment in sorted(moments)]
    assert all(later >= earlier - 1e-3 for earlier, later in itertools.pairwise(counts))


def test_a_repeated_trace_carries_the_same_in_every_round() -> None:
    carried = Capacity(0.0, [(1.0, 100.0), (1.0, 0.0), (1.0, 50.0)], repeat=True)
    assert carried.opened(3.0) == pytest.approx(150)
    assert carried.opened(7.5) == pytest.approx(2 * 150 + 100)
    assert carried.when(150 + 100) == pytest.approx(4.0)
    assert carried.when(150 + 101) == pytest.approx(5.02)


def test_packets_leave_back_to_back_at_the_rate() -> None:
    queue = Serialiser(Capacity(0.0, [(math.inf, 1000.0)]), math.inf)
    assert [queue.depart(0.0, 100) for _ in range(3)] == pytest.approx([0.1, 0.2, 0.3])
    assert queue.backlog_bytes(0.15) == pytest.approx(150)
    assert queue.depart(10.0, 100) == pytest.approx(10.1)


def test_what_waits_during_an_outage_leaves_after_it_and_only_the_queue_s_size_waits() -> None:
    spec = LinkSpec(rate_bps=8000.0, queue_bytes=500, schedule=(LinkChange(1.0, for_s=5.0, rate_bps=0.0),))
    queue = Serialiser(capacity(spec.conditions("forward"), (), 0.0), spec.queue_limit_bytes("forward"))
    assert queue.depart(2.0, 400) == pytest.approx(6.4)
    assert queue.room_bytes(2.0) == pytest.approx(100)
    assert queue.room_bytes(6.0) == pytest.approx(100)
    assert queue.room_bytes(6.5) == pytest.approx(500)


def test_an_outage_without_end_never_lets_a_packet_leave() -> None:
    queue = Serialiser(Capacity(0.0, [(1.0, 100.0), (math.inf, 0.0)]), math.inf)
    assert queue.depart(2.0, 1) == math.inf


def test_a_schedule_that_starts_late_keeps_what_is_queued() -> None:
    queue = Serialiser(Capacity(0.0, [(math.inf, 1000.0)]), math.inf)
    queue.depart(0.0, 1000)
    queue.follow(Capacity(0.5, [(math.inf, 100.0)]), 0.5)
    assert queue.backlog_bytes(0.5) == pytest.approx(500)
    assert queue.depart(0.5, 100) == pytest.approx(0.5 + 6.0)


def test_an_unlimited_link_neither_queues_nor_delays() -> None:
    queue = Serialiser(capacity(LinkSpec().conditions("forward"), (), 0.0), math.inf)
    assert queue.depart(3.0, 1e9) == 3.0
    assert queue.room_bytes(3.0) == math.inf
