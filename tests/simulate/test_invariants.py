"""Named invariants of every run, on a deployment with everything switched on."""

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from tiny import Exponential, Lengths, TinyProfile, local, play, split

from repro.errors import UserError
from repro.kvcache.pool import CacheSpec, GroupSpec
from repro.scheduling.admission import AdmissionSpec
from repro.scheduling.long_term import LongTermSpec
from repro.scheduling.placement import PLACEMENTS
from repro.scheduling.policies import Homogeneous, LengthAware, Naive, Prfaas, RandomSplit, Router, Threshold
from repro.scheduling.short_term import ShortTermSpec
from repro.scheduling.spec import SchedulerSpec
from repro.simulate.decode import DecodeStage, StepTimes
from repro.simulate.events import EventQueue
from repro.simulate.job import Job
from repro.simulate.link_spec import CapacityChange, SharedLinkSpec
from repro.simulate.simulation import Simulation
from repro.simulate.spec import Fault, PdCluster, PrfaasCluster, SimulationSpec
from repro.simulate.stability import lambda_max
from repro.workload.arrivals import Gamma, Poisson
from repro.workload.outputs import FixedOutput, LogNormalOutput
from repro.workload.sessions import SessionSpec, draw_sessions
from repro.workload.stream import Independent, Recorded, RequestBatch, replay

PROFILE = TinyProfile(s_per_token=1e-4, per_sequence_s=1e-4, per_context_s=1e-9, batch_max=8)
LINK = SharedLinkSpec(
    1e9, 0.02, 2e9, 4, 4e8, 12, (CapacityChange(200.0, 2e7), CapacityChange(300.0, 0.0), CapacityChange(330.0, 1e9))
)
EVERYTHING = SchedulerSpec(
    Prfaas(), 8_000.0, short_term=ShortTermSpec(enabled=True), long_term=LongTermSpec(enabled=True), fallback_s=5.0
)
FAULTS = (Fault("prfaas", 0, 100.0, 60.0), Fault("pd_p", 0, 150.0, 40.0), Fault("pd_d", 3, 250.0, 80.0))
ROUTERS: list[Router] = [Prfaas(), Threshold(), LengthAware(), RandomSplit(0.5), Naive(), Homogeneous()]


def busy(seed: int = 1, n: int = 2500) -> Independent:
    return Independent(Gamma(3.0, 1.5), Exponential(9_000), LogNormalOutput(60.0, 1.0, 1000), n, seed)


def everything(**kwargs: Any) -> SimulationSpec:
    return split(PROFILE, EVERYTHING, LINK, faults=FAULTS, **kwargs)


def check(table: pd.DataFrame, n: int) -> None:
    assert table["id"].tolist() == list(range(n))
    done = table[table["outcome"].isin(["ok", "fell_back"])]
    for column in ("queue_s", "prefill_s", "transfer_s", "transfer_exposed_s", "decode_queue_s", "tpot_s"):
        assert (done[column] >= -1e-9).all(), column
    assert (done["ttft_s"] > 0).all()
    assert (done["finish_s"] >= done["arrival_s"] + done["ttft_s"] - 1e-9).all()
    straight = done[done["outcome"] == "ok"]
    parts = straight["queue_s"] + straight["prefill_s"] + straight["transfer_exposed_s"] + straight["decode_queue_s"]
    assert (straight["ttft_s"] > parts - 1e-9).all()
    remote = straight[straight["route"] == "prfaas"]
    assert (remote["transfer_exposed_s"] >= LINK.rtt_s / 2 - 1e-9).all()
    assert (done.loc[done["route"] == "pd", "transfer_s"] == 0).all()


@pytest.mark.parametrize("chunk_tokens", [None, 1024])
def test_requests_are_conserved_and_nothing_comes_before_its_cause_under_faults_and_controllers(
    chunk_tokens: int | None,
) -> None:
    table, summary = play(everything(chunk_tokens=chunk_tokens), busy())
    assert summary.arrived == 2500 == summary.completed + summary.refused + summary.unfinished
    assert summary.unfinished == 0
    check(table, 2500)
    assert (table["outcome"] == "fell_back").any()
    assert len({sample.n_p for sample in summary.samples}) > 1  # roles were converted
    assert len({sample.threshold_tokens for sample in summary.samples}) > 3  # thresholds were moved


