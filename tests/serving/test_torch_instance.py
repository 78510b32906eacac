"""What an instance that computes does at once, though prefills wait for their turn: connections, and what it says of the link."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any, cast

import pytest

from repro.engine.torch_engine import EngineSpec
from repro.models import spec as models
from repro.serving.torch_instance import TorchInstance, TorchInstanceConfig
from repro.transport import Receiver, TransportSpec

TRANSPORT = TransportSpec(connections=1, connect_timeout_s=5.0)


class Ear:
    """Stands for the parent: keeps what the instance says."""

    def __init__(self) -> None:
        self.said = list[dict[str, Any]]()
        self.changed = threading.Condition()

    def send_text(self, text: bytes | str) -> None:
        with self.changed:
            self.said.append(json.loads(text))
            self.changed.notify_all()

    def hears(self, kind: str) -> dict[str, Any]:
        with self.changed:
            assert self.changed.wait_for(lambda: any(one["kind"] == kind for one in self.said), 10), self.said
            return next(one for one in self.said if one["kind"] == kind)


@pytest.fixture
def receivers() -> Iterator[list[Receiver]]:
    found = [Receiver(TRANSPORT, "127.0.0.1") for _ in range(2)]
    yield found
    for one in found:
        one.close()


def test_whoever_comes_is_connected_and_the_link_is_told_of_before_anything_is_computed(
    receivers: list[Receiver],
) -> None:
    ear, engine = Ear(), EngineSpec(models.load("qwen3_235b", "tiny"), chunk_tokens=16)
    config = TorchInstanceConfig("prfaas0.0", engine, TRANSPORT, None, 100, 4, 1)
    # Its thread that computes never begins, as if a prefill took for ever.
    instance = TorchInstance(config, cast(Any, ear), None)
    instance.hear({"kind": "prefill", "request": 1, "attempt": 0, "input_tokens": 40, "cached_tokens": 0, "output_tokens": 2,
                   "kv_bytes": 0.0, "to": "pd0.0", "prompt": None})  # fmt: skip
    instance.hear({"kind": "connect", "name": "pd0.0", "host": "127.0.0.1", "port": receivers[0].port})
    assert ear.hears("connected")["name"] == "pd0.0"
    instance.hear({"kind": "report"})
    ear.hears("sending")

    ear.said.clear()
    instance.hear({"kind": "connect", "name": "pd0.0", "host": "127.0.0.1", "port": receivers[1].port})
    ear.hears("connected")
    until_s = time.monotonic() + 10
    while receivers[0].stats()["connections"] and time.monotonic() < until_s:
        time.sleep(0.02)
    assert not receivers[0].stats()["connections"], "the sender to its predecessor is closed"
