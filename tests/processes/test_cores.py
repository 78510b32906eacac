"""Cores are handed out so that a computing thread shares its core with nothing, within what the process may use."""

from __future__ import annotations

import os
import threading

import pytest

from repro.processes import Child, Core, background, cores, hand_out, placed

BOTH = {"prefill": 1, "decode": 1}


def single(count: int) -> list[Core]:
    return [Core((number,)) for number in range(count)]


def test_every_computing_thread_gets_a_core_and_the_rest_shares_the_others() -> None:
    found = hand_out({"prefill": 2, "decode": 1}, single(6))
    assert found.computing == {"prefill": (0, 1), "decode": (2,)}
    assert found.others == (3, 4, 5)


def test_on_two_cores_the_workers_take_turns_on_one_and_all_else_has_the_other() -> None:
    found = hand_out(BOTH, single(2))
    assert found.computing == {"prefill": (0,), "decode": (0,)}
    assert found.others == (1,)
    assert "taking turns" in found.record()["how"]


@pytest.mark.parametrize(("count", "threads"), [(1, 1), (2, 2), (3, 4)])
def test_with_too_few_cores_nothing_is_handed_out(count: int, threads: int) -> None:
    found = hand_out({"prefill": threads, "decode": threads}, single(count))
    assert found.computing == {"prefill": (), "decode": ()}
    assert found.record()["everything else"] == "any"


def test_the_hyper_thread_beside_a_computing_thread_stays_idle() -> None:
    found = hand_out(BOTH, [Core((number, number + 4)) for number in range(4)])
    assert found.computing == {"prefill": (0,), "decode": (1,)}
    assert found.others == (2, 3, 6, 7)


def test_a_role_s_cores_are_of_one_numa_node_where_one_has_enough() -> None:
    machine = [Core((number,), node=number % 2) for number in range(8)]
    found = hand_out({"prefill": 3, "decode": 3}, machine)
    assert found.computing == {"prefill": (0, 2, 4), "decode": (1, 3, 5)}
    assert found.others == (6, 7)


def test_no_more_cores_are_usable_than_the_control_group_has_time_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(cores, "_siblings", lambda processor: (processor,))
    monkeypatch.setattr(cores, "_quota", lambda: 2.5)
    assert [core.processors for core in cores.usable()] == [(0,), (1,), (2,)]


def test_the_kernel_s_lists_of_processors_are_read() -> None:
    assert cores._parsed("0-2,8\n") == (0, 1, 2, 8)


def test_only_processors_of_this_process_are_usable() -> None:
    found = [processor for core in cores.usable() for processor in core.processors]
    assert set(found) <= os.sched_getaffinity(0)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two processors are needed")
def test_what_a_computing_thread_starts_in_the_background_leaves_its_core() -> None:
    began_with = os.sched_getaffinity(0)
    seen: dict[str, set[int]] = {}
    done = threading.Event()

    def look() -> None:
        seen["thread"] = os.sched_getaffinity(0)
        done.set()

    with placed([min(began_with)]):
        assert os.sched_getaffinity(0) == {min(began_with)}
        background(look, name="looking")
        assert done.wait(10)
    assert seen["thread"] == began_with
    assert os.sched_getaffinity(0) == began_with


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two processors are needed")
def test_a_child_runs_where_the_thread_that_started_it_does_or_where_it_is_told() -> None:
    low, *_, high = sorted(os.sched_getaffinity(0))
    with placed([low]):
        children = {
            low: Child("here", ["sleep", "60"], channel=False),
            high: Child("there", ["sleep", "60"], channel=False, cores=[high]),
        }
    for processor, child in children.items():
        with child:
            assert os.sched_getaffinity(child.pid) == {processor}
