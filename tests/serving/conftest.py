"""What the tests of the live system share: one process to fork workers from, for all of them."""

from collections.abc import Iterator

import pytest
from warm_workers import WarmWorkers


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmWorkers]:
    with WarmWorkers(tmp_path_factory.mktemp("warm")) as warm:
        yield warm
