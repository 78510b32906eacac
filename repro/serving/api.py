"""The OpenAI-compatible HTTP interface of a serving deployment: completions and chat, streamed or whole, models, health and metrics.

Starlette routes, uvicorn speaks HTTP; here stands only what an answer is made of. A mistake of the client's is an object of OpenAI's form
with the status that clients of such servers know; one that comes after the first token is an event of the stream.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from uuid import uuid4

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from repro.serving.front import Answer, Front
from repro.serving.openai_bodies import (
    DONE,
    ApiError,
    Body,
    ChatBody,
    CompletionBody,
    Shape,
    StopText,
    messages_of,
    parsed,
    prompt_of,
    sse,
    usage_of,
)  # fmt: skip
from repro.serving.tokenizer import Tokenizer

T = TypeVar("T")
#: Of a completion that does not say how long it may be, as OpenAI's.
_COMPLETION_TOKENS = 16
#: The client has closed the connection (nginx's number); nobody reads it.
_GONE = 499


@dataclass(frozen=True)
class Served:
    """The model that is served: its name and source, its tokenizer, and the ids that it knows."""

    name: str
    root: str
    tokenizer: Tokenizer
    vocabulary: int


@dataclass(frozen=True)
class _Piece:
    """What one token adds to an answer."""

    text: str
    token: int
    finish: str | None


class _ClientGoneError(Exception):
    """Whoever asked has closed the connection."""


class _Events(StreamingResponse):
    """A stream after which `done` is called, however it ends: a client that goes away leaves the generator where it stood."""

    def __init__(self, events: AsyncIterator[bytes], done: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._done = done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._done()


class Api:
    """The endpoints over a front. With a `key`, /v1 answers only whoever brings it."""

    def __init__(self, front: Front, served: Served, key: str | None = None) -> None:
        self._front = front
        self._served = served
        self._key = key
        self._created = int(time.time())

    def app(self) -> Starlette:
        """As an ASGI application."""
        routes = [
            Route("/health", self._health),
            Route("/metrics", self._metrics),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/v1/completions", self._completions, methods=["POST"]),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
        ]
        return Starlette(
            routes=routes,
            exception_handlers={
                ApiError: _refused,
                HTTPException: _not_found,
                _ClientGoneError: _gone,
                Exception: _broken,
            },
        )

    # What it is.

    async def _health(self, _: Request) -> Response:
        """200 while somebody prefills and somebody decodes."""
        roles = list((await self._front.view()).roles.values())
        well = {"prefill", "decode"} <= set(roles)
        found = {
            "status": "ok" if well else "unavailable",
            "instances": {role: roles.count(role) for role in sorted(set(roles))},
        }
        return _json(found, 200 if well else 503)

    async def _metrics(self, _: Request) -> Response:
        text = self._front.exposition.text(await self._front.view())
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _models(self, request: Request) -> Response:
        self._let_in(request)
        return _json({"object": "list", "data": [self._description()]})

    async def _model(self, request: Request) -> Response:
        self._let_in(request)
        self._known(request.path_params["name"])
        return _json(self._description())

    def _description(self) -> dict[str, Any]:
        return {
            "id": self._served.name, "object": "model", "created": self._created, "owned_by": "prfaas-repro", "root": self._served.root,
            "max_model_len": self._front.limits.context_tokens,
        }  # fmt: skip

    def _let_in(self, request: Request) -> None:
        if self._key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._key.encode()):
            raise ApiError(401, "No key, or a wrong one; accepted: Authorization: Bearer <key>", code="invalid_api_key")

    def _known(self, model: str) -> None:
        if model not in (self._served.name, self._served.root):
            raise ApiError(
                404,
                f"The model {model!r} does not exist; accepted: {self._served.name}",
                param="model",
                code="model_not_found",
            )

    # Answers.

    async def _completions(self, request: Request) -> Response:
        received_s = time.monotonic()
        body = parsed(await self._read(request), CompletionBody)
        self._known(body.model)
        prompt = prompt_of(body)
        ids = self._served.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        return await self._answer(request, received_s, body, ids, "prompt", body.max_tokens or _COMPLETION_TOKENS)

    async def _chat(self, request: Request) -> Response:
        received_s = time.monotonic()
        body = parsed(await self._read(request), ChatBody)
        self._known(body.model)
        try:
            ids = self._served.tokenizer.chat(messages_of(body))
        except ValueError as error:
            raise ApiError(400, f"messages: {error}", param="messages", code="invalid_value") from error
        limits = self._front.limits
        left = max(min(limits.output_tokens, limits.context_tokens - len(ids)), 1)
        return await self._answer(
            request, received_s, body, ids, "messages", body.max_completion_tokens or body.max_tokens or left
        )

    async def _read(self, request: Request) -> bytes:
        """The body, as far as it may be."""
        self._let_in(request)
        most, found = self._front.limits.body_bytes, bytearray()
        declared = request.headers.get("content-length", "0")
        async for chunk in request.stream():
            found += chunk
            if len(found) > most or (declared.isdecimal() and int(declared) > most):
                raise ApiError(413, f"The body has more than {most} bytes", code="body_too_large")
        return bytes(found)

    async def _answer(
        self, request: Request, received_s: float, body: Body, prompt: list[int], param: str, output_tokens: int
    ) -> Response:
        self._check(prompt, param, output_tokens)
        answer = self._front.submit(prompt, output_tokens, received_s)
        chat = isinstance(body, ChatBody)
        shape = Shape(
            f"{'chatcmpl' if chat else 'cmpl'}-{uuid4().hex}", body.model, int(time.time()), chat, body.return_token_ids
        )
        pieces = self._pieces(answer, body)
        try:
            if not body.stream:
                return await _unless_gone(request, self._whole(shape, answer, pieces))
            # The status waits for the first token: what is refused until then is no stream.
            first = await _unless_gone(request, anext(pieces))
        except BaseException:
            self._front.leave(answer, "cancelled")
            raise
        return _Events(self._events(shape, answer, body, first, pieces), lambda: self._front.leave(answer, "cancelled"))

    def _check(self, prompt: list[int], param: str, output_tokens: int) -> None:
        limits, words = self._front.limits, self._served.vocabulary
        if len(prompt) < 2:
            raise ApiError(
                400, f"{param}: {len(prompt)} tokens; accepted: 2 or more", param=param, code="invalid_value"
            )
        if wrong := [token for token in prompt if not 0 <= token < words]:
            raise ApiError(
                400, f"{param}: token id {wrong[0]}; accepted: 0 to {words - 1}", param=param, code="invalid_value"
            )
        if output_tokens > limits.output_tokens:
            raise ApiError(
                400,
                f"max_tokens: {output_tokens}; accepted: up to {limits.output_tokens}",
                param="max_tokens",
                code="invalid_value",
            )
        if len(prompt) + output_tokens > limits.context_tokens:
            raise ApiError(
                400,
                f"This model's maximum context length is {limits.context_tokens} tokens, and {len(prompt) + output_tokens} were asked for "
                f"({len(prompt)} of {param}, {output_tokens} of the answer)",
                param=param,
                code="context_length_exceeded",
            )

    async def _pieces(self, answer: Answer, body: Body) -> AsyncIterator[_Piece]:
        """The answer token by token, up to its end: the length that was asked for, an end-of-text token, or a stop of the client's."""
        stop = StopText([body.stop] if isinstance(body.stop, str) else body.stop or ())
        ends = frozenset(body.stop_token_ids or ()) | (
            frozenset() if body.ignore_eos else self._served.tokenizer.stop_ids
        )
        text_of, tokens = self._served.tokenizer.stream(), 0
        async for token in self._front.tokens(answer):
            tokens += 1
            may_end = tokens > body.min_tokens
            if may_end and token in ends:
                self._front.leave(answer, "ok", tokens)
                yield _Piece(stop.rest(), token, "stop")
                break
            text = stop.take(text_of(token))
            if stop.found:
                self._front.leave(answer, "ok", tokens)
                yield _Piece(text, token, "stop")
                break
            last = tokens == answer.output_tokens
            yield _Piece(text + stop.rest() if last else text, token, "length" if last else None)
        await self._front.ended(answer)

    async def _whole(self, shape: Shape, answer: Answer, pieces: AsyncIterator[_Piece]) -> Response:
        found = [piece async for piece in pieces]
        text, tokens = "".join(piece.text for piece in found), [piece.token for piece in found]
        usage = usage_of(len(answer.prompt), len(found))
        return _json(shape.whole(text, tokens, found[-1].finish or "length", usage, answer.prompt))

    async def _events(
        self, shape: Shape, answer: Answer, body: Body, first: _Piece, rest: AsyncIterator[_Piece]
    ) -> AsyncIterator[bytes]:
        options, tokens = body.stream_options, 1
        always = options is not None and options.continuous_usage_stats

        def event(piece: _Piece) -> bytes:
            usage = usage_of(len(answer.prompt), tokens) if always else None
            return shape.event(piece.text, [piece.token], piece.finish, usage, first=tokens == 1)

        yield event(first)
        try:
            async for piece in rest:
                tokens += 1
                yield event(piece)
        except ApiError as error:
            yield sse(error.body())
            return
        if options is not None and options.include_usage:
            yield shape.counts(usage_of(len(answer.prompt), tokens))
        yield DONE


async def _unless_gone(request: Request, answer: Awaitable[T]) -> T:
    """The answer, or _ClientGoneError as soon as the client has closed the connection."""
    work = asyncio.ensure_future(answer)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise _ClientGoneError
        return work.result()
    finally:
        for task in (work, gone):
            task.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), status, headers, "application/json")


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    headers = {} if error.retry_after_s is None else {"retry-after": str(error.retry_after_s)}
    return _json(error.body(), error.status, headers)


async def _not_found(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _json(
        ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}").body(), error.status_code
    )


async def _gone(_: Request, __: Exception) -> Response:
    return Response(status_code=_GONE)


async def _broken(_: Request, __: Exception) -> Response:
    return _json(ApiError(500, "The server made a mistake; its log says which").body(), 500)
