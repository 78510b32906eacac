"""A deployment on the nodes of a Ray cluster: two on this machine, in two network namespaces with an emulated link between."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from test_serve_api import MODEL, PROFILE, SPEC, WIRE, WORDS

from repro.engine.torch_engine import EngineSpec
from repro.experiments.computed import Answers, Computing
from repro.experiments.live import Deployment, Played, deployed
from repro.link import Link, LinkSpec, Side, open_link
from repro.link.link import DirectLink, Unavailable
from repro.models.build import build
from repro.profiles.presets import save_profile
from repro.record.directory import Record
from repro.record.metrics import value
from repro.serving.faults import LiveFault
from repro.serving.ray_launcher import RayLauncher
from repro.serving.torch_instance import TorchInstanceConfig
from repro.simulate.link_spec import SharedLinkSpec
from repro.simulate.spec import PrfaasCluster
from repro.workload.stream import RequestBatch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed (the extra `ray`)"),
]
RATE_BPS, RTT_S = 200e6, 0.01
#: Two PrfaaS instances, so that one is left; one that prefills and one that decodes in the PD cluster.
DEPLOYMENT = replace(SPEC, prfaas=(PrfaasCluster(PROFILE, 2, SharedLinkSpec(1e10, 0.0)),))
COMPUTING = Computing(EngineSpec(MODEL, chunk_tokens=64), WORDS, 4)
#: In the environment of every process that this module starts, and of all that those start.
MARK = f"RAY_PLACEMENT_TEST={uuid.uuid4().hex}"
OURS = ("ray::Host", "-m repro.serving", "-m repro.link.probe", "-m repro serve", "-m repro experiment")
INSTANCE = "-m repro.serving.torch_instance"


def marked(*words: str) -> set[int]:
    """Processes that descend from this module, of those with one of the words in their command where there are any."""
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            command = " ".join(process.cmdline())
            is_ours = not words or any(word in command for word in words)
            if is_ours and MARK.encode() in Path(f"/proc/{process.pid}/environ").read_bytes():
                found.add(process.pid)
    return found - {os.getpid()}


def gone(*words: str, within_s: float) -> set[int]:
    """Wait until no such process is left; those that are."""
    until_s = time.monotonic() + within_s
    while (left := marked(*words)) and time.monotonic() < until_s:
        time.sleep(0.2)
    return left


def shared_memory() -> set[Path]:
    """Named shared memory that the kit's processes have mapped, without Ray's own."""
    found = set()
    for pid in marked(*OURS):
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
            found |= {Path(line.split()[-1]) for line in lines if "/dev/shm/" in line and "plasma" not in line}
    return found


def left(folder: Path, memory: set[Path], within_s: float) -> list[object]:
    """What is left of the kit's a moment after its end: processes, shared memory, temporary files."""
    processes = gone(*OURS, within_s=within_s)
    return [*processes, *(path for path in memory if path.exists()), *(folder / "temporary").iterdir()]


@dataclass
class Cluster:
    """A running cluster; `nodes` are the processes that `ray start` became, by name."""

    link: Link
    address: str
    folder: Path
    nodes: dict[str, subprocess.Popen[bytes]]

    def add(self, name: str, side: Side, places: int, *how: str) -> None:
        """Start a node on a side of the link."""
        command = [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--node-ip-address={self.link.listen_host(side)}",
            "--num-cpus=1", f'--resources={{"{side}":{places}}}', "--disable-usage-stats", "--object-store-memory=80000000",
            *(how or (f"--address={self.address}",)),
        ]  # fmt: skip
        with (self.folder / f"{name}.log").open("w") as log:
            self.nodes[name] = subprocess.Popen(
                self.link.command(side, command), stdout=log, stderr=log, env=environment(), start_new_session=True
            )

    def kill(self, name: str) -> None:
        """SIGKILL of all of Ray's processes of a node, its workers but not what they started."""
        process = self.nodes.pop(name)
        with contextlib.suppress(psutil.NoSuchProcess):
            for one in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    if "torch_instance" not in " ".join(one.cmdline()):
                        one.kill()
        process.wait()

    def launcher(self, folder: Path) -> RayLauncher:
        return RayLauncher(self.address, folder, self.link.command("prefill", []))

    def wait_for(self, prefill: int) -> None:
        """Wait until so many nodes of the prefill side and one of the decode side are there."""
        until_s = time.monotonic() + 90
        while True:
            with contextlib.suppress(Exception):
                nodes = self.launcher(self.folder)._nodes
                if (len(nodes["prefill"]), len(nodes["decode"])) == (prefill, 1):
                    return
            assert time.monotonic() < until_s, (self.folder / "decode.log").read_text()


