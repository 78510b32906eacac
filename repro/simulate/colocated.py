"""Colocation by chunked prefill: each instance prefills between the decode steps of what it has prefilled, and nothing is sent.

A step gives every request of the batch a token and, while somebody waits for prefill, computes a chunk of the first of them: it takes
T_decode of the batch and T_prefill of the chunk together, so TPOT grows by the chunks of others. Nothing overlaps, which a kernel may do
in part. A prefill begins only while the batch has room for it. As in `repro.simulate.decode`, steps without a chunk are computed and not
played until the batch changes.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable

from repro.scheduling.tables import StepTimes
from repro.simulate.decode import Batch, DecodeStage
from repro.simulate.events import EventQueue
from repro.simulate.job import NOT_YET, Job


class MixedBatch(Batch):
    """One instance: `queue` waits for prefill, of whose first `done` tokens are computed; `chunk` of it are in the step under way.

    `until` is the step up to which the batch goes on without a chunk.
    """

    __slots__ = ("chunk", "done", "queue", "until")

    def __init__(self, id_: int) -> None:
        super().__init__(id_)
        self.queue: deque[Job] = deque()
        self.done = 0
        self.chunk = 0
        self.until = 0


class ColocatedStage(DecodeStage):
    """Prefill and decode of one PD cluster. `prefilled(now, job)` is called at a prefill's end, `finished(now, job)` at a last token."""

    def __init__(
        self,
        events: EventQueue,
        steps: StepTimes,
        batch_max: int,
        finished: Callable[[float, Job], None],
        prefilled: Callable[[float, Job], None],
        chunk_tokens: int,
        chunk_s: Callable[[int, int], float],
    ) -> None:
        super().__init__(events, steps, batch_max, finished)
        self._prefilled = prefilled
        self._chunk_tokens = chunk_tokens
        self._chunk_s = chunk_s
        self._mixed: dict[int, MixedBatch] = {}
        self._on_step = self._step

    def open(self, now_s: float, instance: int) -> None:
        """Let an instance serve."""
        batch = MixedBatch(instance)
        batch.at_s = now_s
        self._mixed[instance] = self.members[instance] = batch

    def assign(self, now_s: float, job: Job, instance: int) -> None:
        """Queue a job for prefill at an instance; if nobody waits there, its first chunk is in the next step."""
        batch = self._mixed[instance]
        job.prefill_worker = instance
        job.prefill_start_s = NOT_YET
        batch.queue.append(job)
        if len(batch.queue) > 1 or batch.chunk or len(batch.heap) >= self.batch_max:
            return
        if batch.heap:
            if now_s > batch.at_s:
                self._advance_past(batch, now_s)
            batch.until = batch.step
            self._wake_at(batch, batch.at_s)
        else:
            batch.at_s = now_s
            self._begin(batch)

    def ready(self, now_s: float, job: Job) -> None:
        """A job's KVCache is there: it joins the batch of the instance that has prefilled it."""
        batch = self._mixed[job.prefill_worker]
        self._order += 1
        heapq.heappush(batch.heap, (batch.step + job.output_tokens, self._order, job))
        batch.context += job.input_tokens
        batch.fresh.append(job)
        job.decode_worker = batch.id
        job.decode_s = now_s

    def _wake_at(self, batch: MixedBatch, at_s: float) -> None:
        batch.wake_s = at_s
        self._events.at(at_s, self._on_step, batch)

    def _begin(self, batch: MixedBatch) -> None:
        """Begin the next step at `at_s`, with a chunk if one may go, else as many as there are until the next completion."""
        batch.chunk = 0
        if batch.queue and len(batch.heap) < self.batch_max:
            job = batch.queue[0]
            if job.prefill_start_s == NOT_YET:
                job.prefill_start_s = batch.at_s
            batch.chunk = min(self._chunk_tokens, job.work_tokens - batch.done)
            decode_s = self._duration(batch, 1) if batch.heap else 0.0
            self._wake_at(batch, batch.at_s + decode_s + self._chunk_s(batch.done, batch.chunk))
        elif batch.heap:
            batch.until = batch.heap[0][0]
            self._wake_at(batch, batch.at_s + self._duration(batch, batch.until - batch.step))
        else:
            batch.wake_s = math.inf

    def _step(self, now_s: float, batch: MixedBatch) -> None:
        """A step with a chunk, or the last of several without, has ended."""
        if now_s != batch.wake_s:
            return
        heap, whole = batch.heap, None
        if batch.chunk:
            for job in batch.fresh:
                job.first_token_s = now_s
            batch.fresh.clear()
            if heap:
                batch.step += 1
                batch.context += len(heap)
            batch.done += batch.chunk
            if batch.done >= batch.queue[0].work_tokens:
                whole = batch.queue.popleft()
                batch.done = 0
        else:
            self._advance(batch, batch.until - batch.step)
        batch.at_s = now_s
        ended = []
        while heap and heap[0][0] <= batch.step:
            job = heapq.heappop(heap)[2]
            batch.context -= job.input_tokens + job.output_tokens
            ended.append(job)
        if whole is not None:
            whole.prefill_end_s = now_s
            self._prefilled(now_s, whole)
        self._begin(batch)
        for job in ended:
            job.finish_s = now_s
            self._finished(now_s, job)
