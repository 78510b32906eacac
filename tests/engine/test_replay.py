"""Replayed engines against the simulator's stages: the same requests on a virtual clock take the same times."""

from __future__ import annotations

import heapq
import math
import random
from dataclasses import dataclass

import pytest

from repro.engine.replay import ReplayDecode, ReplayPrefill
from repro.scheduling.tables import StepTimes
from repro.simulate.decode import DecodeStage
from repro.simulate.events import EventQueue
from repro.simulate.job import Job


@dataclass(frozen=True)
class Steps:
    """Decode steps that take longer with every sequence and every token of context."""

    base_s: float = 0.02
    per_sequence_s: float = 0.0
    per_token_s: float = 0.0
    batch_max: int = 4

    def decode_step_s(self, batch: int, context_tokens: float = 0.0) -> float:
        return self.base_s + self.per_sequence_s * batch + self.per_token_s * context_tokens


def drawn(seed: int) -> list[tuple[float, int, int]]:
    """Ready at, context and output tokens."""
    rng, now = random.Random(seed), 0.0
    found = []
    for _ in range(60):
        now += rng.expovariate(4.0)
        found.append((now, rng.randrange(1, 2000), rng.randrange(1, 40)))
    return found


def simulated(profile: Steps, requests: list[tuple[float, int, int]]) -> dict[int, tuple[float, float]]:
    """(first token, last token) by the simulator's stage."""
    events = EventQueue()
    ended: dict[int, tuple[float, float]] = {}

    def finished(now_s: float, job: Job) -> None:
        ended[job.id] = (job.first_token_s, now_s)

    stage = DecodeStage(events, StepTimes(profile.decode_step_s, profile.batch_max), profile.batch_max, finished)
    stage.open(0.0, 0)
    for number, (at_s, context, output) in enumerate(requests):
        events.at(at_s, stage.ready, Job(number, at_s, context, output, None))
    while events.heap:
        now, _, handler, argument = heapq.heappop(events.heap)
        handler(now, argument)
    return ended


def replayed(profile: Steps, requests: list[tuple[float, int, int]]) -> dict[int, tuple[float, float]]:
    """The same by the engine, driven from outside."""
    engine, first, ended = ReplayDecode(profile), dict[int, float](), dict[int, tuple[float, float]]()

    def until(now_s: float) -> None:
        while engine.due_s() <= now_s:
            for at_s, key, last in engine.take()[0]:
                if last:
                    ended[key] = (first[key], at_s)
                else:
                    first[key] = at_s

    for number, (at_s, context, output) in enumerate(requests):
        until(at_s)
        engine.join(at_s, number, context, output)
    until(math.inf if not len(engine) else 1e9)
    assert not len(engine)
    return ended


@pytest.mark.parametrize(
    "profile", [Steps(), Steps(per_sequence_s=0.003), Steps(per_sequence_s=0.002, per_token_s=1e-6), Steps(batch_max=1)]
)
def test_decode_replays_what_the_simulator_computes(profile: Steps) -> None:
    requests = drawn(seed=3)
    expected, found = simulated(profile, requests), replayed(profile, requests)
    assert found.keys() == expected.keys() == set(range(len(requests)))
    for number, times in expected.items():
        assert found[number] == pytest.approx(times, abs=1e-6), number


def test_a_request_that_is_given_up_leaves_the_batch_to_the_others() -> None:
    engine = ReplayDecode(Steps(batch_max=2))
    for key in range(3):
        engine.join(0.0, key, 100, 10)
    assert len(engine) == 3
    engine.forget(0)
    joined = engine.join(0.05, 3, 100, 10)
    assert [one.key for one in joined] == [2]
    engine.forget(2)
    engine.forget(3)
    assert len(engine) == 1


def test_prefill_emits_its_pieces_at_equal_distances_and_begins_the_next_where_the_last_ended() -> None:
    engine = ReplayPrefill()
    engine.assign(1.0, 7, 4.0, 4)
    engine.assign(1.5, 8, 1.0, 1)
    assert engine.busy_until_s(1.5) == 6.0
    taken = [engine.take() for _ in range(5)]
    assert [(due.key, due.piece, due.at_s, ended) for due, ended in taken] == [
        (7, 0, 2.0, False), (7, 1, 3.0, False), (7, 2, 4.0, False), (7, 3, 5.0, True), (8, 0, 6.0, True),
    ]  # fmt: skip
    assert engine.due() is None
    engine.assign(6.5, 9, 1.0, 1)  # after idling it begins when it is asked
    assert engine.started_s() == 6.5


def test_a_prefill_that_is_given_up_lets_the_next_begin_at_once() -> None:
    engine = ReplayPrefill()
    engine.assign(0.0, 1, 4.0, 4)
    engine.assign(0.0, 2, 1.0, 1)
    engine.take()
    engine.forget(1)
    assert engine.started_s() == 1.0
    assert engine.take()[0].at_s == 2.0