def test_a_prefill_that_is_lost_twice_at_one_moment_is_played_once() -> None:
    faults = tuple(Fault("prfaas", instance, 0.5, 60.0) for instance in (0, 1))
    spec = split(PROFILE, SchedulerSpec(Naive()), replace(LINK, changes=()), n_prfaas=3, faults=faults)
    table, summary = play(spec, [RequestBatch(np.array([0.0, 0.6]), np.full(2, 10_000), np.full(2, 5))])
    assert summary.completed == 2
    assert table["prefill_s"].tolist() == pytest.approx([1.0, 1.0])
    assert table["queue_s"].tolist() == pytest.approx([0.5, 0.9])
    assert (table["transfer_exposed_s"] >= LINK.rtt_s / 2 - 1e-9).all()


@pytest.mark.parametrize("router", ROUTERS, ids=lambda router: type(router).__name__)
@pytest.mark.parametrize("chunk_tokens", [None, 2048])
def test_every_router_conserves_requests_with_whole_and_with_chunked_prefill(
    router: Router, chunk_tokens: int | None
) -> None:
    scheduler = SchedulerSpec(router, 8_000.0)
    table, summary = play(split(PROFILE, scheduler, LINK, 3, 3, chunk_tokens=chunk_tokens), busy(n=800))
    assert summary.completed == 800
    check(table, 800)


@pytest.mark.parametrize("name", sorted(PLACEMENTS))
def test_every_placement_conserves_requests(name: str) -> None:
    table, summary = play(split(PROFILE, SchedulerSpec(Threshold(), 8_000.0, placement=name), LINK, 3, 3), busy(n=500))
    assert summary.completed == 500
    check(table, 500)


def test_bytes_that_crossed_the_link_are_those_of_the_offloaded_requests() -> None:
    scheduler = SchedulerSpec(Threshold(), 8_000.0)
    table, summary = play(split(PROFILE, scheduler, replace(LINK, changes=())), busy(n=1000))
    remote = table[table["route"] == "prfaas"]
    assert summary.egress_bytes == pytest.approx(remote["kv_bytes"].sum(), rel=1e-9)


@pytest.mark.parametrize(
    "spec", [everything(), split(PROFILE, EVERYTHING, LINK, chunk_tokens=1024)], ids=["whole", "chunked"]
)
def test_the_same_seed_gives_the_same_bytes(spec: SimulationSpec) -> None:
    first, second = (play(spec, busy())[0] for _ in range(2))
    numbers = list(first.select_dtypes("number").columns)
    assert first[numbers].to_numpy().tobytes() == second[numbers].to_numpy().tobytes()
    assert first.equals(second)


def test_a_run_equals_the_replay_of_its_own_requests() -> None:
    first, _ = play(everything(), busy())
    again, _ = play(everything(), replay(first))
    pd.testing.assert_frame_equal(first, again, check_exact=True)


def test_time_does_not_end_before_the_drain_and_a_dead_link_is_reported_not_awaited() -> None:
    dead = SharedLinkSpec(1e9, 0.0, changes=(CapacityChange(0.0, 0.0),))
    spec = split(PROFILE, SchedulerSpec(Naive()), dead, drain_s=60.0)
    table, summary = play(spec, busy(n=50))
    assert summary.unfinished == 50
    assert set(table["outcome"]) == {"timed_out"}


def test_an_overloaded_run_is_cut_and_flagged() -> None:
    spec = local(PROFILE, limit_requests=2_000)
    _, summary = play(spec, Independent(Poisson(1000.0), Lengths((10_000,)), FixedOutput(5), 100_000, 0))
    assert summary.overloaded
    assert summary.arrived < 100_000
    assert summary.arrived == summary.completed + summary.unfinished


def test_admission_refuses_what_would_wait_too_long() -> None:
    scheduler = SchedulerSpec(Homogeneous(), admission=AdmissionSpec(5.0))
    spec = SimulationSpec((PdCluster(PROFILE, 1, 8),), scheduler=scheduler)
    table, summary = play(spec, Independent(Poisson(3.0), Lengths((10_000,)), FixedOutput(5), 2_000, 0))
    assert summary.refused > 500
    done = table[table["outcome"] == "ok"]
    assert (done["queue_s"] + done["prefill_s"]).max() <= 5.0 + 1e-9
    assert summary.completed + summary.refused == 2_000
    assert (table["outcome"] == "refused").sum() == summary.refused


