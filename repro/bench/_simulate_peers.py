"""Other simulators of LLM serving, as peers of `scripts/bench simulate`, each given the same requests and settings that make it fast.

A peer is one adapter: it writes the requests in the peer's own format into a scratch folder, runs the peer's own program under the
peer's own interpreter, and takes back how long the event loop ran and how many requests it completed. What they simulate is not
compared, for each has another cluster; what each leaves out is said at its adapter.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from repro import processes
from repro.errors import UserError
from repro.processes import tied
from repro.workload.stream import Independent

_LOOP = Path(__file__).with_name("_simulate_loop.py")
_LIMIT_S = 900.0


@dataclass(frozen=True)
class Workload:
    """Requests in order of arrival: seconds from the beginning, whole tokens."""

    arrival_s: NDArray[np.float64]
    input_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]

    @classmethod
    def of(cls, stream: Independent) -> Workload:
        """All requests of a stream at once."""
        batches = list(stream)
        return cls(*(np.concatenate([batch[column] for batch in batches]) for column in range(3)))

    def __len__(self) -> int:
        return len(self.arrival_s)


@dataclass(frozen=True)
class Played:
    """One run of a simulator: requests that it completed, and what its event loop took."""

    completed: int
    wall_s: float
    cpu_s: float


class Peer(Protocol):
    """Another simulator, installed somewhere on this machine."""

    @property
    def name(self) -> str:
        """As `options.peers` calls it."""
        ...

    @property
    def most_requests(self) -> int:
        """More than these would take it minutes."""
        ...

    def version(self) -> str:
        """What was run: a commit, a release, or a digest of its sources."""
        ...

    def play(self, workload: Workload, scratch: Path) -> Played:
        """Simulate all requests, leaving files in `scratch` only.

        Raises:
            UserError: if the program fails or takes too long.
        """
        ...


@dataclass(frozen=True)
class SplitwiseSim:
    """splitwise-sim (GitHub: Mutinifni/splitwise-sim), the simulator of the Splitwise paper (ISCA 2024).

    `git clone` it, and `pip install -r requirements.txt` in an environment of its own. It plays Llama 2 70B on 30 prefill and 90
    decode servers (DGX H100) under its own `mixed_pool` scheduler and its table of measured times: larger clusters make it no faster,
    smaller ones slower, since a transfer that finds no memory polls once per simulated second.

    It has prefill and decode pools, iteration-level batching and one event for many decode steps, as here. It does not have: a link
    that transfers share (each has its own 200 GB/s), a second cluster, routing by length, control loops, prefix caches.
    """

    checkout: Path
    python: Path
    name: ClassVar[str] = "splitwise-sim"
    most_requests: ClassVar[int] = 50_000
    prefill_servers: ClassVar[int] = 30
    decode_servers: ClassVar[int] = 90

    def __post_init__(self) -> None:
        for mark in ("run.py", "simulator.py", "configs/start_state/splitwise.yaml", "data/perf_model.csv"):
            if not (self.checkout / mark).is_file():
                said = f"options.peers: {self.name}: {self.checkout} is no checkout of it: {mark} is missing"
                raise UserError(f"{said}; accepted: a whole clone")
        _runnable(self.name, self.python)

    def version(self) -> str:
        """The commit of the checkout."""
        return _version_of(self.checkout)

    def play(self, workload: Workload, scratch: Path) -> Played:
        """Through run.py, with Hydra overrides in place of its configuration files."""
        pd.DataFrame(
            {
                "request_id": np.arange(len(workload)), "request_type": 2, "application_id": 0,
                "arrival_timestamp": workload.arrival_s, "batch_size": 1, "prompt_size": workload.input_tokens,
                "token_size": workload.output_tokens,
            }
        ).to_csv(scratch / "requests.csv", index=False)  # fmt: skip
        seconds = _timed(
            self.name,
            self.python,
            self.checkout,
            "simulator:Simulator.run",
            [
                "run.py", f"trace.dir={scratch}", "trace.filename=requests", f"hydra.run.dir={scratch / 'out'}", "end_time=1e12",
                "applications.0.model_architecture=llama2-70b", "applications.0.model_size=llama2-70b-fp16",
                "applications.0.scheduler=mixed_pool", "performance_model=db", "cluster=dgx-h100",
                f"cluster.servers.1.count={self.prefill_servers + self.decode_servers}", "start_state=splitwise",
                "start_state.split_type=homogeneous", f"start_state.prompt.num_instances={self.prefill_servers}",
                f"start_state.token.num_instances={self.decode_servers}",
            ],
            scratch,
        )  # fmt: skip
        done = scratch / "out" / "detailed" / "0.csv"
        return Played(len(pd.read_csv(done, usecols=["request_ids"])), **seconds)


@dataclass(frozen=True)
class Vidur:
    """Vidur (MLSys 2024): `pip install vidur==0.0.26` in an environment of its own, whose folder is the path that `VIDUR` holds.

    It plays Llama 3 8B on 8 replicas of one H100, the fewest that keep up with these requests, with Sarathi's chunked prefill, its compiled
    predictor of step times, and no metrics but those of requests. Memory is set so large that it never preempts, at which this release
    stops on an assertion. It downloads the measured times that it learns from; the adapter puts a roofline of that model in their
    place, since what a step is said to take hardly changes what it costs to simulate.

    It has batches, chunks and paged memory of every replica, in one event per step. It does not have: pools for prefill and decode
    that are apart, any link, a second cluster, routing by length, control loops, prefix caches across replicas.
    """

    environment: Path
    python: Path
    name: ClassVar[str] = "vidur"
    most_requests: ClassVar[int] = 500
    replicas: ClassVar[int] = 8

    def __post_init__(self) -> None:
        _runnable(self.name, self.python)
        self.version()

    def version(self) -> str:
        """The release that is installed."""
        asking = "from importlib.metadata import version; print(version('vidur'))"
        done = subprocess.run([str(self.python), "-c", asking], capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(
                f"options.peers: vidur: {self.environment} does not have it; accepted: an environment with vidur installed"
            )
        return done.stdout.strip()

    def play(self, workload: Workload, scratch: Path) -> Played:
        """Through vidur.main, with a table of times and a trace of requests."""
        _roofline(scratch / "cache" / "profiling_data")
        pd.DataFrame(
            {
                "Date": "2023-08-21", "Time": workload.arrival_s, "PromptTokenCount": workload.input_tokens,
                "CompletionTokenCount": workload.output_tokens,
            }
        ).to_csv(scratch / "requests.csv", index=False)  # fmt: skip
        longest = 256 * -(-int((workload.input_tokens + workload.output_tokens).max()) // 256)
        trace, learned = "--trace_request_generator_config_", "--random_forrest_execution_time_predictor_config_"
        seconds = _timed(
            self.name,
            self.python,
            scratch,
            "vidur.simulator:Simulator.run",
            [
                "-m", "vidur.main", "--cluster_config_num_replicas", str(self.replicas),
                "--replica_config_model_name", "meta-llama/Llama-3-8B", "--replica_config_device", "h100",
                "--replica_config_network_device", "h100_dgx", "--replica_config_tensor_parallel_size", "1",
                "--replica_config_num_pipeline_stages", "1", "--cache_config_num_blocks", "200000",
                "--request_generator_config_type", "trace_replay",
                f"{trace}trace_file", str(scratch / "requests.csv"), f"{trace}max_tokens", str(longest),
                f"{trace}prefill_scale_factor", "1", f"{trace}time_scale_factor", "1",
                "--replica_scheduler_config_type", "sarathi", "--sarathi_scheduler_config_chunk_size", "4096",
                "--execution_time_predictor_config_type", "random_forrest", f"{learned}num_estimators", "4",
                f"{learned}max_depth", "16", f"{learned}min_samples_split", "2", f"{learned}num_training_job_threads", "1",
                f"{learned}prediction_max_tokens_per_request", str(longest), f"{learned}cache_dir", str(scratch / "cache"),
                f"{learned}use_native_execution_time_predictor", "--metrics_config_output_dir", str(scratch / "out"),
                "--no-metrics_config_store_plots", "--no-metrics_config_enable_chrome_trace",
                "--no-metrics_config_store_batch_metrics", "--no-metrics_config_store_utilization_metrics",
            ],
            scratch,
        )  # fmt: skip
        (done,) = (scratch / "out").glob("*/request_metrics.csv")
        return Played(len(pd.read_csv(done)), **seconds)


def _roofline(folder: Path) -> None:
    """Times in ms of Llama 3 8B's operations per layer on one H100, where Vidur looks for the tables that it downloaded.

    Matrix products at half the peak (1e15 FLOP/s) above a floor for their weights and launches; attention at the pace of compute
    over a chunk and of memory (3.35 TB/s, 4 KiB of KVCache per token and layer) over a batch.
    """
    tokens = np.array([2**power for power in range(18)])
    of_model = {"n_embd": 4096, "n_kv_head": 8, "num_tensor_parallel_workers": 1}
    mlp = pd.DataFrame(
        {"num_tokens": tokens, **of_model, "n_head": 32, "n_expanded_embd": 14_336, "use_gated_mlp": True}
    )
    mlp["vocab_size"] = 128_256
    products = ("attn_pre_proj", "attn_post_proj", "mlp_up_proj", "mlp_down_proj")
    for operation in (*products, "mlp_act", "input_layernorm", "post_attention_layernorm", "attn_rope", "add"):
        mlp[f"time_stats.{operation}.median"] = 0.015 + 1.1e-4 * tokens
    cached = (0, *(4 ** np.arange(5, 9)), 131_072)
    prefill = [
        (chunk, 1, kv, 0.01 + 3.3e-8 * chunk * (kv + chunk)) for kv in cached for chunk in (32, 128, 512, 2048, 4096)
    ]
    decode = [(0, batch, kv, 0.01 + 1.2e-6 * batch * kv) for kv in cached for batch in (1, 2, 4, 8, 16, 32, 64, 128)]
    attention = pd.DataFrame(prefill + decode, columns=["prefill_chunk_size", "batch_size", "kv_cache_size", "ms"])
    attention = attention.assign(**of_model, n_q_head=32, block_size=16)
    for operation in ("attn_prefill", "attn_decode", "attn_kv_cache_save"):
        attention[f"time_stats.{operation}.median"] = attention["ms"]
    _downloaded(
        folder / "compute" / "datasets--project-vajra--dev-staging-meta-llama-llama-3-8b-h100",
        {"model": "meta-llama/Llama-3-8B", "device_sku": "h100"},
        {"mlp": mlp, "attention": attention},
    )
    _downloaded(folder / "network" / "datasets--project-vajra--dev-staging-h100-dgx", {"sku": "h100_dgx"}, {})


def _downloaded(folder: Path, configuration: Mapping[str, str], tables: Mapping[str, pd.DataFrame]) -> None:
    """A dataset as its hub's client keeps it once downloaded, so that it is found offline."""
    commit = "0" * 40
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    (snapshot / "config.json").write_text(json.dumps(configuration))
    for name, table in tables.items():
        table.to_csv(snapshot / f"{name}.csv.xz", index=False)


