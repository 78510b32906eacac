"""The shared link against hand calculation and against a brute-force fluid integration."""

import math
from typing import Any

import numpy as np
import pytest

from repro.simulate.events import EventQueue
from repro.simulate.link import SharedLink, fill
from repro.simulate.link_spec import CapacityChange, SharedLinkSpec


def spec(**kwargs: Any) -> SharedLinkSpec:
    defaults = {"rate_bps": 8e9, "nic_bps": 8e12, "connections": 1, "connection_bps": 8e12, "rtt_s": 0.0}
    return SharedLinkSpec(**{**defaults, **kwargs})


def play(link: SharedLink, events: EventQueue) -> None:
    import heapq

    while events.heap:
        now, _, handler, argument = heapq.heappop(events.heap)
        handler(now, argument)


def times(actions: list[tuple[float, str, int, float, float]], **kwargs: Any) -> tuple[dict[int, float], SharedLink]:
    """Actions are (at, send|overlap, sender, bytes, prefill seconds); returns the completion time of each."""
    events = EventQueue()
    link = SharedLink(spec(**kwargs), events)
    ends: dict[int, float] = {}

    def done(now: float, index: int) -> None:
        ends[index] = now

    def start(now: float, index: int) -> None:
        _, kind, sender, size, prefill = actions[index]
        if kind == "send":
            link.send(now, sender, size, done, index)
        else:
            flow = link.produce(now, sender, size, size / prefill, done, index)
            events.at(now + prefill, link.drain, flow)

    for index, (at, *_) in enumerate(actions):
        events.at(at, start, index)
    play(link, events)
    return ends, link


def test_link_reshares_bandwidth_when_a_transfer_joins_and_when_one_ends() -> None:
    ends, _ = times([(0.0, "send", 0, 1e9, 0), (0.5, "send", 1, 1e9, 0)])
    assert ends == pytest.approx({0: 1.5, 1: 2.0})


def test_a_transfer_cannot_end_before_its_prefill() -> None:
    ends, _ = times([(0.0, "overlap", 0, 1e8, 2.0)])
    assert ends[0] == pytest.approx(2.0)


def test_a_transfer_slower_than_its_prefill_ends_when_the_link_has_carried_it() -> None:
    ends, _ = times([(0.0, "overlap", 0, 4e9, 2.0)])
    assert ends[0] == pytest.approx(4.0)


def test_a_backlog_drains_while_the_prefill_still_runs() -> None:
    # Full link until 1 s for two (0.5 each, asking 0.6), then 0 is left alone and catches up: 0.5 + … = 3 GB made by 5 s, all sent.
    ends, _ = times([(0.0, "overlap", 0, 3e9, 5.0), (0.0, "send", 1, 0.5e9, 0)])
    assert ends[1] == pytest.approx(1.0)
    assert ends[0] == pytest.approx(5.0)


def test_nic_and_connection_caps_bound_a_transfer_on_an_empty_link() -> None:
    assert times([(0.0, "send", 0, 1e9, 0)], nic_bps=4e9)[0][0] == pytest.approx(2.0)
    assert times([(0.0, "send", 0, 1e9, 0)], connections=2, connection_bps=1e9)[0][0] == pytest.approx(4.0)


def test_what_a_full_nic_leaves_over_goes_to_other_senders() -> None:
    ends, _ = times(
        [(0.0, "send", 0, 1e9, 0), (0.0, "send", 0, 1e9, 0), (0.0, "send", 1, 0.75e9, 0)], rate_bps=8e9, nic_bps=6e9
    )
    # Fair third each while the NIC of sender 0 allows 6/8: not binding; then each level follows from what is left.
    assert ends[2] == pytest.approx(2.25)
    assert ends[0] == ends[1] == pytest.approx(2.25 + 2 * 0.25e9 / 0.75e9)


def test_an_outage_stops_bytes_and_a_repair_resumes_them() -> None:
    changes = (CapacityChange(0.5, 0.0), CapacityChange(10.0, 8e9))
    ends, link = times([(0.0, "send", 0, 1e9, 0)], changes=changes)
    assert ends[0] == pytest.approx(10.5)
    assert link.settle(11.0) == pytest.approx(1e9)


def test_filling_is_max_min_fair_on_the_tree_of_nics() -> None:
    levels = fill(10.0, 4.0, 100.0, {"a": ([1.0], 3), "b": ([], 1), "c": ([0.5], 1)})
    assert levels["a"] == pytest.approx(1.0)  # its NIC: 1 asked, 3 left for three
    assert levels["b"] == pytest.approx(10.0 - 4.0 - 0.5 - levels["c"])
    assert levels["c"] == pytest.approx(2.75)


@pytest.mark.parametrize("nic_bps", [8e12, 5e9])
def test_completion_times_agree_with_a_fluid_integration_in_small_steps(nic_bps: float) -> None:
    rng = np.random.default_rng(3)
    actions = [
        (
            float(rng.uniform(0, 5)),
            "overlap" if rng.random() < 0.6 else "send",
            int(rng.integers(3)),
            float(rng.uniform(1e8, 9e8)),
            float(rng.uniform(0.3, 1.5)),
        )
        for _ in range(24)
    ]
    ends, link = times(actions, nic_bps=nic_bps)
    assert sorted(ends) == list(range(24))
    assert link.settle(1e3) == pytest.approx(sum(size for *_, size, _ in actions))
    reference = integrate(actions, 1e9, nic_bps / 8, 5e-4)
    assert max(abs(ends[i] - reference[i]) for i in ends) < 0.02


def integrate(
    actions: list[tuple[float, str, int, float, float]], capacity: float, nic: float, step: float
) -> dict[int, float]:
    sent, ends, now = [0.0] * len(actions), dict[int, float](), 0.0
    while len(ends) < len(actions):
        asks: dict[int, float] = {}
        for i, (at, kind, _, size, prefill) in enumerate(actions):
            if at <= now and i not in ends:
                made = size if kind == "send" else min(size, size * (now + step - at) / prefill)
                asks[i] = (made - sent[i]) / step
        senders = {actions[i][2] for i in asks}
        levels = fill(capacity, nic, math.inf, {s: ([asks[i] for i in asks if actions[i][2] == s], 0) for s in senders})
        now += step
        for i, ask in asks.items():
            sent[i] += min(ask, levels[actions[i][2]]) * step
            if sent[i] >= actions[i][3] - 1.0:
                ends[i] = now
    return ends


def test_work_is_conserved_the_link_is_full_whenever_anything_waits() -> None:
    ends, _ = times([(0.1 * i, "send", i, 3e8, 0) for i in range(10)])
    assert max(ends.values()) == pytest.approx(3.0)