def test_several_clusters_share_the_load_by_their_shares_and_free_sites() -> None:
    pd_clusters = (PdCluster(PROFILE, 2, 4, share=3.0), PdCluster(PROFILE, 2, 4, share=1.0))
    sites = (PrfaasCluster(PROFILE, 2, LINK), PrfaasCluster(PROFILE, 2, replace(LINK, changes=())))
    table, summary = play(SimulationSpec(pd_clusters, sites, EVERYTHING), busy(n=3000))
    assert summary.completed == 3000
    check(table, 3000)
    assert {sample.home for sample in summary.samples} == {0, 1}


def test_a_prefix_that_was_prefilled_is_not_prefilled_again() -> None:
    stream = draw_sessions(
        SessionSpec(0.05, block_tokens=64, system_tokens=640, first_tokens=2000, turn_tokens=500), 2000.0, 3
    )
    cold = split(PROFILE, replace(EVERYTHING, threshold_tokens=3000.0), replace(LINK, changes=()))
    warm = replace(cold, cache=CacheSpec(GROUPS, block_tokens=64, page_bytes=4096))
    before, _ = play(cold, stream)
    after, _ = play(warm, stream)
    assert before["cached_tokens"].sum() == 0
    assert (after["cached_tokens"] < after["input_tokens"]).all()
    assert after["cached_tokens"].sum() > 0.5 * after["input_tokens"].sum()
    assert after["prefill_s"].mean() < 0.6 * before["prefill_s"].mean()
    assert after["kv_bytes"].sum() < before["kv_bytes"].sum()


def decode_alone(profile: TinyProfile, jobs: list[tuple[float, int, int]]) -> list[Job]:
    """Play (ready, context, output) through one decode instance."""
    import heapq

    events, done = EventQueue(), []
    stage = DecodeStage(
        events, StepTimes(profile.decode_step_s, profile.batch_max), profile.batch_max, lambda _, job: done.append(job)
    )
    stage.open(0.0, 0)
    made = [Job(i, at, tokens, output, None) for i, (at, tokens, output) in enumerate(jobs)]
    for job in made:
        events.at(job.arrival_s, stage.ready, job)
    while events.heap:
        now, _, handler, argument = heapq.heappop(events.heap)
        handler(now, argument)
    assert len(done) == len(jobs)
    return made


def decode_token_by_token(
    profile: TinyProfile, jobs: list[tuple[float, int, int]]
) -> tuple[dict[int, float], dict[int, float]]:
    """The same, one event per token: first and last token times."""
    waiting = sorted(range(len(jobs)), key=lambda i: jobs[i][0])
    running: dict[int, list[int]] = {}
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    now = 0.0
    while waiting or running:
        if not running and jobs[waiting[0]][0] > now:
            now = jobs[waiting[0]][0]
        while waiting and jobs[waiting[0]][0] <= now + 1e-12 and len(running) < profile.batch_max:
            i = waiting.pop(0)
            running[i] = [jobs[i][1], jobs[i][2]]
        now += profile.decode_step_s(len(running), sum(context for context, _ in running.values()))
        for i in list(running):
            running[i][0] += 1
            running[i][1] -= 1
            first.setdefault(i, now)
            if not running[i][1]:
                last[i] = now
                del running[i]
    return first, last


@pytest.mark.parametrize("growing", [0.0, 2e-6])
def test_one_event_for_many_decode_steps_gives_the_times_of_one_event_per_token(growing: float) -> None:
    profile = TinyProfile(step_s=0.01, per_sequence_s=0.001, per_context_s=growing, batch_max=4)
    rng = np.random.default_rng(0)
    jobs = [
        (float(at), int(rng.integers(100, 900)), int(rng.integers(1, 80)))
        for at in np.cumsum(rng.exponential(0.2, 300))
    ]
    made = decode_alone(profile, jobs)
    first, last = decode_token_by_token(profile, jobs)
    for i, job in enumerate(made):
        assert job.first_token_s == pytest.approx(first[i], abs=1e-6)
        assert job.finish_s == pytest.approx(last[i], abs=1e-6)


def light(rate: float, seed: int) -> Independent:
    return Independent(Poisson(rate), Exponential(9_000), FixedOutput(50), 4_000, seed)