#: What `options.peers` knows: name → adapter of a folder and an interpreter.
PEERS: Mapping[str, Callable[[Path, Path], Peer]] = {SplitwiseSim.name: SplitwiseSim, Vidur.name: Vidur}


def peer_of(name: str) -> Peer:
    """The simulator of that name where its environment variable (SPLITWISE_SIM, VIDUR) says that it lies: `FOLDER` or `FOLDER:PYTHON`.

    Without an interpreter it is FOLDER/bin/python, or else the one that runs this. Where it lies is no part of the configuration: the
    same run on another machine is the same run.

    Raises:
        UserError: if the name is unknown, the variable is not set, or the folder does not hold that simulator.
    """
    if name not in PEERS:
        raise UserError(f"options.peers: {name!r}; accepted: {', '.join(sorted(PEERS))}")
    variable = name.upper().replace("-", "_")
    folder, _, python = os.environ.get(variable, "").partition(":")
    if not folder:
        raise UserError(
            f"options.peers: {name}: {variable} is not set; accepted: {variable}=FOLDER[:PYTHON] in the environment"
        )
    home = Path(folder).resolve()
    its_own = home / "bin" / "python"
    return PEERS[name](
        home, Path(python).absolute() if python else its_own if its_own.exists() else Path(sys.executable)
    )


