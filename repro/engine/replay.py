"""Engines that replay a profile: they spend its T_prefill and T_decode and emit S_kv(l) of bytes, and compute nothing.

With them a deployment of any size runs on a laptop, its sockets, scheduler and link real. Both are pure: time comes as an argument, in
seconds of whatever clock drives them, and what is due next is asked for, so that a worker's real clock and a test's virtual one drive the
same code. Nothing here imports torch.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol


class Profile(Protocol):
    """What is replayed (`repro.profiles.base.PhaseProfile` fits)."""

    @property
    def batch_max(self) -> int:
        """BS_max of equation 5."""
        ...

    def decode_step_s(self, batch: int, context_tokens: float = 0.0) -> float:
        """T_decode of one step in seconds."""
        ...


class PrefillDue(NamedTuple):
    """What a prefill instance has to do at `at_s`: emit piece `piece` of request `key`; with the last one the prefill has ended."""

    at_s: float
    key: int
    piece: int


@dataclass
class _Prefilling:
    key: int
    work_s: float
    pieces: int
    slow: float
    start_s: float = math.nan
    piece: int = 0

    def due(self) -> PrefillDue:
        at_s = self.start_s + self.work_s * self.slow * (self.piece + 1) / self.pieces
        return PrefillDue(at_s, self.key, self.piece)


class ReplayPrefill:
    """One prefill instance: first come, first served, one request at a time, its KVCache emitted layer by layer (§3.3).

    A request that waited begins when its predecessor was to end, however late the clock was to notice: lateness does not add up.
    """

    def __init__(self) -> None:
        self._queue: deque[_Prefilling] = deque()
        self._ended_s = -math.inf
        #: From now on everything takes so many times as long: an instance that is slow.
        self.slow = 1.0

    def __len__(self) -> int:
        return len(self._queue)

    def assign(self, now_s: float, key: int, work_s: float, pieces: int) -> None:
        """Queue a prefill of `work_s` seconds that emits `pieces` pieces at equal distances."""
        self._queue.append(_Prefilling(key, work_s, pieces, self.slow))
        if len(self._queue) == 1:
            self._queue[0].start_s = max(now_s, self._ended_s)

    def started_s(self) -> float:
        """When the running prefill began; nan where none is."""
        return self._queue[0].start_s if self._queue else math.nan

    def busy_until_s(self, now_s: float) -> float:
        """When all that it holds will be done."""
        if not self._queue:
            return now_s
        return self._queue[0].start_s + sum(one.work_s * one.slow for one in self._queue)

    def due(self) -> PrefillDue | None:
        """What comes next."""
        return self._queue[0].due() if self._queue else None

    def take(self) -> tuple[PrefillDue, bool]:
        """Have done with what was due; returns it, and whether that prefill has ended."""
        running = self._queue[0]
        due = running.due()
        running.piece += 1
        if running.piece < running.pieces:
            return due, False
        self._queue.popleft()
        self._ended_s = due.at_s
        if self._queue:
            self._queue[0].start_s = due.at_s
        return due, True

    def forget(self, key: int) -> None:
        """Give a request up; one that is running stops at once."""
        running = self._queue[0] if self._queue else None
        kept = [one for one in self._queue if one.key != key]
        self._queue = deque(kept)
        if running is not None and running.key == key and kept:
            kept[0].start_s = running.start_s + running.work_s * running.slow * running.piece / running.pieces


class DecodeEvent(NamedTuple):
    """A request's first token (`last` false) or its last one (`last` true), at the end of the step that brings it."""

    at_s: float
    key: int
    last: bool


class Joined(NamedTuple):
    """A request joins the batch at the step boundary `at_s`."""

    key: int
    at_s: float


