"""Failures that the configuration asks for, against the machine-repair model, breakdowns with repeated service, and fewer servers."""

import math
from typing import Any

import numpy as np
import pytest
from test_queueing_theory import first_come_first_served
from tiny import Lengths, TinyProfile, local, play, split

from repro.errors import UserError
from repro.profiles.failures import FailureSpec, Outage
from repro.scheduling.policies import Threshold
from repro.scheduling.spec import SchedulerSpec
from repro.simulate.failures import available_fraction, faults
from repro.simulate.link_spec import SharedLinkSpec
from repro.simulate.spec import Fault
from repro.workload.arrivals import Poisson
from repro.workload.outputs import FixedOutput
from repro.workload.stream import Independent, RequestBatch

MTBF_S, REPAIR_S, N = 1000.0, 300.0, 6


def repaired(crews: int) -> float:
    """Mean share of N machines that run under so many crews: birth and death of failed machines (M/M/r//N)."""
    weights = [1.0]
    for down in range(N):
        weights.append(weights[-1] * (N - down) / MTBF_S * REPAIR_S / min(down + 1, crews))
    return 1 - sum(down * weight for down, weight in enumerate(weights)) / sum(weights) / N


@pytest.mark.parametrize("crews", [None, 1, 2])
def test_drawn_failures_leave_what_the_machine_repair_model_says(crews: int | None) -> None:
    until_s = 4e6
    found = faults(FailureSpec(mtbf_s=MTBF_S, repair_s=REPAIR_S, crews=crews), {"pd": N}, until_s, 5)
    assert available_fraction(found, "pd", N, until_s) == pytest.approx(repaired(crews or N), rel=0.015)
    if crews is None:
        assert repaired(N) == pytest.approx(MTBF_S / (MTBF_S + REPAIR_S))


def test_a_cold_start_is_down_time_that_holds_no_crew() -> None:
    until_s, cold_s = 4e6, 200.0
    found = faults(FailureSpec((), MTBF_S, REPAIR_S, None, cold_s), {"prfaas": N}, until_s, 5)
    expected = MTBF_S / (MTBF_S + REPAIR_S + cold_s)
    assert available_fraction(found, "prfaas", N, until_s) == pytest.approx(expected, rel=0.015)
    (one,) = faults(FailureSpec((Outage("pd", 3, 10.0, 5.0),), cold_start_s=2.0), {"pd": N}, until_s, 0)
    assert one == Fault("pd", 3, 10.0, 7.0)


def test_failures_belong_to_the_seed_and_to_the_instance() -> None:
    spec = FailureSpec(mtbf_s=MTBF_S, repair_s=REPAIR_S)
    few, many, other = (
        faults(spec, {"prfaas": n}, 1e5, seed) for n, seed in ((2, 1), (5, 1), (2, 2))
    )  # fmt: skip
    assert few == tuple(fault for fault in many if fault.instance < 2)
    assert {fault.at_s for fault in few}.isdisjoint(fault.at_s for fault in other)
    both = faults(FailureSpec((Outage("prfaas", 0, 0.0, 1e5),), MTBF_S, REPAIR_S), {"prfaas": 2}, 1e5, 1)
    (first,) = (fault for fault in both if fault.instance == 0)
    assert first.at_s == 0.0
    assert first.for_s >= 1e5
    assert [fault for fault in both if fault.instance == 1] == [fault for fault in few if fault.instance == 1]


def test_instances_that_are_down_throughout_are_as_good_as_none() -> None:
    profile, n = TinyProfile(s_per_token=1e-4), 20_000
    (batch,) = Independent(Poisson(1.6), Lengths((3_000, 21_000)), FixedOutput(1), n, 3)
    away = FailureSpec((Outage("pd", 0, 0.0, 1e9), Outage("pd", 3, 0.0, 1e9)))
    table, summary = play(local(profile, 5, faults=faults(away, {"pd": 5}, 1e9, 0)), [batch])
    assert summary.completed == n
    waits = first_come_first_served(batch.arrival_s, batch.input_tokens * profile.s_per_token, 3)
    np.testing.assert_allclose(table["queue_s"], waits, rtol=0, atol=1e-6)


