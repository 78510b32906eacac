"""The scheduler object alone, driven by hand: reports and arrivals in, decisions out, no simulator, no clock."""

import ast
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from repro import scheduling
from repro.scheduling.admission import AdmissionSpec
from repro.scheduling.decisions import Conversion, Decision
from repro.scheduling.kvcache_manager import Replica
from repro.scheduling.long_term import LongTermSpec
from repro.scheduling.observations import InstanceReport, LinkReport, PdReport, StalledTransfer
from repro.scheduling.policies import LengthAware, Naive, Prfaas, Threshold
from repro.scheduling.rebalance import RebalanceSpec
from repro.scheduling.scheduler import CacheIndices, Scheduler
from repro.scheduling.short_term import ShortTermSpec
from repro.scheduling.spec import SchedulerSpec
from repro.simulate.link_spec import SharedLinkSpec

CALM = LinkReport(capacity_bps=100e9, utilisation=0.1, backlog_bytes=0.0)
FULL = LinkReport(capacity_bps=100e9, utilisation=0.95, backlog_bytes=1e9)
BLOCK = 1000
LINK = SharedLinkSpec()


@dataclass(frozen=True)
class Profile:
    """10,000 tokens per second, 1 MB and 1 kB per token, 100 decode steps per second."""

    s_per_token: float = 1e-4
    name: str = "hand-made"
    batch_max: int = 8

    def prefill_s(self, tokens: Any) -> Any:
        return np.asarray(tokens, dtype=np.float64) * self.s_per_token

    def kv_bytes(self, tokens: Any) -> Any:
        return 1e6 + np.asarray(tokens, dtype=np.float64) * 1e3

    def decode_step_s(self, batch: int, context_tokens: float = 0.0) -> float:  # noqa: ARG002
        return 0.01


@dataclass(frozen=True)
class Pd:
    n_p: int = 2
    n_d: int = 4
    share: float = 1.0
    profile: Profile = Profile()


@dataclass(frozen=True)
class Remote:
    instances: int = 2
    profile: Profile = Profile(s_per_token=5e-5)
    link: SharedLinkSpec = LINK


def held(blocks: int) -> Replica:
    """The index of a cluster that has the first blocks of the one prompt of these tests."""
    return Replica(needs_checkpoint=False, blocks=set(range(blocks)))


def caching(spec: SchedulerSpec, pd_blocks: int, prfaas_blocks: int) -> Scheduler:
    return Scheduler(spec, [Pd()], [Remote()], CacheIndices(BLOCK, [held(pd_blocks)], [held(prfaas_blocks)]))


