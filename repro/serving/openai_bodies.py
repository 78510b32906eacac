"""What clients of the OpenAI-compatible front ask, and how they are answered: bodies in, events and objects out. No HTTP, no clock.

A field that would change the answer and that this server cannot honour is refused by name unless it has the value that changes nothing;
fields of which it knows nothing are left alone, as the common servers do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import msgspec

#: What changes nothing, by field. Decoding is greedy: a temperature above 0 would be ignored, and is refused instead.
_NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = {
    "n": (1,), "best_of": (1,), "temperature": (0,), "echo": (False,), "logprobs": (False, 0), "top_logprobs": (0,), "suffix": ("",),
    "logit_bias": ({},), "presence_penalty": (0,), "frequency_penalty": (0,), "repetition_penalty": (1,), "tools": ([],),
    "response_format": ({"type": "text"},), "use_beam_search": (False,), "prompt_logprobs": (0,),
}  # fmt: skip


class ApiError(Exception):
    """An answer in OpenAI's form of an error; `param` names the field, `code` the reason for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        self.status = status
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s
        super().__init__(message)

    def body(self) -> dict[str, Any]:
        """The object that goes to the client."""
        kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


B = TypeVar("B", bound="Body")


class StreamOptions(msgspec.Struct, frozen=True):
    """`continuous_usage_stats` puts the counts into every event, as vLLM does."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class Body(msgspec.Struct, frozen=True, kw_only=True):
    """What both endpoints take. `ignore_eos`, `min_tokens` and `return_token_ids` are vLLM's, and load generators use them."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    min_tokens: int = 0
    return_token_ids: bool = False


class CompletionBody(Body, frozen=True, kw_only=True):
    """`POST /v1/completions`: the prompt is text or token ids."""

    prompt: Any


class ChatMessage(msgspec.Struct, frozen=True):
    """One message; its content is text, or parts of which each is text."""

    role: str
    content: Any = None


class ChatBody(Body, frozen=True, kw_only=True):
    """`POST /v1/chat/completions`."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None


def parsed(raw: bytes, form: type[B]) -> B:
    """A request's body.

    Raises:
        ApiError: naming the field that is wrong, missing, or asks for what this server does not do.
    """
    try:
        values = msgspec.json.decode(raw)
    except msgspec.DecodeError as error:
        raise ApiError(400, f"The body is not JSON: {error}", code="invalid_json") from error
    if not isinstance(values, dict):
        raise ApiError(400, "The body is not a JSON object", code="invalid_json")
    for name, neutral in _NEUTRAL.items():
        value = values.get(name)
        if value is not None and not any(value == one for one in neutral):
            accepted = " or ".join([*(msgspec.json.encode(one).decode() for one in neutral), "leaving it out"])
            reason = "this server decodes greedily" if name == "temperature" else "not supported here"
            raise ApiError(400, f"{name}: {reason}; accepted: {accepted}", param=name, code="unsupported_parameter")
    try:
        found = msgspec.convert({name: value for name, value in values.items() if value is not None}, form)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at ")
        param = where.strip("`").removeprefix("$").removeprefix(".") or None
        raise ApiError(400, f"{param}: {what}" if param else what, param=param, code="invalid_type") from error
    for name in ("max_tokens", "max_completion_tokens", "min_tokens"):
        least = 0 if name == "min_tokens" else 1
        if (number := getattr(found, name, None)) is not None and number < least:
            raise ApiError(400, f"{name}: {number}; accepted: {least} or more", param=name, code="invalid_value")
    return found


def prompt_of(body: CompletionBody) -> str | list[int]:
    """The one prompt of a completion: a text or token ids, alone or as the only one of a list. Raises ApiError for several, or none."""
    prompt = body.prompt
    if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        return prompt
    if isinstance(prompt, list) and len(prompt) > 1 and all(isinstance(one, (str, list)) for one in prompt):
        raise ApiError(
            400, f"prompt: {len(prompt)} prompts; accepted: one per request", param="prompt", code="invalid_value"
        )
    raise ApiError(400, "prompt: accepted: a text, or token ids", param="prompt", code="invalid_type")


def messages_of(body: ChatBody) -> list[dict[str, str]]:
    """The messages with their contents as text. Raises ApiError for a part that is none."""
    found = []
    for at, message in enumerate(body.messages):
        parts = message.content if isinstance(message.content, list) else [message.content or ""]
        texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part for part in parts]
        if not all(isinstance(text, str) for text in texts):
            raise ApiError(
                400, f"messages[{at}].content: accepted: text", param=f"messages[{at}].content", code="invalid_type"
            )
        found.append({"role": message.role, "content": "".join(map(str, texts))})
    if not found:
        raise ApiError(400, "messages: none; accepted: one or more", param="messages", code="invalid_value")
    return found


class StopText:
    """Ends an answer at the first of some texts, which is not shown; text that may be the beginning of one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        #: Whether one has come.
        self.found = False

    def take(self, text: str) -> str:
        """What of the answer can be shown after this piece of it."""
        self._held += text
        ends = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if ends:
            self.found, shown, self._held = True, self._held[: min(ends)], ""
            return shown
        most = max((len(stop) for stop in self._stops), default=1) - 1
        kept = next(
            (size for size in range(min(most, len(self._held)), 0, -1) if any(stop.startswith(self._held[-size:]) for stop in self._stops)),
            0,
        )  # fmt: skip
        shown, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return shown

    def rest(self) -> str:
        """What was held back, once there is nothing to come."""
        held, self._held = self._held, ""
        return held


@dataclass(frozen=True)
class Shape:
    """How one answer is written: as a completion or as a chat, under its id."""

    id: str
    model: str
    created: int
    chat: bool
    with_ids: bool = False

    def event(
        self,
        text: str,
        tokens: Sequence[int],
        finish: str | None,
        usage: Mapping[str, Any] | None = None,
        *,
        first: bool,
    ) -> bytes:
        """One event of a stream."""
        if self.chat:
            delta = {**({"role": "assistant"} if first else {}), "content": text}
            choice: dict[str, Any] = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        else:
            choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}
        if self.with_ids:
            choice["token_ids"] = list(tokens)
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return sse({**self._head(kind), "choices": [choice], **({} if usage is None else {"usage": usage})})

    def counts(self, usage: Mapping[str, Any]) -> bytes:
        """The event that holds the counts alone, the last of a stream that was asked for them."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return sse({**self._head(kind), "choices": [], "usage": usage})

    def whole(
        self, text: str, tokens: Sequence[int], finish: str, usage: Mapping[str, Any], prompt: Sequence[int]
    ) -> dict[str, Any]:
        """An answer that is not streamed."""
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": finish}
        choice |= {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        if self.with_ids:
            choice |= {"token_ids": list(tokens), "prompt_token_ids": list(prompt)}
        return {
            **self._head("chat.completion" if self.chat else "text_completion"),
            "choices": [choice],
            "usage": usage,
        }

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


DONE: Final = b"data: [DONE]\n\n"


def sse(value: Mapping[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


def usage_of(prompt_tokens: int, output_tokens: int) -> dict[str, Any]:
    """The counts of an answer."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": output_tokens,
        "total_tokens": prompt_tokens + output_tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
