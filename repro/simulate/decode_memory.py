"""The decode stage of instances whose memory is counted: a batch holds what fits beside growing contexts, and gives back when it fills.

A request joins when S_kv of all contexts, after the step that comes next, fits the room for KVCache. Every step adds a token to each
context, and where the next one would not fit, the request that joined last leaves the batch and its KVCache is dropped. It comes back
before anybody new as soon as there is room, and is prefilled again on its decode instance, prompt and answer so far, while the batch stands
still: preemption by recomputation, the default of vLLM. Those who wait are served in the order in which they became ready, and
nobody overtakes.

As in `repro.simulate.decode`, whose interface this is, the steps until the batch changes are computed and not played: until the next
completion, or until memory is full. An event costs time linear in the batch, so the stage without a limit of memory stays its own.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

from repro.errors import UserError
from repro.scheduling.tables import CostTables, StepTimes
from repro.simulate.events import EventQueue
from repro.simulate.job import Job


class Running:
    """A request in a batch: `tokens` of context, `left` tokens to come; `fresh` until its first step, which is that of its first token."""

    __slots__ = ("fresh", "job", "left", "tokens")

    def __init__(self, job: Job) -> None:
        self.job = job
        self.tokens = job.input_tokens
        self.left = job.output_tokens
        self.fresh = True


class MemoryBatch:
    """One instance: `at_s` is the step boundary up to which it has been advanced, or at which the next step begins.

    `running` is in the order of joining; `changed` numbers the last change of its size.
    """

    __slots__ = ("at_s", "changed", "id", "preempted", "running", "wake_s")

    def __init__(self, id_: int, at_s: float) -> None:
        self.id = id_
        self.running: list[Running] = []
        self.preempted: deque[Running] = deque()
        self.at_s = at_s
        self.changed = 0
        self.wake_s = math.inf

    @property
    def size(self) -> int:
        """Requests that the instance is decoding, or has to recompute."""
        return len(self.running) + len(self.preempted)


class MemoryDecodeStage:
    """All decode instances of one PD cluster, each with `memory_bytes` for KVCache. `finished(now, job)` is called at a job's last token.

    `tables` gives S_kv and what recomputing takes.
    """

    def __init__(
        self,
        events: EventQueue,
        steps: StepTimes,
        batch_max: int,
        finished: Callable[[float, Job], None],
        tables: CostTables,
        memory_bytes: float,
    ) -> None:
        self.batch_max = batch_max
        self.preemptions = 0
        self.waiting: deque[Job] = deque()
        self.members: dict[int, MemoryBatch] = {}
        self._events = events
        self._steps = steps
        self._finished = finished
        self._tables = tables
        self._memory_bytes = memory_bytes
        self._closing: dict[int, Callable[[float, int], None]] = {}
        self._changes = 0
        self._on_wake = self._wake

    def open(self, now_s: float, instance: int) -> None:
        """Let an instance serve."""
        batch = self.members[instance] = MemoryBatch(instance, now_s)
        self._count(batch)
        self._fill(now_s)

    def close(self, now_s: float, instance: int, drained: Callable[[float, int], None]) -> None:
        """Give an instance nothing new, and call `drained` when its batch is done."""
        self._closing[instance] = drained
        if not self.members[instance].size:
            self._leave(now_s, instance)

    def fail(self, now_s: float, instance: int) -> list[Job]:  # noqa: ARG002
        """Stop an instance at once; returns the jobs whose KVCache is lost with it."""
        batch = self.members.pop(instance, None)
        if batch is None:
            return []
        self._closing.pop(instance, None)
        batch.wake_s = math.inf
        return [one.job for one in batch.running] + [one.job for one in batch.preempted]

    def ready(self, now_s: float, job: Job) -> None:
        """A job's KVCache has arrived.

        Raises:
            UserError: for a request whose last context alone is larger than the memory.
        """
        longest = job.input_tokens + job.output_tokens
        self._tables.cover(longest + 1)
        if self._tables.kv_bytes[longest] > self._memory_bytes:
            raise UserError(
                f"cluster.decode.memory_bytes: {self._memory_bytes:g}, but a request of {longest} tokens keeps "
                f"{self._tables.kv_bytes[longest]:.4g} bytes; accepted: room for the longest request, or null"
            )
        if self.waiting or not self._place(now_s, job):
            self.waiting.append(job)

    def _fill(self, now_s: float) -> None:
        while self.waiting and self._place(now_s, self.waiting[0]):
            self.waiting.popleft()

    def _place(self, now_s: float, job: Job) -> bool:
        """Join the smallest batch that has room, of several the one that has been of its size for longest."""
        closing, most = self._closing, self.batch_max
        open_ = [batch for batch in self.members.values() if batch.id not in closing and batch.size < most]
        open_.sort(key=_size_and_age)
        for batch in open_:
            if batch.preempted:
                continue
            if not batch.running:
                batch.at_s = max(now_s, batch.at_s)
            elif now_s > batch.at_s:
                self._advance_past(batch, now_s)
            if self._fits(batch, job.input_tokens):
                running = Running(job)
                batch.running.append(running)
                self._count(batch)
                job.decode_worker = batch.id
                job.decode_s = batch.at_s
                self._plan(batch)
                return True
        return False

    def _count(self, batch: MemoryBatch) -> None:
        self._changes += 1
        batch.changed = self._changes

    def _held_bytes(self, batch: MemoryBatch, steps: int) -> float:
        """KVCache of the whole batch after so many steps more."""
        kv = self._tables.kv_bytes
        held = 0.0
        for one in batch.running:
            held += kv[one.tokens + steps]
        return held

    def _fits(self, batch: MemoryBatch, tokens: int) -> bool:
        """Whether the next step fits with one more context of `tokens`."""
        return self._held_bytes(batch, 1) + self._tables.kv_bytes[tokens + 1] <= self._memory_bytes

    def _steps_left(self, batch: MemoryBatch) -> int:
        """Steps until the first completion, or fewer: as many as memory has room for."""
        most = batch.running[0].left
        for one in batch.running:
            if one.left < most:
                most = one.left
        if most <= 0 or self._held_bytes(batch, most) <= self._memory_bytes:
            return most
        low, high = 0, most
        while high - low > 1:
            middle = (low + high) // 2
            if self._held_bytes(batch, middle) <= self._memory_bytes:
                low = middle
            else:
                high = middle
        return low

    def _duration(self, batch: MemoryBatch, count: int) -> float:
        size = len(batch.running)
        fixed = self._steps.step_s[size] * count
        if not self._steps.grows:
            return fixed
        context = 0
        for one in batch.running:
            context += one.tokens
        return fixed + self._steps.slope_s[size] * (context * count + size * (count * (count - 1) // 2))

    def _advance_past(self, batch: MemoryBatch, now_s: float) -> None:
        """To the first step boundary at or after `now_s`, which lies before any completion and before memory is full."""
        low, high = 0, self._steps_left(batch)
        while high - low > 1:
            middle = (low + high) // 2
            if batch.at_s + self._duration(batch, middle) < now_s - 1e-9:
                low = middle
            else:
                high = middle
        self._advance(batch, high)

    def _advance(self, batch: MemoryBatch, count: int) -> None:
        if not count:
            return
        first_s, after_s = batch.at_s + self._duration(batch, 1), batch.at_s + self._duration(batch, count)
        for one in batch.running:
            if one.fresh:
                one.fresh = False
                one.job.first_token_s = first_s
            one.tokens += count
            one.left -= count
        batch.at_s = after_s

    def _plan(self, batch: MemoryBatch) -> None:
        """Ask to be woken at the earliest completion, or when memory is full."""
        wake_s = batch.at_s + self._duration(batch, self._steps_left(batch))
        if not -1e-9 < wake_s - batch.wake_s < 1e-9:
            batch.wake_s = wake_s
            self._events.at(wake_s, self._on_wake, batch)

    def _wake(self, now_s: float, batch: MemoryBatch) -> None:
        if now_s != batch.wake_s:
            return
        self._advance(batch, self._steps_left(batch))
        batch.at_s = now_s  # equal but for rounding; the event's time is the one that others saw
        batch.wake_s = math.inf
        ended = [one.job for one in batch.running if one.left <= 0]
        batch.running = [one for one in batch.running if one.left > 0]
        if ended:
            self._count(batch)
        while len(batch.running) > 1 and self._held_bytes(batch, 1) > self._memory_bytes:
            self.preemptions += 1
            batch.preempted.appendleft(batch.running.pop())
        self._recompute(batch)
        if batch.running:
            self._plan(batch)
        if batch.id in self._closing:
            if not batch.size:
                self._leave(now_s, batch.id)
        else:
            self._fill(now_s)
        for job in ended:
            job.finish_s = now_s
            self._finished(now_s, job)

    def _recompute(self, batch: MemoryBatch) -> None:
        """Take back who was preempted, in the order of joining, as far as there is room; the batch waits for their prefill."""
        while batch.preempted and self._fits(batch, batch.preempted[0].tokens):
            one = batch.preempted.popleft()
            batch.running.append(one)
            batch.at_s += self._tables.prefill_s[one.tokens]

    def _leave(self, now_s: float, instance: int) -> None:
        del self.members[instance]
        self._closing.pop(instance)(now_s, instance)


def _size_and_age(batch: MemoryBatch) -> tuple[int, int]:
    return batch.size, batch.changed
