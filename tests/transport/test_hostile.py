"""Peers that break the rules: each is refused with a line in the log, while an honest sender goes on."""

import contextlib
import logging
import random
import socket
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path as FilePath

import pytest
from transport_rig import HonestTraffic, assert_same, eventually, make_request, send_all

from repro.errors import UserError
from repro.transport import ReceiverAwayError, TransportSpec, open_receiver, open_sender
from repro.transport.certificates import make_certificates
from repro.transport.handshake import Hello, Role, introduce
from repro.transport.wire import HEAD_BYTES, Envelope, Kind, PeerError, sealed


class Scene(HonestTraffic):
    def stranger(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.receiver.port))

    def insider(self, session: bytes = b"insider-session!", slot: int = 0) -> socket.socket:
        """A peer that knows the secret and goes wrong afterwards."""
        sock = self.stranger()
        introduce(sock, Hello(Role.DATA, slot, session), self.spec.secret_bytes(), 5)
        return sock

    def ended(self, sock: socket.socket) -> bool:
        sock.settimeout(5)
        try:
            return sock.recv(1) == b""
        except ConnectionResetError:
            return True


@pytest.fixture
def scene(spec: TransportSpec, caplog: pytest.LogCaptureFixture) -> Iterator[Scene]:
    caplog.set_level(logging.INFO, "repro.transport")
    with open_receiver(spec, "127.0.0.1") as receiver, open_sender(spec, ("127.0.0.1", receiver.port)) as honest:
        yield Scene(spec, receiver, honest, caplog)
        assert eventually(lambda: receiver.stats()["held_bytes"] == 0)


def segment(payload: bytes, header: bytes, **fields: int) -> bytes:
    values = {"length": len(payload), **fields}
    return Envelope(Kind.SEGMENT, **values).head(header) + payload


def test_a_wrong_secret_is_refused(scene: Scene) -> None:
    with pytest.raises(UserError, match="refused the secret"):
        open_sender(replace(scene.spec, secret="guess", connect_timeout_s=0.3), ("127.0.0.1", scene.receiver.port))
    scene.refused_for("wrong secret")


def test_a_receiver_without_the_secret_is_refused_by_the_sender(spec: TransportSpec) -> None:
    near, far = socket.socketpair()
    with near, far:
        far.sendall(bytes(33) + bytes(57))  # any challenge, any welcome
        with pytest.raises(PeerError, match="does not know the shared secret"):
            introduce(near, Hello(Role.DATA, 0, bytes(16)), b"open sesame", 1)


def test_a_recorded_handshake_cannot_be_played_again(scene: Scene) -> None:
    class Recorder:
        def __init__(self, sock: socket.socket) -> None:
            self.sock, self.said = sock, b""

        def sendall(self, data: bytes) -> None:
            self.said += data
            self.sock.sendall(data)

        def recv_into(self, *args: object) -> int:
            return self.sock.recv_into(*args)  # type: ignore[arg-type]

    with scene.stranger() as sock:
        recorder = Recorder(sock)
        introduce(recorder, Hello(Role.DATA, 0, bytes(16)), scene.spec.secret_bytes(), 5)  # type: ignore[arg-type]
    with scene.stranger() as sock:
        sock.sendall(recorder.said)
        scene.refused_for("wrong secret")


def test_garbage_is_refused(scene: Scene) -> None:
    with scene.stranger() as sock:
        sock.sendall(random.Random(1).randbytes(4096))
        assert scene.ended(sock)
    scene.refused_for("garbage instead of a handshake")


def test_garbage_after_the_handshake_is_refused(scene: Scene) -> None:
    with scene.insider() as sock:
        sock.sendall(random.Random(1).randbytes(4096))
        assert scene.ended(sock)
    scene.refused_for("garbage where an envelope should begin")


@pytest.mark.parametrize("first", [b"", b"P"])
def test_a_slow_loris_is_dropped(scene: Scene, first: bytes) -> None:
    with scene.stranger() as sock:
        for _ in range(100):
            try:
                sock.sendall(first)
            except OSError:
                break
            time.sleep(0.03)
        assert scene.ended(sock)
    scene.refused_for("came in time")


def test_a_crowd_of_silent_strangers_does_not_keep_honest_peers_out(scene: Scene) -> None:
    crowd = [scene.stranger() for _ in range(100)]
    scene.refused_for("handshake already")
    for sock in crowd:
        sock.close()
    assert eventually(lambda: scene.receiver.stats()["threads"] <= 2 + scene.spec.connections + 1)


