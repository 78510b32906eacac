"""Lower cache tiers in a run: without a load time they are a larger first tier, with one a hit waits for its bytes."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from tiny import TinyProfile, local, play, split

from repro.errors import UserError
from repro.kvcache.pool import CacheSpec, CacheTier, GroupSpec
from repro.scheduling.policies import Prfaas
from repro.scheduling.spec import SchedulerSpec
from repro.simulate.link_spec import SharedLinkSpec
from repro.workload.sessions import SessionSpec, draw_sessions
from repro.workload.stream import Recorded, RequestBatch

PROFILE = TinyProfile(s_per_token=1e-3)
ATTENTION = (GroupSpec("full", "block", 1e4),)
BOTH = (*ATTENTION, GroupSpec("state", "request", 1e6))
SESSIONS = draw_sessions(
    SessionSpec(0.05, block_tokens=64, system_tokens=640, first_tokens=2000, turn_tokens=500), 1500.0, 3
)


def sessions(cache: CacheSpec) -> pd.DataFrame:
    link = SharedLinkSpec(1e9, 0.02)
    profile = TinyProfile(s_per_token=1e-4, batch_max=8)
    return play(split(profile, SchedulerSpec(Prfaas(), 3000.0), link, cache=cache), SESSIONS)[0]


def test_tiers_that_load_at_once_are_one_larger_tier_to_the_last_digit() -> None:
    small = CacheSpec(BOTH, 4e7, 64, 1000)
    tiered = replace(small, lower=(CacheTier("dram", 0.06), CacheTier("ssd", 0.1)))
    large = sessions(replace(small, capacity_bytes=2e8))
    assert sessions(tiered).to_csv() == large.to_csv()
    assert sessions(small)["cached_tokens"].sum() < 0.8 * large["cached_tokens"].sum()


def test_slower_tiers_answer_later_and_all_hit_alike() -> None:
    small = CacheSpec(BOTH, 4e7, 64, 1000)
    found = [
        sessions(replace(small, lower=(CacheTier("ssd", None, load_bps),))) for load_bps in (None, 4e9, 1e9, 4e8)
    ]  # fmt: skip
    ttft = [table["ttft_s"].mean() for table in found]
    assert ttft == sorted(ttft)
    assert ttft[-1] > 1.05 * ttft[0]
    hits = [table["cached_tokens"].sum() for table in found]
    assert max(hits) < 1.02 * min(hits)


@pytest.mark.parametrize("latency_s", [0.0, 0.25])
def test_a_hit_in_a_lower_tier_costs_its_load_before_prefill(latency_s: float) -> None:
    # A document of 10 blocks, another that pushes it out of HBM, and the first again with one block more.
    block, blocks, load_bps = 100, 10, 1e7
    first, other = tuple(range(blocks)), tuple(range(100, 100 + blocks))
    asked = (*first, 50)
    chains = [(keys, keys) for keys in (first, other, asked)]
    lengths = np.array([len(chain) * block + 1 for chain, _ in chains])
    stream = Recorded(RequestBatch(np.array([0.0, 10.0, 20.0]), lengths, np.ones(3, np.int64), chains))
    own_bytes = blocks * block * ATTENTION[0].bytes
    spec = local(PROFILE, cache=CacheSpec(ATTENTION, own_bytes, block, 1000))
    forgot, _ = play(spec, stream)
    assert forgot["cached_tokens"].tolist() == [0, 0, 0]
    assert spec.cache is not None
    tier = CacheTier("dram", 1.0, load_bps, latency_s)
    loaded, _ = play(replace(spec, cache=replace(spec.cache, lower=(tier,))), stream)
    assert loaded["cached_tokens"].tolist() == [0, 0, blocks * block]
    expected = latency_s + 8 * own_bytes / load_bps + (block + 1) * PROFILE.s_per_token
    assert loaded["prefill_s"].iloc[2] == pytest.approx(expected, rel=1e-12)
    assert loaded["queue_s"].tolist() == [0.0, 0.0, 0.0]


def test_chunked_prefill_with_lower_tiers_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"^policy\.cache\.lower: loads before whole prefills"):
        local(PROFILE, chunk_tokens=100, cache=CacheSpec(ATTENTION, 1e9, lower=(CacheTier("dram", 1.0),)))
