import socket
from collections.abc import Iterator

import pytest

from repro.transport.wire import HEAD_BYTES, LOCAL_BUFFER_BYTES, hold_buffer

OPTIONS = (socket.SO_SNDBUF, socket.SO_RCVBUF)


@pytest.fixture
def local() -> Iterator[socket.socket]:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as near,
        listener.accept()[0],
    ):
        yield near


@pytest.mark.parametrize("option", OPTIONS)
def test_several_connections_within_a_machine_keep_their_buffers_small(local: socket.socket, option: int) -> None:
    assert hold_buffer(local, option, 4)
    assert local.getsockopt(socket.SOL_SOCKET, option) == 2 * LOCAL_BUFFER_BYTES


@pytest.mark.parametrize("option", OPTIONS)
def test_a_connection_alone_keeps_the_kernels_buffers(local: socket.socket, option: int) -> None:
    before = local.getsockopt(socket.SOL_SOCKET, option)
    assert not hold_buffer(local, option, 1)
    assert local.getsockopt(socket.SOL_SOCKET, option) == before


@pytest.mark.parametrize("option", OPTIONS)
def test_a_path_between_addresses_keeps_the_kernels_buffers(option: int) -> None:
    with (
        socket.create_server(("127.0.0.2", 0)) as listener,
        socket.create_connection(listener.getsockname(), source_address=("127.0.0.1", 0)) as far,
    ):
        before = far.getsockopt(socket.SOL_SOCKET, option)
        assert not hold_buffer(far, option, 4)
        assert far.getsockopt(socket.SOL_SOCKET, option) == before


def test_a_head_keeps_the_payload_behind_it_aligned() -> None:
    assert HEAD_BYTES % 32 == 0
