"""Multi-turn sessions whose prompts grow: agents and conversations, the workload of prefix caches.

A session begins with one of a few system prompts and a first question; every turn's prompt is the whole conversation so far and
something new. Block keys name (session, block), or (system prompt, block) where the block is shared by all sessions of a family. Open-loop
turns come at drawn times, so that the same arrivals meet every policy, at the price that a slow system is not spared; closed-loop
turns wait for the answer before them, as people and agents do, at the price that a slow system meets fewer requests.
When sessions begin and what they say are two random streams of one seed, so that another rate moves the same sessions closer together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from repro.errors import UserError
from repro.workload.stream import Chains, Recorded, RequestBatch, Turn


@dataclass(frozen=True)
class SessionSpec:
    """Sessions arrive at `sessions_per_s`; the number of turns is geometric, the other lengths are exponential around their means.

    A gap of `mean_gap_s` on average lies between the beginnings of two turns, or, `closed_loop`, between an answer's end and the next turn.
    `primed`: every family's system prompt is sent once alone, one a second from the beginning, as frameworks do to warm a cache.
    It leaves a recurrent state at its very end, which a prompt that only begins with it does not.
    """

    NODE: ClassVar = "workload.sessions"
    sessions_per_s: float
    mean_turns: float = 8.0
    families: int = 8
    system_tokens: int = 4096
    first_tokens: float = 12_000.0
    turn_tokens: float = 3_000.0
    output_tokens: float = 512.0
    mean_gap_s: float = 60.0
    maximum_tokens: int = 131_072
    block_tokens: int = 512
    primed: bool = False
    closed_loop: bool = False

    def __post_init__(self) -> None:
        for key in (
            "sessions_per_s", "mean_turns", "families", "first_tokens", "turn_tokens", "output_tokens", "mean_gap_s", "block_tokens",
        ):  # fmt: skip
            if not getattr(self, key) > 0:
                raise UserError(f"workload.sessions.{key}: {getattr(self, key)} is not positive")
        if self.mean_turns < 1:
            raise UserError(f"workload.sessions.mean_turns: {self.mean_turns} is below 1")
        if not 0 <= self.system_tokens < self.maximum_tokens:
            raise UserError(
                f"workload.sessions.system_tokens: {self.system_tokens} must lie below maximum_tokens ({self.maximum_tokens})"
            )


def draw_sessions(spec: SessionSpec, duration_s: float, seed: int) -> Recorded:
    """The sessions that begin within `duration_s`, with the turns that arrive in it, or, closed-loop, with all that may follow.

    Raises:
        UserError: when no session begins in that time.
    """
    rows = [row.turn for row in _rows(spec, duration_s, seed)]
    times, inputs, outputs, chains, then = zip(*rows, strict=True)
    return Recorded(
        RequestBatch(
            np.array(times), np.array(inputs, np.int64), np.array(outputs, np.int64), list(chains),
            list(then) if spec.closed_loop else None,
        )
    )  # fmt: skip


def draw_prompts(spec: SessionSpec, duration_s: float, seed: int, vocabulary: int) -> list[tuple[int, ...]]:
    """The prompts of the same sessions, as token ids below `vocabulary`: a turn's begins with that of the turn before it.

    What stands where an answer would is drawn as well: open-loop turns do not wait for one.
    """

    def words(whose: str, number: int, size: int) -> list[int]:
        rng = np.random.default_rng((seed, *whose.encode(), number))
        return [int(word) for word in rng.integers(0, vocabulary, size)]

    return [
        (
            *words("family", row.family, spec.system_tokens),
            *words(
                "session" if row.session is not None else "primed",
                row.family if row.session is None else row.session,
                row.turn.input_tokens - spec.system_tokens,
            ),
        )
        for row in _rows(spec, duration_s, seed)
    ]


class _Row(NamedTuple):
    """A turn that arrives, and whose it is; a priming request is no session's."""

    turn: Turn
    family: int
    session: int | None


def _rows(spec: SessionSpec, duration_s: float, seed: int) -> list[_Row]:
    """All turns in the order of their arrival; closed-loop, the first ones, with what follows them."""
    when, what = (np.random.default_rng(stream) for stream in np.random.SeedSequence(seed).spawn(2))
    expected = duration_s * spec.sessions_per_s
    starts = np.cumsum(when.exponential(size=round(1.5 * expected) + 50)) / spec.sessions_per_s
    rows = [
        _Row(Turn(float(family), *_priming(spec, family)), family, None)
        for family in range(spec.families if spec.primed else 0)
    ]
    for session, start in enumerate(starts[starts < duration_s].tolist()):
        family, turns = _turns(spec, session, what)
        if spec.closed_loop:
            conversation = None
            for turn in reversed(turns):
                conversation = turn._replace(then=conversation)
            rows += [_Row(conversation._replace(after_s=start), family, session)] if conversation else []
            continue
        at_s = start
        for turn in turns:
            at_s += turn.after_s
            if at_s < duration_s:
                rows.append(_Row(turn._replace(after_s=at_s), family, session))
    if not rows:
        raise UserError(f"workload.sessions: none begins within {duration_s} s at {spec.sessions_per_s} per second")
    return sorted(rows, key=lambda row: row.turn.after_s)


def _priming(spec: SessionSpec, family: int) -> tuple[int, int, Chains]:
    keys = _system_keys(spec, family)
    return spec.system_tokens + 1, 1, (keys, keys)


def _system_keys(spec: SessionSpec, family: int) -> tuple[int, ...]:
    return tuple(family << 20 | block for block in range(spec.system_tokens // spec.block_tokens))


def _turns(spec: SessionSpec, session: int, rng: np.random.Generator) -> tuple[int, list[Turn]]:
    """A session's family and its turns, each with the gap before it; none before the first."""
    family = int(rng.integers(spec.families))
    shared = _system_keys(spec, family)
    turns = int(rng.geometric(1 / spec.mean_turns))
    gaps = rng.exponential(spec.mean_gap_s, turns)
    adds = np.ceil(rng.exponential(spec.turn_tokens, turns)).astype(int)
    outputs = np.ceil(rng.exponential(spec.output_tokens, turns)).astype(int)
    context = spec.system_tokens + int(np.ceil(rng.exponential(spec.first_tokens)))
    found: list[Turn] = []
    for turn in range(turns):
        if context > spec.maximum_tokens:
            break
        output = int(outputs[turn])
        after = context + output
        # Blocks of the system prompt are the family's; all later ones the session's own.
        own = range(len(shared), after // spec.block_tokens)
        keys = shared[: after // spec.block_tokens] + tuple(-1 - (session << 20 | block) for block in own)
        gap_s = float(gaps[turn - 1]) if turn else 0.0
        found.append(Turn(gap_s, context, output, (keys[: context // spec.block_tokens], keys)))
        context = after + int(adds[turn])
    return family, found
