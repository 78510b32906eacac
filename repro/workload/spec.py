"""The configuration's `workload` node: all that is asked of a deployment, from arrivals and lengths to the service level (§4.1)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Literal, TypeVar

from repro.errors import UserError
from repro.workload.arrivals import (
    ArrivalProcess,
    Deterministic,
    Diurnal,
    Gamma,
    MarkovModulated,
    Piecewise,
    Poisson,
)
from repro.workload.lengths import LengthDistribution, TruncatedLogNormal
from repro.workload.mixtures import Empirical, Mixture
from repro.workload.outputs import FixedOutput, LogNormalOutput, OutputLengths
from repro.workload.sessions import SessionSpec, draw_sessions
from repro.workload.stream import Independent, RequestBatch
from repro.workload.traces import Trace, TraceSpec, read_trace

T = TypeVar("T")


@dataclass(frozen=True)
class ServiceLevel:
    """A request is good when its first token comes within `ttft_s` and the others at `tokens_per_s` or faster."""

    tokens_per_s: float = 40.0
    ttft_s: float = 10.0

    def __post_init__(self) -> None:
        for key in ("tokens_per_s", "ttft_s"):
            if not getattr(self, key) > 0:
                raise UserError(f"workload.slo.{key}: {getattr(self, key)} is not positive")


#: Kind of arrivals → the fields that it takes.
_ARRIVAL_FIELDS = {
    "poisson": (),
    "deterministic": (),
    "gamma": ("cv",),
    "diurnal": ("amplitude", "period_s"),
    "bursts": ("factor", "burst_s", "every_s"),
    "markov": ("factor", "burst_s", "every_s"),
    "piecewise": ("rates", "durations_s"),
}


@dataclass(frozen=True)
class ArrivalSpec:
    """When requests come, around a mean rate that the experiment sets.

    `poisson` and `deterministic` need nothing more. `gamma` gaps have the coefficient of variation `cv`. `diurnal` is a sine of relative
    `amplitude` and period `period_s`. `bursts` come at `factor` times the rate of the calm for `burst_s` out of every `every_s`; `markov`
    is the same with exponential durations. `piecewise` repeats a schedule: `rates[i]`, relative to each other, for `durations_s[i]`.
    """

    kind: Literal["poisson", "deterministic", "gamma", "diurnal", "bursts", "markov", "piecewise"] = "poisson"
    cv: float | None = None
    amplitude: float | None = None
    period_s: float | None = None
    factor: float | None = None
    burst_s: float | None = None
    every_s: float | None = None
    rates: tuple[float, ...] | None = None
    durations_s: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        wanted = _ARRIVAL_FIELDS[self.kind]
        for name in dict.fromkeys(itertools.chain.from_iterable(_ARRIVAL_FIELDS.values())):
            given = getattr(self, name) is not None
            if given and name not in wanted:
                takes = ", ".join(wanted) or "nothing else"
                raise UserError(f"workload.arrivals.{name}: has no meaning for kind={self.kind}, which takes {takes}")
            if not given and name in wanted:
                raise UserError(f"workload.arrivals.{name}: missing; kind={self.kind} needs {', '.join(wanted)}")
        if self.burst_s is not None and self.every_s is not None and not 0 < self.burst_s < self.every_s:
            raise UserError(
                f"workload.arrivals.burst_s: {self.burst_s} must lie between 0 and every_s ({self.every_s})"
            )
        if self.factor is not None and not self.factor > 0:
            raise UserError(f"workload.arrivals.factor: {self.factor} is not positive")
        self.process(1.0)

    def process(self, rate_per_s: float) -> ArrivalProcess:
        """The process with that mean rate in requests per second."""
        if self.kind == "gamma":
            return Gamma(rate_per_s, _given(self.cv))
        if self.kind == "deterministic":
            return Deterministic(rate_per_s)
        if self.kind == "diurnal":
            return Diurnal(rate_per_s, _given(self.amplitude), _given(self.period_s))
        if self.kind == "poisson":
            return Poisson(rate_per_s)
        if self.kind == "piecewise":
            shape = Piecewise(_given(self.rates), _given(self.durations_s))
            return Piecewise(
                tuple(rate_per_s / shape.mean_per_s * rate for rate in shape.rates_per_s), shape.durations_s
            )
        factor, burst_s, every_s = _given(self.factor), _given(self.burst_s), _given(self.every_s)
        calm_s = every_s - burst_s
        calm = rate_per_s * every_s / (calm_s + factor * burst_s)
        if self.kind == "bursts":
            return Piecewise((calm, factor * calm), (calm_s, burst_s))
        return MarkovModulated((calm, factor * calm), (calm_s, burst_s))


def _given(value: T | None) -> T:
    assert value is not None
    return value


@dataclass(frozen=True)
class Component:
    """A part of a mixture of input lengths, with its `share` of the requests."""

    NODE: ClassVar = "workload.lengths"
    share: float
    mu: float
    sigma: float
    minimum_tokens: float
    maximum_tokens: float

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise UserError(f"workload.lengths.share: {self.share}; accepted: between 0 and 1")
        self.law()

    def law(self) -> TruncatedLogNormal:
        """The lengths of this part."""
        return TruncatedLogNormal(self.mu, self.sigma, self.minimum_tokens, self.maximum_tokens)


@dataclass(frozen=True)
class WorkloadSpec:
    """Who asks for what, when, and what counts as answered in time.

    `lengths` are uncached input lengths in tokens; `mixture` takes shares of the requests away from them. `output_tokens` is the mean of
    the outputs, all equal with `output_cv` 0, else log-normal with that coefficient of variation. `sessions` are conversations whose
    prompts grow, `trace` a recorded stream: each brings its own arrivals, lengths and outputs.
    """

    name: str
    lengths: TruncatedLogNormal
    output_tokens: float
    output_cv: float = 0.0
    mixture: tuple[Component, ...] = ()
    arrivals: ArrivalSpec = field(default_factory=ArrivalSpec)
    sessions: SessionSpec | None = None
    trace: TraceSpec | None = None
    slo: ServiceLevel = ServiceLevel()

    def __post_init__(self) -> None:
        if not self.output_tokens >= 1:
            raise UserError(f"workload.output_tokens: {self.output_tokens} is below 1")
        if not self.output_cv >= 0:
            raise UserError(f"workload.output_cv: {self.output_cv} is negative")
        if self.sessions is not None and self.trace is not None:
            raise UserError("workload.sessions, workload.trace: both are given; accepted: one of the two")
        if sum(part.share for part in self.mixture) >= 1:
            raise UserError(
                "workload.mixture: the shares leave nothing for workload.lengths; accepted: less than 1 in sum"
            )
        if self.output_cv:
            self.outputs()
        node = "sessions" if self.sessions is not None else "trace" if self.trace is not None else None
        if node is not None:
            for key, value, usual in (
                ("arrivals.kind", self.arrivals.kind, "poisson"), ("mixture", len(self.mixture), 0), ("output_cv", self.output_cv, 0.0),
            ):  # fmt: skip
                if value != usual:
                    raise UserError(f"workload.{key}: has no effect beside workload.{node}, which brings its own")
        if self.trace is not None:
            self.trace.check("workload.trace")

    def length_law(self) -> LengthDistribution:
        """The distribution of input lengths, for equations 1–8: a trace's own where there is one."""
        if self.trace is not None:
            return Empirical(self.recorded.batch.input_tokens)
        if not self.mixture:
            return self.lengths
        shares = [part.share for part in self.mixture]
        return Mixture((self.lengths, *(part.law() for part in self.mixture)), (1 - sum(shares), *shares))

    def mean_output_tokens(self) -> float:
        """The mean output length; a trace's own where there is one."""
        return float(self.recorded.batch.output_tokens.mean()) if self.trace is not None else self.output_tokens

    def outputs(self) -> OutputLengths:
        """The distribution of output lengths."""
        if self.output_cv:
            return LogNormalOutput(self.output_tokens, self.output_cv)
        return FixedOutput(round(self.output_tokens))

    def block_tokens(self) -> int | None:
        """Tokens that one prefix key stands for, where requests name their prefixes."""
        if self.trace is not None:
            return self.recorded.block_tokens
        return self.sessions.block_tokens if self.sessions is not None else None

    @cached_property
    def recorded(self) -> Trace:
        """The trace, read once.

        Raises:
            UserError: where the file cannot be read.
        """
        assert self.trace is not None
        return read_trace(self.trace)

    def stream(self, rate_per_s: float, duration_s: float, seed: int) -> Iterable[RequestBatch]:
        """The requests that arrive in `duration_s` at that mean rate. Sessions keep their own rate, a trace also its own duration.

        Raises:
            UserError: for a trace that cannot be read, and sessions of which none begins in time.
        """
        if self.trace is not None:
            return self.recorded
        if self.sessions is not None:
            return draw_sessions(self.sessions, duration_s, seed)
        count = max(round(rate_per_s * duration_s), 1)
        return Independent(self.arrivals.process(rate_per_s), self.length_law(), self.outputs(), count, seed)
