"""An answer of a running engine, and what may be wrong with one."""

from __future__ import annotations

from dataclasses import dataclass


class RefusedError(Exception):
    """A server refused a request for what it asks."""


class BrokenAnswerError(Exception):
    """A server closed the connection, answered with an error of its own, or sent no token in time. It may be asked again."""


@dataclass(frozen=True)
class Answer:
    """One streamed answer: when its tokens came, counted from the request, and what the server says that it counted.

    `token_counts` holds the tokens of each event of `token_times_s`; `prompt_tokens` and `output_tokens` are None where the server
    does not count, `cached_tokens` is 0 there. `start_s` is when it was asked, on a clock that answers share.
    """

    start_s: float
    token_times_s: tuple[float, ...]
    token_counts: tuple[float, ...]
    prompt_tokens: int | None
    output_tokens: int | None
    cached_tokens: int = 0
    text: str = ""
    tokens: tuple[int, ...] = ()

    @property
    def ttft_s(self) -> float:
        """Time to first token."""
        return self.token_times_s[0]
