"""A client of any OpenAI-compatible server: prompts of exact token lengths, streamed answers with the time of every token.

Prompts go in as token ids, so that no tokenizer stands between what is asked and what is computed; a server that takes text only
gets common words, as many as its own count (`usage`) says that it takes. What a server does not know of (`ignore_eos`,
`return_token_ids`) is left out once it has refused it. A key for the server is read from the environment, and never recorded.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import httpx
import numpy as np

from repro.errors import UserError
from repro.profiles.answers import Answer, BrokenAnswerError, RefusedError

#: Each is one token, blank included, in the vocabularies of today's models; a server's own count is asked all the same.
_WORDS: Final = """
time year people way day man thing woman life child world school state family student group country problem hand part
place case week company system program question work government number night point home water room mother area money
story fact month lot right study book eye job word business issue side kind head house service friend father power hour
game line end member law car city community name president team minute idea kid body information back parent face others
level office door health person art war history party result change morning reason research girl guy moment air teacher
force education
"""
#: Not of the common interface: no end before the last token asked for, and tokens by their ids.
_EXTRAS: Final = {"ignore_eos": True, "return_token_ids": True}
_SAMPLE = re.compile(r"^([A-Za-z_:][\w:]*)(\{.*\})?\s+(\S+)")
_CHUNK_CHARACTERS: Final = 200
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_NO_LIMITS: Final = httpx.Limits(max_connections=None)


def base_url(text: str, key: str) -> str:
    """The server's address with /v1 at its end. Raises UserError naming `key`."""
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise UserError(
            f"{key}: {text!r} is no address; accepted: http://host:port or https://host, with or without /v1"
        )
    if "@" in parts.netloc:
        raise UserError(
            f"{key}: a name or password in the address would be recorded; accepted: options.api_key_variable"
        )
    stem = text.rstrip("/")
    return stem if stem.endswith("/v1") else f"{stem}/v1"


