"""Broken and hostile peers of the backends that write remote memory: refused by name, their memory given back, honest senders served."""

import base64
import contextlib
import gc
import logging
import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import psutil
import pytest
from transport_rig import HonestTraffic, Path, assert_same, eventually, make_request, send_all

from repro.errors import UserError
from repro.kvcache.frames import Manifest, Piece
from repro.transport import Receiver, Sender, TransferFailed, TransportSpec, open_receiver, open_sender
from repro.transport.handshake import Hello, Role, introduce
from repro.transport.remote_memory import missing, read_description
from repro.transport.spec import BACKENDS
from repro.transport.wire import ENVELOPE_BYTES, Envelope, Kind, read_exactly, sealed

MakePath = Callable[[int], Path]
REMOTE = tuple(backend for backend in BACKENDS if backend != "tcp")


@pytest.fixture(params=REMOTE)
def remote(request: pytest.FixtureRequest, spec: TransportSpec) -> Iterator[TransportSpec]:
    """The specification of a backend; it is skipped where it is not installed."""
    if reason := missing(request.param):
        pytest.skip(f"{request.param}: {reason}")
    limits = replace(
        spec.limits, handshake_timeout_s=5, segment_timeout_s=1, session_timeout_s=0.5, max_request_bytes=2 << 20
    )
    yield replace(spec, backend=request.param, connections=2, segment_bytes=256 << 10, stall_s=5, limits=limits)
    gc.collect()  # an engine's threads spin until it is collected, and would slow the tests that follow


@dataclass
class Insider:
    """A peer that knows the secret, speaks for itself and writes nothing."""

    sock: socket.socket

    def say(self, kind: Kind, piece: Piece, *, oldest: int = 0, transfer: int = 0, offset: int = 0) -> None:
        header = piece.header
        length = min(header.payload_bytes - offset, 256 << 10)
        raw_header = header.pack()
        self.sock.sendall(Envelope(kind, transfer, header.piece, offset, length, oldest).head(raw_header))

    def place(self) -> Envelope:
        return Envelope.unpack(read_exactly(self.sock, ENVELOPE_BYTES, time.monotonic() + 5))

    def close_request(self, manifest: Manifest, transfer: int = 0) -> None:
        packed = manifest.pack()
        self.sock.sendall(Envelope(Kind.MANIFEST, transfer, length=len(packed)).head() + sealed(packed))

    def ended(self) -> bool:
        self.sock.settimeout(5)
        try:
            while self.sock.recv(4096):
                pass
        except ConnectionResetError:
            pass
        return True


class Scene(HonestTraffic):
    def insider(self, session: bytes = b"insider-session!", slot: int = 0) -> Insider:
        sock = socket.create_connection(("127.0.0.1", self.receiver.port))
        backend = BACKENDS.index(self.spec.backend)
        hello = Hello(Role.DATA, slot, session, backend=backend)
        introduce(sock, hello, self.spec.secret_bytes(), 5)
        assert "base" in read_description(sock, 5)
        return Insider(sock)


@pytest.fixture
def scene(remote: TransportSpec, caplog: pytest.LogCaptureFixture) -> Iterator[Scene]:
    caplog.set_level(logging.INFO, "repro.transport")
    remote = replace(remote, connections=1)
    with open_receiver(remote, "127.0.0.1") as receiver, open_sender(remote, ("127.0.0.1", receiver.port)) as honest:
        scene = Scene(remote, receiver, honest, caplog, size=300_000)
        yield scene
        assert eventually(lambda: receiver.stats()["arena_used_bytes"] == 0), receiver.stats()
        assert receiver.stats()["held_bytes"] == 0


def test_places_that_are_reserved_and_never_written_are_taken_back(scene: Scene) -> None:
    (piece,), _ = make_request(5, [200_000])
    silent, leaving = scene.insider(b"one that stays.."), scene.insider(b"one that goes...")
    for insider in (silent, leaving):
        insider.say(Kind.RESERVE, piece)
        assert insider.place().length == 1
    assert scene.receiver.stats()["arena_used_bytes"] >= 400_000
    leaving.sock.close()
    scene.still_serves()
    scene.refused_for("silent: 0 of")  # after `segment_timeout_s` without a word
    assert silent.ended()
    assert eventually(lambda: scene.receiver.stats()["arena_used_bytes"] == 0)


