from dataclasses import replace

from repro.link.tcp_info import TcpInfo
from repro.transport.signals import ConnectionSignal, Laggards

IDLE = TcpInfo(
    rtt_s=0.01,
    min_rtt_s=0.01,
    bytes_sent=0,
    bytes_acked=0,
    bytes_retransmitted=0,
    notsent_bytes=0,
    unacked_segments=0,
    segment_bytes=1448,
    delivery_rate_bps=0,
    app_limited=False,
)


def lagging(history: list[dict[int, tuple[int, int]]], step_s: float = 0.1, rtt_s: float = 0.01) -> dict[int, float]:
    """When each connection was first found to lag; the history gives (bytes acked, segments outstanding) per connection."""
    laggards, found = Laggards(patience_s=1.0, patience_rtts=8.0), {}
    for step, readings in enumerate(history):
        now = step * step_s
        signals = {
            key: ConnectionSignal(key, now, replace(IDLE, rtt_s=rtt_s, bytes_acked=acked, unacked_segments=unacked))
            for key, (acked, unacked) in readings.items()
        }
        for key in laggards.update(signals):
            found.setdefault(key, now)
    return found


def test_a_connection_that_waits_while_its_sibling_goes_on_lags_after_its_patience() -> None:
    found = lagging([{0: (5, 3), 1: (step, 1)} for step in range(40)])
    assert list(found) == [0]
    assert 1.08 < found[0] < 1.3


def test_an_outage_of_the_whole_link_makes_no_laggard() -> None:
    assert lagging([{0: (5, 3), 1: (7, 3)} for _ in range(100)]) == {}


def test_after_an_outage_only_the_connection_that_stays_behind_lags() -> None:
    outage = [{0: (5, 3), 1: (7, 3)} for _ in range(30)]
    after = [{0: (5, 3), 1: (8 + step, 3)} for step in range(5)]
    assert list(lagging(outage + after)) == [0]


def test_an_idle_connection_does_not_lag_and_starts_afresh_when_it_has_something_to_send() -> None:
    idle = [{0: (5, 0), 1: (step, 1)} for step in range(50)]
    busy = [{0: (5, 2), 1: (50 + step, 1)} for step in range(8)]
    assert lagging(idle + busy) == {}


def test_a_connection_without_siblings_never_lags() -> None:
    assert lagging([{0: (5, 3)} for _ in range(100)]) == {}


def test_a_long_round_trip_earns_patience() -> None:
    found = lagging([{0: (5, 3), 1: (step, 1)} for step in range(60)], rtt_s=0.2)
    assert found[0] > 2.5
