import contextlib
import math
import socket
import time
from dataclasses import replace

import pytest

from repro.link import tcp_info
from repro.link.tcp_info import Sampler, TcpInfo, together

CALM = TcpInfo(0.020, 0.020, 0, 0, 0, 0, 0, 1448, 0.0, True)


def test_a_real_connection_reports_what_was_acknowledged_and_what_waits() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as near:
        far, _ = listener.accept()
        with far:
            near.sendall(bytes(100_000))
            received = 0
            while received < 100_000:
                received += len(far.recv(1 << 20))
            deadline = time.monotonic() + 5
            while (info := tcp_info.read(near)).bytes_acked < 100_000 and time.monotonic() < deadline:
                time.sleep(0.01)
            assert info.bytes_acked in (100_000, 100_001)  # the kernel may count the SYN
            assert info.bytes_sent == 100_000
            assert info.bytes_retransmitted == 0
            assert 0 < info.min_rtt_s <= info.rtt_s < 5
            assert info.notsent_bytes == 0

            near.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    near.send(bytes(1 << 20))
            assert tcp_info.read(near).notsent_bytes > 0


def test_only_a_connected_socket_has_tcp_info() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagram, pytest.raises(OSError, match=r".+"):
        tcp_info.read(datagram)


def test_the_average_of_acknowledged_bytes_follows_the_link() -> None:
    sampler = Sampler(memory_s=0.25)
    acked = 0
    for step in range(41):
        found = sampler.sample(step * 0.05, replace(CALM, bytes_acked=acked, bytes_sent=acked))
        acked += 1_250_000 // 20  # 10 Mbps
    assert found.acked_bps == pytest.approx(10e6, rel=0.01)


def test_queue_and_loss_come_from_differences() -> None:
    sampler = Sampler()
    sampler.sample(0.0, CALM)
    busy = replace(CALM, rtt_s=0.035, bytes_sent=100_000, bytes_retransmitted=1_000, notsent_bytes=7)
    found = sampler.sample(0.1, busy)
    assert found.queue_delay_s == pytest.approx(0.015)
    assert found.loss == pytest.approx(0.01)
    assert found.backlog_bytes == 7
    calm_again = sampler.sample(0.2, busy)
    assert calm_again.loss == 0


def test_the_delivery_rate_counts_only_while_the_application_keeps_tcp_busy() -> None:
    idle = Sampler().sample(0.0, replace(CALM, delivery_rate_bps=5e6, app_limited=True))
    busy = Sampler().sample(0.0, replace(CALM, delivery_rate_bps=5e6, app_limited=False))
    assert math.isnan(idle.delivery_rate_bps)
    assert busy.delivery_rate_bps == 5e6


def test_connections_together_add_rates_and_weigh_delays() -> None:
    fast = tcp_info.Congestion(1.0, 9e6, 0.010, 0.02, 0.0, 0, 100, 9e6)
    slow = tcp_info.Congestion(1.1, 1e6, 0.110, 0.03, 0.1, 5, 50, math.nan)
    found = together([fast, slow])
    assert found.acked_bps == 10e6
    assert found.queue_delay_s == pytest.approx(0.020)
    assert found.loss == pytest.approx(0.01)
    assert found.backlog_bytes == 150
    assert found.min_rtt_s == 0.02
    assert math.isnan(found.delivery_rate_bps)
    with pytest.raises(ValueError, match="no connection"):
        together([])