def test_a_peer_that_says_written_and_wrote_nothing_is_refused_by_the_checksum(scene: Scene) -> None:
    (piece,), manifest = make_request(5, [200_000])
    insider = scene.insider()
    insider.close_request(manifest)
    for _ in range(3):
        insider.say(Kind.RESERVE, piece)
        assert insider.place().length == 1
        insider.say(Kind.WRITTEN, piece)
        time.sleep(0.1)
    scene.refused_for("refused request 5 (transfer 0): checksum of piece 0")
    with pytest.raises(TimeoutError):
        scene.receiver.receive(0.1)
    insider.sock.close()


def test_words_about_places_that_make_no_sense_end_the_connection(scene: Scene) -> None:
    (piece,), _ = make_request(5, [200_000])
    insider = scene.insider(b"1 session in all")
    insider.say(Kind.WRITTEN, piece)
    assert insider.ended()
    scene.refused_for("written where no place was reserved")

    insider = scene.insider(b"2 session in all")
    insider.say(Kind.RESERVE, piece)
    insider.say(Kind.RESERVE, piece)
    assert insider.ended()
    scene.refused_for("reserves a place twice")

    insider = scene.insider(b"3 session in all")
    insider.say(Kind.PLACE, piece)
    assert insider.ended()
    scene.refused_for("PLACE is not for a receiver")


def test_a_peer_cannot_reserve_more_than_its_window(scene: Scene) -> None:
    limits = scene.spec.limits
    allowed = limits.window_bytes + limits.max_request_bytes
    insider = scene.insider()
    for transfer in range(2 * allowed // (1 << 20)):
        (piece,), _ = make_request(100 + transfer, [1 << 20])
        try:
            insider.say(Kind.RESERVE, piece, transfer=transfer)
        except OSError:
            break
    assert insider.ended()
    assert scene.receiver.stats()["arena_used_bytes"] <= allowed
    scene.refused_for("more bytes than its window allows")


def test_places_are_not_for_senders_over_tcp_nor_the_backends_for_each_other(
    spec: TransportSpec, caplog: pytest.LogCaptureFixture
) -> None:
    with open_receiver(spec, "127.0.0.1") as receiver:
        with pytest.raises(UserError, match="no connection"):
            open_sender_of_another(spec, receiver.port)
        sock = socket.create_connection(("127.0.0.1", receiver.port))
        introduce(sock, Hello(Role.DATA, 0, bytes(16)), spec.secret_bytes(), 5)
        insider = Insider(sock)
        insider.say(Kind.RESERVE, make_request(5, [1000])[0][0])
        assert insider.ended()
    assert "sends by another backend than tcp" in caplog.text
    assert "RESERVE is not for a receiver" in caplog.text


def open_sender_of_another(spec: TransportSpec, port: int) -> Sender:
    return open_sender(replace(spec, backend="nixl", connect_timeout_s=0.5), ("127.0.0.1", port))


@dataclass
class Lying:
    """A target that describes itself as `lie` makes of the truth."""

    target: Any
    lie: Callable[[dict[str, Any]], Any]

    def describe(self) -> Any:
        return self.lie(self.target.describe())

    def close(self) -> None:
        self.target.close()


LIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "nothing": lambda true: {},
    "other types": lambda true: {name: ["x"] for name in true},
    "no address": lambda true: {**true, "base": -1},
    "memory of nobody": lambda true: {**true, "base": true["base"] + (1 << 40)},
    "nobody there": lambda true: {**true, "segment": "127.0.0.1:1", "agent": "!!!"},
    "noise": lambda true: {**true, "segment": "\0%n" * 50, "agent": base64.b64encode(os.urandom(300)).decode()},
    "too long": lambda true: {**true, "more": "x" * (1 << 20)},
}


@pytest.mark.slow
def test_a_receiver_that_describes_its_memory_wrongly_fails_the_request_and_not_the_sender(
    remote: TransportSpec, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "repro.transport")
    remote = replace(remote, connections=1)
    with open_receiver(remote, "127.0.0.1") as receiver:
        true: Any = receiver._target
        lying = Lying(true, lambda description: description)
        receiver._target = lying
        with open_sender(remote, ("127.0.0.1", receiver.port)) as sender:
            threads = {thread.name for thread in threading.enumerate() if thread.name.startswith("send-")}
            for number, (name, lie) in enumerate(LIES.items()):
                lying.lie = lie
                drop_connections(receiver)
                send_all(sender, *make_request(number, [20_000]), deadline_s=0.5)
                with pytest.raises(TransferFailed) as failure:
                    sender.wait(number, 20)
                assert failure.value.reason == "deadline", name
                assert threads == {t.name for t in threading.enumerate() if t.name.startswith("send-")}, name
            lying.lie = lambda description: description
            drop_connections(receiver)
            pieces, manifest = make_request(1000, [300_000])
            send_all(sender, pieces, manifest)
            with receiver.receive(20) as received:
                assert_same(received, pieces)


