"""The split run by other people's transfer engines: the same tokens, and the state truly crosses the link."""

import os
from pathlib import Path

import numpy as np
import pytest
from warm_workers import WarmWorkers

from repro.engine.base import Request
from repro.engine.torch_engine import EngineSpec
from repro.errors import UserError
from repro.link import Link, LinkSpec, open_link
from repro.models import spec as models
from repro.serving.system import System
from repro.transport import TransportSpec
from repro.transport.remote_memory import missing

LINKS = {
    "none": LinkSpec(backend="none"),
    "relay": LinkSpec(backend="relay", rate_bps=80e6),
    "packet": LinkSpec(backend="packet", rate_bps=80e6, rtt_s=0.004, loss=0.005),
}


def opened(name: str) -> Link:
    try:
        return open_link(LINKS[name], run="test-engines")
    except UserError as error:
        pytest.skip(f"the {name} link is not available here: {error}")


def requests() -> list[Request]:
    rng = np.random.default_rng(5)
    return [Request(number, tuple(rng.integers(3, 512, length).tolist()), 3) for number, length in enumerate((90, 41))]


def engine_spec(name: str) -> EngineSpec:
    return EngineSpec(models.load(name, "tiny"), chunk_tokens=32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "link_name"), [("mooncake", "none"), ("mooncake", "packet"), ("nixl", "none"), ("nixl", "packet")]
)
def test_tokens_equal_the_unsplit_runs_by_another_engine(
    backend: str, link_name: str, warm: WarmWorkers, tmp_path: Path
) -> None:
    if reason := missing(backend):
        pytest.skip(f"{backend}: {reason}")
    transport = TransportSpec(backend=backend, connections=2, secret="of this test", stall_s=5)
    own_devices = backend == "nixl" and link_name == "packet"
    if own_devices and os.geteuid() != 0:
        pytest.skip("nixl needs a /sys of its own on a namespaced link, which only root may mount everywhere")
    with (
        opened(link_name) as link,
        # A warm worker is forked into the network of a link, but not into the mounts.
        System(engine_spec("qwen3_5_397b"), transport, link if own_devices else warm.on(link), tmp_path) as system,
    ):
        expected = system.serve(requests(), "unsplit").tokens
        before = link.signals().forward.forwarded_bytes
        for mode in ("bulk", "layerwise"):
            run = system.serve(requests(), mode, in_flight=2)
            assert run.tokens == expected
        crossed = link.signals().forward.forwarded_bytes - before
    if link_name != "none":
        assert crossed > 2 * sum(served.total_kv_bytes for served in run.served)


@pytest.mark.parametrize(
    ("backend", "link_name", "why"),
    [
        ("mooncake", "relay", "opens connections of its own, which a relay link does not carry"),
        ("nixl", "relay", "opens connections of its own, which a relay link does not carry"),
    ],
    ids=["mooncake-relay", "nixl-relay"],
)
def test_an_engine_whose_bytes_would_not_cross_the_link_is_refused(
    backend: str, link_name: str, why: str, tmp_path: Path
) -> None:
    refused = pytest.raises(UserError, match=f"transport.backend: {backend} {why}")
    with opened(link_name) as link, refused:
        System(engine_spec("qwen3_5_397b"), TransportSpec(backend=backend), link, tmp_path)
