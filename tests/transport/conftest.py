"""What every test of the transport starts from."""

from collections.abc import Callable, Iterator

import pytest
from transport_rig import Path, small_spec

from repro.transport import TransportSpec


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
    return small_spec()