class ReplayDecode:
    """One decode instance: continuous batching up to BS_max, its steps computed until the batch changes.

    A request joins at the end of the step that is running; from then on it takes one token per step. Between two changes all steps are
    alike, so one timer covers them; what is reported is the end of the very step in which a token falls.
    """

    def __init__(self, profile: Profile, time_scale: float = 1.0) -> None:
        self._profile = profile
        self._scale = time_scale
        self._waiting: deque[tuple[int, int, int]] = deque()
        self._running: list[tuple[int, int, int, int]] = []  # last step, key, output tokens, context at its end
        self._first: list[int] = []  # have joined, and take their first token with the step that begins now
        self._coming: list[DecodeEvent] = []  # first tokens of a step that is running
        self._at_s = 0.0  # the step boundary up to which the batch has come
        self._step = 0
        self._context = 0
        #: As for prefill.
        self.slow = 1.0

    def __len__(self) -> int:
        """Requests that it holds, waiting or running."""
        return len(self._waiting) + len(self._running)

    def join(self, now_s: float, key: int, context_tokens: int, output_tokens: int) -> list[Joined]:
        """A request whose KVCache is there; what joins the batch by that, now or at the end of the running step."""
        self._waiting.append((key, context_tokens, output_tokens))
        return self._admit(now_s)

    def _admit(self, now_s: float) -> list[Joined]:
        joined = []
        room = self._profile.batch_max - len(self._running)
        if not room or not self._waiting:
            return []
        if not self._running:
            self._at_s = max(now_s, self._at_s)
        elif now_s > self._at_s:
            self._advance(min(self._steps_within(now_s - self._at_s), self._left()))
        while room and self._waiting:
            key, context, output = self._waiting.popleft()
            heapq.heappush(self._running, (self._step + output, key, output, context + output))
            self._context += context
            self._first.append(key)
            joined.append(Joined(key, self._at_s))
            room -= 1
        return joined

    def due_s(self) -> float:
        """When the next first or last token comes; infinite where nothing runs."""
        if self._coming:
            return self._coming[0].at_s
        if not self._running:
            return math.inf
        if not self._left():
            return self._at_s
        return self._at_s + self._duration_s(1 if self._first else self._left())

    def take(self) -> tuple[Sequence[DecodeEvent], Sequence[Joined]]:
        """Go on to what was due: the tokens that fall there, and who joins because others left."""
        if not self._coming and self._left():
            self._advance(1 if self._first else self._left())
        events, self._coming = self._coming, []
        if events and events[0].at_s < self._at_s:
            return events, []
        while self._running and self._running[0][0] <= self._step:
            _, key, _, context = heapq.heappop(self._running)
            self._context -= context
            events.append(DecodeEvent(self._at_s, key, True))
        return events, self._admit(self._at_s)

    def forget(self, key: int) -> None:
        """Give a request up."""
        self._waiting = deque(one for one in self._waiting if one[0] != key)
        gone = [one for one in self._running if one[1] == key]
        if gone:
            last, _, output, context = gone[0]
            self._context -= context - output + (output - (last - self._step))
            self._running = [one for one in self._running if one[1] != key]
            heapq.heapify(self._running)
            self._first = [one for one in self._first if one != key]
            self._coming = [event for event in self._coming if event.key != key]

    def _left(self) -> int:
        """Steps until the batch loses somebody."""
        return self._running[0][0] - self._step

    def _pace(self) -> tuple[float, float]:
        """Seconds of the next step, and by how much each step takes longer than the one before it, as contexts grow."""
        size, factor = len(self._running), self._scale * self.slow
        first_s = self._profile.decode_step_s(size, float(self._context)) * factor
        return first_s, self._profile.decode_step_s(size, float(self._context + size)) * factor - first_s

    def _duration_s(self, steps: int) -> float:
        first_s, growth_s = self._pace()
        return steps * first_s + growth_s * steps * (steps - 1) / 2

    def _steps_within(self, elapsed_s: float) -> int:
        """Steps that have begun after `elapsed_s`."""
        first_s, growth_s = self._pace()
        a, b = first_s - growth_s / 2, growth_s / 2
        # elapsed = a·n + b·n², its root written so that it is exact for b → 0.
        return max(math.ceil(2 * elapsed_s / (a + math.sqrt(a * a + 4 * b * elapsed_s)) - 1e-9), 0)

    def _advance(self, steps: int) -> None:
        if self._first and steps:
            first_s = self._at_s + self._duration_s(1)
            self._coming += [DecodeEvent(first_s, key, False) for key in self._first]
            self._first.clear()
        self._at_s += self._duration_s(steps)
        self._step += steps
        self._context += steps * len(self._running)
