from hypothesis import given
from hypothesis import strategies as st

from repro.transport.schedule import Schedule


def filled(
    requests: dict[int, int], turn: int = 4, priorities: dict[int, int] | None = None
) -> Schedule[tuple[int, int]]:
    schedule: Schedule[tuple[int, int]] = Schedule(turn)
    for request, count in requests.items():
        schedule.add(request, (priorities or {}).get(request, 0))
        for item in range(count):
            schedule.push(request, (item,), (request, item), 0, 1)
    return schedule


def drain(schedule: Schedule[tuple[int, int]]) -> list[tuple[int, int]]:
    out = []
    while (taken := schedule.pop(1)) is not None:
        out.append(taken[0])
    return out


def test_the_earliest_layer_goes_first_however_late_it_was_pushed() -> None:
    schedule: Schedule[str] = Schedule(100)
    schedule.add(0)
    schedule.push(0, (3, 0), "layer 3", 0, 1)
    schedule.push(0, (1, 0), "layer 1", 0, 1)
    schedule.push(0, (2, 0), "layer 2", 0, 1)
    assert [schedule.pop(1) for _ in range(3)] == [("layer 1", 0, 1), ("layer 2", 0, 1), ("layer 3", 0, 1)]


def test_an_item_is_taken_bit_by_bit_unless_something_earlier_is_pushed_meanwhile() -> None:
    schedule: Schedule[str] = Schedule(100)
    schedule.add(0)
    schedule.push(0, (2, 0), "layer 2", 0, 10)
    assert schedule.pop(4) == ("layer 2", 0, 4)
    schedule.push(0, (1, 0), "layer 1", 0, 3)
    assert [schedule.pop(4) for _ in range(4)] == [("layer 1", 0, 3), ("layer 2", 4, 4), ("layer 2", 8, 2), None]


def test_a_large_old_request_does_not_starve_a_small_one() -> None:
    order = [request for request, _ in drain(filled({0: 1000, 1: 2}))]
    assert order.index(1) <= 4
    assert [request for request in order if request == 1] == [1, 1]


def test_the_oldest_request_gets_half_of_the_link_among_many() -> None:
    order = [request for request, _ in drain(filled({0: 100, 1: 100, 2: 100, 3: 100}))]
    assert 90 <= order[:200].count(0) <= 110
    assert min(order[:200].count(other) for other in (1, 2, 3)) >= 28


def test_a_higher_priority_goes_before_older_requests() -> None:
    order = [request for request, _ in drain(filled({0: 10, 1: 10}, priorities={1: 5}))]
    assert order == [1] * 10 + [0] * 10


def test_a_priority_can_change_while_a_request_waits() -> None:
    schedule = filled({0: 4, 1: 4})
    schedule.set_priority(1, 9)
    assert [request for request, _ in drain(schedule)] == [1] * 4 + [0] * 4


def test_a_request_that_may_not_send_does_not_hold_up_others() -> None:
    schedule = filled({0: 3, 1: 3})
    assert schedule.pop(1, lambda request, _item: request != 0) == ((1, 0), 0, 1)
    assert schedule.pop(1, lambda _request, _item: False) is None
    assert len(schedule) == 5


def test_a_removed_request_leaves_nothing_behind() -> None:
    schedule = filled({0: 3, 1: 3})
    schedule.remove(0)
    assert [request for request, _ in drain(schedule)] == [1, 1, 1]


@given(
    st.dictionaries(st.integers(0, 20), st.integers(0, 30), max_size=8),
    st.integers(1, 12),
    st.dictionaries(st.integers(0, 20), st.integers(-2, 2)),
)
def test_everything_pushed_comes_out_once_and_in_order_within_its_request(
    requests: dict[int, int], turn: int, priorities: dict[int, int]
) -> None:
    out = drain(filled(requests, turn, priorities))
    for request, count in requests.items():
        assert [item for r, item in out if r == request] == list(range(count))
    assert len(out) == sum(requests.values())
