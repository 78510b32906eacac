"""A timetable: what is written holds from its moment on, and its moves cost what any do."""

import pytest

from repro.errors import UserError
from repro.scheduling.adaptive import AdaptiveSpec
from repro.scheduling.spec import SchedulerSpec
from repro.scheduling.timetable import Planned, planned, step

PLAN = (Planned(10.0, 8000.0, 3), Planned(20.0, 4000.0, 5))


def test_an_entry_holds_from_its_moment_to_the_next() -> None:
    assert planned(PLAN, 9.9) is None
    assert planned(PLAN, 10.0) == PLAN[0]
    assert planned(PLAN, 1e6) == PLAN[1]


def test_nodes_turn_towards_the_split_and_never_against_those_under_way() -> None:
    assert step(3, 0, PLAN[1]) == 1
    assert step(6, 0, PLAN[1]) == -1
    assert step(5, 2, PLAN[1]) == 0
    assert step(6, 1, PLAN[1]) == 0


def test_two_that_move_the_same_nodes_and_moments_out_of_order_are_refused() -> None:
    with pytest.raises(UserError, match="timetable: a slow loop moves the same nodes"):
        SchedulerSpec(timetable=PLAN, adaptive=AdaptiveSpec(enabled=True))
    with pytest.raises(UserError, match="timetable: its moments are not in order"):
        SchedulerSpec(timetable=PLAN[::-1])
    with pytest.raises(UserError, match="no negative time"):
        Planned(-1.0, 0.0, 0)
