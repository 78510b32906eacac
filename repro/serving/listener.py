"""What a front that answers requests while they run hears of the router, and what it may look at.

A run of an experiment asks for neither: it submits all of its requests and reads the table of what became of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from repro.serving.messages import Sending

#: Where a request is: waiting for prefill or prefilled, its KVCache under way, waiting for the batch, decoded.
PHASES = ("prefill", "transfer", "decode_queue", "decode")


class Listener(Protocol):
    """Whoever answers requests while they run. Called in the router's thread, so it must neither wait nor raise."""

    def prompt(self, number: int) -> list[int]:
        """The token ids of a request."""
        ...

    def stepped(self, tokens: Sequence[tuple[int, int, int]]) -> None:
        """Tokens of a decode step: (request, index in its answer, token). A request that is tried anew begins at index 0 again."""
        ...

    def left(self, row: Mapping[str, Any]) -> None:
        """A request has left; the row is that of the requests table."""
        ...

    def sent(self, name: str, said: Sending) -> None:
        """What an instance has sent since its start."""
        ...


class View(NamedTuple):
    """A router at a moment: the controllers, requests by phase, and by instance what it holds and its role (prefill, decode, down).

    `at_s` is the deployment's time. Counted since the start: requests that arrived, that left `answered` or `unanswered`, and the
    KVCache that was delivered over the link, in bytes, unscaled. `link_bps` is what the egress was sold as.
    """

    threshold_tokens: float
    bandwidth_scarce: bool
    link_up: bool
    link_utilisation: float
    phases: Mapping[str, int]
    held: Mapping[str, int]
    roles: Mapping[str, str]
    at_s: float
    arrived: int
    answered: int
    unanswered: int
    crossed_bytes: float
    link_bps: float
