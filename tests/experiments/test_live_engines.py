"""vLLM under the live router, against an engine that speaks as vLLM does: faults, bytes, one-line refusals, and nothing left."""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import ExitStack
from pathlib import Path

import fake_engine
import pytest
from test_engines import REAL, WRONG, instance, refused, started_below, value

from repro import app, runner
from repro.composition import compose
from repro.errors import UserError
from repro.models.served import write_served
from repro.record.directory import Record

SMALL = [
    "experiment=live_engines", "link.backend=none", "link.rate_bps=null", "link.rtt_s=0", "options.checkpoints=[dense]",
    "options.requests=12", "options.rate_per_s=6", "options.input_tokens=[40,400]", "options.output_tokens=3",
    "options.start_timeout_s=120", "tracking=disabled",
]  # fmt: skip


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_engine.environment(tmp_path_factory.mktemp("engines"))


def ran(folder: Path, engines: Path, *words: str) -> Record:
    arguments = [*SMALL, f"options.environment={engines}", f"results={folder / 'results'}", *words]
    return runner.run(compose(arguments), ["repro", *arguments], lambda line: None)


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["prfaas0.0", "pd0.1"])
def test_a_killed_instance_is_replaced_and_every_request_answered_once(
    killed: str, tmp_path: Path, engines: Path
) -> None:
    words = [
        "options.checkpoints=[hybrid]",
        f"options.killed={killed}",
        "options.kill_at_s=0.5",
        "options.kill_for_s=0.2",
    ]
    record = ran(tmp_path, engines, *words)
    assert value(record, "hybrid", "requests_lost") == value(record, "hybrid", "requests_answered_twice") == 0
    assert value(record, "hybrid", "instances_lost") == 1
    assert value(record, "hybrid", "tokens_match") == 1
    assert value(record, "hybrid", "kv_bytes") == value(record, "hybrid", "kv_bytes_layout")
    assert value(record, "hybrid", "processes_left") == 0
    requests = record.requests
    sizes = {40: 107_520 + 512 * 128, 400: 107_520 + 512 * 512}
    assert list(requests["payload_bytes"]) == [sizes[tokens] for tokens in requests["input_tokens"]]
    # Short ones are prefilled beside decode, long ones across the link once the instance is back.
    after = requests[requests["phase"] == "after"]
    assert set(after.loc[after["input_tokens"] == 40, "prefill_worker"]) == {"pd0.0"}
    assert set(after.loc[after["input_tokens"] == 400, "prefill_worker"]) == {"prfaas0.0"}
    assert set(after["decode_worker"]) == {"pd0.1"}
    assert not started_below(engines)
    left = [
        file for folder in ("/dev/shm", tempfile.gettempdir()) for file in Path(folder).glob(f"{fake_engine.LEFT}*")
    ]
    assert not left
    assert not list(record.path.glob("**/s-*"))


SILENT = [
    ({"FAKE_ALONE": "1"}, "nothing crosses from .* to pd0.*nixl_bytes_transferred_sum did not grow: it was decoded alone"),
    ({"FAKE_REFUSES": "llama"}, "instance .* failed: vLLM of .* exited .*NotImplementedError: llama has no kernel here"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("habit", "words"), SILENT, ids=["alone", "refuses"])
def test_an_engine_that_hands_nothing_over_or_ends_is_refused_before_a_request(
    habit: dict[str, str], words: str, tmp_path: Path, engines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, text in habit.items():
        monkeypatch.setenv(key, text)
    with pytest.raises(UserError, match=words) as refusal:
        ran(tmp_path, engines, "options.killed=null")
    assert "\n" not in str(refusal.value)
    assert not started_below(engines)


@pytest.mark.slow
def test_other_bytes_than_the_layouts_make_the_run_fail(
    tmp_path: Path, engines: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE_SHARE", "0.9")
    words = ["options.killed=null", "options.requests=2", f"options.environment={engines}", f"results={tmp_path}"]
    assert app.main([*SMALL, *words]) != 0
    assert "dense: 0 requests lost, 0 answered twice, 2 with other bytes than vLLM's layout" in capsys.readouterr().err


@pytest.mark.slow
def test_instances_that_run_already_are_routed_to_and_left_running(tmp_path: Path) -> None:
    checkpoint = write_served("dense", tmp_path)
    config = json.loads((checkpoint / "config.json").read_text())
    with ExitStack() as closing:
        one, two, three = (closing.enter_context(instance(config)) for _ in range(3))
        arguments = [
            *SMALL, f"options.checkpoints=[{checkpoint}]", f"options.endpoints.prefill=[{one}]", "options.killed=null",
            f"options.endpoints.decode=[{two},{three}]", f"results={tmp_path / 'results'}", "policy.n_p=0", "policy.threshold_tokens=0",
        ]  # fmt: skip
        record = runner.run(compose(arguments), ["repro", *arguments], lambda line: None)
        assert value(record, checkpoint.name, "requests_lost") == 0
    assert value(record, checkpoint.name, "tokens_match") == 1
    assert value(record, checkpoint.name, "offload_fraction") == 1
    assert value(record, checkpoint.name, "kv_bytes") == value(record, checkpoint.name, "kv_bytes_layout")
    assert set(record.requests["decode_worker"]) == {"pd0.0", "pd0.1"}


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(REAL not in os.environ, reason=f"{REAL} names no environment made by scripts/engines")
def test_the_real_engine_answers_everything_though_an_instance_is_killed(tmp_path: Path) -> None:
    arguments = ["experiment=live_engines", f"options.environment={os.environ[REAL]}", "options.start_timeout_s=600"]
    arguments += ["tracking=disabled", f"results={tmp_path}"]
    record = runner.run(compose(arguments), ["repro", *arguments], lambda line: None)
    for model in ("hybrid", "dense"):
        assert value(record, model, "requests_lost") == value(record, model, "requests_answered_twice") == 0
        assert value(record, model, "kv_bytes") == pytest.approx(value(record, model, "kv_bytes_layout"), rel=0.02)
        assert value(record, model, "processes_left") == 0


WRONG_HERE = [
    (["options.killed=pd0.7"], "options.killed: 'pd0.7' is none; accepted: prfaas0.0, pd0.0, pd0.1, or null"),
    (["policy.n_p=2"], "policy.n_p: 2 of 2 PD instances; accepted: 0 to 1"),
    (["policy.n_p=0"], "policy.n_p: 0 leaves nobody to prefill what is shorter than policy.threshold_tokens"),
    (["policy.threshold_tokens=null"], "policy.threshold_tokens, policy.n_p: null; accepted: numbers"),
    (["options.endpoints={prefill: [http://a], decode: [http://b]}"], "options.endpoints.decode: 1 addresses for cluster.pd.instances=2"),
    (["options.endpoints={prefill: [http://a], decode: [http://b,http://c]}"], "options.killed: instances of options.endpoints are not"),
    (["transport.connections=2"], "transport.connections: not read by experiment=live_engines"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "message"), [*WRONG, *WRONG_HERE], ids=lambda part: str(part)[:40])
def test_what_cannot_be_deployed_is_refused(
    words: list[str], message: str, tmp_path: Path, engines: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused([*SMALL, f"options.environment={engines}", *words], message, tmp_path, capsys)
