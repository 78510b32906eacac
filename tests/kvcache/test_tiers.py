"""Cache tiers against what LRU guarantees: each tier and those above it hold what one pool of their size would."""

import itertools
from typing import Any

import numpy as np
import pytest

from repro.errors import UserError
from repro.kvcache.pool import CacheSpec, CacheTier, GroupSpec, HybridPool
from repro.kvcache.sizing import CacheOptions
from repro.kvcache.tiers import TieredPool, made
from repro.profiles.presets import load_profile

GB = 1_000_000_000
#: A block and a checkpoint take a page of 1 GB each.
ATTENTION, STATE = GroupSpec("attention", "block", GB), GroupSpec("state", "request", GB)


def cache(pages: int, *lower: CacheTier, groups: tuple[GroupSpec, ...] = (ATTENTION,)) -> CacheSpec:
    return CacheSpec(groups, pages * GB, block_tokens=1, page_bytes=GB, lower=lower)


def prompts(n: int, most_blocks: int) -> list[tuple[int, ...]]:
    """Beginnings of 30 documents, some asked for far more often than others."""
    rng = np.random.default_rng(3)
    return [
        tuple(100 * int(document) + block for block in range(int(length)))
        for document, length in zip(rng.zipf(1.3, n) % 30, rng.integers(1, most_blocks + 1, n), strict=True)
    ]


def test_every_tier_with_those_above_it_holds_what_one_pool_of_their_size_holds() -> None:
    sizes = (8, 14, 40)
    tiered = made(cache(sizes[0], *(CacheTier(str(size), float(size)) for size in sizes[1:])))
    assert isinstance(tiered, TieredPool)
    alone = [HybridPool(cache(sum(sizes[: i + 1]))) for i in range(len(sizes))]
    seen = set()
    for chain in prompts(4000, 6):
        hits = tuple(pool.match_blocks(chain) for pool in alone)
        seen.add(hits)
        for tier, hit in enumerate(hits):
            held = [number is not None and number <= tier for number in (tiered.tier_of(0, key) for key in chain)]
            assert len(list(itertools.takewhile(bool, held))) == hit
        assert tiered.match_blocks(chain) == hits[-1]
        for pool in (tiered, *alone):
            pool.touch(chain, pool.match_blocks(chain))
            pool.insert(chain, pool.match_blocks(chain))
    assert any(len(set(hits)) == 3 for hits in seen), "some prompt is in part in every tier"


def test_a_load_takes_each_lower_tiers_latency_and_bytes() -> None:
    dram, ssd = CacheTier("dram", 3.0, 80e9, 0.5), CacheTier("ssd", None, 8e9, 2.0)
    tiered = made(cache(2, dram, ssd, groups=(ATTENTION, STATE)))
    document = (1, 2, 3)
    tiered.insert(document)
    # In order of use: block 1, block 2, block 3, checkpoint; two of them are in HBM.
    assert tiered.load_s(document, 3) == pytest.approx(0.5 + 2 * 8 / 80)
    tiered.insert((9,))
    tiered.insert((8,))
    # Two prompts of a block and a checkpoint each came on top: HBM has the last, DRAM the first and block 1.
    assert tiered.load_s(document, 3) == pytest.approx(0.5 + 8 / 80 + 2.0 + 3 * 8 / 8)
    tiered.touch(document, 3)
    assert tiered.load_s(document, 3) == pytest.approx(0.5 + 2 * 8 / 80), "what was used has risen"
    assert tiered.load_s((1,), 1) == 0.0


def test_what_leaves_the_last_tier_is_gone_and_counted_nowhere() -> None:
    tiered = made(cache(2, CacheTier("dram", 3.0), groups=(ATTENTION, STATE)))
    for key in range(0, 700, 7):
        tiered.insert((key, key + 1))
        assert tiered.used_pages <= 5
        assert len(tiered) == sum(tiered.tier_of(group, at) is not None for group in (0, 1) for at in range(710))
    assert tiered.evicted > 200


@pytest.mark.parametrize(
    ("made_", "message"),
    [
        (lambda: CacheTier("x", 0.0), r"^policy\.cache\.lower\.capacity_gb: 0.0; accepted"),
        (lambda: CacheTier("x", 1.0, -1.0), r"^policy\.cache\.lower\.load_bps: -1.0; accepted"),
        (lambda: CacheTier("x", 1.0, None, -1.0), r"^policy\.cache\.lower\.latency_s: -1.0; accepted"),
        (lambda: cache(2, CacheTier("x", None), CacheTier("y", 1.0)), r"^policy\.cache\.lower\[1\]: has no effect below"),
        (lambda: CacheSpec((ATTENTION,), lower=(CacheTier("x", 1.0),)), r"^policy\.cache\.lower\[0\]: has no effect below"),
        (lambda: CacheOptions(lower=(CacheTier("x", 1.0),)), r"^policy\.cache\.lower: has no effect without"),
    ],
)  # fmt: skip
def test_tiers_that_cannot_be_are_refused_by_key(made_: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        made_()


def test_one_tier_is_the_pool_that_it_was() -> None:
    assert type(made(CacheOptions(enabled=True).spec(load_profile("paper_1t_h20")))) is HybridPool
