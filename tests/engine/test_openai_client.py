"""The client against servers with a socket: what it takes from a stream, and one clear line for what is none."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from repro import app
from repro.composition import compose
from repro.engine.openai import OpenAIServer, base_url, parse_counters
from repro.errors import UserError
from repro.experiments.profile_endpoint import check_endpoint
from repro.profiles.answers import BrokenAnswerError, RefusedError
from repro.profiles.measured import ProfileSpec

METRICS = """# HELP vllm:request_prefill_time_seconds Histogram
vllm:request_prefill_time_seconds_bucket{le="0.3",model_name="a"} 2.0
vllm:request_prefill_time_seconds_count{model_name="a"} 2.0
vllm:request_prefill_time_seconds_count{model_name="b"} 1.0
"""


class Habits:
    """What a server does; the defaults are those of a good one."""

    text_only = False
    tokens_per_word = 1
    knows_extras = True
    counts = True
    shows_text = True
    closes_after: int | None = None
    status = 200
    token_s = 0.0
    listed = True
    root = "/models/tiny"


@contextmanager
def served(habits: type[Habits]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None: ...

        def said(self, status: int, body: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def do_GET(self) -> None:
            if self.path == "/metrics":
                return self.said(200, METRICS)
            listed = [{"id": "tiny", "root": habits.root, "max_model_len": 4096}]
            return self.said(200, json.dumps({"data": listed}) if habits.listed else "<html>hello</html>")

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt, wanted = body["prompt"], body["max_tokens"]
            if habits.status != 200:
                return self.said(habits.status, json.dumps({"error": {"message": "out of\nmemory"}}))
            if (habits.text_only and not isinstance(prompt, str)) or (not habits.knows_extras and "ignore_eos" in body):
                return self.said(422, json.dumps({"error": {"message": "not understood"}}))
            length = len(prompt.split()) * habits.tokens_per_word if isinstance(prompt, str) else len(prompt)
            self.send_response(200)
            self.send_header("Connection", "close")
            self.end_headers()
            self.close_connection = True
            with contextlib.suppress(OSError):  # a client that has gone is one that waited long enough
                return self.stream(body, wanted, length)

        def stream(self, body: dict[str, Any], wanted: int, length: int) -> None:
            for index in range(wanted):
                if index == habits.closes_after:
                    return
                time.sleep(habits.token_s)
                ids = {"token_ids": [index]} if "return_token_ids" in body else {}
                end = "length" if index == wanted - 1 else None
                self.event({"choices": [{"text": "x" if habits.shows_text else "", "finish_reason": end, **ids}]})
            if habits.counts:
                self.event({"choices": [], "usage": {"prompt_tokens": length, "completion_tokens": wanted}})
            self.wfile.write(b"data: [DONE]\n\n")
            return

        def event(self, value: Any) -> None:
            self.wfile.write(f"data: {json.dumps(value)}\n\n".encode())
            self.wfile.flush()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_token_ids_go_in_and_every_token_comes_with_its_time() -> None:
    class Slow(Habits):
        token_s = 0.1

    with served(Slow) as url, OpenAIServer(url, 512) as server:
        assert server.prepare() == "token ids"
        assert (server.model, server.root, server.limit_tokens) == ("tiny", "/models/tiny", 4096)
        found = server.answer(server.prompt(40, np.random.default_rng(0)), 5)
        assert (found.prompt_tokens, found.output_tokens, found.tokens) == (40, 5, (0, 1, 2, 3, 4))
        # None before it can have been sent, and not all at once: how much later a loaded machine reads them is its own.
        times_s = np.array(found.token_times_s)
        since_s = found.ttft_s + times_s - times_s[0]
        assert (since_s >= 0.1 * np.arange(1, 6)).all()
        assert times_s[-1] - times_s[0] > 0.1
        assert len(server.together([[64] * 8] * 3, 2)) == 3
        assert server.counters() == {"vllm:request_prefill_time_seconds_count": 3.0}


def test_a_server_that_takes_text_only_gets_as_many_words_as_it_counts() -> None:
    class Texts(Habits):
        text_only, knows_extras = True, False

    with served(Texts) as url, OpenAIServer(url, 512) as server:
        assert server.prepare() == "words, counted by the server; the server may end answers by itself"
        assert server.answer(server.prompt(77, np.random.default_rng(0)), 1).prompt_tokens == 77


def test_a_token_without_text_counts_when_the_answer_ends() -> None:
    class Silent(Habits):
        shows_text, knows_extras = False, False

    with served(Silent) as url, OpenAIServer(url, 512) as server:
        server.prepare()
        assert server.answer([64] * 8, 1).token_counts == (1,)


REFUSALS = [
    ({"text_only": True, "tokens_per_word": 2}, "counts 64 common words as 128 tokens"),
    ({"text_only": True, "counts": False}, "does not count its tokens"),
    ({"status": 404}, "refuses prompts as token ids and as text: status 404 (out of memory)"),
    ({"status": 500}, "a prompt of 16 tokens: status 500 (out of memory)"),
    ({"closes_after": 1}, "closed before the answer was complete"),
]


@pytest.mark.parametrize(("values", "message"), REFUSALS, ids=lambda part: str(part)[:24])
def test_what_a_server_does_wrong_is_said_in_one_line(values: dict[str, Any], message: str) -> None:
    with (
        served(type("Bad", (Habits,), values)) as url,
        OpenAIServer(url, 512) as server,
        pytest.raises(UserError) as caught,
    ):
        server.prepare()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_server_that_says_nothing_in_time_breaks_its_answer() -> None:
    class Stuck(Habits):
        token_s = 0.5

    within = pytest.raises(BrokenAnswerError, match=r"within 0\.1 s")
    with served(Stuck) as url, OpenAIServer(url, 512, timeout_s=0.1) as server, within:
        server.answer([64] * 8, 3)


def test_errors_of_a_request_and_of_the_server_are_told_apart() -> None:
    refused = pytest.raises(RefusedError, match="status 400")
    with served(type("Bad", (Habits,), {"status": 400})) as url, OpenAIServer(url, 512) as server, refused:
        server.complete([64] * 8, 1)


def test_an_address_that_leads_nowhere_is_named() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(UserError, match=r"options\.endpoint: http://127\.0\.0\.1:\d+/v1 cannot be reached"):
            OpenAIServer(f"http://127.0.0.1:{free.getsockname()[1]}", 512)
    with (
        served(type("Other", (Habits,), {"listed": False})) as url,
        pytest.raises(UserError, match="is no list of models"),
    ):
        OpenAIServer(url, 512)
    with (
        served(Habits) as url,
        pytest.raises(UserError, match=r"options\.served_model: 'big' is not served; accepted: tiny"),
    ):
        OpenAIServer(url, 512, model="big")


@pytest.mark.parametrize("text", ["localhost:8000", "ftp://a", "", "http://user:word@host"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"^options\.endpoint: "):
        base_url(text, "options.endpoint")


def test_addresses_end_in_v1_once_and_counters_are_summed() -> None:
    assert base_url("http://a:1/", "k") == base_url("http://a:1/v1", "k") == "http://a:1/v1"
    assert parse_counters(METRICS) == {"vllm:request_prefill_time_seconds_count": 3.0}


@pytest.mark.parametrize(("root", "accepted"), [("kimi_linear_tiny", True), ("/data/kimi_linear", False)])
def test_a_tiny_model_is_profiled_only_where_the_server_says_that_it_is_that(root: str, accepted: bool) -> None:
    settings = compose(["experiment=profile"]).settings
    with served(type("Named", (Habits,), {"root": root})) as url:
        if accepted:
            check_endpoint(settings, ProfileSpec(), url)
        else:
            with pytest.raises(UserError, match=r"^pretrained: null; .* it is hardly the tiny kimi_linear"):
                check_endpoint(settings, ProfileSpec(), url)


WRONG = [
    (["options.endpoint=http://127.0.0.1:1"], "error: pretrained: null"),
    (["options.endpoint=http://127.0.0.1:1", "size=full", "options.device=cpu"], "error: options.device: cpu"),
    (["options.served_model=a"], "error: options.served_model: a; only of options.endpoint"),
    (["options.endpoint=nowhere", "size=full"], "error: options.endpoint: 'nowhere' is no address"),
]


@pytest.mark.parametrize(("words", "message"), WRONG, ids=lambda part: str(part)[-24:])
def test_keys_that_do_not_go_together_are_refused(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.main(["experiment=profile", *words, "tracking=disabled", f"results={tmp_path / 'results'}"]) == 2
    assert capsys.readouterr().err.startswith(message)
    assert not (tmp_path / "results").exists()
