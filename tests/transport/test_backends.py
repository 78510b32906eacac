"""Every backend behind the same interface, by the same test; one that is not installed says so and is skipped."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from transport_rig import assert_same, eventually, make_request, send_all

from repro.configuration import build
from repro.transport import TransferFailed, TransportSpec, open_receiver, open_sender
from repro.transport.remote_memory import missing
from repro.transport.spec import BACKENDS


@pytest.fixture(params=BACKENDS)
def backend_spec(request: pytest.FixtureRequest, spec: TransportSpec) -> TransportSpec:
    if request.param != "tcp" and (reason := missing(request.param)):
        pytest.skip(f"{request.param}: {reason}")
    limits = replace(spec.limits, handshake_timeout_s=5)
    return replace(spec, backend=request.param, connections=2, segment_bytes=256 << 10, stall_s=5, limits=limits)


def test_a_backend_delivers_what_was_sent_and_gives_its_memory_back(backend_spec: TransportSpec) -> None:
    with (
        open_receiver(backend_spec, "127.0.0.1") as receiver,
        open_sender(backend_spec, ("127.0.0.1", receiver.port)) as sender,
    ):
        for request_id in range(4):
            pieces, manifest = make_request(request_id, [0, 1, 300_000, 1_000_000])
            send_all(sender, pieces, manifest)
            with receiver.receive(20) as received:
                assert_same(received, pieces)
            sender.wait(request_id, 20)
        pieces, _ = make_request(9, [1000])
        sender.begin(9)
        sender.send(pieces[0])
        sender.cancel(9)
        with pytest.raises(TransferFailed):
            sender.wait(9)
        assert eventually(lambda: receiver.stats()["arena_used_bytes"] == 0)


def test_a_backend_refuses_an_altered_piece(backend_spec: TransportSpec) -> None:
    with (
        open_receiver(backend_spec, "127.0.0.1") as receiver,
        open_sender(backend_spec, ("127.0.0.1", receiver.port)) as sender,
    ):
        pieces, manifest = make_request(1, [1000])
        send_all(sender, [replace(pieces[0], payload=memoryview(bytes(1000)))], manifest)
        with pytest.raises(TransferFailed, match="checksum"):
            sender.wait(1, 20)


@pytest.mark.parametrize("path", sorted(Path("conf/transport").glob("*.yaml")), ids=lambda path: path.stem)
def test_each_configuration_file_is_a_valid_specification(path: Path) -> None:
    assert build(TransportSpec, yaml.safe_load(path.read_text()), "transport").backend in BACKENDS