def _runnable(name: str, python: Path) -> None:
    if not (python.is_file() and os.access(python, os.X_OK)):
        raise UserError(
            f"options.peers: {name}: {python} cannot be run; accepted: the interpreter of an environment with its packages"
        )


def _version_of(checkout: Path) -> str:
    """The commit of a clone; for a folder that is none, a digest of its Python files."""
    if (checkout / ".git").exists():
        command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return done.stdout.strip()
    digest = hashlib.sha256()
    for path in sorted(checkout.rglob("*.py")):
        digest.update(f"{path.relative_to(checkout)}\0".encode() + path.read_bytes())
    return f"sources {digest.hexdigest()[:12]}"


def _timed(name: str, python: Path, folder: Path, method: str, command: list[str], scratch: Path) -> dict[str, float]:
    """Run a peer's command in `folder`; seconds inside `method` (MODULE:CLASS.METHOD), on one thread, without network."""
    out, log = scratch / "loop.json", scratch / "log.txt"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment |= {
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "disabled",
    }
    with log.open("w") as file:
        try:
            argv = tied([str(python), str(_LOOP), str(out), method, *command])
            done = processes.run(argv, cwd=folder, environment=environment, output=file, timeout_s=_LIMIT_S)
        except subprocess.TimeoutExpired:
            raise UserError(f"{name}: not done after {_LIMIT_S:.0f} s; give it fewer with options.requests") from None
    if done.returncode or not out.is_file():
        said = " ".join(log.read_text(errors="replace").split()[-40:])
        raise UserError(f"{name}: exit status {done.returncode}; its last words: {said}")
    seconds: dict[str, float] = json.loads(out.read_text())
    return seconds