@pytest.mark.parametrize("encrypted", [False, True])
def test_a_sender_that_finds_the_receiver_busy_says_so(
    spec: TransportSpec, tmp_path: FilePath, encrypted: bool
) -> None:
    if encrypted:
        make_certificates(tmp_path / "tls")
        spec = replace(spec, tls=str(tmp_path / "tls"))
    spec = replace(spec, connect_timeout_s=0.5, limits=replace(spec.limits, handshake_timeout_s=5))
    with open_receiver(spec, "127.0.0.1") as receiver:
        crowd = [socket.create_connection(("127.0.0.1", receiver.port)) for _ in range(64)]
        assert eventually(lambda: receiver.stats()["threads"] >= 64)
        with pytest.raises(ReceiverAwayError, match=r"the receiver is busy: .* in their handshake"):
            open_sender(spec, ("127.0.0.1", receiver.port))
        for sock in crowd:
            sock.close()


def test_a_sender_too_many_says_that_the_receiver_has_as_many_as_it_takes(spec: TransportSpec) -> None:
    spec = replace(spec, connect_timeout_s=0.5, limits=replace(spec.limits, max_sessions=1))
    with (
        open_receiver(spec, "127.0.0.1") as receiver,
        open_sender(spec, ("127.0.0.1", receiver.port)),
        pytest.raises(UserError, match="as many senders as it takes are there"),
    ):
        open_sender(spec, ("127.0.0.1", receiver.port))


def test_a_receiver_that_refuses_is_there_all_the_same(spec: TransportSpec) -> None:
    other = replace(spec, secret="something else", connect_timeout_s=0.5)
    with (
        open_receiver(spec, "127.0.0.1") as receiver,
        pytest.raises(UserError, match="no connection to") as refused,
    ):
        open_sender(other, ("127.0.0.1", receiver.port))
    assert not isinstance(refused.value, ReceiverAwayError)


def test_a_sender_that_is_away_makes_room_for_one_that_comes_but_not_at_once(spec: TransportSpec) -> None:
    spec = replace(spec, connect_timeout_s=0.2, limits=replace(spec.limits, max_sessions=2))
    with open_receiver(spec, "127.0.0.1") as receiver:
        address = ("127.0.0.1", receiver.port)
        with open_sender(spec, address) as here:
            pieces, _ = make_request(4, [1000, 1000])
            with open_sender(spec, address) as away:
                away.begin(4)
                away.send(pieces[0])
                assert eventually(lambda: receiver.stats()["held_bytes"] == 1000)
            assert eventually(lambda: receiver.stats()["connections"] == spec.connections + 1)
            with pytest.raises(ReceiverAwayError, match="as many senders as it takes are there"):
                open_sender(spec, address)
            with open_sender(replace(spec, connect_timeout_s=3 * spec.silence_s), address) as newcomer:
                assert receiver.stats()["sessions"] == 2
                assert receiver.stats()["held_bytes"] == 0, "and with the sender goes what it has begun"
                for sender in (here, newcomer):
                    pieces, manifest = make_request(5, [1000])
                    sender.begin(5)
                    sender.send(pieces[0])
                    sender.finish(manifest)
                    with receiver.receive(5) as received:
                        assert_same(received, pieces)


@pytest.mark.parametrize("kind", [Kind.DELIVERED, Kind.RELEASED, Kind.SEGMENT])
def test_an_answer_that_the_receiver_cannot_mean_ends_its_connection_and_no_request(scene: Scene, kind: Kind) -> None:
    (first, second), manifest = make_request(7, [1000, 1000])
    scene.honest.begin(7)
    scene.honest.send(first)
    with pytest.raises(PeerError, match=r"still on its way|not for a sender"):
        scene.honest.heard(Envelope(kind, transfer=0), "")
    scene.honest.send(second)
    scene.honest.finish(manifest)
    with scene.receiver.receive(5) as received:
        assert_same(received, [first, second])
    scene.honest.wait(7, 5)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**31])
def test_an_absurd_length_is_refused_before_anything_is_allocated(scene: Scene, length: int) -> None:
    used = scene.receiver.arena.used_bytes
    header = bytearray(make_request(1, [1000])[0][0].header.pack())
    header[-8 - 16 - 8 : -8 - 16] = struct.pack("<Q", length)  # the header's own checksum does not match any more
    with scene.insider() as sock:
        sock.sendall(segment(b"x" * 1000, bytes(header)))
        scene.refused_for("refused request")
    with scene.insider(slot=1) as sock:
        sock.sendall(Envelope(Kind.SEGMENT, 1, length=2**32 - 1).head())
        assert scene.ended(sock)
        scene.refused_for("a segment of 4294967295 bytes")
    with scene.insider(slot=2) as sock:
        sock.sendall(Envelope(Kind.MANIFEST, 2, length=2**32 - 1).head())
        assert scene.ended(sock)
        scene.refused_for("a manifest of 4294967295 bytes")
    assert scene.receiver.arena.used_bytes == used


