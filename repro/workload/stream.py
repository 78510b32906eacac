"""Requests as a stream of batches: who arrives when, how long its prompt is, how much it will say, and which prefix it shares.

Batches are arrays, so that ten million requests are drawn in seconds and never held at once. Three independent random streams
(arrivals, inputs, outputs) come from one seed: changing the rate leaves the lengths as they are, which is what makes paired
comparisons paired.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from repro.errors import UserError
from repro.workload.arrivals import ArrivalProcess
from repro.workload.outputs import OutputLengths

CHUNK_REQUESTS = 1 << 15

#: The keys of a prompt's full blocks, and those of prompt and answer together, which the next turn of a conversation may share.
Chains = tuple[tuple[int, ...], tuple[int, ...]]


class Turn(NamedTuple):
    """A request that is sent `after_s` after the answer to the one before it is out, and what follows it in turn."""

    after_s: float
    input_tokens: int
    output_tokens: int
    chains: Chains
    then: Turn | None = None


class RequestBatch(NamedTuple):
    """Some requests in order of arrival: seconds from the beginning, whole tokens, block keys where prefixes are shared, and the turns that
    wait for answers, where the conversation is closed-loop. `homes` are numbers of PD clusters, where requests
    belong to one whatever its share.
    """

    arrival_s: NDArray[np.float64]
    input_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    chains: list[Chains] | None = None
    turns: list[Turn | None] | None = None
    homes: NDArray[np.int64] | None = None

    def check(self, after_s: float) -> None:
        """Refuse what is no request: a time that is none or goes back before `after_s`, and lengths below one token.

        Raises:
            UserError: naming the first such request.
        """
        times = np.asarray(self.arrival_s, np.float64)
        late = ~(np.diff(times, prepend=after_s) >= 0) | ~np.isfinite(times)
        for name, wrong in (
            ("arrival_s", late), ("input_tokens", ~(self.input_tokens >= 1)), ("output_tokens", ~(self.output_tokens >= 1)),
        ):  # fmt: skip
            if wrong.any():
                at = int(wrong.argmax())
                value = getattr(self, name)[at]
                what = (
                    f"must be finite and not before {after_s if not at else times[at - 1]:g}"
                    if name == "arrival_s"
                    else "is below 1"
                )
                raise UserError(f"workload: {name} {value} of request {at} {what}")

    def longest_tokens(self) -> int:
        """The longest input, turns included."""
        longest = int(self.input_tokens.max(initial=0))
        for turn in self.turns or ():
            while turn is not None:
                longest = max(longest, turn.input_tokens)
                turn = turn.then
        return longest


class InputLengths(Protocol):
    """Anything that draws input lengths; every `LengthDistribution` does."""

    def sample(self, rng: np.random.Generator, n: int) -> NDArray[np.int64]:
        """`n` lengths in whole tokens."""
        ...


@dataclass(frozen=True)
class Independent:
    """Requests that share nothing: an arrival process and two length distributions. After `shift_at_s` inputs come from `shifted`."""

    arrivals: ArrivalProcess
    inputs: InputLengths
    outputs: OutputLengths
    requests: int
    seed: int = 0
    shifted: InputLengths | None = None
    shift_at_s: float = 0.0

    def __post_init__(self) -> None:
        if self.requests < 1:
            raise UserError(f"workload.requests: {self.requests} is below 1")

    def __iter__(self) -> Iterator[RequestBatch]:
        when, what, says = (np.random.default_rng(s) for s in np.random.SeedSequence(self.seed).spawn(3))
        left = self.requests
        for times in self.arrivals.times(when, CHUNK_REQUESTS):
            times = times[:left]
            n = len(times)
            inputs = self.inputs.sample(what, n)
            if self.shifted is not None:
                # Both are drawn from the same numbers of the stream, so that runs with and without a shift stay comparable.
                inputs = np.where(times < self.shift_at_s, inputs, self.shifted.sample(what, n))
            yield RequestBatch(times, inputs, self.outputs.sample(says, n))
            left -= n
            if not left:
                return


@dataclass(frozen=True)
class Recorded:
    """Requests that are all known: a trace, or sessions drawn in advance."""

    batch: RequestBatch

    def __iter__(self) -> Iterator[RequestBatch]:
        whole, n = self.batch, len(self.batch.arrival_s)
        for at in range(0, n, CHUNK_REQUESTS):
            part = slice(at, at + CHUNK_REQUESTS)
            chains = whole.chains[part] if whole.chains is not None else None
            turns = whole.turns[part] if whole.turns is not None else None
            homes = whole.homes[part] if whole.homes is not None else None
            yield RequestBatch(
                whole.arrival_s[part], whole.input_tokens[part], whole.output_tokens[part], chains, turns, homes
            )


def replay(requests: pd.DataFrame) -> Recorded:
    """The arrivals of a finished run's requests table, to run again."""
    table = requests.sort_values("id")
    return Recorded(
        RequestBatch(
            table["arrival_s"].to_numpy(np.float64),
            table["input_tokens"].to_numpy(np.int64),
            table["output_tokens"].to_numpy(np.int64),
        )
    )
