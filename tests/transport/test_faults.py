import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
from transport_rig import Path, assert_same, eventually, make_request, send_all

from repro.kvcache.frames import Piece
from repro.transport import TransferFailed, TransportSpec, open_receiver, open_sender

MakePath = Callable[[int], Path]


def test_a_connection_reset_again_and_again_loses_and_doubles_nothing(spec: TransportSpec, path_to: MakePath) -> None:
    with open_receiver(spec, "127.0.0.1") as receiver:
        path = path_to(receiver.port)
        with open_sender(spec, ("127.0.0.1", path.port)) as sender:
            over = threading.Event()

            def disturb() -> None:
                while not over.wait(0.05):
                    path.reset(0 if path.connections else None)

            disturber = threading.Thread(target=disturb)
            disturber.start()
            for request_id in range(30):
                pieces, manifest = make_request(request_id, [200_000, 16, 50_000])
                send_all(sender, pieces, manifest)
                with receiver.receive(20) as received:
                    assert received.request_id == request_id
                    assert_same(received, pieces)
                sender.wait(request_id, 20)
            over.set()
            disturber.join()
            assert sender.stats()["lost"] > 0
            assert eventually(lambda: sender.stats()["connections"] == spec.connections)
            assert eventually(lambda: receiver.stats()["arena_used_bytes"] == 0)
            with pytest.raises(TimeoutError):
                receiver.receive(0.1)


@pytest.mark.parametrize("outage_s", [0.2, 1.5])
def test_an_outage_is_survived_and_acknowledged_pieces_are_not_sent_again(
    spec: TransportSpec, path_to: MakePath, outage_s: float
) -> None:
    with open_receiver(spec, "127.0.0.1") as receiver:
        path = path_to(receiver.port)
        with open_sender(spec, ("127.0.0.1", path.port)) as sender:
            pieces, manifest = make_request(1, [1_000_000] * 6)
            sender.begin(1)
            for piece in pieces[:3]:
                sender.send(piece)
            assert eventually(lambda: sender.stats()["acked_pieces"] == 3)
            path.open.clear()
            if outage_s > spec.stall_s:
                path.reset()
            carried_bytes = path.carried
            for piece in pieces[3:]:
                sender.send(piece)
            sender.finish(manifest)
            threading.Timer(outage_s, path.open.set).start()
            with receiver.receive(20) as received:
                assert_same(received, pieces)
            delivery = sender.wait(1, 10)
            # Heads, heartbeats, handshakes and acknowledgements are the rest.
            assert 3_000_000 <= path.carried - carried_bytes <= 3_100_000
            assert all(p.acked_s < q.first_byte_s for p in delivery.pieces[:3] for q in delivery.pieces[3:])


def test_an_outage_beyond_the_deadline_is_a_failure_that_says_how_far_it_got(
    spec: TransportSpec, path_to: MakePath
) -> None:
    with open_receiver(spec, "127.0.0.1") as receiver:
        path = path_to(receiver.port)
        with open_sender(spec, ("127.0.0.1", path.port)) as sender:
            pieces, manifest = make_request(1, [100_000] * 2)
            sender.begin(1, deadline_s=1.0)
            sender.send(pieces[0])
            assert eventually(lambda: sender.stats()["acked_pieces"] == 1)
            path.open.clear()
            path.reset()
            sender.send(pieces[1])
            sender.finish(manifest)
            with pytest.raises(TransferFailed, match="1 of 2 pieces acknowledged") as failure:
                sender.wait(1, 10)
            assert failure.value.reason == "deadline"
            path.open.set()
            # The receiver is told when the link is back, and the next request is served.
            pieces, manifest = make_request(2, [1000])
            send_all(sender, pieces, manifest)
            with receiver.receive(10) as received:
                assert received.request_id == 2
            assert eventually(lambda: receiver.stats()["arena_used_bytes"] == 0)
            assert [f.request_id for f in receiver.failures()] == [1]


def test_a_receiver_that_starts_again_fails_what_it_has_forgotten_and_serves_what_follows(spec: TransportSpec) -> None:
    first = open_receiver(spec, "127.0.0.1")
    port = first.port
    with open_sender(spec, ("127.0.0.1", port)) as sender:
        pieces, _ = make_request(1, [100_000] * 2)
        sender.begin(1)
        sender.send(pieces[0])
        assert eventually(lambda: sender.stats()["acked_pieces"] == 1)
        first.close()
        with open_receiver(spec, "127.0.0.1", port) as second:
            with pytest.raises(TransferFailed) as failure:
                sender.wait(1, 10)
            assert failure.value.reason == "lost"
            pieces, manifest = make_request(2, [100_000] * 2)
            send_all(sender, pieces, manifest)
            with second.receive(10) as received:
                assert_same(received, pieces)


def test_a_sender_that_goes_away_leaves_no_memory_behind(spec: TransportSpec) -> None:
    spec = replace(spec, limits=replace(spec.limits, session_timeout_s=0.5))
    with open_receiver(spec, "127.0.0.1") as receiver:
        sender = open_sender(spec, ("127.0.0.1", receiver.port))
        sender.begin(7)
        sender.send(make_request(7, [300_000])[0][0])
        assert eventually(lambda: receiver.stats()["held_bytes"] == 300_000)
        sender.close()
        assert eventually(lambda: receiver.stats()["arena_used_bytes"] == 0)
        assert eventually(lambda: receiver.stats()["sessions"] == 0)
        assert [(f.request_id, f.reason) for f in receiver.failures()] == [(7, "the sender has gone")]


def test_a_payload_that_changes_on_its_way_is_sent_again_and_then_refused(spec: TransportSpec) -> None:
    with open_receiver(spec, "127.0.0.1") as receiver, open_sender(spec, ("127.0.0.1", receiver.port)) as sender:
        pieces, manifest = make_request(1, [100_000])
        altered = bytearray(pieces[0].payload)
        altered[50_000] ^= 1
        send_all(sender, [Piece(pieces[0].header, memoryview(altered))], manifest)
        with pytest.raises(TransferFailed, match="checksum") as failure:
            sender.wait(1, 10)
        assert failure.value.reason == "refused"
        with pytest.raises(TimeoutError):
            receiver.receive(0.1)
        assert sender.stats()["resent_bytes"] == 200_000


def test_a_manifest_of_other_pieces_is_refused(spec: TransportSpec) -> None:
    with open_receiver(spec, "127.0.0.1") as receiver, open_sender(spec, ("127.0.0.1", receiver.port)) as sender:
        pieces, _ = make_request(1, [1000, 2000])
        _, other = make_request(1, [1000, 2000], seed=1)
        send_all(sender, pieces, other)
        with pytest.raises(TransferFailed, match="digest"):
            sender.wait(1, 10)
        with pytest.raises(TimeoutError):
            receiver.receive(0.1)


def test_closing_either_end_ends_all_its_threads(spec: TransportSpec) -> None:
    before = set(threading.enumerate())
    for _ in range(3):
        receiver = open_receiver(spec, "127.0.0.1")
        sender = open_sender(spec, ("127.0.0.1", receiver.port))
        sender.begin(1)
        receiver.close()
        sender.close()
        with pytest.raises(TransferFailed) as failure:
            sender.begin(2)
        assert failure.value.reason == "closed"
        with pytest.raises(OSError, match="closed"):
            receiver.receive(1)
    assert eventually(lambda: set(threading.enumerate()) == before)
