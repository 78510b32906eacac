"""The shared link with TCP's windows, against the law's own sum of round trips and against `SharedLink` without them."""

from __future__ import annotations

import heapq
import math
from dataclasses import replace

import numpy as np
import pytest

from repro.link.spec import LinkSpec
from repro.link.tcp_model import TcpPath
from repro.simulate.deployments import payload_share, shared_link
from repro.simulate.events import EventQueue
from repro.simulate.link import SharedLink
from repro.simulate.link_spec import CapacityChange, SharedLinkSpec, WindowSpec
from repro.simulate.windowed_link import WindowedLink, made
from repro.transport.spec import TransportSpec

#: (at, bytes, prefill seconds, sender)
Transfer = tuple[float, float, float, int]


def ends(spec: SharedLinkSpec, transfers: list[Transfer]) -> tuple[list[float], SharedLink]:
    events = EventQueue()
    link = made(spec, events)
    found = [math.nan] * len(transfers)

    def done(now_s: float, index: int) -> None:
        found[index] = now_s

    def start(now_s: float, index: int) -> None:
        _, size, prefill_s, sender = transfers[index]
        if prefill_s:
            flow = link.produce(now_s, sender, size, size / prefill_s, done, index)
            events.at(now_s + prefill_s, lambda at_s, _: link.drain(at_s, flow), None)
        else:
            link.send(now_s, sender, size, done, index)

    for index, (at_s, *_) in enumerate(transfers):
        events.at(at_s, start, index)
    while events.heap:
        now_s, _, handler, argument = heapq.heappop(events.heap)
        handler(now_s, argument)
    return found, link


def lossless(**link: object) -> SharedLinkSpec:
    return shared_link(
        replace(LinkSpec(rate_bps=1e9, rtt_s=0.05, congestion_control="cubic"), **link),
        TransportSpec(connections=4),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("size", [1e4, 1e6, 3e7])
def test_a_transfer_over_rested_connections_takes_what_the_law_says(size: float) -> None:
    spec = lossless()
    path = TcpPath(0.05, connections=4, window_bytes=math.inf, link_bps=spec.rate_bps)
    (end,), link = ends(spec, [(0.0, size, 0.0, 0)])
    assert end + 0.025 == pytest.approx(path.delivery_s(size))
    assert link.bytes_sent == pytest.approx(size)


def test_a_window_is_open_after_a_transfer_and_closes_while_it_rests_but_bbr_keeps_its_rate() -> None:
    size = 3e7
    for control, rested in (("cubic", 1.0), ("bbr", 0.0)):
        spec = lossless(congestion_control=control)
        first, later = (ends(spec, [(0.0, size, 0.0, 0), (at_s, size, 0.0, 0)])[0] for at_s in (2.0, 60.0))
        fresh = first[0]
        at_once = ends(spec, [(0.0, size, 0.0, 0), (fresh, size, 0.0, 0)])[0][1] - fresh
        assert at_once == pytest.approx(8 * size / spec.rate_bps)
        assert later[1] - 60.0 - at_once == pytest.approx(rested * (fresh - at_once), abs=1e-6)


def test_each_receiver_has_connections_of_its_own() -> None:
    spec = lossless()
    assert spec.window is not None
    both = replace(spec, window=replace(spec.window, receivers=2))
    first, second, third = ends(both, [(at_s, 3e7, 0.0, 0) for at_s in (0.0, 1.0, 1.6)])[0]
    assert second - 1.0 == pytest.approx(first), "the other receiver's connections are new"
    assert third - 1.6 < first, "the first one's have rested for a second"


def test_loss_caps_a_transfer_at_what_its_connections_carry() -> None:
    spec = lossless(loss=0.01)
    (end,), _ = ends(spec, [(0.0, 1e8, 0.0, 0)])
    carried = TcpPath(0.05, 0.01, connections=4, window_bytes=math.inf, link_bps=spec.rate_bps).goodput_bps
    assert carried < 0.02 * spec.rate_bps
    assert end == pytest.approx(8e8 / carried, rel=0.01)


def test_with_prefill_long_enough_slow_start_is_hidden_behind_it() -> None:
    spec = lossless()
    (end,), _ = ends(spec, [(0.0, 3e7, 10.0, 0)])
    assert end == pytest.approx(10.0, abs=1e-3)


def test_windows_that_are_open_at_once_share_as_the_link_without_windows_does() -> None:
    random = np.random.default_rng(5)
    transfers: list[Transfer] = [
        (float(at_s), float(size), float(prefill_s) * (index % 2), index % 3)
        for index, (at_s, size, prefill_s) in enumerate(
            zip(
                np.sort(random.uniform(0, 4, 40)),
                random.uniform(1e6, 2e8, 40),
                random.uniform(0.01, 2, 40),
                strict=True,
            )
        )
    ]
    plain = SharedLinkSpec(
        8e9, 0.01, 6e9, 4, 4e8, changes=(CapacityChange(2.0, 1e9), CapacityChange(3.0, 0.0), CapacityChange(4.0, 8e9))
    )
    wide = replace(plain, window=WindowSpec(1e15, 0.2))
    expected, without = ends(plain, transfers)
    found, link = ends(wide, transfers)
    assert isinstance(link, WindowedLink)
    assert found == pytest.approx(expected, rel=1e-6)
    assert link.bytes_sent == pytest.approx(without.bytes_sent)
    assert link.offered_bytes == pytest.approx(without.offered_bytes)


def test_a_cancelled_transfer_leaves_the_link_to_the_others() -> None:
    events = EventQueue()
    link = made(lossless(), events)
    done: list[float] = []
    flow = link.send(0.0, 0, 1e9, lambda now_s, _: done.append(now_s), None)
    link.send(0.0, 1, 1e7, lambda now_s, _: done.append(now_s), None)
    events.at(0.01, lambda now_s, _: link.cancel(now_s, flow), None)
    while events.heap:
        now_s, _, handler, argument = heapq.heappop(events.heap)
        handler(now_s, argument)
    assert len(done) == 1
    assert link.flows() == []
    assert link.offered_bytes == pytest.approx(link.bytes_sent)


def test_the_papers_link_has_no_windows_and_is_as_it_was() -> None:
    spec = shared_link(LinkSpec(rate_bps=100e9, rtt_s=0.002), TransportSpec())
    assert spec == SharedLinkSpec(rate_bps=100e9, rtt_s=0.002)
    assert type(made(spec, EventQueue())) is SharedLink


def test_a_rate_that_a_study_drops_the_link_to_is_counted_as_the_links_own_is() -> None:
    for link in (LinkSpec(rate_bps=1e9, rtt_s=0.02), LinkSpec(rate_bps=1e9, rtt_s=0.02, loss=0.01)):
        assert shared_link(link, TransportSpec()).rate_bps == 1e9 * payload_share(link)
    assert payload_share(LinkSpec(rate_bps=1e9, rtt_s=0.02)) == 1.0
    assert payload_share(link) < 1.0
