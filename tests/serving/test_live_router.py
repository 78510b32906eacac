"""The live system: instances as processes, a router in charge, requests answered once each whatever dies."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from repro.experiments.live import Deployment, Wire, deployed
from repro.experiments.study import run_once
from repro.link import LinkSpec
from repro.profiles.base import DecodeStep, KVSize, PhaseProfile, PrefillCurve
from repro.record import requests as schema
from repro.scheduling.policies import Threshold
from repro.scheduling.spec import SchedulerSpec
from repro.serving.faults import LiveFault
from repro.serving.scale import Scale
from repro.simulate.link_spec import SharedLinkSpec
from repro.simulate.spec import PdCluster, PrfaasCluster, SimulationSpec
from repro.transport import TransportSpec
from repro.workload.stream import RequestBatch

PROFILE = PhaseProfile(
    "tiny", "m", "a", 1, PrefillCurve(tokens=(100, 10_000), seconds=(0.1, 2.0), interpolation="linear"),
    KVSize(1e6, 1e4), DecodeStep(0.02, batch_max=8),
)  # fmt: skip
SPEC = SimulationSpec(
    (PdCluster(PROFILE, 1, 2),),
    (PrfaasCluster(PROFILE, 2, SharedLinkSpec(1e10, 0.0)),),
    SchedulerSpec(Threshold(), threshold_tokens=2000.0),
)
WIRE = Wire(LinkSpec(rate_bps=None, backend="none"), TransportSpec(connections=1), 5, Scale(10.0, 100.0))


def stream(count: int, seed: int = 0) -> list[RequestBatch]:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(200, 6000, count)
    return [RequestBatch(np.cumsum(rng.exponential(1.0, count)), tokens, np.full(count, 20))]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deployed(SPEC, WIRE, tmp_path_factory.mktemp("live"), "live-test") as running:
        yield running


@pytest.mark.slow
def test_what_is_served_is_what_the_simulator_routes(live: Deployment) -> None:
    played = live.play(stream(60))
    simulated, _ = run_once(SPEC, stream(60))
    schema.validate(played.requests)
    assert list(played.requests["outcome"]) == ["ok"] * 60
    assert list(played.requests["route"]) == list(simulated["route"])
    remote = played.requests[played.requests["route"] == "prfaas"]
    assert len(remote) > 10
    sizes = np.asarray(PROFILE.kv_bytes(remote["input_tokens"].to_numpy()))
    np.testing.assert_allclose(remote["kv_bytes"], sizes, rtol=0.01)
    assert played.payload_bytes <= played.wire_bytes <= 1.2 * played.payload_bytes
    # What is replayed is reported at its own time, however late the timers of this machine were.
    np.testing.assert_allclose(played.requests["tpot_s"], PROFILE.decode_step_s(1), rtol=1e-6)
    np.testing.assert_allclose(played.requests["prefill_s"], simulated["prefill_s"], rtol=1e-6)
    assert (played.requests["ttft_s"] >= simulated["ttft_s"] - 0.02).all()


@pytest.mark.slow
def test_a_run_that_is_cut_leaves_nothing_to_the_next(live: Deployment) -> None:
    cut = live.play(stream(40, seed=1), drain_s=0.0)
    assert cut.unfinished == (cut.requests["outcome"] == "timed_out").sum() > 0
    whole = live.play(stream(20, seed=2))
    assert list(whole.requests["id"]) == list(range(20))
    assert set(whole.requests["outcome"]) == {"ok"}


@pytest.mark.slow
def test_every_request_is_answered_once_though_instances_of_each_role_are_killed(live: Deployment) -> None:
    faults = [
        LiveFault("prfaas0.0", 8.0, 40.0),
        LiveFault("pd0.1", 12.0, 40.0),
        LiveFault("pd0.0", 20.0, 30.0),
        LiveFault("prfaas0.1", 30.0, 20.0, "slow", 3.0),
    ]
    played = live.play(stream(90, seed=3), faults=faults)
    assert played.unfinished == 0
    assert sorted(played.requests["id"]) == list(range(90))
    assert set(played.requests["outcome"]) <= {"ok", "fell_back"}
    assert played.requests["attempts"].max() > 1
    died = [words for _, words in played.events if "was killed by SIGKILL" in words]
    assert len(died) == 3
    after = live.play(stream(40, seed=4))
    assert set(after.requests["outcome"]) == {"ok"}
    assert set(after.requests["prefill_worker"]) == {"prfaas0.0", "prfaas0.1", "pd0.0"}


@pytest.mark.slow
def test_nothing_is_left_of_a_deployment(tmp_path: Path) -> None:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with deployed(SPEC, WIRE, tmp_path, "live-gone") as running:
        pids = {running.fleet.pid(name) for name in running.fleet.names}
        assert len(pids) == 5
        running.play(stream(5), drain_s=0.0)
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before


@pytest.mark.slow
def test_a_stopped_instance_is_noticed_and_its_requests_are_answered_elsewhere(live: Deployment) -> None:
    # A stop of 6 s of this machine: silence is told after 3.
    played = live.play(stream(80, seed=5), faults=[LiveFault("prfaas0.1", 5.0, 60.0, "stop")])
    assert sorted(played.requests["id"]) == list(range(80))
    assert set(played.requests["outcome"]) <= {"ok", "fell_back"}
    assert any("instance prfaas0.1 is stopped" in words for _, words in played.events)
    assert played.requests["attempts"].max() > 1


@pytest.mark.slow
def test_every_request_is_answered_once_though_the_router_restarts_and_memory_and_disk_are_full(
    live: Deployment,
) -> None:
    faults = [
        LiveFault("pd0.1", 5.0, 20.0, "out_of_memory"),
        LiveFault("pd0.2", 10.0, 40.0, "disk_full"),
        LiveFault("router", 30.0, 5.0, "restart"),
    ]
    played = live.play(stream(80, seed=6), faults=faults)
    assert sorted(played.requests["id"]) == list(range(80))
    assert set(played.requests["outcome"]) <= {"ok", "fell_back"}
    assert played.requests["attempts"].max() > 1
    words = [words for _, words in played.events]
    assert [one for one in words if one.startswith("fault")] == [
        f"fault {one.kind} of {one.instance}" for one in faults
    ]
    assert any("no memory for its KVCache" in one for one in words)
    assert any(one.startswith("the router serves again") for one in words)
    assert not [one for one in words if one.startswith("instance ")]


_HEAD = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_live_router import SPEC, WIRE, deployed, stream
with deployed(SPEC, WIRE, Path(sys.argv[2]), "live-killed") as running:
    print(*(running.fleet.pid(name) for name in running.fleet.names), flush=True)
    running.play(stream(200))
"""


@pytest.mark.slow
def test_nothing_is_left_when_the_head_is_killed(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", _HEAD, str(Path(__file__).parent), str(tmp_path)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as head:
        assert head.stdout is not None
        pids = [int(word) for word in head.stdout.readline().split()]
        assert len(pids) == 5
        time.sleep(1.0)  # requests are under way
        head.kill()
    until_s = time.monotonic() + 10.0
    while any(psutil.pid_exists(pid) for pid in pids) and time.monotonic() < until_s:
        time.sleep(0.05)
    assert not [pid for pid in pids if psutil.pid_exists(pid)]
