"""The ledger of a run: who is in the system, how many came and went, and a row for everyone who left."""

from __future__ import annotations

import math

from repro.simulate.job import Job
from repro.simulate.records import Row, Sink

_BATCH = 1 << 15

#: Indices into `records.OUTCOMES`.
OK, FAILED, TIMED_OUT, FELL_BACK, REFUSED = range(5)
_DONE = (OK, FELL_BACK)


class RequestLedger:
    """Requests in the system by id, and rows on their way to the sink in batches."""

    def __init__(self, sink: Sink) -> None:
        self.live: dict[int, Job] = {}
        self.arriving = True
        self.arrived = 0
        self.completed = 0
        self.refused = 0
        self.peak = 0
        self.last_finish_s = 0.0
        self._sink = sink
        self._rows: list[Row] = []

    @property
    def open(self) -> bool:
        """Whether anything is still to come or under way."""
        return self.arriving or bool(self.live)

    def finish(self, now_s: float, job: Job) -> None:
        """The last token is out."""
        self.last_finish_s = now_s
        self.completed += 1
        self.record(job, FELL_BACK if job.fell_back else OK)

    def refuse(self, job: Job) -> None:
        """Admission has turned a request away."""
        self.refused += 1
        self.record(job, REFUSED)

    def record(self, job: Job, outcome: int) -> None:
        """Let a request leave the system."""
        live = self.live
        if len(live) > self.peak:
            self.peak = len(live)
        del live[job.id]
        arrival, output = job.arrival_s, job.output_tokens
        if outcome in _DONE:
            delivered, ended, first = job.delivered_s, job.prefill_end_s, job.first_token_s
            finish = job.finish_s
            row: Row = (
                job.id, arrival, job.input_tokens, job.cached_tokens, output, job.offloaded, job.prefill_start_s - arrival,
                ended - job.prefill_start_s, delivered - job.prefill_start_s if job.offloaded else 0.0, delivered - ended, job.kv_bytes,
                job.decode_s - delivered, first - arrival, (finish - first) / (output - 1) if output > 1 else 0.0, finish, outcome,
                job.prefill_worker, job.decode_worker,
            )  # fmt: skip
        else:
            nan = math.nan
            row = (
                job.id, arrival, job.input_tokens, job.cached_tokens, output, job.offloaded, nan, nan, nan, nan, job.kv_bytes,
                nan, nan, nan, nan, outcome, job.prefill_worker, job.decode_worker,
            )  # fmt: skip
        rows = self._rows
        rows.append(row)
        if len(rows) >= _BATCH:
            self._sink.take(rows)
            rows.clear()

    def close(self) -> int:
        """Record everyone who is still there as timed out, hand over the last rows, and say how many there were."""
        unfinished = list(self.live.values())
        for job in unfinished:
            self.record(job, TIMED_OUT)
        if self._rows:
            self._sink.take(self._rows)
        return len(unfinished)
