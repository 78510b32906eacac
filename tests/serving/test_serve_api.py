"""The OpenAI-compatible front over a live deployment that computes: right tokens, honest counts, clear refusals, nothing left behind."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import torch

from repro.engine.openai import OpenAIServer, parse_counters
from repro.engine.reference import generate
from repro.engine.torch_engine import EngineSpec
from repro.errors import UserError
from repro.experiments.computed import Computing
from repro.experiments.live import Deployment, Wire, deployed
from repro.experiments.split_model import model_layout, vocabulary_of
from repro.kvcache.pool import CacheSpec, GroupSpec
from repro.kvcache.prefix import PrefixCacheSpec
from repro.link import LinkSpec
from repro.models.build import build
from repro.models.spec import load
from repro.profiles.base import DecodeStep, KVSize, PhaseProfile, PrefillCurve
from repro.profiles.presets import save_profile
from repro.record import requests as schema
from repro.scheduling.policies import LengthAware, Threshold
from repro.scheduling.spec import SchedulerSpec
from repro.serving.api import Api, Served
from repro.serving.exposition import Exposition
from repro.serving.front import Front, Limits
from repro.serving.http_server import listening, serve_until
from repro.serving.router import Router
from repro.serving.scale import Scale
from repro.serving.tokenizer import ByteTokenizer
from repro.simulate.link_spec import SharedLinkSpec
from repro.simulate.spec import PdCluster, PrfaasCluster, SimulationSpec
from repro.transport import TransportSpec
from repro.verbs import serve

MODEL = load("kimi_linear")
WORDS = vocabulary_of(MODEL)
#: Longer prompts than this are offloaded.
THRESHOLD = 64
PROFILE = PhaseProfile(
    "tiny", MODEL.name, "a", 1, PrefillCurve(tokens=(16, 512), seconds=(0.01, 0.1), interpolation="linear"),
    KVSize(1e5, 1e3), DecodeStep(0.01, batch_max=8),
)  # fmt: skip
SPEC = SimulationSpec(
    (PdCluster(PROFILE, 1, 1),),
    (PrfaasCluster(PROFILE, 1, SharedLinkSpec(1e10, 0.0)),),
    SchedulerSpec(Threshold(), threshold_tokens=THRESHOLD),
)
WIRE = Wire(LinkSpec(rate_bps=None, backend="none"), TransportSpec(connections=1), 1, Scale())
LIMITS = Limits(body_bytes=1 << 16, context_tokens=2048, output_tokens=1024, requests=4, timeout_s=30.0)


@dataclass(frozen=True)
class Running:
    live: Deployment
    front: Front
    url: str
    client: httpx.Client
    router: Router

    def ask(self, path: str = "completions", **body: Any) -> httpx.Response:
        return self.client.post(f"/v1/{path}", json={"model": MODEL.name, **body})

    def counters(self) -> dict[str, float]:
        """Samples of /metrics by name and labels."""
        lines = self.client.get("/metrics").text.splitlines()
        pairs = [line.rpartition(" ") for line in lines if not line.startswith("#")]
        return {name: float(value) for name, _, value in pairs}

    def until(self, name: str, least: float) -> float:
        """The counter once it has reached that; it may be some moments behind an answer."""
        until_s = time.monotonic() + 10.0
        while (found := self.counters().get(name, 0.0)) < least and time.monotonic() < until_s:
            time.sleep(0.05)
        assert found >= least, name
        return found


@contextmanager
def served(
    folder: Path, computing: Computing, spec: SimulationSpec = SPEC, chains: Callable[[Any], Any] = lambda prompt: None
) -> Iterator[Running]:
    """A deployment that serves at a free port."""
    over = threading.Event()
    with (
        listening("127.0.0.1", 0) as listener,
        deployed(spec, WIRE, folder, "serve-test", 0, computing) as live,
    ):
        front = Front(Exposition(MODEL.name), LIMITS, live.first_number(), chains)
        api = Api(front, Served(MODEL.name, MODEL.name, ByteTokenizer(WORDS), WORDS))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with live.serving(front, LIMITS.requests + 1) as router, httpx.Client(base_url=url, timeout=30.0) as client:
            thread = threading.Thread(target=serve_until, args=(over, router, front, api, listener))
            thread.start()
            try:
                yield Running(live, front, url, client, router)
            finally:
                over.set()
                thread.join()


COMPUTING = Computing(EngineSpec(MODEL, chunk_tokens=64), WORDS, 1, streams=True)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with served(tmp_path_factory.mktemp("serve"), COMPUTING) as found:
        yield found


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return build(MODEL, "cpu")


def prompt(tokens: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, WORDS, tokens)]


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream, which must end as it should."""
    lines = [line[6:] for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


@pytest.mark.parametrize("length", [40, 200], ids=["local", "offloaded"])
def test_an_answer_is_what_the_model_itself_generates(running: Running, model: torch.nn.Module, length: int) -> None:
    ids = prompt(length)
    expected = list(generate(model, torch.tensor([ids]), 6).tokens)
    response = running.ask(prompt=ids, max_tokens=6, return_token_ids=True)
    assert response.status_code == 200
    (choice,) = response.json()["choices"]
    assert choice["token_ids"] == expected
    assert choice["text"] == "".join(map(ByteTokenizer.shown, expected))
    assert choice["finish_reason"] == "length"
    assert response.json()["usage"] | {"prompt_tokens_details": None} == {
        "prompt_tokens": length, "completion_tokens": 6, "total_tokens": length + 6, "prompt_tokens_details": None,
    }  # fmt: skip


def test_it_shows_that_state_crossed_the_link_for_offloaded_requests_alone(running: Running) -> None:
    running.ask(prompt=prompt(200, 1), max_tokens=2)
    time.sleep(1.5)  # all that was sent so far is counted
    crossed, arrived = 'prfaas_link_bytes_total{kind="wire"}', 'prfaas_kv_bytes_total{route="prfaas"}'
    before = running.counters()
    running.ask(prompt=prompt(50), max_tokens=2)
    local = running.counters()
    assert local[arrived] == before[arrived]
    assert local['prfaas_kv_bytes_total{route="pd"}'] > before['prfaas_kv_bytes_total{route="pd"}']
    running.ask(prompt=prompt(300), max_tokens=2)
    size = model_layout(MODEL).kv_bytes(299)
    assert running.until(arrived, before[arrived] + size) == before[arrived] + size
    assert running.until(crossed, before[crossed] + size) < before[crossed] + 1.2 * size
    view = running.router.view().result(5)
    assert view.crossed_bytes == running.counters()[arrived]
    assert view.arrived == view.answered + view.unanswered + sum(view.phases.values())
    assert local["prfaas_threshold_tokens"] == THRESHOLD
    assert running.counters()['prfaas_instance_requests{instance="pd0.1",role="decode"}'] == 0


def test_a_stream_brings_every_token_by_itself_and_the_counts_at_last(running: Running) -> None:
    asked = {"prompt": prompt(100), "max_tokens": 5, "return_token_ids": True}
    whole = running.ask(**asked).json()["choices"][0]
    *tokens, last = events(running.ask(**asked, stream=True, stream_options={"include_usage": True}))
    assert [event["choices"][0]["token_ids"] for event in tokens] == [[token] for token in whole["token_ids"]]
    assert "".join(event["choices"][0]["text"] for event in tokens) == whole["text"]
    assert [event["choices"][0]["finish_reason"] for event in tokens] == [None] * 4 + ["length"]
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 5)


