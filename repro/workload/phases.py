"""A workload that changes: phases, each with its own rate, input lengths and output lengths, one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from repro.errors import UserError
from repro.workload.arrivals import Poisson
from repro.workload.lengths import LengthDistribution
from repro.workload.outputs import OutputLengths
from repro.workload.stream import Independent, RequestBatch


@dataclass(frozen=True)
class Phase:
    """So many seconds of Poisson arrivals at one rate, with one distribution of inputs and one of outputs."""

    seconds: float
    rate_per_s: float
    inputs: LengthDistribution
    outputs: OutputLengths

    def __post_init__(self) -> None:
        if not (self.seconds > 0 and self.rate_per_s > 0):
            raise UserError(f"phases: {self.seconds} s at {self.rate_per_s} req/s; accepted: positive numbers")


@dataclass(frozen=True)
class Phases:
    """The requests of all phases in order; each phase draws from streams of its own, so a change in one leaves the others as they are."""

    phases: tuple[Phase, ...]
    seed: int

    def __iter__(self) -> Iterator[RequestBatch]:
        began_s = 0.0
        for number, phase in enumerate(self.phases):
            # More than five standard deviations of a Poisson count beyond its mean.
            mean = phase.rate_per_s * phase.seconds
            count = round(mean + 6 * mean**0.5) + 10
            for batch in Independent(
                Poisson(phase.rate_per_s), phase.inputs, phase.outputs, count, self.seed * 1000 + number
            ):
                own = batch.arrival_s < phase.seconds
                yield RequestBatch(began_s + batch.arrival_s[own], batch.input_tokens[own], batch.output_tokens[own])
            began_s += phase.seconds
