"""The decode stage: continuous batching up to BS_max, with one event for all the steps until the batch changes.

A batch advances in whole steps. A request that becomes ready during a step joins at the step's end; from then on it takes one token
per step. As nothing changes in between, the next change is the earliest completion, and the steps until then are computed, not
played. Requests that find every batch full wait in one queue, in the order in which they became ready.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable

from repro.scheduling.tables import StepTimes
from repro.simulate.events import EventQueue
from repro.simulate.job import Job


class Batch:
    """One instance: `at_s` is the step boundary up to which it has been advanced, or at which the next step begins."""

    __slots__ = ("at_s", "context", "fresh", "heap", "id", "step", "wake_s")

    def __init__(self, id_: int) -> None:
        self.id = id_
        self.heap: list[tuple[int, int, Job]] = []
        self.fresh: list[Job] = []
        self.at_s = 0.0
        self.step = 0
        self.context = 0
        self.wake_s = math.inf

    @property
    def size(self) -> int:
        """Requests that the instance is decoding."""
        return len(self.heap)


class DecodeStage:
    """All decode instances of one PD cluster. `finished(now, job)` is called at a job's last token."""

    def __init__(
        self, events: EventQueue, steps: StepTimes, batch_max: int, finished: Callable[[float, Job], None]
    ) -> None:
        self.batch_max = batch_max
        self.preemptions = 0  # only memory preempts, and nobody counts it here
        self.waiting: deque[Job] = deque()
        self.members: dict[int, Batch] = {}
        self._events = events
        self._steps = steps
        self._finished = finished
        # Open instances by batch size, so that the smallest batch is found at once among any number of them.
        self._by_size: list[dict[int, Batch]] = [{} for _ in range(batch_max + 1)]
        self._smallest = batch_max
        self._closing: dict[int, Callable[[float, int], None]] = {}
        self._order = 0
        self._on_wake = self._wake

    def open(self, now_s: float, instance: int) -> None:
        """Let an instance serve."""
        batch = self.members[instance] = Batch(instance)
        batch.at_s = now_s
        self._by_size[0][instance] = batch
        self._smallest = 0
        self._fill(now_s)

    def close(self, now_s: float, instance: int, drained: Callable[[float, int], None]) -> None:
        """Give an instance nothing new, and call `drained` when its batch is done."""
        batch = self.members[instance]
        self._by_size[len(batch.heap)].pop(instance)
        self._closing[instance] = drained
        if not batch.heap:
            self._leave(now_s, instance)

    def fail(self, now_s: float, instance: int) -> list[Job]:  # noqa: ARG002
        """Stop an instance at once; returns the jobs whose KVCache is lost with it."""
        batch = self.members.pop(instance, None)
        if batch is None:
            return []
        if self._closing.pop(instance, None) is None:
            self._by_size[len(batch.heap)].pop(instance)
        batch.wake_s = math.inf
        return [job for _, _, job in sorted(batch.heap, key=lambda entry: entry[1])]

    def ready(self, now_s: float, job: Job) -> None:
        """A job's KVCache has arrived."""
        sizes, size = self._by_size, self._smallest
        while not sizes[size] and size < self.batch_max:
            size += 1
        self._smallest = size
        if size >= self.batch_max:
            self.waiting.append(job)
            return
        batch = next(iter(sizes[size].values()))
        self._join(now_s, batch, job)
        self._plan(batch)

    def _fill(self, now_s: float) -> None:
        while self.waiting:
            before = len(self.waiting)
            self.ready(now_s, self.waiting.popleft())
            if len(self.waiting) == before:
                self.waiting.rotate(1)
                return

    def _join(self, now_s: float, batch: Batch, job: Job) -> None:
        heap = batch.heap
        size = len(heap)
        if not size:
            batch.at_s = now_s
        elif now_s > batch.at_s:
            self._advance_past(batch, now_s)
        self._order += 1
        heapq.heappush(heap, (batch.step + job.output_tokens, self._order, job))
        sizes = self._by_size
        del sizes[size][batch.id]
        sizes[size + 1][batch.id] = batch
        batch.context += job.input_tokens
        batch.fresh.append(job)
        job.decode_worker = batch.id
        job.decode_s = batch.at_s

    def _duration(self, batch: Batch, steps: int) -> float:
        size = len(batch.heap)
        fixed = self._steps.step_s[size] * steps
        if not self._steps.grows:
            return fixed
        return fixed + self._steps.slope_s[size] * (batch.context * steps + size * (steps * (steps - 1) // 2))

    def _advance_past(self, batch: Batch, now_s: float) -> None:
        """To the first step boundary at or after `now_s`, which lies before any completion."""
        size = len(batch.heap)
        elapsed = now_s - batch.at_s
        steps = self._steps
        if steps.grows:
            a, b = steps.step_s[size] + steps.slope_s[size] * (batch.context - size / 2), steps.slope_s[size] * size / 2
            # elapsed = a·n + b·n², its root written so that it is exact for b → 0.
            count = math.ceil(2 * elapsed / (a + math.sqrt(a * a + 4 * b * elapsed)) - 1e-9)
        else:
            count = math.ceil(elapsed / steps.step_s[size] - 1e-9)
        most = batch.heap[0][0] - batch.step
        if count < 1:
            count = 1
        self._advance(batch, count if count < most else most)

    def _advance(self, batch: Batch, count: int) -> None:
        size = len(batch.heap)
        grows, step_s = self._steps.grows, self._steps.step_s[size]
        if batch.fresh and count:
            first_s = batch.at_s + (self._duration(batch, 1) if grows else step_s)
            for job in batch.fresh:
                job.first_token_s = first_s
            batch.fresh.clear()
        batch.at_s += self._duration(batch, count) if grows else step_s * count
        batch.step += count
        batch.context += count * size

    def _plan(self, batch: Batch) -> None:
        """Ask to be woken at the batch's earliest completion."""
        count = batch.heap[0][0] - batch.step
        steps = self._steps
        wake_s = batch.at_s + (self._duration(batch, count) if steps.grows else steps.step_s[len(batch.heap)] * count)
        if not -1e-9 < wake_s - batch.wake_s < 1e-9:
            batch.wake_s = wake_s
            self._events.at(wake_s, self._on_wake, batch)

    def _wake(self, now_s: float, batch: Batch) -> None:
        if now_s != batch.wake_s:
            return
        heap = batch.heap
        size = len(heap)
        self._advance(batch, heap[0][0] - batch.step)
        batch.at_s = now_s  # equal but for rounding; the event's time is the one that others saw
        batch.wake_s = math.inf
        step = batch.step
        ended = []
        while heap and heap[0][0] <= step:
            job = heapq.heappop(heap)[2]
            batch.context -= job.input_tokens + job.output_tokens
            ended.append(job)
        left = len(heap)
        if batch.id in self._closing:
            if not left:
                self._leave(now_s, batch.id)
        else:
            del self._by_size[size][batch.id]
            self._by_size[left][batch.id] = batch
            if left < self._smallest:
                self._smallest = left
            while self.waiting and len(heap) < self.batch_max:
                self._join(now_s, batch, self.waiting.popleft())
        if heap:
            self._plan(batch)
        for job in ended:
            job.finish_s = now_s
            self._finished(now_s, job)

    def _leave(self, now_s: float, instance: int) -> None:
        del self.members[instance]
        self._closing.pop(instance)(now_s, instance)
