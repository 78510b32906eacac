"""Prefix caches of the live system: conversations find what the simulator's find, prefixes cross the link where a policy asks for it."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from test_live_router import PROFILE, SPEC, WIRE
from test_router_faults import running

from repro.errors import UserError
from repro.experiments.live import deployed
from repro.experiments.study import run_once
from repro.kvcache.pool import CacheSpec, GroupSpec
from repro.link import LinkSpec
from repro.processes import Ended
from repro.scheduling.policies import LengthAware, Router, Threshold
from repro.scheduling.rebalance import RebalanceSpec
from repro.scheduling.spec import SchedulerSpec
from repro.serving import messages as say
from repro.serving.cluster_caches import PD, PRFAAS, ClusterCaches
from repro.serving.faults import LiveFault
from repro.serving.router import Router as LiveRouter
from repro.simulate.spec import SimulationSpec
from repro.workload.sessions import SessionSpec, draw_sessions
from repro.workload.stream import RequestBatch

SESSIONS = SessionSpec(
    1.0, mean_turns=4.0, families=2, system_tokens=1024, first_tokens=2000.0, turn_tokens=800.0, output_tokens=20.0,
    mean_gap_s=12.0, maximum_tokens=9000, block_tokens=256, primed=True,
)  # fmt: skip
CACHE = CacheSpec((GroupSpec("full", "block", 1e4), GroupSpec("fixed", "request", 1e6)), 5e8, 256)

SPEC_OF_BEST_CACHE = SchedulerSpec(LengthAware(), threshold_tokens=2000.0)


def cached(router: Router, cache: CacheSpec = CACHE) -> SimulationSpec:
    return replace(SPEC, scheduler=replace(SPEC.scheduler, router=router), cache=cache)


def conversation_of(batch: RequestBatch, at: int) -> int | None:
    """The first block of a conversation's own; None of the priming requests."""
    assert batch.chains is not None
    keys = batch.chains[at][0][SESSIONS.system_tokens // SESSIONS.block_tokens :]
    return int(keys[0]) if keys else None


def in_time(batch: RequestBatch, live: pd.DataFrame) -> list[bool]:
    """Of each turn, whether priming and all turns before it in its conversation were over before the next began, on the live clock."""
    primed_s = live["finish_s"].head(SESSIONS.families).max()
    over_s: dict[int | None, float] = {}
    found = []
    for at, (arrival_s, finish_s) in enumerate(zip(live["arrival_s"], live["finish_s"], strict=True)):
        whose = conversation_of(batch, at)
        before_s = over_s.get(whose, -math.inf if whose is None else primed_s)
        found.append(whose is None or arrival_s > before_s)
        over_s[whose] = finish_s if found[-1] else math.inf
    return found


def conversations(seconds: float = 60.0, seed: int = 1) -> list[RequestBatch]:
    """Turns that come well after the turn before them, and sessions well after the priming."""
    (batch,) = draw_sessions(SESSIONS, seconds, seed)
    assert batch.chains is not None
    latest: dict[int, float] = {}
    kept = []
    for at, arrival_s in enumerate(batch.arrival_s):
        whose = conversation_of(batch, at)
        if at < SESSIONS.families or (
            whose is not None and arrival_s > 8.0 and arrival_s - latest.get(whose, -8.0) > 8.0
        ):
            kept.append(at)
            latest[-1 if whose is None else whose] = arrival_s
    return [
        RequestBatch(
            batch.arrival_s[kept],
            batch.input_tokens[kept],
            batch.output_tokens[kept],
            [batch.chains[at] for at in kept],
        )
    ]


@pytest.mark.slow
@pytest.mark.parametrize("router", [Threshold(), LengthAware()], ids=["own caches", "best cache"])
def test_conversations_find_cached_what_they_find_in_the_simulator(router: Router, tmp_path: Path) -> None:
    # Nothing is evicted: which of two prompts that end together is evicted first is for a clock to say.
    spec = cached(router, replace(CACHE, capacity_bytes=math.inf))
    wire = replace(WIRE, link=LinkSpec(rate_bps=None, backend="relay"))
    with deployed(spec, wire, tmp_path, "live-caches") as running:
        played = running.play(conversations())
    simulated, summary = run_once(spec, conversations())
    assert set(played.requests["outcome"]) == {"ok"}
    # What a turn finds whose forerunner is still being answered is for a clock to say: a loaded machine may be so late.
    (batch,) = conversations()
    compared = in_time(batch, played.requests)
    assert sum(compared) > 0.7 * len(compared)
    live, modelled = played.requests[compared], simulated[compared]
    assert list(live["cached_tokens"]) == list(modelled["cached_tokens"])
    assert list(live["route"]) == list(modelled["route"])
    assert live["cached_tokens"].sum() > 0.2 * live["input_tokens"].sum()
    np.testing.assert_allclose(live["prefill_s"], modelled["prefill_s"], rtol=1e-6)
    # What is cached is not sent again, and what left PrfaaS is what the simulator's link carried, prefixes included.
    sent = [rows["kv_bytes"].where(rows["route"] == "prfaas", 0.0).sum() for rows in (played.requests, simulated)]
    egress_bytes = summary.egress_bytes + sent[0] - sent[1]
    assert played.payload_bytes * WIRE.scale.bytes == pytest.approx(egress_bytes, rel=0.01)
    assert (played.copied_bytes > 0) == isinstance(router, LengthAware)


def turn(router: LiveRouter, number: int, tokens: int) -> None:
    """A turn of one conversation, and its answer."""
    keys = tuple(range(tokens // 256))
    router.submit(number, router.scale.virtual_s(time.monotonic()), tokens, 8, (keys, keys))
    assert router.drain(number + 1, 20.0)


def test_a_prefix_crosses_the_link_to_the_cluster_that_prefills() -> None:
    with running(SPEC_OF_BEST_CACHE, partial(ClusterCaches, CACHE, [PD, PRFAAS])) as (router, instances):
        turn(router, 0, 1800)  # up to t: the PD cluster has it
        turn(router, 1, 5000)  # 1792 of it are there, and more than t are left
        copies = [(name, said) for _, name, said in instances.told if isinstance(said, say.Copy)]
        orders = [(name, said) for _, name, said in instances.told if isinstance(said, say.Prefill)]
        ((source, copy),), (_, (where, order)) = copies, orders
        assert source.startswith("pd0.")
        assert copy.to.startswith("prfaas0.")
        assert where.startswith("prfaas0.")
        assert copy.input_tokens == order.cached_tokens == 1792
        # S_kv of the prefix goes there; attention blocks that the PD cluster has do not come back.
        assert copy.kv_bytes == PROFILE.kv_bytes(1792)
        assert order.kv_bytes == pytest.approx(PROFILE.kv_bytes(5000) - PROFILE.kv_bytes(1792) + PROFILE.kv_bytes(0))
        assert router.copied_bytes == {"pd0": 10}


def test_a_request_is_prefilled_whole_where_an_instance_ended_that_its_prefix_was_to_come_from() -> None:
    with running(SPEC_OF_BEST_CACHE, partial(ClusterCaches, CACHE, [PD, PRFAAS])) as (router, instances):
        turn(router, 0, 1800)
        instances.copies = False  # nobody answers
        router.submit(1, router.scale.virtual_s(time.monotonic()), 5000, 8, (tuple(range(19)), ()))
        until_s = time.monotonic() + 5.0
        while not (copies := [name for _, name, said in instances.told if isinstance(said, say.Copy)]):
            assert time.monotonic() < until_s
            time.sleep(0.01)
        router.ended(copies[0], Ended(f"instance {copies[0]}", 1, "was killed by SIGKILL", 0))
        assert router.drain(2, 20.0)
        row = router.requests().loc[1]
        assert (row["outcome"], row["attempts"], row["cached_tokens"]) == ("fell_back", 2, 0)


def test_a_router_that_was_restarted_knows_of_no_prefix() -> None:
    with running(SPEC_OF_BEST_CACHE, partial(ClusterCaches, CACHE, [PD, PRFAAS])) as (router, _):
        turn(router, 0, 1800)
        router.go_down()
        router.come_up()
        turn(router, 1, 1900)
        turn(router, 2, 1900)
        assert list(router.requests()["cached_tokens"]) == [0, 0, 1792]


@pytest.mark.slow
def test_a_request_whose_prefix_was_lost_on_its_way_is_prefilled_without_it(tmp_path: Path) -> None:
    wire = replace(WIRE, link=LinkSpec(rate_bps=2e8, backend="relay"))
    with deployed(cached(LengthAware()), wire, tmp_path, "live-copies-lost") as running:
        faults = [LiveFault("prfaas0.0", at_s, 8.0) for at_s in (10.0, 30.0)] + [
            LiveFault("router", 50.0, 2.0, "restart")
        ]
        played = running.play(conversations(), faults=faults)
    assert played.unfinished == 0
    assert set(played.requests["outcome"]) <= {"ok", "fell_back"}
    assert not played.requests["id"].duplicated().any()
    assert played.copied_bytes > 0


def test_what_no_live_router_can_honour_is_refused_by_name(tmp_path: Path) -> None:
    spec = cached(Threshold())
    spec = replace(spec, scheduler=replace(spec.scheduler, rebalance=RebalanceSpec(enabled=True)))
    with (
        pytest.raises(UserError, match=r"policy\.rebalance: .*accepted: enabled=false"),
        deployed(spec, WIRE, tmp_path, "refused"),
    ):
        pass
