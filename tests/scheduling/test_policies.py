"""Routers against the paper's worked example, and every router against what it may not do."""

import math

import pytest

from repro.errors import UserError
from repro.scheduling.placement import PLACEMENTS, placement
from repro.scheduling.policies import ROUTERS, Prfaas, RandomSplit
from repro.scheduling.views import ClusterView, LinkView, RequestView, Route, SchedulerState

EXAMPLE = RequestView(id=0, total_tokens=30_000, cached_pd_tokens=10_000, cached_prfaas_tokens=25_000)


def state(scarce: bool = False, threshold: float = 19_400) -> SchedulerState:
    return SchedulerState(threshold, scarce, ClusterView(3), ClusterView(4), LinkView(100e9))


def test_scarce_bandwidth_counts_each_clusters_cache_alone() -> None:
    assert Prfaas().route(EXAMPLE, state(scarce=True)) == Route(offload=True, cached_tokens=25_000, fetch=False)


def test_abundant_bandwidth_counts_the_best_cache_and_moves_it() -> None:
    assert Prfaas().route(EXAMPLE, state(scarce=False)) == Route(offload=False, cached_tokens=25_000, fetch=True)


def test_a_longer_local_cache_is_moved_to_prfaas_when_the_rest_is_long() -> None:
    request = RequestView(0, 60_000, cached_pd_tokens=20_000, cached_prfaas_tokens=5_000)
    assert Prfaas().route(request, state()) == Route(offload=True, cached_tokens=20_000, fetch=True)


def test_random_split_offloads_its_share_whatever_the_length() -> None:
    router = RandomSplit(0.496)
    taken = [router.route(RequestView(i, 1 + i % 1000), state()).offload for i in range(20_000)]
    assert abs(sum(taken) / len(taken) - 0.496) < 3 * math.sqrt(0.25 / len(taken))


def make(name: str):  # type: ignore[no-untyped-def]
    return ROUTERS[name](0.5) if name == "random_split" else ROUTERS[name]()  # type: ignore[call-arg]


@pytest.mark.parametrize("name", sorted(ROUTERS))
@pytest.mark.parametrize("scarce", [True, False])
def test_every_router_is_a_pure_function_and_never_claims_more_cache_than_there_is(name: str, scarce: bool) -> None:
    for request in (EXAMPLE, RequestView(7, 500), RequestView(9, 90_000, 0, 64_000), RequestView(3, 8_000, 8_000, 0)):
        routes = {make(name).route(request, state(scarce)) for _ in range(3)}
        (route,) = routes
        held = (request.cached_pd_tokens, request.cached_prfaas_tokens)
        assert route.cached_tokens <= max(held)
        own = held[1] if route.offload else held[0]
        assert route.fetch or route.cached_tokens <= own


@pytest.mark.parametrize("name", sorted(PLACEMENTS))
def test_every_placement_serves_only_members_and_promises_all_work(name: str) -> None:
    chooser = placement(name)
    for instance in range(4):
        chooser.add(instance, 0.0)
    chooser.remove(2)
    taken = [chooser.take(0.0, 1.0) for _ in range(30)]
    assert 2 not in taken
    assert sum(chooser.free_at_s.values()) == pytest.approx(30.0)
    for instance in (0, 1, 3):
        chooser.remove(instance)
    with pytest.raises(LookupError):
        chooser.take(0.0, 1.0)


def test_least_work_evens_out_unequal_jobs() -> None:
    chooser = placement("least_work")
    for instance in range(3):
        chooser.add(instance, 0.0)
    assert [chooser.take(0.0, work) for work in (5.0, 1.0, 2.0, 1.0, 1.0)] == [0, 1, 2, 1, 1]


def test_an_unknown_placement_is_named_with_what_is_accepted() -> None:
    with pytest.raises(UserError, match=r"policy.placement: 'best'.*least_work"):
        placement("best")
