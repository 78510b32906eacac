"""The global KVCache manager: what clusters hold, what to move, and which prefixes are hot in the wrong place."""

from repro.kvcache.pool import CacheSpec, GroupSpec, HybridPool
from repro.scheduling.kvcache_manager import KVCacheManager, Replica

MLA = GroupSpec("mla", "block", 1024.0)
KDA = GroupSpec("kda", "request", 4 * 1024.0)


def pool(*groups: GroupSpec, **kwargs: object) -> HybridPool:
    return HybridPool(CacheSpec(groups, block_tokens=1, page_bytes=1024, **kwargs))  # type: ignore[arg-type]


def test_a_replica_that_got_all_messages_answers_as_the_pool_does() -> None:
    cache, replica = pool(MLA, KDA, checkpoint_blocks=2), Replica(needs_checkpoint=True)
    cache.insert((1, 2, 3, 4, 5))
    replica.apply((1, 2, 3, 4, 5), (), (2, 4, 5), ())
    for n in range(6):
        keys = tuple(range(1, n + 1))
        assert cache.match_blocks(keys) == replica.match_blocks(keys)
    replica.apply((), (3, 4, 5), (), (4, 5))
    assert replica.match_blocks((1, 2, 3, 4, 5)) == 2


def test_the_manager_fetches_the_longest_prefix_and_only_what_is_missing() -> None:
    here, there = pool(MLA), pool(MLA)
    here.insert((1, 2))
    there.insert((1, 2, 3, 4, 5))
    manager = KVCacheManager({"pd": here, "prfaas": there}, 1, lambda blocks: 100.0 + 10.0 * blocks)
    move = manager.fetch("pd", (1, 2, 3, 4, 5, 6))
    assert move is not None
    assert (move.source, move.blocks, move.size_bytes) == ("prfaas", 5, 100.0 + 30.0)
    assert manager.fetch("prfaas", (1, 2, 3)) is None


def test_rebalancing_proposes_what_was_lacked_most_often_within_its_budget() -> None:
    here, there = pool(MLA), pool(MLA)
    there.insert((1, 2, 3))
    there.insert((7, 8, 9))
    manager = KVCacheManager({"pd": here, "prfaas": there}, 1, lambda blocks: 10.0 * blocks)
    for _ in range(5):
        manager.asked("pd", (1, 2, 3, 4))
    manager.asked("pd", (7, 8, 9))
    (move,) = manager.rebalance(budget_bytes=30.0)
    assert move.chain == (1, 2, 3)
    assert manager.rebalance(1e9) == []


def test_nothing_is_proposed_between_clusters_that_no_link_joins() -> None:
    pools = {name: pool(MLA) for name in ("pd0", "pd1", "prfaas")}
    pools["pd0"].insert((1, 2, 3))
    pools["prfaas"].insert((1, 2))
    manager = KVCacheManager(pools, 1, lambda blocks: 10.0 * blocks, linked=lambda a, b: "prfaas" in (a, b))
    move = manager.fetch("pd1", (1, 2, 3))
    assert move is not None
    assert (move.source, move.blocks) == ("prfaas", 2)


def test_a_move_weighs_the_state_that_is_missing_not_the_blocks_that_are_there() -> None:
    here, there = pool(MLA, KDA), pool(MLA, KDA)
    there.insert((1, 2, 3))
    here.insert((1, 2, 3, 4))
    move = KVCacheManager({"pd": here, "prfaas": there}, 1, lambda blocks: 100.0 + 10.0 * blocks).fetch("pd", (1, 2, 3))
    assert move is not None
    assert move.size_bytes == 100.0


def test_a_copy_begins_once_and_only_while_its_source_holds_the_prefix() -> None:
    here, there = pool(MLA), pool(MLA)
    there.insert((1, 2, 3))
    manager = KVCacheManager({"pd": here, "prfaas": there}, 1, lambda blocks: 10.0 * blocks)
    move = manager.fetch("pd", (1, 2, 3))
    assert move is not None
    assert manager.begin(move)
    assert not manager.begin(move)
    manager.end(move)
    assert manager.begin(move)
    manager.end(move)
    assert not manager.begin(move._replace(chain=(1, 2, 3, 4), blocks=4))
    assert not manager.under_way


def test_one_token_of_a_prompt_is_never_taken_from_a_cache() -> None:
    manager = KVCacheManager({"pd": pool(MLA)}, 100, lambda blocks: 10.0 * blocks)
    assert manager.usable((1, 2, 3), 300) == (1, 2)
    assert manager.usable((1, 2, 3), 301) == (1, 2, 3)
