"""What the live system asks of an engine. The torch engine computes; the replay engine spends a profile's time instead.

Prefill takes all of a prompt but its last token, and decode begins with that one: so nothing but state crosses the
link, all sampling happens on the decode side, and the decode side's first step yields the request's first token. A
request of l tokens therefore ships S_kv(l − 1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from repro.engine.spans import SpanLog
from repro.errors import UserError
from repro.kvcache.frames import Piece
from repro.kvcache.state import State

Emit = Callable[[Piece], None]


@dataclass(frozen=True)
class Request:
    """A prompt of token ids, and how many tokens to answer it with. Prefixes are shared among equal `cache_salt` only."""

    request_id: int
    prompt: tuple[int, ...]
    output_tokens: int
    cache_salt: str = ""

    def __post_init__(self) -> None:
        if len(self.prompt) < 2:
            raise UserError(f"prompt of request {self.request_id}: {len(self.prompt)} tokens; at least 2 are accepted")
        if self.output_tokens < 1:
            raise UserError(f"output_tokens of request {self.request_id}: {self.output_tokens}; at least 1 is accepted")

    def as_json(self) -> dict[str, Any]:
        """A plain mapping for a control message."""
        return asdict(self)

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Request:
        """The inverse of `as_json`."""
        return Request(**{**values, "prompt": tuple(values["prompt"])})

    @property
    def state_tokens(self) -> int:
        """Tokens that prefill turns into state: all but the last."""
        return len(self.prompt) - 1


@dataclass(frozen=True)
class Handover:
    """What decode must know beside the state. It travels in the manifest, so it cannot be had without the state.

    What grows with each token was not sent for the first `held_tokens`, which the prefix cache knows by the name `held_key`:
    decode has it, or refuses.
    """

    request_id: int
    last_token: int
    input_tokens: int
    output_tokens: int
    held_tokens: int = 0
    held_key: int = 0

    @staticmethod
    def of(request: Request, held_tokens: int = 0, held_key: int = 0) -> Handover:
        """The hand-over of a request whose first l − 1 tokens have become state."""
        return Handover(
            request.request_id,
            request.prompt[-1],
            len(request.prompt),
            request.output_tokens,
            held_tokens,
            held_key,
        )

    def as_meta(self) -> dict[str, int]:
        """Plain values for the manifest."""
        return asdict(self)

    @staticmethod
    def from_meta(meta: Any) -> Handover:
        """The inverse of `as_meta`. Raises UserError where the sender left something out."""
        try:
            return Handover(**{name: int(meta[name]) for name in Handover.__dataclass_fields__})
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"manifest meta: {meta!r} is not a hand-over ({error})") from error


@dataclass(frozen=True)
class Prefilled:
    """A prefill that is over: computed at `end_s` (CLOCK_MONOTONIC), but for the first `cached_tokens` tokens.

    `keep` puts its state into the prefix cache, when nothing waits for it; `release` is called once the decode side has it.
    """

    end_s: float
    cached_tokens: int
    handover: Handover
    keep: Callable[[], None]
    release: Callable[[], None]


class PrefillEngine(Protocol):
    """Turns prompts into state, one at a time."""

    def prefill(self, request: Request, emit: Emit, log: SpanLog, held_tokens: int = 0) -> Prefilled:
        """Compute the state of the first l − 1 tokens; `emit` gets every piece as soon as it is final, in any one thread.

        The decode side holds what grows with each of the first `held_tokens`: no piece of that is made.
        """


class DecodeEngine(Protocol):
    """Holds the running batch."""

    def reserve(self, request: Request) -> int:
        """Tokens at the beginning of a prompt whose growing state is here, and stays until the request has left."""

    def fetch(self, pieces: Sequence[Piece]) -> list[State]:
        """Bring a request's state to the device. Any thread may call it, beside a step; the pieces' memory is free afterwards."""

    def join(self, handover: Handover, states: Sequence[State]) -> None:
        """Put a request's state together and take it into the batch."""

    def step(self) -> list[tuple[int, int]]:
        """One token for every request of the batch: (request id, token). Requests leave by `leave` only."""

    def leave(self, request_id: int) -> None:
        """Drop a request and its state."""