def environment() -> dict[str, str]:
    name, _, mark = MARK.partition("=")
    return {**os.environ, name: mark, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": "1"}


@contextlib.contextmanager
def ray_cluster(folder: Path, port: int) -> Iterator[Cluster]:
    """The head on the prefill side, a node on the decode side; with it go all of Ray's processes."""
    os.environ.update([MARK.split("=")])
    try:
        link = open_link(LinkSpec(rate_bps=RATE_BPS, rtt_s=RTT_S, backend="packet"), run=f"ray-{os.getpid()}-{port}")
    except Unavailable as missing:
        pytest.skip(str(missing))
    temporary = Path(f"/tmp/ray-test-{os.getpid()}-{port}")
    with link:
        cluster = Cluster(link, f"{link.listen_host('prefill')}:{port}", folder, {})
        try:
            how = ["--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={temporary}"]
            cluster.add("head", "prefill", 4, *how)
            time.sleep(6)
            cluster.add("decode", "decode", 4)
            cluster.wait_for(1)
            yield cluster
        finally:
            for name in list(cluster.nodes):
                cluster.kill(name)
            shutil.rmtree(temporary, ignore_errors=True)
    assert not gone(within_s=10)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with ray_cluster(tmp_path_factory.mktemp("ray"), 6399) as found:
        yield found


@pytest.fixture(scope="module")
def live(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    none = DirectLink(replace(WIRE.link, rate_bps=RATE_BPS), "ray", "none", [])
    folder = tmp_path_factory.mktemp("live")
    with Deployment(DEPLOYMENT, WIRE, none, folder, 0, COMPUTING, cluster.launcher(folder)) as running:
        yield running


def stream(count: int, every_s: float = 0.4) -> list[RequestBatch]:
    tokens = np.where(np.arange(count) % 2, 60, 240)
    return [RequestBatch(np.cumsum(np.full(count, every_s)), tokens, np.full(count, 6))]


@pytest.fixture(scope="module")
def answers() -> Answers:
    config = COMPUTING.config("reference", WIRE.transport, None, 1, 0)
    assert isinstance(config, TorchInstanceConfig)
    return Answers(build(MODEL, "cpu"), config, 1)


def answered_once(played: Played, count: int, answers: Answers) -> None:
    """Every request was answered, once, with the model's own tokens."""
    assert sorted(played.requests["id"]) == list(range(count))
    assert set(played.requests["outcome"]) <= {"ok", "fell_back"}
    assert answers.right(played) == (count, count)


@contextlib.contextmanager
def head(cluster: Cluster, folder: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    """The kit's own command on the node of Ray's head; what it says goes to `said` and `errors` in the folder."""
    save_profile(PROFILE, folder / "profiles" / "tiny.yaml")
    argv = [
        sys.executable, "-m", "repro", *words, "profile=tiny", f"results={folder}", "label=here", "tracking=disabled", "link.backend=none",
        f"link.rate_bps={RATE_BPS}",
    ]  # fmt: skip
    (folder / "temporary").mkdir()
    own = {**environment(), "TMPDIR": str(folder / "temporary"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}
    with (folder / "said").open("w") as said, (folder / "errors").open("w") as errors:
        process = subprocess.Popen(
            cluster.link.command("prefill", argv), stdout=said, stderr=errors, text=True, env=own
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def served_at(process: subprocess.Popen[str], folder: Path) -> str:
    """Its address, once it serves."""
    until_s = time.monotonic() + 120
    while True:
        said = (folder / "errors").read_text()
        if match := re.search(r"http://[\d.:]+", said):
            return match[0]
        assert process.poll() is None, said
        assert time.monotonic() < until_s, said
        time.sleep(0.1)


# First, as it looks for whatever is left of any cluster of this module.
def test_nothing_of_the_kits_is_left_when_rays_own_head_is_killed(tmp_path: Path) -> None:
    with ray_cluster(tmp_path, 6397) as own:
        with head(own, tmp_path, "serve", f"ray={own.address}", "--port", "0", "policy.threshold_tokens=64") as process:
            served_at(process, tmp_path)
            assert len(marked(INSTANCE)) == 3
            own.kill("head")
            time.sleep(1.0)
            process.kill()
        # With no head to tell them, actors end because nobody asks them any more.
        assert not left(tmp_path, set(), within_s=30)


TIERS = [
    "experiment=tiers", "options.requests=20", "options.compared=20", "workload.lengths.mu=4.2", "workload.lengths.minimum_tokens=32",
    "workload.lengths.maximum_tokens=128", "workload.output_tokens=3", "options.load=0.1", "options.slowdown=1",
    "policy.threshold_tokens=64",
]  # fmt: skip


def test_the_experiment_of_all_tiers_runs_on_the_cluster_and_records_its_network(
    cluster: Cluster, tmp_path: Path
) -> None:
    with head(cluster, tmp_path, *TIERS, f"ray={cluster.address}") as process:
        assert process.wait(500) == 0, (tmp_path / "errors").read_text()
    record = Record(Path((tmp_path / "said").read_text().splitlines()[-1]))
    assert value(record.metrics, "tokens_match") == 1
    assert record.configuration["ray"] == cluster.address
    link = record.provenance["link"]["execute"]
    (found,) = link["measured"].values()
    assert found["rate_bps"] == pytest.approx(RATE_BPS * 0.965, rel=0.1)
    assert found["rtt_s"] >= RTT_S
    assert not gone(*OURS, within_s=10)


CLIENT = """
import json, sys
import httpx
with httpx.Client(base_url=sys.argv[1], timeout=60.0) as client:
    body = {"model": sys.argv[2], "prompt": list(range(1, 241)), "max_tokens": 5, "return_token_ids": True}
    whole = client.post("/v1/completions", json=body).json()
    streamed = client.post("/v1/completions", json={**body, "stream": True}).text
    chat = {"model": sys.argv[2], "messages": [{"role": "user", "content": "What crosses the link?" * 9}], "max_tokens": 3}
    said = client.post("/v1/chat/completions", json=chat).json()
    events = [json.loads(line[6:]) for line in streamed.split("\\n\\n") if line and line != "data: [DONE]"]
    tokens = [token for event in events for choice in event["choices"] for token in choice["token_ids"]]
    print(json.dumps({"whole": whole, "streamed": tokens, "chat": said, "metrics": client.get("/metrics").text}))
"""


def test_a_public_client_is_served_from_the_cluster_and_nothing_is_left_when_the_head_is_killed(
    cluster: Cluster, tmp_path: Path
) -> None:
    words = ["serve", "--ray", cluster.address, "--port", "0", "policy.threshold_tokens=64"]
    with head(cluster, tmp_path, *words) as process:
        url = served_at(process, tmp_path)
        argv = [sys.executable, "-c", CLIENT, url, MODEL.name]
        done = subprocess.run(
            cluster.link.command("prefill", argv),
            capture_output=True,
            text=True,
            env=environment(),
            timeout=120,
            check=True,
        )
        found = json.loads(done.stdout)
        assert found["whole"]["usage"]["prompt_tokens"] == 240
        assert found["whole"]["choices"][0]["token_ids"] == found["streamed"]
        assert len(found["streamed"]) == 5
        assert found["chat"]["choices"][0]["message"]["role"] == "assistant"
        crossed = re.search(r'prfaas_kv_bytes_total\{route="prfaas"\} (\S+)', found["metrics"])
        assert crossed is not None
        assert float(crossed[1]) > 1e5
        assert len(marked(INSTANCE)) == 3
        memory = shared_memory()
        process.kill()
    assert not left(tmp_path, memory, within_s=20)
    link = json.loads((tmp_path / "serve" / "here" / "provenance.json").read_text())["link"]
    assert next(iter(link["measured"].values()))["rtt_s"] >= RTT_S


def test_nothing_is_left_when_the_head_of_an_experiment_is_killed(cluster: Cluster, tmp_path: Path) -> None:
    words = ["experiment=live_stress", "link.schedule=[]", "cluster.prfaas.instances=1", "cluster.pd.instances=2"]
    with head(cluster, tmp_path, *words, f"ray={cluster.address}") as process:
        until_s = time.monotonic() + 120
        while len(marked(INSTANCE)) < 3 and time.monotonic() < until_s:
            time.sleep(0.2)
        time.sleep(5.0)
        assert len(marked(INSTANCE)) == 3
        memory = shared_memory()
        process.kill()
    assert not left(tmp_path, memory, within_s=20)


# From here on one deployment stays up, whose instances the tests above would count.


def test_the_network_between_the_nodes_is_measured_for_the_record(live: Deployment) -> None:
    record = live.measured_link()
    assert (record["backend"], record["placed_by"]) == ("none", "ray")
    (found,) = record["measured"].values()
    assert found["rate_bps"] == pytest.approx(RATE_BPS * 0.965, rel=0.1)
    assert RTT_S <= found["rtt_s"] < 1.5 * RTT_S


def test_the_tokens_are_those_of_the_local_launcher_and_state_crosses_between_the_nodes(
    live: Deployment, cluster: Cluster, answers: Answers, tmp_path: Path
) -> None:
    before = cluster.link.signals().forward.forwarded_bytes
    played = live.play(stream(8))
    answered_once(played, 8, answers)
    assert (played.requests["route"] == "prfaas").sum() == 4
    # Payload of offloaded requests went through the link between the two namespaces.
    assert cluster.link.signals().forward.forwarded_bytes - before > played.payload_bytes > 0
    assert set(played.workers) == {"prfaas0.0", "prfaas0.1", "pd0.0", "pd0.1"}
    with deployed(DEPLOYMENT, WIRE, tmp_path, "ray-local", 0, COMPUTING) as local:
        assert local.play(stream(8)).tokens == played.tokens


def test_ray_workers_that_are_killed_and_stopped_end_as_any_other_fault(live: Deployment, answers: Answers) -> None:
    # Slow ones still have what they were given when their end comes.
    faults = [
        LiveFault("prfaas0.0", 0.1, 60.0, "slow", 20.0),
        LiveFault("prfaas0.1", 0.1, 60.0, "slow", 20.0),
        LiveFault("prfaas0.0", 2.0, 1.0, "kill"),
        LiveFault("pd0.1", 4.0, 1.0, "kill"),
        LiveFault("prfaas0.1", 5.0, 8.0, "stop"),
    ]
    played = live.play(stream(30), faults=faults)
    answered_once(played, 30, answers)
    assert played.requests["attempts"].max() > 1
    words = [words for _, words in played.events]
    for name, how in (
        ("prfaas0.0", "its Ray worker has ended"),
        ("pd0.1", "its Ray worker"),
        ("prfaas0.1", "is stopped"),
    ):
        assert any(name in one and how in one for one in words), words
    answered_once(live.play(stream(6)), 6, answers)
    assert all(live.fleet.is_alive(name) for name in live.fleet.names)


def test_a_node_that_is_killed_ends_as_any_other_fault_and_its_instance_is_started_on_another(
    cluster: Cluster, answers: Answers, tmp_path: Path
) -> None:
    cluster.add("spare", "prefill", 1)
    cluster.wait_for(2)
    none = DirectLink(WIRE.link, "ray", "none", [])
    with Deployment(DEPLOYMENT, WIRE, none, tmp_path, 0, COMPUTING, cluster.launcher(tmp_path)) as live:
        slow = [LiveFault(f"prfaas0.{index}", 0.1, 5.0, "slow", 20.0) for index in (0, 1)]
        timer = threading.Timer(3.0, cluster.kill, ["spare"])
        timer.start()
        played = live.play(stream(30), faults=slow)
        timer.join()
        answered_once(played, 30, answers)
        (lost,) = [name for name in live.fleet.names if not live.fleet.is_alive(name)]
        assert lost.startswith("prfaas0.")
        assert any(words.startswith(f"instance {lost} failed: its Ray worker") for _, words in played.events)
        assert ((played.requests["attempts"] > 1) | (played.requests["outcome"] == "fell_back")).any()
        cluster.wait_for(1)
        live._replace(lost)
        again = live.play(stream(12))
        answered_once(again, 12, answers)
        assert set(again.requests["prefill_worker"]) == {"prfaas0.0", "prfaas0.1", "pd0.0"}
