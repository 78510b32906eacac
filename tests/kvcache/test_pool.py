"""The hybrid prefix cache pool: real hits, real room."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repro.errors import UserError
from repro.kvcache.pool import CacheSpec, GroupSpec, HybridPool
from repro.scheduling.kvcache_manager import Replica

MLA = GroupSpec("mla", "block", 1024.0)
KDA = GroupSpec("kda", "request", 4 * 1024.0)


def pool(*groups: GroupSpec, pages: float = 1e9, **kwargs: object) -> HybridPool:
    return HybridPool(CacheSpec(groups, capacity_bytes=pages * 1024, block_tokens=1, page_bytes=1024, **kwargs))  # type: ignore[arg-type]


def chain(*keys: int) -> tuple[int, ...]:
    return keys


def test_attention_alone_matches_any_prefix() -> None:
    cache = pool(MLA)
    cache.insert(chain(1, 2, 3, 4))
    assert cache.match_blocks(chain(1, 2, 9)) == 2
    assert cache.match_blocks(chain(9, 2, 3)) == 0


def test_a_recurrent_state_serves_exactly_the_length_at_which_it_was_taken() -> None:
    cache = pool(MLA, KDA)
    cache.insert(chain(1, 2, 3, 4))
    assert cache.match_blocks(chain(1, 2, 3, 4, 5)) == 4
    assert cache.match_blocks(chain(1, 2, 3)) == 0
    assert cache.attention_blocks(chain(1, 2, 3)) == 3


def test_checkpoints_along_the_way_give_partial_hits_back() -> None:
    cache = pool(MLA, KDA, checkpoint_blocks=2)
    cache.insert(tuple(range(1, 8)))
    assert [cache.match_blocks(tuple(range(1, n + 1))) for n in range(1, 8)] == [0, 2, 2, 4, 4, 6, 7]


def test_no_checkpoint_appears_inside_a_prefix_that_was_not_computed() -> None:
    cache = pool(MLA, KDA, checkpoint_blocks=1)
    cache.insert(tuple(range(1, 7)), known_blocks=4)
    assert cache.match_blocks((1, 2, 3)) == 0
    assert cache.match_blocks((1, 2, 3, 4, 5)) == 5


def test_groups_share_one_pool_of_pages() -> None:
    cache = pool(MLA, KDA, pages=8)
    cache.insert((1, 2, 3, 4))
    assert cache.used_pages == 8
    cache.insert((9,))
    assert cache.used_pages <= 8
    assert cache.match_blocks((9,)) == 1
    assert cache.match_blocks((1, 2, 3, 4)) == 0


def test_lru_loses_the_end_of_the_oldest_prompt_first() -> None:
    cache = pool(MLA, pages=6)
    cache.insert((1, 2, 3))
    cache.insert((4, 5, 6))
    cache.insert((7,))
    assert cache.match_blocks((1, 2, 3)) == 2
    assert cache.match_blocks((4, 5, 6)) == 3


def test_length_aware_eviction_loses_the_shorter_prompt_though_it_is_newer() -> None:
    caches = {name: pool(MLA, pages=6, eviction=name) for name in ("lru", "length_aware")}
    for cache in caches.values():
        cache.insert((1, 2, 3, 4))
        cache.insert((5, 6))
        cache.insert((7,))
    assert caches["lru"].match_blocks((1, 2, 3, 4)) == 3
    assert caches["length_aware"].match_blocks((1, 2, 3, 4)) == 4
    assert caches["length_aware"].match_blocks((5, 6)) == 1


def test_a_pinned_hit_survives_until_it_is_unpinned() -> None:
    cache = pool(MLA, KDA, pages=8)
    cache.insert((1, 2, 3, 4))
    cache.pin((1, 2, 3, 4), 4)
    cache.insert((5, 6, 7, 8))
    assert cache.match_blocks((1, 2, 3, 4)) == 4
    cache.unpin((1, 2, 3, 4), 4)
    cache.insert((5, 6, 7, 8))
    assert cache.match_blocks((5, 6, 7, 8)) == 4


def test_transfer_leases_take_room_from_the_same_pool_and_give_it_back() -> None:
    cache = pool(MLA, pages=6)
    cache.insert((1, 2, 3, 4))
    lease = cache.lease(4.5 * 1024)
    assert lease is not None
    assert lease.pages == 5
    assert cache.match_blocks((1, 2, 3, 4)) == 1
    assert cache.lease(2 * 1024) is None or cache.used_pages <= 6
    cache.free(lease)
    with pytest.raises(KeyError):
        cache.free(lease)


def test_real_state_is_kept_with_its_entry() -> None:
    cache = pool(MLA, KDA)
    cache.insert((1, 2), payload=lambda group, depth: f"group {group} until block {depth}")
    assert cache.payload(0, 1) == "group 0 until block 1"
    assert cache.payload(1, 2) == "group 1 until block 2"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=8), min_size=1, max_size=40),
    st.integers(4, 30),
    st.sampled_from(["lru", "length_aware"]),
)
def test_room_is_never_exceeded_and_no_block_is_kept_without_its_prefix(
    prompts: list[list[int]], pages: int, eviction: str
) -> None:
    cache = pool(MLA, KDA, pages=pages, eviction=eviction, checkpoint_blocks=2)
    seen: set[tuple[int, ...]] = set()
    for prompt in prompts:
        keys = tuple(hash(tuple(prompt[: i + 1])) for i in range(len(prompt)))
        hit = cache.match_blocks(keys)
        assert hit <= cache.attention_blocks(keys)
        assert hit == 0 or keys[:hit] in seen  # nothing is served that was never computed
        cache.touch(keys, hit)
        cache.insert(keys, hit)
        seen.update(keys[: i + 1] for i in range(len(keys)))
        assert cache.used_pages <= pages
        present = [(0, key) in cache._entries for key in keys]
        assert present == sorted(present, reverse=True)


def test_a_replica_that_hears_all_changes_serves_what_the_pool_serves() -> None:
    cache, replica = pool(MLA, KDA, pages=20, checkpoint_blocks=2), Replica(needs_checkpoint=True)
    assert cache.changes() == ([], [], [], [])
    rng = np.random.default_rng(0)
    gone = 0
    for _ in range(60):
        prompt = rng.integers(0, 3, int(rng.integers(1, 8))).tolist()
        keys = tuple(hash(tuple(prompt[: i + 1])) for i in range(len(prompt)))
        cache.prefilled(keys, cache.match_tokens(keys))
        changes = cache.changes()
        gone += len(changes.removed) + len(changes.removed_checkpoints)
        replica.apply(*changes)
        assert replica.match_blocks(keys) == cache.match_blocks(keys)
        assert replica.blocks == {key for group, key in cache._entries if group == 0}
        assert replica.checkpoints == {key for group, key in cache._entries if group == 1}
    assert gone > 20
    assert cache.changes() == ([], [], [], [])


def test_a_pool_without_a_block_level_group_is_refused() -> None:
    with pytest.raises(UserError, match=r"cache\.groups"):
        CacheSpec((KDA,))


def test_hit_rates_fall_as_the_pool_shrinks() -> None:
    rng = np.random.default_rng(0)
    prompts = [
        tuple(int(f) * 100 + i for i in range(int(n)))
        for f, n in zip(rng.zipf(1.5, 400) % 50, rng.integers(1, 9, 400), strict=True)
    ]
    rates = []
    for pages in (8, 32, 128, 10_000):
        cache, hits = pool(MLA, pages=pages), 0
        for prompt in prompts:
            hits += cache.match_blocks(prompt)
            cache.touch(prompt, cache.match_blocks(prompt))
            cache.insert(prompt)
        rates.append(hits)
    assert rates == sorted(rates)
    assert rates[0] < rates[-1]