@pytest.mark.slow
def test_another_instance_and_more_bandwidth_never_lower_lambda_max() -> None:
    scheduler = SchedulerSpec(Threshold(), 8_000.0)

    def best(n_prfaas: int = 1, n_p: int = 1, n_d: int = 4, gbps: float = 0.06) -> float:
        link = SharedLinkSpec(gbps * 1e9, 0.01, 2e9, 4, 4e8, 12)
        spec = split(TinyProfile(s_per_token=1e-4, batch_max=8), scheduler, link, n_prfaas, n_p, n_d)
        return lambda_max(spec, light, 1.5, [0], width=0.004).value

    base = best()
    for better in ({"n_prfaas": 2}, {"n_p": 2}, {"n_d": 5}, {"gbps": 0.2}):
        assert best(**better) >= base * (1 - 0.006)  # type: ignore[arg-type]
    assert best(n_prfaas=2, n_p=2, gbps=0.2) > 1.3 * base


#: Fewer, larger blocks than a real pool's, so that a bisection takes a second.
SESSIONS = SessionSpec(
    1.0, 5.0, 4, system_tokens=1024, first_tokens=2000.0, turn_tokens=500.0, output_tokens=60.0, mean_gap_s=20.0, block_tokens=256
)  # fmt: skip
GROUPS = (GroupSpec("full", "block", 1e3), GroupSpec("state", "request", 1e6))


def sessions(rate: float, seed: int) -> Recorded:
    return draw_sessions(replace(SESSIONS, sessions_per_s=rate), 300 / rate, seed)


def test_another_rate_moves_the_same_sessions_closer_together() -> None:
    slow, fast = (sessions(rate, 3).batch for rate in (0.05, 0.1))
    assert fast.arrival_s[0] == pytest.approx(slow.arrival_s[0] / 2)
    prompts = [set(zip(c.input_tokens.tolist(), c.chains or [], strict=True)) for c in (slow, fast)]
    # Turns that come after the last session has begun are cut, of which the faster stream has more.
    assert prompts[1] < prompts[0]


@pytest.mark.slow
@pytest.mark.parametrize("router", [Homogeneous(), Prfaas()], ids=lambda router: type(router).__name__)
def test_more_cache_never_lowers_lambda_max(router: Router) -> None:
    profile, width = TinyProfile(s_per_token=1e-4, batch_max=8), 0.01
    spec = split(profile, SchedulerSpec(router, 3_000.0), replace(LINK, changes=()))
    caches = [None, *(CacheSpec(GROUPS, capacity, 256, 4096) for capacity in (1e8, math.inf))]
    best = [lambda_max(replace(spec, cache=cache), sessions, 1.0, [0], width).value for cache in caches]
    # Each is within half a width of its own boundary.
    assert all(more >= less * (1 - width) for less, more in itertools.pairwise(best))
    assert best[1] > 1.1 * best[0]
    assert best[-1] > 3 * best[0]


def test_more_cache_never_lowers_the_hit_rate() -> None:
    stream = sessions(0.5, 3)
    spec = split(PROFILE, SchedulerSpec(Threshold(), 3000.0), replace(LINK, changes=()))
    cached = []
    for capacity in (2e7, 1e8, 1e9, 1e12):
        table, _ = play(replace(spec, cache=CacheSpec(GROUPS, capacity, 256, 4096)), stream)
        cached.append(int(table["cached_tokens"].sum()))
    assert cached == sorted(cached)
    assert cached[0] < cached[-1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SimulationSpec(()), r"cluster\.pd"),
        (lambda: SimulationSpec((PdCluster(PROFILE, 1, 1),), scheduler=SchedulerSpec(Naive())), r"policy\.router"),
        (lambda: SimulationSpec((PdCluster(PROFILE, 0, 1),)), r"policy\.n_p"),
        (lambda: PdCluster(PROFILE, 1, 0), r"cluster\.pd"),
        (lambda: SchedulerSpec(placement="best"), r"policy\.placement"),
        (lambda: Simulation(local(PROFILE, faults=(Fault("prfaas", 0, 1.0, 1.0),)), None), r"faults\.cluster"),  # type: ignore[arg-type]
    ],
)
def test_impossible_deployments_are_refused_by_key(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
