"""What happened when, in every process of a run, and its export as a Chrome trace (opens in Perfetto).

All processes of a split run share one machine, so they share CLOCK_MONOTONIC: spans of prefill and decode side lie on one
axis without any synchronisation. Across machines this does not hold: a deployment's fleet measures how far each instance's
clock is ahead and takes it off all moments that it is told (`repro.serving.clocks`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repro.engine.spans import CLOCK_NOTE, Span


@dataclass(frozen=True)
class Timeline:
    """All spans of a run, by the worker that recorded them."""

    spans: Mapping[str, tuple[Span, ...]]

    def of(self, worker: str, what: str, request_id: int | None = None) -> list[Span]:
        """Spans of one kind at one worker, of one request or of all."""
        return [
            span
            for span in self.spans.get(worker, ())
            if span.what == what and (request_id is None or span.request_id == request_id)
        ]

    def total_s(self, worker: str, what: str, request_id: int) -> float:
        """Summed length of one request's spans of one kind, in seconds."""
        return sum(span.duration_s for span in self.of(worker, what, request_id))


def merged(timelines: Mapping[str, Timeline]) -> Timeline:
    """Timelines of several runs as one, with each run's name before its workers'."""
    return Timeline(
        {f"{name} {worker}": spans for name, timeline in timelines.items() for worker, spans in timeline.spans.items()}
    )


def chrome_trace(timeline: Timeline) -> dict[str, Any]:
    """The trace-event form: one process per worker, rows by kind of span, time zero at the first span."""
    starts = [span.start_s for spans in timeline.spans.values() for span in spans]
    origin_s = min(starts, default=0.0)
    events: list[dict[str, Any]] = []
    for process, (worker, spans) in enumerate(sorted(timeline.spans.items()), start=1):
        events.append({"ph": "M", "name": "process_name", "pid": process, "args": {"name": worker}})
        for row, (what, lane) in enumerate(_lanes(spans), start=1):
            events.append({"ph": "M", "name": "thread_name", "pid": process, "tid": row, "args": {"name": what}})
            events += [_event(span, process, row, origin_s) for span in lane]
    return {"displayTimeUnit": "ms", "traceEvents": events, "otherData": {"clock": CLOCK_NOTE}}


def write_trace(path: Path, timeline: Timeline) -> None:
    """Write `timeline` as a Chrome trace."""
    path.write_text(json.dumps(chrome_trace(timeline), separators=(",", ":")))


def _lanes(spans: Iterable[Span]) -> list[tuple[str, list[Span]]]:
    """Spans in rows without overlap: viewers draw a row as a call stack, and sends side by side are none."""
    lanes: list[tuple[str, list[Span]]] = []
    for span in sorted(spans, key=lambda span: (span.what, span.start_s)):
        for what, lane in lanes:
            if what == span.what and lane[-1].end_s <= span.start_s:
                lane.append(span)
                break
        else:
            lanes.append((span.what, [span]))
    return lanes


def _event(span: Span, process: int, track: int, origin_s: float) -> dict[str, Any]:
    name = span.what if span.layer is None else f"{span.what} layer {span.layer}"
    detail = {"request": span.request_id, "layer": span.layer, "chunk": span.chunk, "kv_bytes": span.kv_bytes}
    return {
        "ph": "X",
        "name": name,
        "cat": span.what,
        "pid": process,
        "tid": track,
        "ts": (span.start_s - origin_s) * 1e6,
        "dur": span.duration_s * 1e6,
        "args": {key: value for key, value in detail.items() if value is not None},
    }
