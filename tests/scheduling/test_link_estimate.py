"""What a router can know of a link: nothing but what crossed, what waits and how long a reply takes."""

from typing import NamedTuple

import pytest

from repro.scheduling.link_estimate import LinkEstimate
from repro.scheduling.observations import InstanceReport, LinkReport, PdReport, StalledTransfer

#: Every field that the scheduler is told → who knows it in a live system.
SOURCES: dict[type[NamedTuple], dict[str, str]] = {  # type: ignore[valid-type]
    InstanceReport: {
        "instance": "the router's own number of it", "requests": "what the router gave it and has not seen end",
        "busy_until_s": "the worker's message",
    },
    PdReport: {
        "prefill": "the workers' messages", "decode": "the workers' messages", "finished": "answers that the router passed on",
        "finished_tokens": "tokens that the router passed on", "waiting_decode": "delivered requests that no decode worker has taken",
    },
    LinkReport: {
        "capacity_bps": "the provisioned rate, at first; then LinkEstimate", "utilisation": "bytes acknowledged to the sender",
        "backlog_bytes": "the sender's queue", "rtt_s": "TCP_INFO", "up": "the transport's progress",
    },
    StalledTransfer: {
        "id": "the router's own", "pd": "the router's own", "input_tokens": "the request", "chain": "the request's prefix keys",
    },
}  # fmt: skip


@pytest.mark.parametrize("told", SOURCES, ids=lambda told: told.__name__)
def test_every_field_that_the_scheduler_is_told_has_a_source_in_a_live_system(told: type) -> None:
    assert set(SOURCES[told]) == set(told._fields)  # type: ignore[attr-defined]


def report(carried_bps: float, backlog_bytes: float, true_bps: float = 100e9) -> LinkReport:
    return LinkReport(true_bps, carried_bps / true_bps, backlog_bytes)


def test_an_idle_link_tells_nothing_of_its_rate() -> None:
    estimate = LinkEstimate()
    estimate.seen(0.0, report(0.0, 0.0))
    for second in range(1, 100):
        # The true rate has halved; nobody can know.
        assert estimate.seen(float(second), report(5e9, 0.0, 50e9)).capacity_bps == pytest.approx(100e9)


def test_a_saturated_link_shows_its_rate_and_no_more_is_believed_of_it() -> None:
    estimate = LinkEstimate()
    estimate.seen(0.0, report(0.0, 20e9))
    seen = estimate.seen(1.0, report(50e9, 20e9, 50e9))
    assert (seen.capacity_bps, seen.utilisation) == (pytest.approx(50e9), pytest.approx(1.0))


def test_a_link_that_has_recovered_is_tried_again() -> None:
    estimate = LinkEstimate()
    estimate.seen(0.0, report(0.0, 20e9))
    estimate.seen(1.0, report(10e9, 0.0, 10e9))
    assert estimate.rate_bps == pytest.approx(10e9)
    for second in range(2, 302):
        estimate.seen(float(second), report(2e9, 0.0))
    assert estimate.rate_bps == pytest.approx(100e9, rel=0.01)


def test_an_outage_is_seen_by_what_waits_and_does_not_cross() -> None:
    estimate = LinkEstimate()
    estimate.seen(0.0, report(0.0, 1e9))
    assert estimate.seen(1.0, report(0.0, 1e9)).capacity_bps == 0.0


def test_two_reports_at_one_time_are_one() -> None:
    estimate = LinkEstimate()
    estimate.seen(0.0, report(0.0, 20e9))
    first = estimate.seen(1.0, report(50e9, 20e9, 50e9))
    assert estimate.seen(1.0, report(50e9, 20e9, 50e9)) is first
