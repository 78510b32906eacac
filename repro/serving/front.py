"""The front of a serving deployment: it hands clients' requests to the router and brings every token back as it comes.

Two threads meet here. The router's calls `Front` as its listener; the server's event loop, in which all else runs, submits and reads. What
crosses between them are values, handed over by `call_soon_threadsafe`, so neither waits for the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from repro.errors import UserError
from repro.record.requests import ANSWERED
from repro.serving.exposition import Exposition
from repro.serving.listener import View
from repro.serving.messages import Sending
from repro.serving.openai_bodies import ApiError
from repro.serving.router import Router
from repro.workload.stream import Chains

#: How many requests that have left are kept for the record.
_KEPT_ROWS = 100_000
#: Of a request that was not answered, by its outcome: the status and what the client is told.
_REFUSALS: Mapping[str, tuple[int, str]] = {
    "refused": (429, "the deployment is busy: the time to the first token would be beyond what admission lets in; try again later"),
    "timed_out": (503, "the server is stopping"),
    "failed": (503, "no instance is left that could answer; try again later"),
}  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """What a client may ask: bytes of a body, tokens of prompt and answer together and of the answer, requests at once, seconds."""

    body_bytes: int = 4 << 20
    context_tokens: int = 8192
    output_tokens: int = 1024
    requests: int = 64
    timeout_s: float = 120.0

    def __post_init__(self) -> None:
        for name, least in (("body_bytes", 1024), ("context_tokens", 4), ("output_tokens", 1), ("requests", 1)):
            if getattr(self, name) < least:
                raise UserError(
                    f"serve: max {name.replace('_', ' ')}: {getattr(self, name)}; accepted: {least} or more"
                )
        if not self.timeout_s > 0:
            raise UserError(f"serve: timeout: {self.timeout_s:g} s; accepted: more than 0")


@dataclass
class Answer:
    """One request on its way. Moments are CLOCK_MONOTONIC in seconds: received whole headers, first and latest token at the front."""

    number: int
    prompt: list[int]
    output_tokens: int
    received_s: float
    deadline_s: float
    heard: int = 0
    first_s: float = 0.0
    last_s: float = 0.0
    over: bool = False
    counted: asyncio.Event = field(default_factory=asyncio.Event)
    news: asyncio.Queue[int | Mapping[str, Any]] = field(default_factory=asyncio.Queue)


class Front:
    """Hears the router and holds the answers on their way; `attach` it before the first request.

    Whatever is `async`, and `submit` and `leave`, belongs to the event loop of `attach`.
    """

    def __init__(
        self,
        exposition: Exposition,
        limits: Limits,
        first_number: int = 0,
        chains: Callable[[Sequence[int]], Chains | None] = lambda prompt: None,
    ) -> None:
        """`chains` names a prompt's blocks, where instances have prefix caches."""
        self.exposition = exposition
        self._chains = chains
        self.limits = limits
        #: What has left, for the record: rows of the requests table with `ttft_front_s`.
        self.rows: deque[dict[str, Any]] = deque(maxlen=_KEPT_ROWS)
        self._answers: dict[int, Answer] = {}
        self._numbers = count(first_number)
        self._router: Router | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing = False

    def attach(self, router: Router, loop: asyncio.AbstractEventLoop) -> None:
        """Serve through that router, in that event loop."""
        self._router, self._loop = router, loop

    def close(self) -> None:
        """Take no more requests."""
        self._closing = True

    # In the event loop.

    def submit(self, prompt: list[int], output_tokens: int, received_s: float) -> Answer:
        """Hand a request to the router. Raises ApiError where there are too many, or none are taken any more."""
        router = self._router
        if router is None or self._closing:
            raise ApiError(503, "the server is not serving (any more)", code="unavailable", retry_after_s=5)
        if len(self._answers) >= self.limits.requests:
            self.exposition.turned_away()
            raise ApiError(
                429, f"{len(self._answers)} requests are under way, as many as are taken at once; try again later",
                code="rate_limit_exceeded", retry_after_s=1,
            )  # fmt: skip
        answer = Answer(next(self._numbers), prompt, output_tokens, received_s, received_s + self.limits.timeout_s)
        self._answers[answer.number] = answer
        now_s, chains = router.scale.virtual_s(time.monotonic()), self._chains(prompt)
        router.submit(answer.number, now_s, len(prompt), output_tokens, chains)
        return answer

    async def tokens(self, answer: Answer) -> AsyncIterator[int]:
        """The answer's tokens as they come. Raises ApiError where it is refused, fails, or takes too long."""
        for _ in range(answer.output_tokens):
            if answer.news.empty():
                try:
                    async with asyncio.timeout_at(self._at(answer.deadline_s)):
                        news = await answer.news.get()
                except TimeoutError:
                    self.leave(answer, "timed_out")
                    raise ApiError(
                        504, f"no end of the answer within {self.limits.timeout_s:g} s", code="timeout"
                    ) from None
            else:
                news = answer.news.get_nowait()
            if not isinstance(news, int):
                status, words = _REFUSALS.get(news["outcome"], (503, "the request was given up"))
                raise ApiError(status, words, code=news["outcome"], retry_after_s=1 if status in (429, 503) else None)
            yield news

    async def ended(self, answer: Answer) -> None:
        """Wait, a moment at most, until the router has counted a complete answer: whoever reads the metrics next shall find it there."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await answer.counted.wait()

    def leave(self, answer: Answer, outcome: str, output_tokens: int | None = None) -> None:
        """Nothing more is wanted of a request: it is complete (`ok`), too late (`timed_out`), or whoever asked has gone (`cancelled`)."""
        # Once all tokens are there, the router's own news of the end is on its way.
        if not answer.over and answer.heard < answer.output_tokens and self._router is not None:
            answer.over = True
            self._router.stop(answer.number, outcome, max(answer.heard if output_tokens is None else output_tokens, 1))

    async def view(self) -> View:
        """How the router stands. Raises ApiError where it does not say within a second."""
        if self._router is None:
            raise ApiError(503, "the server is not serving (any more)", code="unavailable")
        try:
            async with asyncio.timeout(1.0):
                return await asyncio.wrap_future(self._router.view())
        except TimeoutError:
            raise ApiError(503, "the router does not answer", code="unavailable") from None

    async def idle(self, timeout_s: float) -> bool:
        """Wait until nothing is under way; False where `timeout_s` were not enough."""
        until_s = time.monotonic() + timeout_s
        while self._answers and time.monotonic() < until_s:
            await asyncio.sleep(0.02)
        return not self._answers

    def _at(self, moment_s: float) -> float:
        assert self._loop is not None
        return self._loop.time() + moment_s - time.monotonic()

    def _take(self, tokens: Sequence[tuple[int, int, int]]) -> None:
        now_s = time.monotonic()
        for number, index, token in tokens:
            answer = self._answers.get(number)
            # Decoding is greedy, so what a second attempt says again is what has been said.
            if answer is not None and index == answer.heard and not answer.over:
                answer.first_s = answer.first_s if answer.heard else now_s
                answer.heard, answer.last_s = index + 1, now_s
                answer.news.put_nowait(token)

    def _over(self, row: Mapping[str, Any]) -> None:
        answer = self._answers.pop(row["id"], None)
        if answer is None:
            return
        answer.over = True
        answer.news.put_nowait(row)
        ttft_s = answer.first_s - answer.received_s if answer.heard else float("nan")
        self.rows.append({**row, "ttft_front_s": ttft_s})
        tpot_s = (answer.last_s - answer.first_s) / (answer.heard - 1) if answer.heard > 1 else float("nan")
        self.exposition.left(row, answer.heard, ttft_s if row["outcome"] in ANSWERED else float("nan"), tpot_s)
        answer.counted.set()

    # In the router's thread.

    def prompt(self, number: int) -> list[int]:
        """The token ids of a request."""
        answer = self._answers.get(number)
        return answer.prompt if answer is not None else []

    def stepped(self, tokens: Sequence[tuple[int, int, int]]) -> None:
        """Tokens of a decode step."""
        self._hand_over(self._take, tokens)

    def left(self, row: Mapping[str, Any]) -> None:
        """A request has left."""
        self._hand_over(self._over, row)

    def sent(self, name: str, said: Sending) -> None:
        """What an instance has sent since its start."""
        self.exposition.sent(name, said)

    def _hand_over(self, task: Callable[[Any], None], value: Any) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has closed: nobody waits for it
                self._loop.call_soon_threadsafe(task, value)
