"""The `workload` node: every kind and every file of conf/workload composes and draws, and contradictions are refused by key."""

import itertools
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest

from repro.composition import compose
from repro.configuration import build
from repro.errors import UserError
from repro.presets import choices
from repro.runner import prepare
from repro.workload.lengths import TruncatedLogNormal
from repro.workload.sessions import SessionSpec
from repro.workload.spec import ArrivalSpec, WorkloadSpec
from repro.workload.stream import RequestBatch
from repro.workload.traces import TraceSpec

CASES = Path(__file__).parent / "cases"
LENGTHS = TruncatedLogNormal(9.9, 1.0, 128, 131_072)
KINDS = {
    "poisson": {},
    "deterministic": {},
    "gamma": {"cv": 3.0},
    "diurnal": {"amplitude": 0.6, "period_s": 600.0},
    "bursts": {"factor": 4.0, "burst_s": 60.0, "every_s": 300.0},
    "markov": {"factor": 4.0, "burst_s": 6.0, "every_s": 30.0},
    "piecewise": {"rates": (1.0, 3.0, 0.0), "durations_s": (30.0, 10.0, 5.0)},
}


def chosen(choice: str) -> WorkloadSpec:
    trace = [f"workload.trace.path={CASES / '01_bailian.jsonl'}"] if choice == "trace" else []
    return compose(["experiment=table6", f"workload={choice}", *trace]).settings.workload


def whole(workload: WorkloadSpec, rate_per_s: float, duration_s: float, seed: int = 0) -> RequestBatch:
    parts = list(workload.stream(rate_per_s, duration_s, seed))
    return RequestBatch(*(np.concatenate([part[i] for part in parts]) for i in range(3)))


def test_every_kind_of_arrivals_is_tried_here_and_has_a_file() -> None:
    kinds = set(get_args(get_type_hints(ArrivalSpec)["kind"]))
    assert set(KINDS) == kinds
    assert {chosen(choice).arrivals.kind for choice in choices("workload")} == kinds


@pytest.mark.parametrize("choice", choices("workload"))
def test_every_file_draws_requests_that_hold(choice: str) -> None:
    workload = chosen(choice)
    assert workload.name == choice
    batch = whole(workload, 2.0, 900.0)
    batch.check(after_s=0.0)
    again = whole(workload, 2.0, 900.0)
    assert all(np.array_equal(a, b) for a, b in zip(batch[:3], again[:3], strict=True))
    assert workload.length_law().mean_tokens > 0
    assert workload.mean_output_tokens() >= 1


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_arrivals_keeps_the_mean_rate_that_a_study_sets(kind: str) -> None:
    arrivals = ArrivalSpec(kind, **KINDS[kind])  # type: ignore[arg-type]
    for rate in (0.5, 4.0):
        times = np.concatenate(list(itertools.islice(arrivals.process(rate).times(np.random.default_rng(1), 8192), 8)))
        assert len(times) / times[-1] == pytest.approx(rate, rel=0.05)


def test_mean_lengths_of_a_file_are_those_that_are_drawn() -> None:
    workload = chosen("mixture")
    batch = whole(workload, 100.0, 2000.0)
    assert batch.input_tokens.mean() == pytest.approx(workload.length_law().mean_tokens, rel=0.02)
    assert batch.output_tokens.mean() == pytest.approx(workload.mean_output_tokens(), rel=0.02)
    assert workload.length_law().mean_tokens < LENGTHS.mean_tokens / 2


def test_a_trace_gives_its_own_lengths_to_the_equations() -> None:
    workload = chosen("trace")
    assert workload.length_law().mean_tokens == pytest.approx((65 + 97 + 129) / 3)
    assert workload.mean_output_tokens() == 10
    assert whole(workload, 5.0, 1.0).arrival_s.tolist() == [0, 10, 20]
    assert workload.recorded is workload.recorded


@pytest.mark.parametrize("kind", KINDS)
def test_a_field_of_another_kind_is_refused_and_a_missing_one_named(kind: str) -> None:
    fields = {name: value for values in KINDS.values() for name, value in values.items()}
    for name, value in fields.items():
        if name not in KINDS[kind]:
            with pytest.raises(UserError, match=rf"workload\.arrivals\.{name}: has no meaning for kind={kind}"):
                ArrivalSpec(kind, **KINDS[kind], **{name: value})  # type: ignore[arg-type]
        else:
            with pytest.raises(UserError, match=rf"workload\.arrivals\.{name}: missing"):
                ArrivalSpec(kind, **{k: v for k, v in KINDS[kind].items() if k != name})  # type: ignore[arg-type]