def test_a_chat_is_answered_by_the_assistant(running: Running) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "What crosses the link?"}]}]
    whole = running.ask("chat/completions", messages=messages, max_completion_tokens=3).json()
    assert whole["object"] == "chat.completion"
    assert whole["usage"]["prompt_tokens"] == len("user: What crosses the link?\nassistant: ")
    chunks = events(running.ask("chat/completions", messages=messages, max_tokens=3, stream=True))
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    text = "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks)
    assert text == whole["choices"][0]["message"]["content"]


def test_an_answer_ends_at_a_token_or_text_of_the_clients(running: Running) -> None:
    ids = prompt(90)
    tokens = running.ask(prompt=ids, max_tokens=8, return_token_ids=True).json()["choices"][0]["token_ids"]
    third = tokens[2]
    first = tokens.index(third) + 1
    ended = running.ask(prompt=ids, max_tokens=8, stop_token_ids=[third]).json()
    assert ended["choices"][0]["finish_reason"] == "stop"
    assert ended["usage"]["completion_tokens"] == first
    assert ended["choices"][0]["text"] == "".join(map(ByteTokenizer.shown, tokens[: first - 1]))
    by_text = running.ask(prompt=ids, max_tokens=8, stop=[ByteTokenizer.shown(third)]).json()
    assert by_text["choices"] == ended["choices"]


