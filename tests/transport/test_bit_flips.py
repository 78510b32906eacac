"""Bits that flip between the ends, past TCP's own checksum: nothing altered is delivered, and every session goes on.

The ten thousand flips of the long run, five thousand of them under TLS, take minutes:

    python tests/transport/test_bit_flips.py 5000
"""

from __future__ import annotations

import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from flipping_path import StretchingPath, Tally, survive
from transport_rig import assert_same, eventually, make_request, send_all, small_spec

from repro.transport import TransportSpec, open_receiver, open_sender
from repro.transport.certificates import make_certificates
from repro.transport.wire import ENVELOPE_BYTES, HEAD_BYTES, Envelope, Kind, PeerError, read_sealed, sealed

#: Mean bytes between two flips, towards the receiver and back. A TLS handshake has some 4 KB and must get through.
PLAIN, TLS = (8_000, 800), (20_000, 20_000)


def every_bit_matters(good: bytes, read: Callable[[bytes], object]) -> None:
    read(good)
    for bit in range(8 * len(good)):
        altered = bytearray(good)
        altered[bit // 8] ^= 1 << bit % 8
        with pytest.raises(PeerError):
            read(bytes(altered))


def test_no_flipped_bit_of_an_answer_or_a_head_is_believed() -> None:
    answer = Envelope(Kind.ACK, transfer=7, piece=3, oldest=2)
    assert Envelope.unpack(answer.pack()) == answer
    assert len(answer.pack()) == ENVELOPE_BYTES
    every_bit_matters(answer.pack(), Envelope.unpack)
    head = Envelope(Kind.SEGMENT, 7, 3, 1 << 20, 1 << 18, 5).head(bytes(range(HEAD_BYTES - ENVELOPE_BYTES)))
    assert len(head) == HEAD_BYTES
    every_bit_matters(head, Envelope.unpack)


def test_no_flipped_bit_of_a_text_is_believed() -> None:
    def read(words: bytes) -> bytes:
        near, far = socket.socketpair()
        with near, far:
            far.sendall(words)
            return read_sealed(near, len(words) - 8, time.monotonic() + 1)

    assert read(sealed(b"a reason")) == b"a reason"
    every_bit_matters(sealed(b"a reason"), read)


@pytest.fixture
def patient(spec: TransportSpec) -> TransportSpec:
    return replace(spec, deadline_s=5)


@pytest.fixture
def tls(patient: TransportSpec, tmp_path: Path) -> TransportSpec:
    make_certificates(tmp_path / "tls")
    return replace(patient, tls=str(tmp_path / "tls"))


def within_bounds(tally: Tally, spec: TransportSpec) -> None:
    assert tally.delivered > sum(tally.failed.values())
    assert set(tally.failed) <= {"refused", "deadline", "lost"}
    assert not [line for line in tally.lines if "\n" in line]
    assert tally.lost_connections > 0
    assert tally.most_arena_bytes <= spec.limits.window_bytes
    assert tally.most_threads < 50
    assert tally.grown_bytes < 64 << 20
    print(tally)


def test_a_plain_session_survives_flipped_bits(patient: TransportSpec) -> None:
    within_bounds(survive(patient, 300, *PLAIN, seed=1), patient)


def test_an_encrypted_session_survives_flipped_bits(tls: TransportSpec) -> None:
    within_bounds(survive(tls, 60, *TLS, seed=2), tls)


@pytest.mark.parametrize("forward", [True, False], ids=["towards the receiver", "back"])
def test_a_tls_record_that_announces_too_much_is_not_waited_for(tls: TransportSpec, forward: bool) -> None:
    """Heartbeats would fill it in the end: 12 KiB of them take more than five seconds here, and a minute as configured."""
    with open_receiver(tls, "127.0.0.1") as receiver:
        path = StretchingPath(receiver.port, forward=forward)
        with open_sender(replace(tls, connections=1), ("127.0.0.1", path.port)) as sender:
            path.armed.set()
            assert eventually(lambda: not path.armed.is_set())
            began_s = time.monotonic()
            pieces, manifest = make_request(1, [1000])
            send_all(sender, pieces, manifest)
            sender.wait(1, 10)
            assert time.monotonic() - began_s < 4
            with receiver.receive(1) as received:
                assert_same(received, pieces)
        path.close()


@pytest.mark.slow
def test_a_thousand_flipped_bits_alter_nothing_in_a_plain_session(patient: TransportSpec) -> None:
    within_bounds(survive(patient, 1_000, *PLAIN, seed=3), patient)


@pytest.mark.slow
def test_five_hundred_flipped_bits_alter_nothing_in_an_encrypted_session(tls: TransportSpec) -> None:
    within_bounds(survive(tls, 500, *TLS, seed=4), tls)


def long_run(flips: int) -> None:
    """As many flips in a plain session, and in an encrypted one."""
    plain = replace(small_spec(), deadline_s=5)
    within_bounds(survive(plain, flips, *PLAIN, seed=3), plain)
    with tempfile.TemporaryDirectory() as folder:
        make_certificates(Path(folder))
        encrypted = replace(plain, tls=folder)
        within_bounds(survive(encrypted, flips, *TLS, seed=4), encrypted)


if __name__ == "__main__":
    long_run(int(sys.argv[1]))
