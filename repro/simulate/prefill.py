"""Prefill stages: instances that take whole requests one after the other, or chunks of several in turn.

T_prefill is known on assignment, so a whole prefill needs no queue to be played: its start and end are written down at once, and the only
event is its end. Failures and role changes void what was written; an event that no longer matches its job's time is ignored.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from repro.simulate.events import EventQueue
from repro.simulate.job import NOT_YET, Job

OnJob = Callable[[float, Job], None]


class _Stage:
    def __init__(self, events: EventQueue, ended: OnJob) -> None:
        self.members: dict[int, deque[Job]] = {}
        self._events = events
        self._ended = ended
        self._closing: dict[int, Callable[[float, int], None]] = {}

    def open(self, now_s: float, instance: int) -> None:  # noqa: ARG002
        """Let an instance serve."""
        self.members[instance] = deque()

    def close(self, now_s: float, instance: int, drained: Callable[[float, int], None]) -> None:
        """Call `drained` when an instance, which gets nothing new, has finished what it has."""
        self._closing[instance] = drained
        if not self.members[instance]:
            self._leave(now_s, instance)

    def _leave(self, now_s: float, instance: int) -> None:
        del self.members[instance]
        self._closing.pop(instance)(now_s, instance)

    def fail(self, now_s: float, instance: int) -> list[Job]:  # noqa: ARG002
        """Stop an instance at once; returns the jobs that it loses."""
        self._closing.pop(instance, None)
        lost = list(self.members.pop(instance, ()))
        for job in lost:
            job.prefill_end_s = NOT_YET
        return lost


class WholePrefill(_Stage):
    """First come, first served, one request at a time. `began(now, job)` is called when a job's first piece exists, if wanted."""

    def __init__(self, events: EventQueue, ended: OnJob, began: OnJob | None = None, first_piece: float = 0.0) -> None:
        super().__init__(events, ended)
        self._began = began
        self._first_piece = first_piece
        self._on_begin = self._begin
        self._on_end = self._end

    def assign(self, now_s: float, job: Job, instance: int) -> None:
        """Queue a job at an instance: write down when it starts and ends."""
        work_s, queue = job.work_s, self.members[instance]
        end_s = (queue[-1].prefill_end_s if queue else now_s) + work_s
        job.prefill_worker = instance
        job.prefill_start_s = start_s = end_s - work_s if end_s - work_s > now_s else now_s
        job.prefill_end_s = end_s
        queue.append(job)
        if self._began is not None:
            self._events.at(start_s + work_s * self._first_piece, self._on_begin, job)
        self._events.at(end_s, self._on_end, job)

    def _begin(self, now_s: float, job: Job) -> None:
        if now_s == job.prefill_start_s + job.work_s * self._first_piece and job.prefill_end_s >= now_s:
            self._began(now_s, job)  # type: ignore[misc]

    def _end(self, now_s: float, job: Job) -> None:
        if now_s != job.prefill_end_s:
            return
        instance = job.prefill_worker
        queue = self.members.get(instance)
        if not queue or queue[0] is not job:
            return  # of a job that was lost and given out twice at one moment, all events fall together
        queue.popleft()
        if not queue and instance in self._closing:
            self._leave(now_s, instance)
        self._ended(now_s, job)


class ChunkedPrefill(_Stage):
    """Chunks of `chunk_tokens` of all requests of an instance in turn, so that a short request does not wait for a long one.

    `chunk_s(done, tokens)` is the time of one chunk after `done` tokens; `part(now, job, done, tokens)` is called at its end, when
    its KVCache exists.
    """

    def __init__(
        self,
        events: EventQueue,
        ended: OnJob,
        chunk_tokens: int,
        chunk_s: Callable[[int, int], float],
        part: Callable[[float, Job, int, int], None] | None = None,
    ) -> None:
        super().__init__(events, ended)
        self._chunk_tokens = chunk_tokens
        self._chunk_s = chunk_s
        self._part = part
        self._turn: dict[int, tuple[Job, int, float]] = {}
        self._done: dict[int, int] = {}

    def assign(self, now_s: float, job: Job, instance: int) -> None:
        """Join the instance's round."""
        job.prefill_worker = instance
        job.prefill_start_s = NOT_YET
        self._done[job.id] = 0
        self.members[instance].append(job)
        if instance not in self._turn:
            self._next(now_s, instance)

    def fail(self, now_s: float, instance: int) -> list[Job]:
        """Stop an instance; chunks done are lost as well."""
        self._turn.pop(instance, None)
        return super().fail(now_s, instance)

    def _next(self, now_s: float, instance: int) -> None:
        job = self.members[instance][0]
        if job.prefill_start_s == NOT_YET:
            job.prefill_start_s = now_s
        done = self._done[job.id]
        end_s = now_s + self._chunk_s(done, min(self._chunk_tokens, job.work_tokens - done))
        self._turn[instance] = (job, done, end_s)
        self._events.at(end_s, self._end, instance)

    def _end(self, now_s: float, instance: int) -> None:
        turn = self._turn.get(instance)
        if turn is None or turn[2] != now_s:
            return
        job, done, _ = turn
        del self._turn[instance]
        tokens = min(self._chunk_tokens, job.work_tokens - done)
        queue = self.members[instance]
        queue.popleft()
        complete = done + tokens >= job.work_tokens
        if complete:
            del self._done[job.id]
            job.prefill_end_s = now_s
        else:
            self._done[job.id] = done + tokens
            queue.append(job)
        if self._part is not None:
            self._part(now_s, job, done, tokens)
        if queue:
            self._next(now_s, instance)
        elif instance in self._closing:
            self._leave(now_s, instance)
        if complete:
            self._ended(now_s, job)