class OpenAIServer:
    """A server behind a URL; a context manager. Every method may raise BrokenAnswerError or RefusedError.

    `vocabulary` bounds the token ids of prompts; `as_text` sends words even where ids are taken. With `socket` the server is behind
    that Unix socket, whatever the URL's host.
    """

    def __init__(
        self,
        url: str,
        vocabulary: int,
        *,
        model: str | None = None,
        key_variable: str | None = None,
        timeout_s: float = 60.0,
        key: str = "options.endpoint",
        as_text: bool = False,
        socket: Path | None = None,
    ) -> None:
        self.url, self._key, self._vocabulary = base_url(url, key), key, vocabulary
        headers = {}
        if key_variable is not None:
            if not os.environ.get(key_variable):
                raise UserError(f"options.api_key_variable: {key_variable} is not set in the environment")
            headers["Authorization"] = f"Bearer {os.environ[key_variable]}"
        self._timeout_s = timeout_s
        self._client = httpx.Client(
            headers=headers,
            timeout=httpx.Timeout(timeout_s),
            transport=httpx.HTTPTransport(
                uds=None if socket is None else str(socket), limits=_NO_LIMITS, trust_env=False
            ),
            trust_env=False,
        )
        self._extras: dict[str, Any] = dict(_EXTRAS)
        self._added = 0
        self.as_text = as_text
        self.limit_tokens: int | None = None
        self.model, self.root = self._models(model)

    def __enter__(self) -> OpenAIServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def _models(self, asked: str | None) -> tuple[str, str]:
        """The model to ask for, and what the server says that it was loaded from."""
        try:
            response = self._client.get(f"{self.url}/models")
            response.raise_for_status()
            listed = {str(one["id"]): one for one in response.json()["data"]}
        except httpx.HTTPStatusError as error:
            status = error.response.status_code
            raise UserError(
                f"{self._key}: {self.url}/models answers with status {status}{_said(error.response)}"
            ) from error
        except httpx.HTTPError as error:
            raise UserError(f"{self._key}: {self.url} cannot be reached: {_words(error)}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self._key}: {self.url}/models is no list of models; accepted: an OpenAI-compatible server"
            ) from error
        if asked is not None and asked not in listed:
            raise UserError(f"options.served_model: {asked!r} is not served; accepted: {', '.join(listed)}")
        if not listed:
            raise UserError(f"{self._key}: {self.url} serves no model")
        name = asked or next(iter(listed))
        limit = listed[name].get("max_model_len")
        self.limit_tokens = int(limit) if isinstance(limit, (int, float)) else None
        return name, str(listed[name].get("root") or name)

    def prepare(self) -> str:
        """Find out what the server takes, by small requests; returns in words how prompts are sent.

        Raises:
            UserError: where it takes neither token ids nor text.
        """
        rng = np.random.default_rng()
        refusal = ""
        for as_text in (self.as_text,) if self.as_text else (False, True):
            self.as_text = as_text
            for extras in ({**_EXTRAS}, {"ignore_eos": True}, {}):
                self._extras = extras
                try:
                    self.answer(self._raw(16, rng), 2)
                except RefusedError as error:
                    refusal = refusal or str(error)
                    continue
                except BrokenAnswerError as error:
                    raise UserError(f"{self._key}: {self.url}: a prompt of 16 tokens: {error}") from error
                if as_text:
                    self._count_words(rng)
                return ("words, counted by the server" if as_text else "token ids") + (
                    "" if "ignore_eos" in extras else "; the server may end answers by itself"
                )
        raise UserError(f"{self._key}: {self.url} refuses prompts as token ids and as text: {refusal}")

    def _count_words(self, rng: np.random.Generator) -> None:
        """How many tokens the server counts beside one for each word. Raises UserError where words are not one token each."""
        counts = {words: self.answer(self._raw(words, rng), 1).prompt_tokens for words in (32, 96)}
        short, long = counts.values()
        if short is None or long is None:
            raise UserError(
                f"{self._key}: {self.url} takes text only and does not count its tokens (`usage`): prompts of exact lengths cannot be made"
            )
        if long - short != 64:
            raise UserError(
                f"{self._key}: {self.url} counts 64 common words as {long - short} tokens: text cannot be made of exact lengths; "
                "accepted: a server that takes token ids"
            )
        self._added = short - 32

    def prompt(self, tokens: int, rng: np.random.Generator) -> Any:
        """Random token ids, or, as text, words that the server counts as so many tokens."""
        return self._raw(max(tokens - self._added, 1), rng)

    def _raw(self, tokens: int, rng: np.random.Generator) -> Any:
        if self.as_text:
            words = _WORDS.split()
            return " ".join(words[index] for index in rng.integers(0, len(words), tokens))
        return rng.integers(self._vocabulary // 8, self._vocabulary, tokens).tolist()

    def answer(
        self, prompt: Any, output_tokens: int, heard: Callable[[int], None] | None = None, **extra: Any
    ) -> Answer:
        """The streamed answer of so many tokens, greedily.

        `heard` is called after every event with the tokens so far; what it raises ends the request, at the server too.
        """
        body = {
            "model": self.model, "prompt": prompt, "max_tokens": output_tokens, "temperature": 0.0, "stream": True,
            "stream_options": {"include_usage": True}, **self._extras, **extra,
        }  # fmt: skip
        start_s = time.perf_counter()
        events = _Heard()
        try:
            with self._client.stream("POST", f"{self.url}/completions", json=body) as response:
                if response.status_code != 200:
                    response.read()
                    problem = f"status {response.status_code}{_said(response)}"
                    raise (RefusedError if 400 <= response.status_code < 500 else BrokenAnswerError)(problem)
                for line in response.iter_lines():
                    if time.perf_counter() - start_s > self._timeout_s:
                        raise BrokenAnswerError(f"no end of the answer within {self._timeout_s:g} s")
                    if not line.startswith("data:"):
                        continue
                    if not events.take(line[5:].strip(), time.perf_counter() - start_s):
                        break
                    if heard is not None:
                        heard(len(events.tokens))
        except httpx.TimeoutException as error:
            raise BrokenAnswerError(f"nothing came within {self._timeout_s:g} s") from error
        except httpx.HTTPError as error:
            raise BrokenAnswerError(_words(error)) from error
        return events.answer(start_s)

    def complete(self, prompt: Sequence[int], output_tokens: int, **extra: Any) -> dict[str, Any]:
        """The whole answer at once, as the server gives it."""
        body = {
            "model": self.model,
            "prompt": list(prompt),
            "max_tokens": output_tokens,
            "temperature": 0.0,
            **self._extras,
            **extra,
        }
        try:
            response = self._client.post(f"{self.url}/completions", json=body)
        except httpx.HTTPError as error:
            raise BrokenAnswerError(_words(error)) from error
        if response.status_code != 200:
            problem = f"status {response.status_code}{_said(response)}"
            raise (RefusedError if 400 <= response.status_code < 500 else BrokenAnswerError)(problem)
        found = response.json()
        assert isinstance(found, dict)
        return found

    def together(self, prompts: Sequence[Any], output_tokens: int) -> list[Answer]:
        """The answers to prompts that are sent at once, a thread for each."""
        with ThreadPoolExecutor(len(prompts)) as threads:
            return list(threads.map(lambda prompt: self.answer(prompt, output_tokens), prompts))

    def reach(self) -> None:
        """Ask for something that computes nothing. Raises BrokenAnswerError where the server cannot be reached."""
        try:
            self._client.get(f"{self.url}/models").read()
        except httpx.HTTPError as error:
            raise BrokenAnswerError(_words(error)) from error

    def counters(self) -> Mapping[str, float]:
        """What /metrics shows, in the text form of Prometheus, summed over labels; empty where there is none."""
        return parse_counters(self._metrics())

    def info(self, name: str) -> Mapping[str, str]:
        """The labels of a metric of /metrics whose value says nothing; empty where there is none."""
        return parse_info(self._metrics(), name)

    def _metrics(self) -> str:
        try:
            response = self._client.get(f"{self.url.removesuffix('/v1')}/metrics")
        except httpx.HTTPError:
            return ""
        return response.text if response.status_code == 200 else ""


def answers_at(socket: Path) -> bool:
    """Whether a server behind that Unix socket says that it is ready."""
    transport = httpx.HTTPTransport(uds=str(socket), verify=False, trust_env=False)
    try:
        with httpx.Client(transport=transport, timeout=5.0, trust_env=False) as client:
            return client.get("http://engine/health").status_code == 200
    except httpx.HTTPError:
        return False


def parse_info(text: str, name: str) -> dict[str, str]:
    """The labels of the first sample of that name in Prometheus' text form."""
    for line in text.splitlines():
        match = _SAMPLE.match(line)
        if match is not None and match[1] == name:
            return dict(_LABEL.findall(match[2] or ""))
    return {}


def parse_counters(text: str) -> dict[str, float]:
    """Samples of Prometheus' text form by name, summed over their labels; buckets of histograms are left out."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        match = _SAMPLE.match(line)
        if match is None or match[1].endswith("_bucket"):
            continue
        try:
            value = float(match[3])
        except ValueError:
            continue
        found[match[1]] = found.get(match[1], 0.0) + value
    return found


class _Heard:
    """An answer as its events come."""

    def __init__(self) -> None:
        self.times_s: list[float] = []
        self.counts: list[float] = []
        self.tokens: list[int] = []
        self.text = ""
        self.usage: Mapping[str, Any] = {}
        self.finished_s: float | None = None

    def take(self, data: str, at_s: float) -> bool:
        """One event; false where it was the last."""
        if data == "[DONE]":
            return False
        try:
            event = json.loads(data)
        except ValueError:
            raise BrokenAnswerError(f"an event that is no JSON: {data[:60]!r}") from None
        if not isinstance(event, dict):
            raise BrokenAnswerError(f"an event that is no object: {data[:60]!r}")
        if event.get("error"):
            error = event["error"]
            raise BrokenAnswerError(
                str(error.get("message", error) if isinstance(error, dict) else error)[:_CHUNK_CHARACTERS]
            )
        self.usage = event.get("usage") or self.usage
        for choice in event.get("choices") or ():
            ids = choice.get("token_ids") or ()
            text = choice.get("text") or ""
            if ids or text:
                self.times_s.append(at_s)
                self.counts.append(len(ids) or 1)
                self.tokens += ids
                self.text += text
            if choice.get("finish_reason"):
                self.finished_s = at_s
        return True

    def answer(self, start_s: float) -> Answer:
        """What was heard, once the stream is over. Raises BrokenAnswerError where it ended early or without a token."""
        if self.finished_s is None:
            raise BrokenAnswerError("the connection was closed before the answer was complete")
        details = self.usage.get("prompt_tokens_details") or {}
        output = self.usage.get("completion_tokens")
        if not self.times_s and output != 0:
            # A token without any text, as special ones are: it came with the end at the latest.
            self.times_s, self.counts = [self.finished_s], [int(output or 1)]
        if not self.times_s:
            raise BrokenAnswerError("an answer without a token")
        if output is not None and not self.tokens and len(self.counts) not in (1, output):
            # Some tokens showed no text of their own, or several came at once: so many to an event on average.
            self.counts[1:] = [(output - 1) / (len(self.counts) - 1)] * (len(self.counts) - 1)
        return Answer(
            start_s, tuple(self.times_s), tuple(self.counts), self.usage.get("prompt_tokens"), output,
            int(details.get("cached_tokens") or 0), self.text, tuple(self.tokens),
        )  # fmt: skip


def _said(response: httpx.Response) -> str:
    """What a server says of an error, in one line."""
    try:
        body = response.json()
        error = body.get("error", body) if isinstance(body, dict) else body
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    except ValueError:
        text = response.text
    text = " ".join(text.split())[:_CHUNK_CHARACTERS]
    return f" ({text})" if text else ""


def _words(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
