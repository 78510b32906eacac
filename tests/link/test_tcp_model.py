"""TCP's law against the standards' closed forms, and against what must hold whatever the numbers."""

from __future__ import annotations

import math

import pytest

from repro.errors import UserError
from repro.link.tcp_model import INITIAL_SEGMENTS, TcpPath, chain_bps, even_losses_bps

WINDOW = 4 * 2**20
SEGMENT_BITS = 8 * 1448


def test_a_connection_carries_a_window_per_round_trip_and_less_under_loss_unless_it_is_bbr() -> None:
    def even(rtt_s: float, loss: float, control: str, window_bytes: float) -> float:
        return even_losses_bps(TcpPath(rtt_s, loss, control, window_bytes=window_bytes))

    assert even(0.1, 0.0, "cubic", WINDOW) == even(0.1, 0.01, "bbr", WINDOW) == pytest.approx(8 * WINDOW / 0.1)
    mathis = 8 * 1448 / 0.02 * (1.5 / 0.01) ** 0.5
    assert even(0.02, 0.01, "cubic", WINDOW) == pytest.approx(mathis), "RFC 9438's Reno-friendly region"
    assert even(0.2, 1e-5, "cubic", 1e12) == pytest.approx(8 * 1448 / 0.2 * 1.054 * (0.2 / 1e-5) ** 0.75, rel=1e-3)


@pytest.mark.parametrize(("rtt_s", "loss"), [(0.02, 1e-3), (0.05, 1e-4), (0.1, 1e-5)], ids=str)
def test_losses_at_random_leave_about_what_even_losses_leave(rtt_s: float, loss: float) -> None:
    path = TcpPath(rtt_s, loss, window_bytes=math.inf)
    assert chain_bps(path, 0, 0.0) == pytest.approx(even_losses_bps(path), rel=0.16)


def test_reno_under_random_loss_has_the_known_mean_window() -> None:
    """E[W] = 1.31 ÷ √p for Poisson losses (Altman, Avrachenkov, Barakat 2000), here of whole segments."""
    path = TcpPath(0.05, 1e-4, "reno", window_bytes=math.inf)
    assert chain_bps(path, 0, 0.0) * 0.05 / SEGMENT_BITS == pytest.approx(131, rel=0.04)


@pytest.mark.parametrize("control", ["cubic", "reno"])
def test_more_loss_and_distance_carry_less_and_more_connections_more_up_to_the_link(control: str) -> None:
    def goodput(rtt_s: float, loss: float, connections: int) -> float:
        return TcpPath(rtt_s, loss, control, connections, math.inf, link_bps=1e9).goodput_bps

    assert goodput(0.02, 1e-4, 4) > goodput(0.02, 1e-3, 4) > goodput(0.02, 1e-2, 4) > goodput(0.04, 1e-2, 4)
    assert goodput(0.02, 1e-3, 1) < goodput(0.02, 1e-3, 16) <= 1e9
    assert goodput(0.02, 1e-2, 16) == pytest.approx(16 * goodput(0.02, 1e-2, 1), rel=0.03), (
        "far from full they do not meet"
    )
    assert 0.9e9 < goodput(0.02, 1e-4, 64) <= 1e9


def test_without_loss_the_link_is_full_and_bbr_loses_no_more_than_is_lost() -> None:
    assert TcpPath(0.1, 0.0, "cubic", 4, math.inf, link_bps=1e9).goodput_bps == 1e9
    assert TcpPath(0.1, 0.02, "bbr", 1, math.inf, link_bps=1e9).goodput_bps == pytest.approx(0.98e9)


def test_a_link_without_length_is_as_one_with_hardly_any() -> None:
    none, hardly = (TcpPath(rtt_s, 0.01, connections=4, window_bytes=math.inf, link_bps=1e10) for rtt_s in (0.0, 1e-6))
    assert none.goodput_bps == pytest.approx(hardly.goodput_bps, rel=0.01)
    assert none.delivery_s(1e8) == pytest.approx(8e8 / none.goodput_bps)


def test_a_burst_of_losses_shrinks_a_window_once() -> None:
    alone, bursts = TcpPath(0.02, 1e-2), TcpPath(0.02, 1e-2, burst_segments=10)
    assert bursts.goodput_bps == pytest.approx(TcpPath(0.02, 1e-3).goodput_bps, rel=0.02)
    assert bursts.goodput_bps > 2 * alone.goodput_bps


def test_delivery_takes_the_round_trips_of_slow_start_and_then_the_steady_rate() -> None:
    path = TcpPath(0.1, connections=1, window_bytes=math.inf, link_bps=1e9)
    segment = 1448
    assert path.delivery_s(INITIAL_SEGMENTS * segment) == pytest.approx(0.15), "one window, spread over its round trip"
    assert path.delivery_s(70 * segment) == pytest.approx(0.35), "10 + 20 + 40 segments"
    large = 1e9
    assert path.delivery_s(large) - 8 * large / 1e9 == pytest.approx(0.9, abs=0.15), (
        "its price does not grow with the size"
    )
    four = TcpPath(0.1, connections=4, window_bytes=math.inf, link_bps=1e9)
    assert path.delivery_s(large) - four.delivery_s(large) == pytest.approx(0.2, abs=0.02), (
        "four windows are two doublings"
    )


def test_an_idle_window_halves_per_timeout_down_to_a_new_one_and_bbr_remembers_its_rate() -> None:
    path = TcpPath(0.1, window_bytes=math.inf, link_bps=1e9)
    new = 8 * INITIAL_SEGMENTS * 1448 / 0.1
    assert path.idle_window_bps(0.0, 0.3) == 1e9
    assert path.idle_window_bps(0.3, 0.3) == pytest.approx(0.5e9)
    assert path.idle_window_bps(30.0, 0.3) == path.idle_window_bps(math.inf, 0.3) == new
    bbr = TcpPath(0.1, congestion_control="bbr", window_bytes=math.inf, link_bps=1e9)
    assert bbr.idle_window_bps(30.0, 0.3) == 1e9
    assert bbr.idle_window_bps(math.inf, 0.3) == new


@pytest.mark.parametrize(
    ("key", "value"), [("congestion_control", "warp"), ("loss", 1.0), ("connections", 0)], ids=lambda part: str(part)
)
def test_what_is_no_path_is_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(UserError, match=key):
        TcpPath(**{"rtt_s": 0.1, key: value})  # type: ignore[arg-type]
