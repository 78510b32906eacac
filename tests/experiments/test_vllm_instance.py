"""The adapter between the live router's messages and a vLLM server, two of them without a router, against an engine that speaks as vLLM."""

from __future__ import annotations

import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import fake_engine
import pytest
from test_engines import started_below

from repro.configuration import plain
from repro.engine.vllm_server import VllmSpec, processes_of, socket_folder
from repro.errors import UserError
from repro.models.served import write_served
from repro.processes import Child
from repro.serving import messages as say
from repro.serving.vllm_instance import VllmInstance, VllmInstanceConfig

pytestmark = pytest.mark.slow
PROMPT = list(range(300))
WITHIN_S = 60.0


class Adapter:
    """An instance's process, and what it says."""

    def __init__(self, name: str, folder: Path, port: int) -> None:
        (folder / "sockets").mkdir(exist_ok=True)
        self.sockets = folder / "sockets"
        server = VllmSpec(str(folder / "env"), str(folder / "served_dense"), 4096, 2048, min(os.sched_getaffinity(0)))
        config = VllmInstanceConfig(
            name,
            "127.0.0.1",
            2048,
            2,
            server,
            str(self.sockets / name),
            str(folder / f"{name}.log"),
            port,
            start_timeout_s=WITHIN_S,
        )
        self.said: queue.SimpleQueue[say.FromInstance] = queue.SimpleQueue()
        self.child = Child(
            f"instance {name}", [sys.executable, "-m", config.MODULE],
            hear=lambda message, _: self.said.put(say.from_instance(message)), stderr=folder / f"{name}.err",
        )  # fmt: skip
        self.child.send("config", **plain(config))

    def tell(self, said: say.ToInstance) -> None:
        self.child.send_text(say.encoded(said))

    def hear(self, kind: type[Any]) -> Any:
        said = self.said.get(timeout=WITHIN_S)
        assert isinstance(said, kind), said
        return said

    def server_pid(self) -> int:
        """The engine's own process, of all that the adapter started."""
        own = str(self.sockets / self.child.role.split()[1]).encode()
        for entry in Path("/proc").glob("[0-9]*"):
            words = (entry / "cmdline").read_bytes().split(b"\0") if entry.exists() else []
            if own in words and any(b"fake_engine" in word for word in words) and words[0].endswith(b"python"):
                return int(entry.name)
        raise AssertionError("no engine runs")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Adapter, Adapter]]:
    folder = tmp_path_factory.mktemp("adapters")
    fake_engine.environment(folder / "env")
    write_served("dense", folder)
    with ExitStack() as closing:
        near, far = Adapter("prfaas0.0", folder, 5811), Adapter("pd0.0", folder, 5812)
        for one in (near, far):
            closing.callback(one.child.kill)
        ports = [one.hear(say.Ready).port for one in (near, far)]
        near.tell(say.Connect("pd0.0", "127.0.0.1", ports[1]))
        assert near.hear(say.Connected).name == "pd0.0"
        yield near, far
    deadline = time.monotonic() + 5
    while started_below(folder / "env") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not started_below(folder / "env")


def prefill(request: int, prompt: list[int] | None = PROMPT) -> say.Prefill:
    return say.Prefill(request, 0, len(PROMPT), 0, 5, 1e6, "pd0.0", prompt)


def sent(near: Adapter) -> say.Sending:
    near.tell(say.Report())
    found = near.hear(say.Sending)
    assert isinstance(found, say.Sending)
    return found


def test_a_request_is_prefilled_here_and_decoded_there_and_its_bytes_are_the_engines(
    pair: tuple[Adapter, Adapter],
) -> None:
    near, far = pair
    before = sent(near).acked_bytes
    near.tell(prefill(1))
    prefilled, delivered = near.hear(say.Prefilled), far.hear(say.Delivered)
    decoding, finished = far.hear(say.Decoding), far.hear(say.Finished)
    assert delivered.payload_bytes == 2048 * 384
    assert prefilled.start_s < prefilled.end_s < decoding.first_s <= finished.at_s
    assert {one.request for one in (prefilled, delivered, decoding, finished)} == {1}
    assert len(finished.tokens) == 5
    deadline = time.monotonic() + WITHIN_S
    while (found := sent(near)).waiting_bytes and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (found.acked_bytes - before, found.waiting_bytes) == (2048 * 384, 0)


def test_a_request_that_was_given_up_is_not_begun_and_one_without_memory_goes_back(
    pair: tuple[Adapter, Adapter],
) -> None:
    near, far = pair
    near.tell(say.Forget(2, 0))
    near.tell(prefill(2))
    far.tell(say.Memory(full=True))
    near.tell(prefill(3))
    assert near.hear(say.Prefilled).request == 3
    assert far.hear(say.Undelivered) == say.Undelivered(3, 0, "no memory for its KVCache", full=True)
    assert sent(near).waiting_bytes == 1_000_000
    near.tell(say.Forget(3, 0))
    far.tell(say.Memory(full=False))
    assert sent(near).waiting_bytes == 0


def test_the_end_of_the_server_is_the_end_of_the_instance_and_the_other_way_round(
    pair: tuple[Adapter, Adapter],
) -> None:
    near, far = pair
    assert processes_of(near.sockets) >= 2
    os.kill(far.server_pid(), signal.SIGKILL)
    far.child.wait(WITHIN_S)
    assert far.child.ended is not None
    assert "failed: vLLM of pd0.0" in far.child.ended.how
    near.child.kill()
    deadline = time.monotonic() + 5
    while processes_of(near.sockets) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_of(near.sockets) == 0


@pytest.mark.parametrize(("over", "failures"), [(True, 0), (False, 1)], ids=["over", "serving"])
def test_what_a_thread_meets_once_all_is_over_hides_no_reason(
    over: bool, failures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = VllmInstanceConfig("pd0.0", "127.0.0.1", 2048, 2, url="http://127.0.0.1:1")
    found: list[object] = []
    monkeypatch.setattr(threading, "excepthook", found.append)
    instance = VllmInstance(config, None, None)  # type: ignore[arg-type]
    closed = threading.Event()

    def ask() -> None:
        closed.wait()
        raise RuntimeError("the client has been closed")

    instance._begin("asking", ask)
    (thread,) = (one for one in threading.enumerate() if one.name == "asking")
    reason = UserError("nothing crosses")
    instance.over.put(reason)
    if over:
        assert instance.wait() is reason
    closed.set()
    thread.join(10)
    assert len(found) == failures


def test_sockets_are_beside_the_logs_unless_their_path_would_be_too_long(tmp_path: Path) -> None:
    length = 107 - len("/sockets-12345678/prfaas0.999")
    fits, long = (tmp_path / "x".ljust(size - len(str(tmp_path)) - 1, "x") for size in (length, length + 1))
    for folder, inside in ((fits, True), (long, False)):
        folder.mkdir()
        with socket_folder(folder, "prfaas0.999") as sockets, socket.socket(socket.AF_UNIX) as listening:
            assert (Path(sockets).parent == folder) == inside
            listening.bind(str(Path(sockets) / "prfaas0.999"))
        assert not list(folder.iterdir())
