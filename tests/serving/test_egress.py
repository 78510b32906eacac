"""What a live router believes of its egress, from senders' counters alone."""

from __future__ import annotations

import pytest

from repro.scheduling.observations import LinkReport
from repro.serving.egress import Egress
from repro.serving.messages import Sending

#: Ten times as fast, bytes divided by a hundred: 1 MB acknowledged here in 0.1 s are 100 MB of the deployment in 1 s.
SCALE = {"time_scale": 10.0, "byte_scale": 100.0}


def said(at_s: float, acked: int, waiting: int) -> Sending:
    return Sending(at_s, acked, 0, waiting, acked, 0.001)


def reports(egress: Egress, words: list[tuple[float, int, int]]) -> list[LinkReport]:
    return [egress.report(at_s, [said(at_s, acked, waiting)]) for at_s, acked, waiting in words]


def test_use_is_what_was_acknowledged_of_what_was_provisioned() -> None:
    found = reports(Egress(1.6e9, **SCALE), [(1.0, 0, 0), (1.1, 1_000_000, 0)])
    assert found[-1].capacity_bps == 1.6e9
    assert found[-1].utilisation == pytest.approx(0.5)
    assert found[-1].rtt_s == pytest.approx(0.01)
    assert found[-1].up


def test_a_link_that_is_full_is_believed_to_carry_what_it_carried() -> None:
    found = reports(
        Egress(1.6e9, **SCALE), [(1.0, 0, 3_000_000), (1.1, 500_000, 3_000_000), (1.2, 1_000_000, 3_000_000)]
    )
    assert found[-1].capacity_bps == pytest.approx(0.4e9)
    assert found[-1].utilisation == pytest.approx(1.0)
    assert found[-1].backlog_bytes == pytest.approx(300e6)


def test_a_link_over_which_nothing_crosses_while_bytes_wait_is_down_until_something_does() -> None:
    egress = Egress(1.6e9, **SCALE)
    found = reports(egress, [(1.0, 10, 500), (1.3, 10, 500), (1.6, 10, 500), (1.7, 20, 490)])
    assert [report.up for report in found] == [True, True, False, True]
    assert reports(egress, [(3.0, 20, 0)])[0].up


def test_several_senders_share_one_egress_and_an_unlimited_one_is_never_used_up() -> None:
    egress = Egress(1.6e9, **SCALE)
    egress.report(1.0, [said(1.0, 0, 0), said(1.0, 0, 0)])
    assert egress.report(1.1, [said(1.1, 500_000, 0), said(1.1, 500_000, 0)]).utilisation == pytest.approx(0.5)
    assert reports(Egress(float("inf"), **SCALE), [(1.0, 0, 0), (1.1, 1_000_000, 0)])[-1].utilisation == 0.0
