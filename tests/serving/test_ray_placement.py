"""A deployment on the nodes of a Ray cluster: two on this machine, in two network namespaces with an emulated link between."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from test_serve_api import MODEL, SPEC, WIRE, WORDS

from repro.engine.torch_engine import EngineSpec
from repro.experiments.computed import Answers, Computing
from repro.experiments.live import Deployment
from repro.link import Link, LinkSpec, Side, open_link
from repro.link.link import DirectLink, Unavailable
from repro.models.build import build
from repro.serving.ray_launcher import RayLauncher
from repro.serving.torch_instance import TorchInstanceConfig
from repro.workload.stream import RequestBatch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed (the extra `ray`)"),
]
_PORT = 6399


@contextlib.contextmanager
def node(link: Link, side: Side, folder: Path, *how: str) -> Iterator[None]:
    """A node of the cluster on a side of the link; with it go all of Ray's processes there."""
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--node-ip-address={link.listen_host(side)}", "--num-cpus=1",
        f'--resources={{"{side}":4}}', "--disable-usage-stats", "--object-store-memory=80000000", *how,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with (folder / f"{side}.log").open("w") as log:
        process = subprocess.Popen(
            link.command(side, command), stdout=log, stderr=log, env=environment, start_new_session=True
        )
    try:
        yield
    finally:
        own = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
        for pid in own:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def rays() -> set[int]:
    """Every process of Ray, and every instance that one started, but for those that only wait to be reaped."""
    words = ("ray/core", "ray::", "ray.scripts", "ray_bridge", "torch_instance")
    return {
        one.pid
        for one in psutil.process_iter(["cmdline", "status"])
        if one.info["status"] != psutil.STATUS_ZOMBIE
        and any(word in " ".join(one.info["cmdline"] or []) for word in words)
    }


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Link, RayLauncher]]:
    folder, before = tmp_path_factory.mktemp("ray"), rays()
    try:
        link = open_link(LinkSpec(rate_bps=1e9, rtt_s=0.01, backend="packet"), run=f"ray-{os.getpid()}")
    except Unavailable as missing:
        pytest.skip(str(missing))
    head = f"{link.listen_host('prefill')}:{_PORT}"
    temporary = Path(f"/tmp/ray-test-{os.getpid()}")
    with link, contextlib.ExitStack() as nodes:
        first = ["--head", f"--port={_PORT}", "--include-dashboard=false", f"--temp-dir={temporary}"]
        nodes.enter_context(node(link, "prefill", folder, *first))
        time.sleep(6)
        nodes.enter_context(node(link, "decode", folder, f"--address={head}"))
        until_s = time.monotonic() + 60
        while True:
            launcher = RayLauncher(head, folder, link.command("prefill", []))
            if all(launcher._nodes.values()):
                break
            assert time.monotonic() < until_s, (folder / "decode.log").read_text()
        yield link, launcher
    until_s = time.monotonic() + 10
    while (left := rays() - before) and time.monotonic() < until_s:
        time.sleep(0.1)
    assert not left
    shutil.rmtree(temporary, ignore_errors=True)


def stream(count: int, seed: int = 0) -> list[RequestBatch]:
    tokens = np.where(np.arange(count) % 2, 60, 240)
    return [RequestBatch(np.cumsum(np.full(count, 0.4)), tokens, np.full(count, 6))]


@pytest.fixture(scope="module")
def live(cluster: tuple[Link, RayLauncher], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    _, launcher = cluster
    computing = Computing(EngineSpec(MODEL, chunk_tokens=64), WORDS, 4)
    none = DirectLink(WIRE.link, "ray", "none", [])
    with Deployment(SPEC, WIRE, none, tmp_path_factory.mktemp("live"), 0, computing, launcher) as running:
        yield running


def answers() -> Answers:
    config = Computing(EngineSpec(MODEL, chunk_tokens=64), WORDS, 4).config("reference", WIRE.transport, None, 1, 0)
    assert isinstance(config, TorchInstanceConfig)
    return Answers(build(MODEL, "cpu"), config, 1)


def test_the_tokens_are_the_models_own_and_state_crosses_between_the_nodes(
    live: Deployment, cluster: tuple[Link, RayLauncher]
) -> None:
    link, _ = cluster
    before = link.signals().forward.forwarded_bytes
    played = live.play(stream(8))
    assert set(played.requests["outcome"]) == {"ok"}
    assert answers().right(played) == (8, 8)
    remote = played.requests[played.requests["route"] == "prfaas"]
    assert len(remote) == 4
    # Payload of offloaded requests went through the link between the two namespaces.
    assert link.signals().forward.forwarded_bytes - before > played.payload_bytes > 0
    assert set(played.workers) == {"prfaas0.0", "pd0.0", "pd0.1"}


def test_a_ray_worker_that_is_killed_ends_as_any_other_fault(live: Deployment) -> None:
    hosts = [one for one in psutil.process_iter(["cmdline"]) if "ray::Host" in " ".join(one.info["cmdline"] or [])]
    assert len(hosts) == 3
    instances = {
        child.pid: one for one in hosts for child in one.children() if "torch_instance" in str(child.cmdline())
    }
    assert len(instances) == 3
    pid, victim = next(iter(instances.items()))
    victim.kill()
    until_s = time.monotonic() + 20
    while all(live.fleet.is_alive(name) for name in live.fleet.names) and time.monotonic() < until_s:
        time.sleep(0.05)
    (lost,) = [name for name in live.fleet.names if not live.fleet.is_alive(name)]
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    live.fleet.replace(lost, next(config for place, config in live.configs.items() if place.name == lost))
    played = live.play(stream(6))
    assert set(played.requests["outcome"]) == {"ok"}
    assert answers().right(played) == (6, 6)
