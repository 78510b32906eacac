import random
import threading
from dataclasses import replace
from pathlib import Path as FilePath

import pytest
from transport_rig import assert_same, eventually, make_request, send_all

from repro.errors import UserError
from repro.transport import ReceiverLimits, TransferFailed, TransportSpec, open_receiver, open_sender
from repro.transport.certificates import make_certificates

SIZES = [0, 1, 4096, 16 << 10, (16 << 10) + 1, 300_000, 1_000_000]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> FilePath:
    folder = tmp_path_factory.mktemp("certificates")
    make_certificates(folder)
    return folder


@pytest.mark.parametrize("connections", [1, 4, 16])
@pytest.mark.parametrize("tls", [False, True])
def test_what_arrives_is_what_was_sent(
    spec: TransportSpec, connections: int, tls: bool, certificates: FilePath
) -> None:
    spec = replace(spec, connections=connections, tls=str(certificates) if tls else None)
    with open_receiver(spec, "127.0.0.1") as receiver, open_sender(spec, ("127.0.0.1", receiver.port)) as sender:
        for request_id in range(5):
            pieces, manifest = make_request(request_id, SIZES)
            send_all(sender, pieces, manifest)
            with receiver.receive(10) as received:
                assert_same(received, pieces)
                assert received.manifest == manifest
            delivery = sender.wait(request_id, 10)
            assert delivery.payload_bytes == sum(SIZES)
            assert delivery.begun_s <= delivery.first_byte_s <= delivery.last_byte_s <= delivery.acked_s
        assert eventually(lambda: sender.stats()["held_bytes"] == 0)
        assert receiver.stats()["arena_used_bytes"] == 0


def test_many_requests_from_many_threads_arrive_whole_and_once(spec: TransportSpec) -> None:
    requests = {n: make_request(n, [random.Random(n).choice(SIZES) for _ in range(n % 9)]) for n in range(80)}
    seen: dict[int, int] = {}
    with open_receiver(spec, "127.0.0.1") as receiver, open_sender(spec, ("127.0.0.1", receiver.port)) as sender:

        def feed(numbers: range) -> None:
            for n in numbers:
                send_all(sender, *requests[n])
                sender.wait(n, 20)

        threads = [threading.Thread(target=feed, args=(range(k, 80, 4),)) for k in range(4)]
        for thread in threads:
            thread.start()
        for _ in requests:
            with receiver.receive(20) as received:
                assert_same(received, requests[received.request_id][0])
                seen[received.request_id] = seen.get(received.request_id, 0) + 1
        for thread in threads:
            thread.join()
        with pytest.raises(TimeoutError):
            receiver.receive(0.1)
    assert seen == dict.fromkeys(range(80), 1)


def test_pieces_cross_while_later_ones_do_not_exist_yet(spec: TransportSpec) -> None:
    with open_receiver(spec, "127.0.0.1") as receiver, open_sender(spec, ("127.0.0.1", receiver.port)) as sender:
        pieces, manifest = make_request(1, [100_000] * 3)
        sender.begin(1)
        for count, piece in enumerate(pieces, 1):
            sender.send(piece)
            assert eventually(lambda count=count: sender.stats()["acked_pieces"] == count)  # type: ignore[misc]
        sender.finish(manifest)
        with receiver.receive(5) as received:
            assert [a.layer for a in sorted(received.arrivals, key=lambda a: a.last_byte_s)] == [0, 1, 2]


def test_a_decode_side_that_takes_nothing_bounds_the_memory_of_both_sides(spec: TransportSpec) -> None:
    window = 1 << 20
    spec = replace(spec, max_in_flight_bytes=window, limits=replace(spec.limits, window_bytes=window))
    size, count = 100_000, 60
    with open_receiver(spec, "127.0.0.1") as receiver, open_sender(spec, ("127.0.0.1", receiver.port)) as sender:
        feeder = threading.Thread(target=lambda: [send_all(sender, *make_request(n, [size])) for n in range(count)])
        feeder.start()
        assert eventually(lambda: receiver.stats()["held_bytes"] > window - 2 * size)
        assert not eventually(lambda: not feeder.is_alive(), 0.5)
        assert receiver.stats()["held_bytes"] <= window
        assert sender.stats()["unacked_bytes"] <= window
        for _ in range(count):
            receiver.receive(10).release()
        feeder.join(10)
        assert not feeder.is_alive()


