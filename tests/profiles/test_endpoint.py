"""Profiles of running engines: what made the times is recovered, and what a server does to make them wrong is refused or flagged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from repro.errors import UserError
from repro.profiles.endpoint import (
    Answer,
    BrokenAnswerError,
    RefusedError,
    fit_fixed,
    measure_endpoint,
    steps_together,
)
from repro.profiles.measured import ProfileSpec, Timing, fit_decode

SPEC = ProfileSpec(
    endpoint="http://127.0.0.1:1",
    first_tokens=128,
    last_tokens=1024,
    repeats=3,
    batches=(1, 2, 4),
    contexts=(128, 1024),
    decode_steps=4,
)
#: HTTP and the way into the engine and back, more than a whole prefill of the shortest prompt.
OUTSIDE_S = 0.03


def step_s(batch: int, context: int) -> float:
    return 0.01 + 0.002 * batch + 1e-6 * batch * context


def prefill_s(tokens: int) -> float:
    """That of one token is one step."""
    return step_s(1, 1) + 1e-4 * (tokens - 1) + 1e-8 * (tokens**2 - 1)


@dataclass
class FakeServer:
    """A server with a clock of its own, and with the habits that a test gives it."""

    caches: bool = False
    counts: Any = int
    says_cached: int = 0
    at_once: int = 1000
    breaks: int = 0
    ends_early: bool = False
    limit_tokens: int | None = None
    refuses_above: int = 10**9
    refuses_below: int = 1
    scatter: float = 0.0
    #: That of what is no prefill.
    wait_scatter: float = 0.0
    again: float = 1.0
    own_counters: bool = False
    #: A prompt of one token takes so much longer.
    single_added_s: float = 0.0
    #: Whether the engine counts as many requests of others.
    others_ask: bool = False
    hits: int = 0
    #: Whether an answer is sent when it is whole.
    holds_back: bool = False
    now_s: float = 0.0
    #: How often a prompt was asked before it is kept.
    keeps_after: int = 1
    seen: dict[tuple[int, ...], int] = field(default_factory=dict)
    prefills: list[float] = field(default_factory=list)
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(1))

    def prompt(self, tokens: int, rng: np.random.Generator) -> tuple[int, ...]:
        return tuple(rng.integers(0, 10**6, tokens).tolist())

    def counters(self) -> Mapping[str, float]:
        if not self.own_counters:
            return {}
        name, count = "vllm:request_prefill_time_seconds", len(self.prefills) * (2 if self.others_ask else 1)
        return {"vllm:prefix_cache_hits_total": self.hits, f"{name}_count": count, f"{name}_sum": sum(self.prefills)}

    def answer(self, prompt: tuple[int, ...], output_tokens: int) -> Answer:
        return self.together([prompt], output_tokens)[0]

    def together(self, prompts: Sequence[tuple[int, ...]], output_tokens: int) -> list[Answer]:
        if self.breaks:
            self.breaks -= 1
            raise BrokenAnswerError("the connection was closed before the answer was complete")
        if not self.refuses_below <= len(prompts[0]) <= self.refuses_above:
            raise RefusedError("status 400 (too long, or too short)")
        answers = []
        for first in range(0, len(prompts), self.at_once):
            group, began_s = prompts[first : first + self.at_once], self.now_s
            start_s = 0.0 if first else began_s
            waited_s, context = 0.0, len(prompts[0])
            ready = []
            for prompt in group:
                hit = self.caches and self.seen.get(prompt, 0) >= self.keeps_after
                own_s = prefill_s(len(prompt)) * (0.1 if hit else 1.0)
                self.hits += hit
                own_s += self.single_added_s if len(prompt) == 1 else 0.0
                own_s *= self.again if prompt in self.seen else 1.0
                own_s *= 1 + self.scatter * float(self.rng.standard_normal())
                self.prefills.append(own_s)
                self.seen[prompt] = self.seen.get(prompt, 0) + 1
                waited_s += own_s
                ready.append(waited_s)
            # Whoever is ready decodes on while the others are prefilled.
            step = step_s(len(group), context)
            tokens = 1 if self.ends_early else output_tokens
            for at_s in ready:
                outside_s = OUTSIDE_S * (1 + self.wait_scatter * float(self.rng.random()))
                times = tuple(began_s - start_s + outside_s + at_s + step * index for index in range(tokens))
                times = times[-1:] * tokens if self.holds_back else times
                answers.append(Answer(start_s, times, (1,) * tokens, self.counts(context), tokens, self.says_cached))
            self.now_s = max(answer.start_s + answer.token_times_s[-1] for answer in answers)
        return answers


def measured(server: FakeServer, spec: ProfileSpec = SPEC, said: list[str] | None = None) -> Any:
    return measure_endpoint(server, spec, (said if said is not None else []).append, 7, lambda: server.now_s)


def test_the_profile_recovers_the_times_that_made_it() -> None:
    found = measured(FakeServer())
    assert [timing.tokens for timing in found.prefill] == [128, 256, 512, 1024]
    assert [timing.seconds for timing in found.prefill] == pytest.approx([prefill_s(n) for n in (128, 256, 512, 1024)])
    assert found.fixed.fixed_s == pytest.approx(0.0119, rel=1e-3)
    assert found.fixed.per_token_s == pytest.approx(1e-4, rel=1e-3)
    step = fit_decode(found.decode, slo_tokens_per_s=60)
    assert (step.base_s, step.per_sequence_s) == pytest.approx((0.01, 0.002))
    assert step.per_context_token_s == pytest.approx(1e-6)
    assert step.batch_max == 2
    assert found.prefix_cache == "off"
    assert found.flags == ()


def test_what_is_no_prefill_is_taken_off_whatever_it_is_and_however_tokens_are_sent() -> None:
    for server in (FakeServer(), FakeServer(holds_back=True), FakeServer(own_counters=True)):
        found = measured(server)
        assert found.outside_by == ("the engine's own time of it" if server.own_counters else "a step of decode")
        assert found.outside.value == pytest.approx(OUTSIDE_S, rel=1e-3)
        assert found.ttft_s[0] == pytest.approx(prefill_s(128) + OUTSIDE_S)
        assert found.prefill[0].seconds == pytest.approx(prefill_s(128), rel=1e-3)


def test_a_server_that_takes_no_prompt_of_one_token_is_asked_with_two() -> None:
    found = measured(FakeServer(refuses_below=2))
    assert found.prefill[0].seconds == pytest.approx(prefill_s(128), rel=1e-2)
    with pytest.raises(UserError, match=r"^options\.endpoint: a prompt of 2 tokens is refused: status 400"):
        measured(FakeServer(refuses_below=3))


def test_a_prompt_that_takes_no_longer_than_one_token_yields_no_profile() -> None:
    with pytest.raises(
        UserError, match=r"^options\.first_tokens: a prompt of 128 tokens .* no later than one of a single"
    ):
        measured(FakeServer(single_added_s=1.0))


def test_a_prefix_cache_is_told_apart_and_disturbs_no_timing() -> None:
    found = measured(FakeServer(caches=True))
    assert found.prefix_cache == "on"
    assert found.prefill[0].seconds == pytest.approx(prefill_s(128))


@pytest.mark.parametrize("own_counters", [False, True])
def test_a_cache_that_keeps_what_was_asked_twice_is_on(own_counters: bool) -> None:
    assert measured(FakeServer(caches=True, keeps_after=2, own_counters=own_counters)).prefix_cache == "on"


def test_the_engines_own_count_of_hits_stands_above_times() -> None:
    assert measured(FakeServer(again=0.5, own_counters=True)).prefix_cache == "off"
    assert measured(FakeServer(caches=True, own_counters=True, again=9.0)).prefix_cache == "on"


def test_a_repeated_prompt_that_is_neither_fast_nor_slow_is_unclear_and_flagged() -> None:
    found = measured(FakeServer(again=0.75))
    assert found.prefix_cache == "unclear"
    assert any("neither cached nor computed" in flag for flag in found.flags)


def test_prompts_of_two_runs_are_different() -> None:
    server = FakeServer(caches=True)
    for nonce in (1, 2):
        found = measure_endpoint(server, SPEC, lambda line: None, nonce, lambda: server.now_s)
        assert found.prefill[-1].seconds == pytest.approx(prefill_s(1024))


def test_the_engines_own_counter_stands_beside_the_clients_time() -> None:
    found = measured(FakeServer(own_counters=True))
    assert [timing.prefill_s for timing in found.engine] == pytest.approx([prefill_s(n) for n in (128, 256, 512, 1024)])
    assert [timing.ratio.value for timing in found.engine] == pytest.approx([1.0] * 4, rel=1e-4)
    assert all(math.isnan(timing.ttft_s) for timing in found.engine)  # a counter that this engine does not have


def test_counters_that_other_requests_are_in_as_well_are_not_taken_for_the_engines_own_time() -> None:
    found = measured(FakeServer(own_counters=True, others_ask=True))
    assert (found.engine, found.outside_by) == ((), "a step of decode")


def test_the_ratio_to_the_engine_is_of_the_same_requests_whatever_their_noise() -> None:
    found = measured(FakeServer(own_counters=True, scatter=0.2, wait_scatter=1.0), replace(SPEC, repeats=9))
    longest = found.engine[-1]
    assert longest.ratio.value == pytest.approx(1.0, abs=0.1)
    assert longest.ratio.low < 1.0 < longest.ratio.high


def test_special_tokens_that_a_server_adds_are_counted_and_flagged() -> None:
    found = measured(FakeServer(counts=lambda tokens: tokens + 1))
    assert [timing.tokens for timing in found.prefill] == [129, 257, 513, 1025]
    assert "adds 1 token" in found.flags[0]


@pytest.mark.parametrize("counts", [lambda n: 3 * n, lambda n: n // 2, lambda n: n + n % 7, lambda n: min(n, 300)])
def test_a_server_that_counts_otherwise_yields_no_profile(counts: Any) -> None:
    with pytest.raises(UserError, match=r"is counted as \d+ by the server"):
        measured(FakeServer(counts=counts))


def test_a_server_that_does_not_count_is_flagged() -> None:
    assert any("does not say how many tokens" in flag for flag in measured(FakeServer(counts=lambda n: None)).flags)


def test_a_new_prompt_that_was_cached_yields_no_profile() -> None:
    with pytest.raises(UserError, match="100 were cached: its times are not T_prefill"):
        measured(FakeServer(says_cached=100))


def test_a_few_broken_answers_are_asked_again_and_flagged_and_more_are_an_error() -> None:
    assert any("broke and were asked again" in flag for flag in measured(FakeServer(breaks=2)).flags)
    with pytest.raises(UserError, match="the connection was closed before the answer was complete, 3 times in a row"):
        measured(FakeServer(breaks=100))


def test_a_batch_that_never_decoded_together_is_left_out_and_flagged() -> None:
    found = measured(FakeServer(at_once=2))
    assert {timing.batch for timing in found.decode} == {1, 2}
    assert any("batch 4" in flag and "left out" in flag for flag in found.flags)


def test_tokens_that_come_in_a_burst_are_flagged_and_the_step_is_what_they_add_to_an_answer() -> None:
    found = measured(FakeServer(holds_back=True))
    for timing in found.decode:
        assert timing.seconds == pytest.approx(step_s(timing.batch, timing.tokens), rel=1e-6)
        assert any(
            f"batch {timing.batch}, context {timing.tokens}: tokens come in bursts" in flag for flag in found.flags
        )
    assert not any("bursts" in flag for flag in measured(FakeServer()).flags)


def test_a_server_that_ends_answers_at_once_has_no_decode_step() -> None:
    with pytest.raises(UserError, match="no decode step could be measured"):
        measured(FakeServer(ends_early=True))


def test_lengths_end_where_the_server_or_the_time_ends_them() -> None:
    assert measured(FakeServer(limit_tokens=600)).stopped == "the server, which takes 600 tokens"
    refused = measured(FakeServer(refuses_above=600))
    assert (refused.prefill[-1].tokens, refused.stopped[:32]) == (512, "the server, which refused 1024 t")
    short = ProfileSpec(endpoint=SPEC.endpoint, budget_s=1.5, repeats=3, batches=(1,), contexts=(128,), decode_steps=2)
    assert measured(FakeServer(), short).stopped.startswith("time: ")
    with pytest.raises(UserError, match="more than the 100 that the server takes"):
        measured(FakeServer(limit_tokens=100))


def test_a_length_that_stays_uncertain_is_repeated_up_to_four_times_as_often() -> None:
    assert {timing.repeats for timing in measured(FakeServer()).prefill} == {3}
    often = [timing.repeats for timing in measured(FakeServer(scatter=0.4)).prefill]
    assert max(often) > 3
    assert set(often) <= {3, 6, 9, 12}
    assert {timing.repeats for timing in measured(FakeServer(scatter=0.4), replace(SPEC, budget_s=10.0)).prefill} == {3}


def test_scattered_repeats_are_flagged() -> None:
    assert any("scatter" in flag for flag in measured(FakeServer(scatter=0.4)).flags)


def test_several_tokens_in_one_event_are_so_many_steps() -> None:
    answer = Answer(0.0, (1.0, 1.2, 1.3), (1, 2, 1), 8, 4)
    assert steps_together([answer]) == pytest.approx([0.1, 0.1, 0.1])


def test_the_fixed_part_of_two_lengths_is_a_straight_lines() -> None:
    fixed = fit_fixed([Timing(n, 1, 0.5 + 0.01 * n, 0, 0, 3, 0) for n in (10, 20)])
    assert (fixed.fixed_s, fixed.per_token_s, fixed.per_pair_s) == pytest.approx((0.5, 0.01, 0.0))
