"""What every test of the transport starts from."""

from collections.abc import Callable, Iterator

import pytest
from transport_rig import Path

from repro.transport import ReceiverLimits, TransportSpec


@pytest.fixture
def path_to() -> Iterator[Callable[[int], Path]]:
    paths: list[Path] = []

    def make(port: int) -> Path:
        paths.append(Path(port))
        return paths[-1]

    yield make
    for path in paths:
        path.close()


@pytest.fixture
def spec() -> TransportSpec:
    """Small segments and short patience, so that a test sees in a moment what a link shows in a minute."""
    return TransportSpec(
        connections=4,
        secret="open sesame",
        segment_bytes=256 << 10,
        turn_bytes=1 << 20,
        heartbeat_s=0.1,
        stall_s=0.5,
        deadline_s=20,
        connect_timeout_s=5,
        limits=ReceiverLimits(
            window_bytes=4 << 20,
            prefault_bytes=1 << 20,
            handshake_timeout_s=0.5,
            segment_timeout_s=2,
            session_timeout_s=5,
        ),
    )