@pytest.mark.parametrize(
    ("body", "status", "param", "code"),
    [
        ({"model": "gpt-4", "prompt": "ab"}, 404, "model", "model_not_found"),
        ({"prompt": "a"}, 400, "prompt", "invalid_value"),
        ({"prompt": [1, WORDS]}, 400, "prompt", "invalid_value"),
        ({"prompt": ["ab", "cd"]}, 400, "prompt", "invalid_value"),
        ({"prompt": {"text": "ab"}}, 400, "prompt", "invalid_type"),
        ({"max_tokens": 3}, 400, None, "invalid_type"),
        ({"prompt": "ab", "max_tokens": "many"}, 400, "max_tokens", "invalid_type"),
        ({"prompt": "ab", "max_tokens": 0}, 400, "max_tokens", "invalid_value"),
        ({"prompt": "ab", "max_tokens": 1025}, 400, "max_tokens", "invalid_value"),
        ({"prompt": [7] * 2040, "max_tokens": 16}, 400, "prompt", "context_length_exceeded"),
        ({"prompt": "ab", "temperature": 0.7}, 400, "temperature", "unsupported_parameter"),
        ({"prompt": "ab", "n": 2}, 400, "n", "unsupported_parameter"),
    ],
)
def test_a_wrong_request_is_refused_by_name(
    running: Running, body: dict[str, Any], status: int, param: str | None, code: str
) -> None:
    response = running.ask(**body)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (status, param, code)
    assert error["message"]


def test_what_is_no_request_is_refused_in_the_same_form(running: Running) -> None:
    answers = {
        400: running.client.post("/v1/completions", content=b"{nothing"),
        413: running.ask(prompt="a" * (1 << 16)),
        404: running.client.get("/v1/embeddings"),
        405: running.client.get("/v1/completions"),
    }
    assert {status: answer.status_code for status, answer in answers.items()} == {status: status for status in answers}
    assert all(answer.json()["error"]["message"] for answer in answers.values())


def test_more_requests_than_the_limit_are_turned_away_at_once(running: Running) -> None:
    with ThreadPoolExecutor(10) as threads:
        found = list(threads.map(lambda seed: running.ask(prompt=prompt(80, seed), max_tokens=24), range(10)))
    statuses = [response.status_code for response in found]
    assert set(statuses) == {200, 429}
    assert statuses.count(200) >= LIMITS.requests
    refused = found[statuses.index(429)]
    assert refused.headers["retry-after"] == "1"
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert running.counters()["prfaas_requests_turned_away_total"] >= statuses.count(429)


def test_a_client_that_goes_away_frees_its_place(running: Running) -> None:
    name = 'prfaas_requests_total{outcome="cancelled",route="prfaas"}'
    before = running.counters().get(name, 0.0)
    asked = {"model": MODEL.name, "prompt": prompt(100), "max_tokens": 1000, "stream": True}
    with running.client.stream("POST", "/v1/completions", json=asked) as response:
        next(response.iter_lines())
    running.until(name, before + 1)
    assert running.ask(prompt=prompt(100), max_tokens=2).status_code == 200
    assert running.counters()['prfaas_instance_requests{instance="pd0.1",role="decode"}'] == 0


def test_the_kits_own_client_measures_it_as_any_engine(running: Running) -> None:
    with OpenAIServer(running.url, WORDS) as server:
        assert server.prepare() == "token ids"
        assert (server.model, server.limit_tokens) == (MODEL.name, LIMITS.context_tokens)
        answer = server.answer(prompt(120), 7)
        assert (answer.prompt_tokens, answer.output_tokens, len(answer.tokens)) == (120, 7, 7)
        assert parse_counters(running.client.get("/metrics").text)["prfaas_ttft_seconds_count"] >= 1


def test_times_at_the_front_contain_those_of_the_router(running: Running) -> None:
    running.ask(prompt=prompt(150), max_tokens=4)
    running.until('prfaas_requests_total{outcome="ok",route="prfaas"}', 1)
    rows = [row for row in running.front.rows if row["outcome"] == "ok"]
    assert rows
    for row in rows:
        assert row["queue_s"] + row["prefill_s"] < row["ttft_s"] <= row["ttft_front_s"]
    assert set(rows[0]) >= set(schema.COLUMNS)


def test_health_and_models_say_what_serves(running: Running) -> None:
    assert running.client.get("/health").json() == {"status": "ok", "instances": {"decode": 1, "prefill": 2}}
    (model,) = running.client.get("/v1/models").json()["data"]
    assert (model["id"], model["max_model_len"]) == (MODEL.name, LIMITS.context_tokens)
    assert running.client.get(f"/v1/models/{MODEL.name}").json() == model