def test_capacity_is_that_of_a_server_whose_interrupted_work_begins_anew() -> None:
    work_s, mtbf_s, repair_s, servers, until_s = 2.0, 20.0, 5.0, 6, 1500.0
    spec = FailureSpec(mtbf_s=mtbf_s, repair_s=repair_s)
    own = tuple(
        Fault("pd_p", fault.instance, fault.at_s, fault.for_s)
        for fault in faults(spec, {"pd": servers}, until_s, 3)
    )  # fmt: skip
    stream = Independent(Poisson(4.0), Lengths((2_000,)), FixedOutput(1), round(4.0 * until_s), 3)
    table, _ = play(local(TinyProfile(), servers, drain_s=0.0, faults=own), stream)
    # Completions in a lifetime are geometric (Avi-Itzhak and Naor), and a lifetime and a repair make a cycle.
    expected = servers / (math.expm1(work_s / mtbf_s) * (mtbf_s + repair_s))
    measured = (table["finish_s"] < until_s).sum() / until_s
    assert measured == pytest.approx(expected, rel=0.025)
    assert expected < 0.96 * servers / work_s * mtbf_s / (mtbf_s + repair_s)


@pytest.mark.parametrize(("instance", "column"), [(1, "prefill_worker"), (3, "decode_worker")])
def test_an_instance_of_a_pd_cluster_fails_in_whatever_role_it_has(instance: int, column: str) -> None:
    batch = RequestBatch(np.linspace(0.0, 100.0, 400), np.full(400, 500), np.full(400, 20))
    spec = split(
        TinyProfile(), SchedulerSpec(Threshold(), threshold_tokens=1e9), SharedLinkSpec(), n_p=2, n_d=2,
        faults=faults(FailureSpec((Outage("pd", instance, 30.0, 40.0),)), {"pd": 4}, 100.0, 0),
    )  # fmt: skip
    table, summary = play(spec, [batch])
    assert summary.completed == 400
    mine = table[table[column] == f"{'pd_p' if instance < 2 else 'pd_d'}/{instance}"]
    begun_s = mine["arrival_s"] + mine["queue_s"]
    assert not begun_s.between(31.0, 69.0).any()
    assert (begun_s < 30.0).any()
    assert (begun_s > 70.0).any()


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"mtbf_s": 0.0, "repair_s": 1.0}, r"^cluster\.failures\.mtbf_s: 0.0; accepted"),
        ({"mtbf_s": 1.0}, r"^cluster\.failures\.repair_s: missing"),
        ({"repair_s": 1.0}, r"^cluster\.failures\.repair_s: has no effect without mtbf_s"),
        ({"crews": 1}, r"^cluster\.failures\.crews: has no effect without mtbf_s"),
        ({"mtbf_s": 1.0, "repair_s": 1.0, "crews": 0}, r"^cluster\.failures\.crews: 0; accepted"),
        ({"cold_start_s": 1.0}, r"^cluster\.failures\.cold_start_s: has no effect without"),
        ({"mtbf_s": 1.0, "repair_s": 1.0, "cold_start_s": -1.0}, r"^cluster\.failures\.cold_start_s: -1.0; accepted"),
    ],
)
def test_impossible_failures_are_refused_by_key(made: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        FailureSpec(**made)


@pytest.mark.parametrize(("at_s", "for_s", "instance"), [(-1.0, 1.0, 0), (0.0, 0.0, 0), (0.0, 1.0, -1)])
def test_an_impossible_outage_is_refused_by_key(at_s: float, for_s: float, instance: int) -> None:
    with pytest.raises(UserError, match=r"^cluster\.failures\.schedule\.\w+: .*; accepted"):
        Outage("pd", instance, at_s, for_s)