def chain(scheduler: Scheduler, tokens: int) -> Sequence[int]:
    assert scheduler.caches is not None
    return scheduler.caches.usable(tuple(range(tokens // BLOCK)), tokens)


LOOPS = SchedulerSpec(
    Prfaas(), 19_400.0, short_term=ShortTermSpec(enabled=True), long_term=LongTermSpec(enabled=True), fallback_s=5.0
)


@pytest.mark.parametrize(
    ("link", "offload", "fetch_tokens"), [(FULL, True, 0), (CALM, False, 15_000)], ids=["scarce", "abundant"]
)
def test_the_papers_cached_request_is_offloaded_under_pressure_and_fetches_its_prefix_otherwise(
    link: LinkReport, offload: bool, fetch_tokens: int
) -> None:
    scheduler = caching(LOOPS, pd_blocks=10, prfaas_blocks=25)
    scheduler.short_term(1.0, 0, [link])
    keys = chain(scheduler, 30_000)
    decision = scheduler.arrive(1.5, 0, 30_000, 0, keys)
    assert (decision.offload, decision.cached_tokens) == (offload, 25_000)
    assert decision.work_s == pytest.approx(5_000 * (5e-5 if offload else 1e-4))
    if offload:
        # Of the 30,000 tokens' KVCache, the PD cluster holds the attention blocks of 10,000.
        assert (decision.action, decision.fetch_bytes) == ("prefill", 0.0)
        assert decision.kv_bytes == pytest.approx(1e6 + 20_000 * 1e3)
    else:
        assert (decision.action, decision.instance) == ("fetch", -1)
        assert decision.fetch_bytes == pytest.approx(1e6 + fetch_tokens * 1e3)
        placed = scheduler.fetched(1.8, 30_000, 0, keys, decision)
        assert (placed.action, placed.offload) == ("prefill", False)
        assert placed.instance in (0, 1)


def test_a_prefix_in_the_pd_cluster_crosses_to_prfaas_for_a_long_rest() -> None:
    scheduler = caching(replace(LOOPS, router=LengthAware()), pd_blocks=8, prfaas_blocks=2)
    decision = scheduler.arrive(0.0, 0, 30_000, 0, chain(scheduler, 30_000))
    assert (decision.action, decision.offload, decision.cached_tokens) == ("fetch", True, 8_000)
    assert decision.fetch_bytes == pytest.approx(1e6 + 6_000 * 1e3)


def test_a_cached_request_goes_to_the_instance_that_holds_its_prefix_where_instances_have_their_own() -> None:
    indices = CacheIndices(BLOCK, [held(10)], [held(0)], holder=lambda cluster, keys: {"pd0": 1}.get(cluster))
    scheduler = Scheduler(replace(LOOPS, router=Threshold()), [Pd()], [Remote()], indices)
    decisions = [scheduler.arrive(0.0, number, 12_000, 0, chain(scheduler, 12_000)) for number in range(3)]
    assert [(one.offload, one.instance, one.cached_tokens) for one in decisions] == [(False, 1, 10_000)] * 3
    # What it has been promised counts for others.
    assert scheduler.arrive(0.0, 3, 12_000, 0).instance == 0
    scheduler.failed("pd_p", 0, 1)
    assert scheduler.arrive(0.0, 4, 12_000, 0, chain(scheduler, 12_000)).instance == 0


def test_work_goes_to_the_instance_that_has_promised_least_and_a_report_corrects_the_promise() -> None:
    scheduler = Scheduler(SchedulerSpec(Threshold(), 50_000.0), [Pd(n_p=2)])
    assert [scheduler.arrive(0.0, i, tokens).instance for i, tokens in enumerate((30_000, 10_000, 10_000))] == [0, 1, 1]
    # Promised are 3 s and 2 s; instance 1 says that it is further behind than that.
    scheduler.report("pd0", [InstanceReport(1, 2, busy_until_s=9.0)])
    assert scheduler.arrive(0.0, 3, 1_000).instance == 0


def test_a_refused_request_is_promised_nothing() -> None:
    scheduler = Scheduler(SchedulerSpec(Threshold(), 50_000.0, admission=AdmissionSpec(2.0)), [Pd(n_p=1)])
    actions = [scheduler.arrive(0.0, i, 15_000).action for i in range(3)]
    assert actions == ["prefill", "refuse", "refuse"]
    assert scheduler.pd[0].predicted_wait_s(0.0) == pytest.approx(1.5)


def test_a_request_goes_to_the_other_side_when_nobody_prefills_on_its_own_and_fails_when_nobody_does() -> None:
    scheduler = Scheduler(SchedulerSpec(Threshold(), 5_000.0), [Pd(n_p=1)], [Remote(1)])
    scheduler.failed("pd_p", 0, 0)
    assert scheduler.arrive(0.0, 0, 1_000).offload
    scheduler.failed("prfaas", 0, 0)
    assert scheduler.arrive(0.0, 1, 1_000).action == "fail"
    scheduler.repaired(1.0, "pd_p", 0, 0)
    assert not scheduler.arrive(1.0, 2, 10_000).offload
    scheduler.repaired(2.0, "prfaas", 0, 0)
    assert scheduler.arrive(2.0, 3, 10_000).offload


def test_with_two_dead_links_and_no_local_prefill_a_request_fails_instead_of_going_round_for_ever() -> None:
    scheduler = Scheduler(SchedulerSpec(Naive()), [Pd(n_p=0)], [Remote(), Remote()])
    for prfaas in (0, 1):
        scheduler.link_changed(prfaas, up=False)
    assert scheduler.arrive(0.0, 0, 1_000).action == "fail"
    scheduler.link_changed(1, up=True)
    assert scheduler.arrive(0.0, 1, 1_000).prfaas == 1


def test_a_prefix_that_nobody_can_send_any_more_is_not_waited_for() -> None:
    scheduler = caching(LOOPS, pd_blocks=10, prfaas_blocks=25)
    for instance in (0, 1):
        scheduler.failed("prfaas", 0, instance)
    decision = scheduler.arrive(0.0, 0, 30_000, 0, chain(scheduler, 30_000))
    assert (decision.action, decision.offload, decision.cached_tokens) == ("prefill", False, 10_000)


def test_a_lost_prefill_is_done_anew_on_the_same_side_without_its_prefix() -> None:
    scheduler = caching(LOOPS, pd_blocks=10, prfaas_blocks=10)
    keys = chain(scheduler, 40_000)
    first = scheduler.arrive(0.0, 0, 40_000, 0, keys)
    assert (first.offload, first.cached_tokens, first.fell_back) == (True, 10_000, False)
    scheduler.failed("prfaas", 0, first.instance)
    anew = scheduler.lost(1.0, 40_000, 0, keys, first.offload)
    assert (anew.offload, anew.cached_tokens, anew.fell_back) == (True, 0, True)
    assert anew.instance != first.instance


def test_a_prefix_that_arrives_after_its_cluster_has_died_is_prefilled_on_the_other_side() -> None:
    scheduler = caching(replace(LOOPS, router=LengthAware()), pd_blocks=8, prfaas_blocks=2)
    keys = chain(scheduler, 30_000)
    decision = scheduler.arrive(0.0, 0, 30_000, 0, keys)
    for instance in (0, 1):
        scheduler.failed("prfaas", 0, instance)
    placed = scheduler.fetched(0.1, 30_000, 0, keys, decision)
    assert (placed.action, placed.offload, placed.cached_tokens, placed.fell_back) == ("prefill", False, 0, True)


def busy_prefill(scheduler: Scheduler, at_s: float) -> None:
    """Five requests per second of 20,000 tokens for ten minutes, of which PrfaaS gets none."""
    number = 0
    while at_s <= 600.0:
        for _ in range(5):
            scheduler.arrive(at_s, number, 20_000)
            number += 1
        at_s += 1.0
        scheduler.short_term(at_s, 0, [CALM])


def overloaded() -> Scheduler:
    """A PD cluster whose two prefill instances have ten times the work of its four decode instances."""
    spec = replace(LOOPS, router=Threshold(), threshold_tokens=1e6, short_term=ShortTermSpec())
    scheduler = Scheduler(spec, [Pd()], [Remote()])
    busy_prefill(scheduler, 0.0)
    return scheduler


#: Decode instances 2 to 5 hold 3, 1, 4 and 1 requests; a thousand have finished with 20 tokens each.
REPORT = PdReport(
    [InstanceReport(0, 9), InstanceReport(1, 9)],
    [InstanceReport(2, 3), InstanceReport(3, 1), InstanceReport(4, 4), InstanceReport(5, 1)],
    1_000,
    20_000,
)


def test_the_idlest_decode_instance_is_converted_and_no_other_until_it_serves() -> None:
    scheduler = overloaded()
    conversion = scheduler.long_term(601.0, 0, [CALM], REPORT)
    assert conversion == Conversion(0, 3, "prefill")
    assert scheduler.long_term(621.0, 0, [CALM], REPORT) is None
    assert (scheduler.pd[0].serving, scheduler.pd[0].decoding) == (2, {2, 4, 5})
    scheduler.converted(631.0, conversion)
    assert (scheduler.pd[0].serving, scheduler.pd[0].decoding) == (3, {2, 4, 5})
    assert scheduler.arrive(631.0, 10**6, 1_000).instance == 3
    second = scheduler.long_term(641.0, 0, [CALM], REPORT)
    assert second is not None
    assert second.instance == 5


def test_a_node_that_dies_while_it_is_converted_does_not_keep_the_others_from_it() -> None:
    scheduler = overloaded()
    first = scheduler.long_term(601.0, 0, [CALM], REPORT)
    assert first is not None
    scheduler.failed("pd_d", 0, first.instance)
    second = scheduler.long_term(621.0, 0, [CALM], REPORT)
    assert second is not None
    assert second.instance == 5


def test_nothing_is_converted_before_anything_has_finished_or_been_measured() -> None:
    assert overloaded().long_term(601.0, 0, [CALM], REPORT._replace(finished=0)) is None
    fresh = Scheduler(LOOPS, [Pd()], [Remote()])
    assert fresh.long_term(20.0, 0, [CALM], REPORT) is None


def test_stalled_transfers_are_given_up_after_the_outage_has_lasted_and_only_onto_idle_instances() -> None:
    scheduler = Scheduler(LOOPS, [Pd(n_p=1)], [Remote()])
    scheduler.cover(200_000)
    scheduler.link_changed(0, up=False)
    assert scheduler.overdue(10.0) == []
    assert scheduler.overdue(14.0) == []
    assert scheduler.overdue(15.0) == [0]
    stalled = [
        StalledTransfer(7, 0, 90_000, None),
        StalledTransfer(8, 0, 30_000, None),
        StalledTransfer(9, 0, 30_000, None),
    ]
    # The first would take longer than the outage has lasted; the second makes the only instance busy for the third.
    ((transfer, decision),) = scheduler.give_up(15.0, 0, stalled)
    assert transfer.id == 8
    assert (decision.action, decision.offload, decision.fell_back) == ("prefill", False, True)
    scheduler.link_changed(0, up=True)
    assert scheduler.overdue(16.0) == []
    scheduler.link_changed(0, up=False)
    assert scheduler.overdue(17.0) == []


def test_copies_take_their_share_of_what_the_links_left_unused_since_the_last_time() -> None:
    spec = SchedulerSpec(
        Threshold(), 50_000.0, rebalance=RebalanceSpec(enabled=True, link_share=0.5, at_least_blocks=20)
    )
    scheduler = caching(spec, pd_blocks=0, prfaas_blocks=25)
    keys = chain(scheduler, 30_000)
    scheduler.arrive(0.0, 0, 30_000, 0, keys)
    assert scheduler.rebalance(unused_bytes=100e6)[0][:2] == ("prfaas0", "pd0")
    scheduler.arrive(5.0, 1, 30_000, 0, keys)
    # 26 MB would be copied; half of what has been left unused since is 25 MB.
    assert scheduler.rebalance(unused_bytes=150e6) == []


def test_arrivals_call_home_by_the_clusters_shares() -> None:
    scheduler = Scheduler(SchedulerSpec(), [Pd(share=3.0), Pd(share=1.0)])
    homes = [scheduler.home_of(number) for number in range(4_000)]
    assert homes.count(0) / len(homes) == pytest.approx(0.75, abs=0.02)


def drive(seed: int) -> list[object]:
    """Every call in a drawn order, and all that came of it."""
    eager = LongTermSpec(enabled=True, busy=0.1, margin=0.0)
    spec = replace(LOOPS, admission=AdmissionSpec(3.0), rebalance=RebalanceSpec(enabled=True), long_term=eager)
    scheduler = Scheduler(
        spec, [Pd(), Pd(share=2.0)], [Remote(), Remote()],
        CacheIndices(BLOCK, [held(5), held(10)], [held(20), held(0)]),
    )  # fmt: skip
    rng, now, found = random.Random(seed), 0.0, list[object]()
    for number in range(2_000):
        now += rng.expovariate(1.5)
        home, tokens = scheduler.home_of(number), rng.randint(100, 60_000)
        decision = scheduler.arrive(now, number, tokens, home, chain(scheduler, tokens))
        found.append(decision)
        if decision.action == "fetch":
            found.append(scheduler.fetched(now + 0.1, tokens, home, chain(scheduler, tokens), decision))
        if rng.random() < 0.2:
            links = [CALM._replace(utilisation=rng.random()), CALM]
            found += [scheduler.short_term(now, pd, links) for pd in (0, 1)]
            conversion = scheduler.long_term(now, home, links, REPORT)
            if conversion is not None:
                found.append(conversion)
                scheduler.converted(now, conversion)
            found.append(scheduler.rebalance(number * 1e6))
        if rng.random() < 0.02:
            scheduler.link_changed(0, up=rng.random() < 0.5)
        if scheduler.overdue(now):
            found += [made for _, made in scheduler.give_up(now, 0, [StalledTransfer(number, home, 500, None)])]
    return found


def test_the_same_calls_give_the_same_decisions() -> None:
    first = drive(3)
    assert first == drive(3)
    assert first != drive(4)
    actions = {(made.action, made.fell_back) for made in first if isinstance(made, Decision)}
    assert actions >= {("prefill", False), ("prefill", True), ("fetch", False), ("refuse", False)}
    assert any(isinstance(made, Conversion) for made in first)


def test_the_room_holds_no_clock_no_thread_no_socket_and_draws_nothing() -> None:
    forbidden = {
        "time",
        "datetime",
        "asyncio",
        "socket",
        "threading",
        "multiprocessing",
        "subprocess",
        "random",
        "selectors",
    }
    sources = sorted(Path(str(scheduling.__file__)).parent.glob("*.py"))
    assert len(sources) > 12
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text())):
            names = (
                [alias.name for alias in node.names] if isinstance(node, ast.Import)
                else [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            )  # fmt: skip
            assert not {name.partition(".")[0] for name in names} & forbidden, source.name
            assert not any(name.startswith(("repro.simulate", "repro.serving", "numpy.random")) for name in names)
