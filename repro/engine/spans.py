"""What took time, for which request: the unit that every process of a run records in.

All processes of a run share one machine, so they share CLOCK_MONOTONIC: spans of prefill and decode side lie on one
axis without any synchronisation. Across machines this would not hold.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

CLOCK_NOTE = (
    "All workers ran on one machine and took their times from CLOCK_MONOTONIC, which its processes share: "
    "spans of different processes are comparable without synchronisation."
)

now_s = time.monotonic


@dataclass(frozen=True)
class Span:
    """One thing that took time, for one request. Times are CLOCK_MONOTONIC in seconds.

    `what` is one of queue, prefill, compute, copy, send, keep, transfer, receive, fetch, restore, decode_queue, decode. `layer` and
    `chunk` are set where the span belongs to one layer or one chunk of the prompt, `kv_bytes` where bytes moved.
    """

    what: str
    request_id: int
    start_s: float
    end_s: float
    layer: int | None = None
    chunk: int | None = None
    kv_bytes: int | None = None

    @property
    def duration_s(self) -> float:
        """Length in seconds."""
        return self.end_s - self.start_s


class SpanLog:
    """Collects the spans of one process."""

    def __init__(self) -> None:
        self._spans: list[Span] = []

    def add(self, span: Span) -> None:
        """Take a finished span."""
        self._spans.append(span)

    @contextmanager
    def span(self, what: str, request_id: int, **fields: int) -> Iterator[None]:
        """Record the time that the block takes."""
        start_s = now_s()
        yield
        self._spans.append(Span(what, request_id, start_s, now_s(), **fields))

    def take(self) -> list[Span]:
        """Everything recorded since the last call."""
        # Swapped, not cleared: another thread may add meanwhile, and its span must land in one of the two.
        spans, self._spans = self._spans, []
        return spans


def spans_to_json(spans: Iterable[Span]) -> list[dict[str, Any]]:
    """Plain mappings for a control message."""
    return [{key: value for key, value in asdict(span).items() if value is not None} for span in spans]


def spans_from_json(rows: Iterable[Mapping[str, Any]]) -> tuple[Span, ...]:
    """The inverse of `spans_to_json`."""
    return tuple(Span(**row) for row in rows)
