"""Conversations whose turns wait for answers."""

from dataclasses import replace

import numpy as np
import pytest
from tiny import TinyProfile, local, play

from repro.kvcache.pool import CacheSpec, GroupSpec
from repro.simulate.spec import PdCluster
from repro.workload.sessions import SessionSpec, draw_sessions

SPEC = SessionSpec(
    0.2, 4.0, 4, system_tokens=512, first_tokens=2000.0, turn_tokens=500.0, output_tokens=40.0, mean_gap_s=5.0, block_tokens=128
)  # fmt: skip
CLOSED = replace(SPEC, closed_loop=True)
FAST, SLOW = TinyProfile(s_per_token=1e-4), TinyProfile(s_per_token=1e-3)


def test_a_turn_comes_its_gap_after_the_answer_before_it() -> None:
    stream = draw_sessions(replace(CLOSED, sessions_per_s=0.02), 2000.0, 8)
    batch = stream.batch
    assert batch.turns is not None
    table, summary = play(local(FAST, 2), stream)
    assert summary.unfinished == 0
    seen = {(row.input_tokens, row.output_tokens): row for row in table.itertuples()}
    assert len(seen) == len(table)
    followed = 0
    for said, turn in zip(zip(batch.input_tokens, batch.output_tokens, strict=True), batch.turns, strict=True):
        before = seen[said]
        while turn is not None and turn[1:3] in seen:
            now = seen[turn[1:3]]
            assert now.arrival_s == pytest.approx(before.finish_s + turn.after_s)
            before, turn, followed = now, turn.then, followed + 1
    assert followed > 50


def test_a_slow_system_meets_fewer_turns_when_they_wait_for_answers_and_as_many_when_they_do_not() -> None:
    arrived = {
        (name, loop): play(local(profile, 2), draw_sessions(spec, 1500.0, 1))[1].arrived
        for name, profile in (("fast", FAST), ("slow", SLOW))
        for loop, spec in (("open", SPEC), ("closed", CLOSED))
    }
    assert arrived["fast", "open"] == arrived["slow", "open"]
    assert arrived["slow", "closed"] < 0.8 * arrived["fast", "closed"]


def test_open_and_closed_loops_say_the_same_things() -> None:
    opened, closed = (draw_sessions(spec, 500.0, 2).batch for spec in (SPEC, CLOSED))
    told = set()
    for tokens, turn in zip(closed.input_tokens.tolist(), closed.turns or [], strict=True):
        told.add(tokens)
        while turn is not None:
            told.add(turn.input_tokens)
            turn = turn.then
    assert set(opened.input_tokens.tolist()) <= told
    assert closed.longest_tokens() == max(told)


def test_a_conversation_stays_with_its_home_and_hits_what_it_said_there() -> None:
    cache = CacheSpec((GroupSpec("full", "block", 1e3), GroupSpec("state", "request", 1e6)), block_tokens=128)
    spec = replace(local(FAST, 2, cache=cache), pd=(PdCluster(FAST, 2, 20), PdCluster(FAST, 2, 20)))
    stream = draw_sessions(replace(CLOSED, system_tokens=0), 1000.0, 3)
    table, summary = play(spec, stream)
    assert summary.completed == summary.arrived == len(table)
    assert (np.diff(table["arrival_s"]) >= 0).all()
    assert table.equals(play(spec, stream)[0])
    # Every turn but a session's first finds the state that the answer before it left behind, if that filled a block.
    later = len(table) - len(stream.batch.arrival_s)
    assert 0.98 * later < (table["cached_tokens"] > 0).sum() <= later