def test_with_a_key_only_those_who_bring_it_are_answered(running: Running) -> None:
    app = Api(running.front, Served(MODEL.name, MODEL.name, ByteTokenizer(WORDS), WORDS), "s3cret").app()

    async def statuses() -> list[int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client:
            given = [{}, {"authorization": "Bearer wrong"}, {"authorization": "Bearer s3cret"}]
            return [(await client.get("/v1/models", headers=headers)).status_code for headers in given]

    assert asyncio.run(statuses()) == [401, 401, 200]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--api-key-variable", "NO_SUCH_KEY"], "NO_SUCH_KEY is not set"),
        (["--host", "0.0.0.0"], "open to other machines"),
        (["--port", "99999"], "accepted"),
        (["--max-requests", "0"], "accepted: 1 or more"),
        (["--batch-max", "0"], "--batch-max: 0; accepted: 1 or more"),
        (["experiment=table6"], "runs no experiment"),
        (["cost.name=x"], "cost.name: not read by serve"),
        (["cluster.prfaas.instances=0"], "1 or more"),
        (["--prot", "1"], "see python -m repro serve --help"),
    ],
)
def test_a_wrong_command_line_is_one_line(argv: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(words)) as raised:
        serve.main([f"results={tmp_path}", "--port", "0", *argv])
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with listening("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"127.0.0.1:{port} cannot be listened on \(Address already in use\)"):
            serve.main([f"results={tmp_path}", "--port", str(port)])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_nothing_is_left_of_a_server_that_was_told_to_stop_or_killed(number: signal.Signals, tmp_path: Path) -> None:
    save_profile(PROFILE, tmp_path / "profiles" / "tiny.yaml")
    argv = [
        sys.executable,
        "-m",
        "repro",
        "serve",
        "--port",
        "0",
        "profile=tiny",
        f"results={tmp_path}",
        "label=here",
        "link.backend=none",
        "link.rate_bps=null",
    ]
    environment = {**os.environ, "SERVE_KEY": "a key of the test's", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [*argv, "--api-key-variable", "SERVE_KEY"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as head:
        assert head.stderr is not None
        assert head.stdout is not None
        url = next(match[0] for line in head.stderr if (match := re.search(r"http://[\d.:]+", line)))
        children = psutil.Process(head.pid).children(recursive=True)
        assert len(children) >= 3
        headers = {"authorization": "Bearer a key of the test's"}
        body = {"model": MODEL.name, "prompt": prompt(300), "max_tokens": 2}
        assert httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60.0).status_code == 200
        head.send_signal(number)
        said = head.stdout.read()
    _, alive = psutil.wait_procs(children, timeout=10.0)
    assert not alive
    if number is signal.SIGKILL:
        return
    assert head.returncode == 0
    folder = tmp_path / "serve" / "here"
    assert said.splitlines()[-1] == str(folder)
    assert {"DONE", "requests.parquet", "provenance.json"} <= {path.name for path in folder.iterdir()}
    assert not any(b"a key of the test's" in path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_a_chat_goes_on_from_cached_state_with_the_tokens_that_the_model_itself_generates(
    model: torch.nn.Module, tmp_path: Path
) -> None:
    cache = PrefixCacheSpec(1e8, block_tokens=64)
    computing = replace(COMPUTING, caches={"pd0": cache, "prfaas0": cache})
    groups = GroupSpec("growing", "block", 1e3), GroupSpec("fixed", "request", 1e5)
    best = replace(SPEC, cache=CacheSpec(groups, 1e8, 64), scheduler=replace(SPEC.scheduler, router=LengthAware()))
    with served(tmp_path, computing, best, partial(computing.named, block_tokens=64)) as running:
        said = prompt(150)  # offloaded; what PrfaaS computed stays there
        for added in (0, 20, 100):
            said = said + prompt(added, seed=added)
            expected = list(generate(model, torch.tensor([said]), 4).tokens)
            (choice,) = running.ask(prompt=said, max_tokens=4, return_token_ids=True).json()["choices"]
            assert choice["token_ids"] == expected
            said = said + expected
        rows = list(running.front.rows)
        assert [row["cached_tokens"] for row in rows] == [0, 128, 128]
        # The second turn is short beside what is cached, and is prefilled where PrfaaS's prefix has crossed the link to.
        assert [row["route"] for row in rows] == ["prfaas", "pd", "prfaas"]
        assert running.router.copied_bytes["prfaas0"] > 0
        assert running.until("prfaas_prefix_cache_hits_total", 256) == 256