def test_half_a_manifest_is_refused(scene: Scene) -> None:
    pieces, manifest = make_request(5, [100])
    packed = manifest.pack()
    with scene.insider() as sock:
        sock.sendall(segment(bytes(pieces[0].payload), pieces[0].header.pack()))
        sock.sendall(Envelope(Kind.MANIFEST, length=len(packed)).head() + sealed(packed)[: len(packed) // 2])
        sock.shutdown(socket.SHUT_WR)
        scene.refused_for("closed in the middle of a message")
    with scene.insider() as sock:
        half = packed[: len(packed) // 2]
        sock.sendall(Envelope(Kind.MANIFEST, length=len(half)).head() + sealed(half))
        scene.refused_for("refused request 5")


def test_a_replayed_piece_changes_nothing(scene: Scene) -> None:
    pieces, manifest = make_request(5, [100])
    packed = manifest.pack()
    once = segment(bytes(pieces[0].payload), pieces[0].header.pack())
    whole = once + Envelope(Kind.MANIFEST, length=len(packed)).head() + sealed(packed)
    with scene.insider() as sock:
        sock.sendall(once + whole)
        with scene.receiver.receive(5) as received:
            assert_same(received, pieces)
        sock.sendall(whole + Envelope(Kind.HEARTBEAT, oldest=1).head() + whole)
        scene.refused_for("late or replayed")
    assert "repeated segment" in scene.log.text


def test_messages_that_only_a_receiver_may_send_are_refused(scene: Scene) -> None:
    with scene.insider() as sock:
        sock.sendall(Envelope(Kind.ACK).head())
        assert scene.ended(sock)
    scene.refused_for("ACK is not for a receiver")


def test_more_sessions_and_connections_than_allowed_are_refused(scene: Scene) -> None:
    limits = scene.spec.limits
    sessions = [scene.insider(session=n.to_bytes(16, "big")) for n in range(limits.max_sessions - 1)]
    with pytest.raises(PeerError):
        scene.insider(session=b"one session more")
    scene.refused_for("senders are here already")
    sessions += [scene.insider(session=bytes(16), slot=slot) for slot in range(1, limits.max_connections + 1)]
    with pytest.raises(PeerError):
        scene.insider(session=bytes(16), slot=limits.max_connections + 1)
    scene.refused_for(f"more than {limits.max_connections} connections")
    for sock in sessions:
        sock.close()


def test_more_requests_at_once_than_allowed_are_refused(scene: Scene) -> None:
    size = scene.spec.segment_bytes
    header = make_request(1, [2 * size])[0][0].header.pack()
    with scene.insider() as sock, contextlib.suppress(OSError):
        for number in range(scene.spec.limits.max_requests + 1):
            sock.sendall(segment(bytes(size), header, transfer=number))
        assert scene.ended(sock)
    scene.refused_for("requests at once")


def test_a_segment_that_does_not_fit_its_piece_is_refused(scene: Scene) -> None:
    header = make_request(1, [1000])[0][0].header.pack()
    with scene.insider() as sock:
        sock.sendall(segment(b"x" * 999, header))
        sock.sendall(segment(b"x" * 1000, header, transfer=1, offset=scene.spec.segment_bytes))
        sock.sendall(segment(b"x" * 1000, header, transfer=2, offset=3))
        assert eventually(lambda: scene.log.text.count("does not fit piece") == 3)
    scene.refused_for("refused request 1")
    assert eventually(lambda: scene.receiver.stats()["arena_used_bytes"] == 0)


def test_expired_or_foreign_certificates_are_refused(
    spec: TransportSpec, tmp_path: FilePath, caplog: pytest.LogCaptureFixture
) -> None:
    make_certificates(tmp_path / "good")
    make_certificates(tmp_path / "foreign")
    make_certificates(tmp_path / "expired", valid_from=datetime.now(UTC) - timedelta(days=3), days=1)
    # Expired, though signed by the authority that the receiver trusts.
    good = replace(spec, tls=str(tmp_path / "good"))
    old = replace(spec, tls=str(tmp_path / "expired"), connect_timeout_s=0.5)
    with open_receiver(good, "127.0.0.1") as receiver, open_sender(good, ("127.0.0.1", receiver.port)) as honest:
        for folder in ("foreign", "expired"):
            with pytest.raises(UserError, match=r"TLS|refused|closed"):
                open_sender(
                    replace(good, tls=str(tmp_path / folder), connect_timeout_s=0.5), ("127.0.0.1", receiver.port)
                )
        with pytest.raises(UserError):
            open_sender(replace(good, tls=None, connect_timeout_s=0.5), ("127.0.0.1", receiver.port))
        send_all(honest, *make_request(1, [1000]))
        with receiver.receive(5) as received:
            assert received.request_id == 1
    assert "TLS handshake failed" in caplog.text
    with open_receiver(old, "127.0.0.1") as receiver, pytest.raises(UserError, match="expired"):
        open_sender(old, ("127.0.0.1", receiver.port))


def test_a_sender_does_not_accept_another_senders_certificate_as_a_receivers(
    spec: TransportSpec, tmp_path: FilePath
) -> None:
    make_certificates(tmp_path)
    for suffix in ("pem", "key"):
        (tmp_path / f"receiver.{suffix}").write_bytes((tmp_path / f"sender.{suffix}").read_bytes())
    spec = replace(spec, tls=str(tmp_path), connect_timeout_s=0.5)
    with open_receiver(spec, "127.0.0.1") as receiver, pytest.raises(UserError, match="TLS handshake failed"):
        open_sender(spec, ("127.0.0.1", receiver.port))


Mutation = Callable[[random.Random, bytearray], None]


def flip(rng: random.Random, stream: bytearray) -> None:
    for _ in range(rng.randint(1, 8)):
        stream[rng.randrange(len(stream))] ^= 1 << rng.randrange(8)


def cut(rng: random.Random, stream: bytearray) -> None:
    del stream[rng.randrange(len(stream)) :]


def splice(rng: random.Random, stream: bytearray) -> None:
    at = rng.randrange(len(stream))
    stream[at:at] = rng.randbytes(rng.randint(1, 200))


def drop(rng: random.Random, stream: bytearray) -> None:
    at = rng.randrange(len(stream))
    del stream[at : at + rng.randint(1, 200)]


def overwrite_number(rng: random.Random, stream: bytearray) -> None:
    at = rng.randrange(HEAD_BYTES)
    stream[at : at + 8] = struct.pack("<Q", rng.choice([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]))


@pytest.mark.slow
def test_two_thousand_mutated_streams_neither_crash_nor_hang_nor_pass_as_good(spec: TransportSpec) -> None:
    rng = random.Random(6)
    limits = replace(spec.limits, session_timeout_s=0.1, max_sessions=4000)
    spec = replace(spec, limits=limits)
    pieces, manifest = make_request(9_999, [300, 20_000], seed=1)
    packed = manifest.pack()
    good = b""
    for piece in pieces:
        for offset in range(0, piece.payload.nbytes, spec.segment_bytes):
            part = bytes(piece.payload[offset : offset + spec.segment_bytes])
            good += segment(part, piece.header.pack(), piece=piece.header.piece, offset=offset)
    good += Envelope(Kind.MANIFEST, length=len(packed)).head() + sealed(packed)
    mutations: list[Mutation] = [flip, cut, splice, drop, overwrite_number]
    with open_receiver(spec, "127.0.0.1") as receiver, open_sender(spec, ("127.0.0.1", receiver.port)) as honest:
        for _ in range(2000):
            stream = bytearray(good)
            rng.choice(mutations)(rng, stream)
            with socket.create_connection(("127.0.0.1", receiver.port)) as sock, contextlib.suppress(OSError):
                sock.settimeout(5)
                hello = Hello(Role.DATA, 0, rng.randbytes(16))
                introduce(sock, hello, spec.secret_bytes(), 5)
                sock.sendall(stream)
                sock.shutdown(socket.SHUT_WR)
                sock.recv(1)  # until the receiver has had enough
        passed = 0
        with contextlib.suppress(TimeoutError):
            while True:
                with receiver.receive(0.3) as received:
                    assert_same(received, pieces)  # the mutation hit nothing that means anything
                    passed += 1
        assert passed < 200
        send_all(honest, *make_request(1, [50_000]))
        with receiver.receive(10) as received:
            assert received.request_id == 1
        assert eventually(lambda: receiver.stats()["arena_used_bytes"] == 0)
        assert eventually(lambda: receiver.stats()["sessions"] == 1)
        assert receiver.stats()["refused_peers"] > 500