BOUNDS = "minimum_tokens: 1, maximum_tokens: 9}]"
SESSIONS, TRACE = SessionSpec(0.3), TraceSpec("somewhere.jsonl")


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"sessions": SESSIONS, "trace": TRACE}, "workload.sessions, workload.trace: both"),
        ({"sessions": SESSIONS, "arrivals": ArrivalSpec("gamma", cv=2.0)}, "workload.arrivals.kind: .* workload.sessions"),
        ({"trace": TRACE, "output_cv": 1.0}, "workload.output_cv: has no effect beside workload.trace"),
        ({"output_tokens": 0.5}, "workload.output_tokens"),
        ({"output_tokens": 40_000.0, "output_cv": 1.0}, "workload.output_tokens, workload.output_cv"),
        ({"output_cv": -1.0}, "workload.output_cv"),
        ({"trace": TraceSpec("somewhere.jsonl", speed=float("inf"))}, "workload.trace.speed: inf"),
    ],
)  # fmt: skip
def test_a_contradiction_is_refused_by_key(change: dict[str, object], key: str) -> None:
    with pytest.raises(UserError, match=key):
        WorkloadSpec(**({"name": "w", "lengths": LENGTHS, "output_tokens": 1024.0} | change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arrivals", "key"),
    [
        ({"kind": "weekly"}, "workload.arrivals.kind: 'weekly' does not fit; accepted: 'poisson'"),
        ({"kind": "piecewise", "rates": [1.0], "durations_s": [1.0, 2.0]}, "workload.arrivals.rates"),
        ({"kind": "piecewise", "rates": [0.0], "durations_s": [1.0]}, "workload.arrivals.rates"),
        ({"kind": "bursts", "factor": 2.0, "burst_s": 9.0, "every_s": 9.0}, "workload.arrivals.burst_s"),
        ({"kind": "gamma", "cv": 0.0}, "workload.arrivals.cv"),
        ({"kind": "diurnal", "amplitude": 1.5, "period_s": 9.0}, "workload.arrivals.amplitude"),
    ],
)
def test_impossible_arrivals_of_the_configuration_are_refused_by_key(arrivals: dict[str, object], key: str) -> None:
    with pytest.raises(UserError, match=key):
        build(ArrivalSpec, arrivals, "workload.arrivals")


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["experiment=agentic", "options.shared_context.mean_turns=0"], "options.shared_context.mean_turns: 0"),
        (["experiment=simulation", "workload=agentic", "workload.sessions.families=0"], "workload.sessions.families: 0"),
        (
            ["experiment=simulation", "workload=mixture", "workload.mixture=[{share: 2, mu: 7, sigma: 1, " + BOUNDS],
            "workload.mixture[0].share: 2",
        ),
        (
            ["experiment=simulation", "workload=mixture", "workload.mixture=[{share: 0.5, mu: 7, sigma: 0, " + BOUNDS],
            "workload.mixture[0].sigma: 0",
        ),
    ],
)  # fmt: skip
def test_a_message_names_the_key_that_was_typed(words: list[str], key: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        prepare(compose([*words, f"results={tmp_path}"]))
    assert str(caught.value).startswith(key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arrival_s": [0.0, float("nan")]}, "arrival_s nan of request 1"),
        ({"arrival_s": [float("inf"), 1.0]}, "arrival_s inf of request 0"),
        ({"arrival_s": [2.0, 1.0]}, "arrival_s 1.0 of request 1 must be finite and not before 2"),
        ({"arrival_s": [-1.0, 1.0]}, "arrival_s -1.0 of request 0"),
        ({"input_tokens": [1, 0]}, "input_tokens 0 of request 1 is below 1"),
        ({"output_tokens": [0, 1]}, "output_tokens 0 of request 0 is below 1"),
    ],
)
def test_what_is_no_request_is_refused(change: dict[str, list[float]], message: str) -> None:
    values = {"arrival_s": [0.0, 1.0], "input_tokens": [1, 1], "output_tokens": [1, 1]} | change
    with pytest.raises(UserError, match=message):
        RequestBatch(*(np.array(values[name]) for name in ("arrival_s", "input_tokens", "output_tokens"))).check(0.0)
