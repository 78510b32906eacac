"""Hot-spot rebalancing in a run: what it copies, what it is worth, and that nothing is lost or made up on the way."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from tiny import TinyProfile, play, split

from repro.errors import UserError
from repro.kvcache.pool import CacheSpec, GroupSpec
from repro.scheduling.policies import Prfaas, Threshold
from repro.scheduling.rebalance import RebalanceSpec
from repro.scheduling.spec import SchedulerSpec
from repro.simulate.link_spec import CapacityChange, SharedLinkSpec
from repro.simulate.records import Table
from repro.simulate.simulation import Simulation, Summary
from repro.simulate.spec import Fault, PdCluster, SimulationSpec
from repro.workload.stream import Recorded, RequestBatch

BLOCK = 100
PROFILE = TinyProfile(s_per_token=1e-4, fixed_bytes=1e6, bytes_per_token=1e3)
CACHE = CacheSpec(
    (GroupSpec("full", "block", 1e3), GroupSpec("state", "request", 1e6)), block_tokens=BLOCK, page_bytes=1000
)
LINK = SharedLinkSpec(1e9, 0.02, 2e9, 4, 4e8, 12)
ON = RebalanceSpec(enabled=True, period_s=5.0)


def forks(n: int = 400, documents: int = 3, blocks: int = 40) -> Recorded:
    """Documents that somebody prefills alone, and then questions about them, which need the state at the document's very end."""
    rng = np.random.default_rng(5)
    arrivals = np.cumsum(rng.exponential(0.7, n))
    inputs, chains = [], []
    for i in range(n):
        document = tuple(1 + 1000 * (i % documents) + block for block in range(blocks))
        question = 0 if i < documents else int(rng.integers(2, 30))
        keys = (*document, *(-(1000 * i + block) for block in range(question)))
        inputs.append(BLOCK * len(keys) + 1)
        chains.append((keys, keys))
    return Recorded(RequestBatch(arrivals, np.array(inputs), np.full(n, 20), chains))


def two_homes(rebalance: RebalanceSpec, router: object = None, **kwargs: object) -> SimulationSpec:
    """Every other request calls the other PD cluster home, so the documents' states are in one of the two."""
    scheduler = SchedulerSpec(router or Threshold(), 3_500.0, rebalance=rebalance)  # type: ignore[arg-type]
    base = split(PROFILE, scheduler, LINK, cache=CACHE)
    return replace(base, pd=(PdCluster(PROFILE, 2, 4), PdCluster(PROFILE, 2, 4)), **kwargs)  # type: ignore[arg-type]


def test_a_hot_prefix_is_copied_to_the_cluster_that_lacks_it_and_hit_there() -> None:
    runs = {name: play(two_homes(spec), forks()) for name, spec in (("without", RebalanceSpec()), ("with", ON))}
    (before, idle), (after, busy) = runs["without"], runs["with"]
    assert idle.copies == 0 == idle.copied_bytes
    assert busy.copies == 3
    # In the PD cluster whose own cache lacked the documents' states, they are hit from then on, and its questions stay there.
    local = {name: table.loc[table["route"] == "pd", "cached_tokens"].sum() for name, (table, _) in runs.items()}
    assert local["with"] > 1.5 * local["without"]
    assert (after["route"] == "prfaas").sum() < 0.1 * (before["route"] == "prfaas").sum()
    assert busy.egress_bytes < 0.1 * idle.egress_bytes


def test_all_bytes_that_left_are_those_of_requests_and_copies() -> None:
    table, summary = play(two_homes(ON), forks())
    remote = table.loc[table["route"] == "prfaas", "kv_bytes"].sum()
    assert summary.copied_bytes > 0
    # Everything hot was prefilled by PrfaaS, so every copy goes outward.
    assert summary.egress_bytes == pytest.approx(remote + summary.copied_bytes, rel=1e-9)


def pools_of(spec: SimulationSpec, stream: Recorded) -> tuple[Simulation, pd.DataFrame, Summary]:
    table = Table()
    simulation = Simulation(spec, table)
    summary = simulation.run(stream)
    return simulation, table.frame(), summary


@pytest.mark.parametrize(("capacity", "documents"), [(2e7, 3), (3e7, 8)])
@pytest.mark.parametrize("eviction", ["lru", "length_aware"])
def test_small_pools_that_evict_all_the_time_keep_their_pages_accounted(
    capacity: float, documents: int, eviction: str
) -> None:
    cache = replace(CACHE, capacity_bytes=capacity, eviction=eviction)  # type: ignore[arg-type]
    eager = replace(ON, period_s=0.5, at_least_blocks=1, link_share=1.0)
    slow = replace(LINK, rate_bps=2e8, changes=(CapacityChange(60.0, 0.0), CapacityChange(90.0, 2e8)))
    spec = two_homes(eager, cache=cache, faults=(Fault("prfaas", 0, 40.0, 30.0),))
    spec = replace(spec, prfaas=(replace(spec.prfaas[0], link=slow),))
    simulation, table, summary = pools_of(spec, forks(400, documents, 15))
    assert summary.copies >= 3
    assert summary.completed == len(table) == 400
    for cluster in (*simulation.pd_clusters, *simulation.prfaas_clusters):
        pool = cluster.cache
        assert pool is not None
        entries = pool._entries.values()
        leased = sum(lease.pages for lease in pool._leases.values())
        assert pool.used_pages == sum(entry.pages for entry in entries) + leased <= pool.pages
        pinned = sum(bool(entry.pins) for entry in entries)
        assert min((entry.pins for entry in entries), default=0) >= 0
        # What is still leased or pinned is of copies that were under way when the last request left.
        under_way = len(simulation.scheduler.caches.under_way) if simulation.scheduler.caches else 0
        assert (leased > 0) <= (under_way > 0)
        assert (pinned > 0) <= (under_way > 0)


def test_a_run_with_copies_is_the_same_every_time() -> None:
    spec = two_homes(ON, Prfaas(), cache=replace(CACHE, capacity_bytes=2e7))
    (first, one), (second, other) = (play(spec, forks()) for _ in range(2))
    assert one == other
    assert first.equals(second)


def test_a_full_link_carries_no_copies() -> None:
    spec = two_homes(ON)
    dead = replace(LINK, changes=(CapacityChange(0.0, 0.0),))
    _, summary = play(replace(spec, prfaas=(replace(spec.prfaas[0], link=dead),), drain_s=10.0), forks(60))
    assert summary.copies == 0


def test_rebalancing_without_caches_is_refused_by_key() -> None:
    with pytest.raises(UserError, match=r"policy\.rebalance"):
        split(PROFILE, SchedulerSpec(rebalance=ON), LINK)
    with pytest.raises(UserError, match=r"policy\.rebalance\.link_share"):
        RebalanceSpec(link_share=0.0)