def drop_connections(receiver: Receiver) -> None:
    """The sender dials anew, and is given a description again."""
    with receiver._lock:
        for sock in receiver._sockets:
            with contextlib.suppress(OSError):  # one that is gone already
                sock.shutdown(socket.SHUT_RDWR)


@pytest.mark.slow
def test_connections_reset_in_the_middle_go_on_where_they_were(remote: TransportSpec, path_to: MakePath) -> None:
    with open_receiver(remote, "127.0.0.1") as receiver:
        path = path_to(receiver.port)
        with open_sender(remote, ("127.0.0.1", path.port)) as sender:
            for request_id in range(2):
                pieces, manifest = make_request(request_id, [1_000_000, 16, 300_000])
                sender.begin(request_id)
                for piece in pieces:
                    sender.send(piece)
                path.reset()
                sender.finish(manifest)
                with receiver.receive(20) as received:
                    assert_same(received, pieces)
                sender.wait(request_id, 20)
            assert sender.stats()["lost"] >= 2
            assert eventually(lambda: receiver.stats()["arena_used_bytes"] == 0)
            with pytest.raises(TimeoutError):
                receiver.receive(0.1)


def test_a_batch_of_unregistered_payloads_on_a_fast_link_loses_no_connection(remote: TransportSpec) -> None:
    with (
        open_receiver(remote, "127.0.0.1") as receiver,
        open_sender(remote, ("127.0.0.1", receiver.port)) as sender,
    ):
        for request_id in range(6):
            pieces, manifest = make_request(request_id, [1_900_000])
            send_all(sender, pieces, manifest)
            with receiver.receive(20) as received:
                assert_same(received, pieces)
            sender.wait(request_id, 20)
        assert sender.stats()["lost"] == 0


@pytest.mark.slow
def test_transfers_that_are_cancelled_leave_no_memory_and_alter_nobody_elses(remote: TransportSpec) -> None:
    with (
        open_receiver(remote, "127.0.0.1") as receiver,
        open_sender(remote, ("127.0.0.1", receiver.port)) as sender,
    ):
        for number in range(6):
            given_up, kept = 2 * number, 2 * number + 1
            sender.begin(given_up)
            sender.send(make_request(given_up, [1_500_000])[0][0])
            time.sleep(0.004 * (number % 3))
            sender.cancel(given_up)
            pieces, manifest = make_request(kept, [700_000, 300_000])
            send_all(sender, pieces, manifest)
            with receiver.receive(20) as received:
                time.sleep(0.02)  # whatever is still on its way would land now
                assert_same(received, pieces)
            sender.wait(kept, 20)
            with pytest.raises(TransferFailed) as failure:
                sender.wait(given_up, 20)
            assert failure.value.reason == "cancelled"
        assert eventually(lambda: receiver.stats()["arena_used_bytes"] == 0)


@pytest.mark.slow
def test_a_receiver_that_is_killed_fails_the_request_in_time_and_its_successor_is_served(remote: TransportSpec) -> None:
    spec = replace(remote, limits=replace(remote.limits, max_request_bytes=64 << 20))
    first = open_receiver(spec, "127.0.0.1", own_process=True)
    port = first.port
    with open_sender(spec, ("127.0.0.1", port)) as sender:
        pieces, _ = make_request(1, [500_000] * 10)
        sender.begin(1, deadline_s=2)
        for piece in pieces[:5]:
            sender.send(piece)
        (child,) = [p for p in psutil.Process().children() if "repro.transport.process" in " ".join(p.cmdline())]
        child.kill()
        for piece in pieces[5:]:
            sender.send(piece)
        with pytest.raises(TransferFailed) as failure:
            sender.wait(1, 10)
        assert failure.value.reason in ("deadline", "lost")
        first.close()
        with open_receiver(spec, "127.0.0.1", port) as second:
            pieces, manifest = make_request(2, [500_000] * 2)
            send_all(sender, pieces, manifest)
            with second.receive(20) as received:
                assert_same(received, pieces)


@pytest.mark.slow
def test_a_process_that_has_used_a_backend_ends_with_status_0(remote: TransportSpec) -> None:
    program = f"""
        from repro.transport import TransportSpec, open_receiver, open_sender
        spec = TransportSpec(backend={remote.backend!r}, connections=1, secret="x")
        with open_receiver(spec, "127.0.0.1") as receiver, open_sender(spec, ("127.0.0.1", receiver.port)):
            pass
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