def test_the_oldest_request_is_finished_even_when_younger_ones_fill_the_window(spec: TransportSpec) -> None:
    window = 1 << 20
    spec = replace(spec, max_in_flight_bytes=window, limits=replace(spec.limits, window_bytes=window))
    with open_receiver(spec, "127.0.0.1") as receiver, open_sender(spec, ("127.0.0.1", receiver.port)) as sender:
        pieces, manifest = make_request(0, [200_000] * 10)
        sender.begin(0)
        sender.send(pieces[0])
        young = [threading.Thread(target=send_all, args=(sender, *make_request(n, [300_000]))) for n in range(1, 8)]
        for thread in young:
            thread.start()
        assert eventually(lambda: receiver.stats()["held_bytes"] > window // 2)
        for piece in pieces[1:]:
            sender.send(piece)
        sender.finish(manifest)
        order = []
        for _ in range(8):
            with receiver.receive(10) as received:
                order.append(received.request_id)
        assert sorted(order) == list(range(8))
        for thread in young:
            thread.join(10)


def test_a_cancelled_request_never_arrives_and_its_memory_comes_back(spec: TransportSpec) -> None:
    with open_receiver(spec, "127.0.0.1") as receiver, open_sender(spec, ("127.0.0.1", receiver.port)) as sender:
        pieces, manifest = make_request(1, [500_000, 10])
        sender.begin(1)
        sender.send(pieces[0])
        assert eventually(lambda: receiver.stats()["held_bytes"] > 0)
        sender.cancel(1)
        with pytest.raises(TransferFailed, match="cancelled"):
            sender.send(pieces[1])
        with pytest.raises(TransferFailed) as failure:
            sender.wait(1)
        assert failure.value.reason == "cancelled"
        assert eventually(lambda: receiver.stats()["arena_used_bytes"] == 0)
        assert eventually(lambda: sender.stats()["transfers"] == 0)
        assert [f.request_id for f in receiver.failures()] == [1]
        send_all(sender, *make_request(1, [1000], seed=1))  # the number may be used again
        with receiver.receive(5) as received:
            assert received.manifest.meta["seed"] == 1
        del manifest


def test_a_request_beyond_the_receivers_limits_is_refused_and_the_next_goes_through(spec: TransportSpec) -> None:
    spec = replace(spec, limits=replace(spec.limits, max_piece_bytes=100_000, max_request_bytes=150_000))
    with open_receiver(spec, "127.0.0.1") as receiver, open_sender(spec, ("127.0.0.1", receiver.port)) as sender:
        for request_id, sizes in ((1, [200_000]), (2, [90_000, 90_000])):
            send_all(sender, *make_request(request_id, sizes))
            with pytest.raises(TransferFailed) as failure:
                sender.wait(request_id, 10)
            assert failure.value.reason == "refused"
        send_all(sender, *make_request(3, [90_000]))
        with receiver.receive(5) as received:
            assert received.request_id == 3
        assert len(receiver.failures()) == 2
        assert eventually(lambda: receiver.stats()["arena_used_bytes"] == 0)


def test_a_rate_cap_holds_and_can_be_lifted(spec: TransportSpec) -> None:
    spec = replace(spec, limits=replace(spec.limits, segment_timeout_s=20))
    with open_receiver(spec, "127.0.0.1") as receiver, open_sender(spec, ("127.0.0.1", receiver.port)) as sender:
        sender.set_rate_cap(8e6)
        send_all(sender, *make_request(1, [2_000_000]))
        with receiver.receive(10) as received:
            capped_s = received.last_byte_s - received.first_byte_s
        # Two megabytes at one per second; the kernel lets the first bursts through unpaced.
        assert capped_s > 0.5
        sender.set_rate_cap(None)
        send_all(sender, *make_request(2, [10_000_000] * 3), deadline_s=20)  # half a minute at the capped rate
        receiver.receive(20).release()


def test_signals_count_what_tcp_has_carried(spec: TransportSpec) -> None:
    with open_receiver(spec, "127.0.0.1") as receiver, open_sender(spec, ("127.0.0.1", receiver.port)) as sender:
        send_all(sender, *make_request(1, [3_000_000]))
        sender.wait(1, 10)
        carried = 0

        def all_carried() -> bool:
            nonlocal carried
            carried = sum(s.tcp.bytes_acked for s in sender.signals())
            return carried > 3_000_000

        assert eventually(all_carried)
        signals = sender.signals()
        receiver.receive(1).release()
    assert [s.slot for s in signals] == [0, 1, 2, 3]
    assert carried < 3_200_000
    assert all(0 < s.tcp.min_rtt_s <= s.tcp.rtt_s < 1 for s in signals)


def test_a_mistake_of_the_caller_is_said_at_once(spec: TransportSpec) -> None:
    with open_receiver(spec, "127.0.0.1") as receiver, open_sender(spec, ("127.0.0.1", receiver.port)) as sender:
        pieces, manifest = make_request(1, [10, 10])
        with pytest.raises(ValueError, match="has not begun"):
            sender.send(pieces[0])
        sender.begin(1)
        with pytest.raises(ValueError, match="under way"):
            sender.begin(1)
        sender.send(pieces[0])
        with pytest.raises(ValueError, match="sent already"):
            sender.send(pieces[0])
        sender.send(pieces[1])
        sender.finish(manifest)
        with pytest.raises(ValueError, match=r"finished"):
            sender.finish(manifest)


def test_nobody_listening_is_one_clear_error(spec: TransportSpec) -> None:
    with pytest.raises(UserError, match=r"no connection to 127\.0\.0\.1:1 .*refused"):
        open_sender(replace(spec, connect_timeout_s=0.3), ("127.0.0.1", 1))


@pytest.mark.parametrize(
    ("field", "value"),
    [("backend", "rdma"), ("connections", 0), ("segment_bytes", 1), ("deadline_s", 0), ("rate_cap_bps", -1.0)],
)
def test_a_bad_specification_names_its_key(field: str, value: object) -> None:
    with pytest.raises(UserError, match=f"transport.{field}"):
        TransportSpec(**{field: value})  # type: ignore[arg-type]


def test_a_bad_limit_names_its_key() -> None:
    with pytest.raises(UserError, match="window_bytes"):
        ReceiverLimits(window_bytes=0)
