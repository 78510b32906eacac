"""Hot-spot rebalancing in a run: copies of prefixes that cross the shared link like any transfer (§3.2).

A copy pins its prefix in the source's pool until the last byte has left, and leases pages of the target's transfer cache until it is kept
there: neither side can lose what it needs halfway, and no page is counted twice or not at all. Links join PrfaaS clusters with PD
clusters only, so nothing moves between two of a kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from repro.kvcache.pool import HybridPool, Lease
from repro.scheduling.kvcache_manager import KVCacheManager, Move
from repro.scheduling.rebalance import RebalanceSpec
from repro.simulate.clusters import PdClusterState, PrfaasClusterState
from repro.simulate.events import EventQueue
from repro.simulate.job import Job
from repro.simulate.ledger import RequestLedger

#: Numbers of senders on a link: instances count from 0 up, fetched prefixes from −1 down; copies share one NIC of their own.
_SENDER = -(1 << 30)


class Copy(NamedTuple):
    """A move under way: its PrfaaS cluster decides the link and the way, `lease` holds its room at the target.

    `there` says how many blocks of attention are not sent because the target has them.
    """

    move: Move
    prfaas: PrfaasClusterState
    lease: Lease
    there: int


class Rebalancing:
    """Notes what clusters lack, and copies it there. Counts what was copied."""

    def __init__(
        self,
        spec: RebalanceSpec,
        pd_clusters: Sequence[PdClusterState],
        prfaas_clusters: Sequence[PrfaasClusterState],
        events: EventQueue,
        ledger: RequestLedger,
    ) -> None:
        self.copies = 0
        self.copied_bytes = 0.0
        self._spec = spec
        self._pd_clusters = pd_clusters
        self._prfaas_clusters = {_of_prfaas(prfaas): prfaas for prfaas in prfaas_clusters}
        self._events = events
        self._ledger = ledger
        self._under_way: set[tuple[str, int]] = set()
        self._unused_bytes = 0.0
        caches = {_of_pd(pd): pd.cache for pd in pd_clusters} | {
            name: prfaas.cache for name, prfaas in self._prfaas_clusters.items()
        }
        self._pools: dict[str, HybridPool] = {name: pool for name, pool in caches.items() if pool is not None}
        self._manager = KVCacheManager(
            dict(self._pools),
            self._size_bytes,
            linked=lambda a, b: (a in self._prfaas_clusters) != (b in self._prfaas_clusters),
        )
        events.at(spec.period_s, self._tick)

    def _size_bytes(self, blocks: int) -> float:
        prfaas = next(iter(self._prfaas_clusters.values()))
        assert prfaas.cache is not None
        return float(prfaas.spec.profile.kv_bytes(blocks * prfaas.cache.spec.block_tokens))

    def asked(self, job: Job) -> None:
        """A request goes to a cluster: what that one, and the request's home, lack of its prefix is what copies could have saved."""
        chain = job.chain
        if not chain:
            return
        pd = _of_pd(job.pd)
        self._manager.lacked(pd, chain, self._pools[pd].match_blocks(chain))
        if job.offloaded:
            prfaas = _of_prfaas(job.prfaas)
            self._manager.lacked(prfaas, chain, self._pools[prfaas].match_blocks(chain))

    def _tick(self, now_s: float, _: None) -> None:
        if not self._ledger.open:
            return
        self._events.at(now_s + self._spec.period_s, self._tick)
        before, self._unused_bytes = (
            self._unused_bytes,
            sum(prfaas.link.unused_bytes(now_s) for prfaas in self._prfaas_clusters.values()),
        )
        budget = self._spec.link_share * (self._unused_bytes - before)
        for move in self._manager.rebalance(budget, self._spec.at_least_blocks):
            self._begin(now_s, move)

    def _begin(self, now_s: float, move: Move) -> None:
        aim = (move.target, move.chain[-1])
        source, target = self._pools[move.source], self._pools[move.target]
        # An earlier copy may be on its way there, or may have made room for itself where this one is.
        if aim in self._under_way or source.match_blocks(move.chain) < move.blocks:
            return
        there = target.attention_blocks(move.chain)
        lease = target.lease(move.size_bytes)
        if lease is None:
            return
        if target.attention_blocks(move.chain) < there:
            target.free(lease)
            return
        source.pin(move.chain, move.blocks)
        self._under_way.add(aim)
        outward = move.source in self._prfaas_clusters
        prfaas = self._prfaas_clusters[move.source if outward else move.target]
        link = prfaas.link if outward else prfaas.ingress
        link.send(now_s, _SENDER, move.size_bytes, self._sent, Copy(move, prfaas, lease, there))

    def _sent(self, now_s: float, copy: Copy) -> None:
        move = copy.move
        self._pools[move.source].unpin(move.chain, move.blocks)
        self.copies += 1
        self.copied_bytes += move.size_bytes
        self._events.at(now_s + copy.prfaas.half_rtt_s, self._arrived, copy)

    def _arrived(self, now_s: float, copy: Copy) -> None:  # noqa: ARG002
        move, target = copy.move, self._pools[copy.move.target]
        self._under_way.discard((move.target, move.chain[-1]))
        target.free(copy.lease)
        # What the target has evicted meanwhile did not come with the copy, which is then of no use.
        if target.attention_blocks(move.chain) >= copy.there:
            # One state crossed, that at the end: no checkpoint inside the prefix appears.
            target.insert(move.chain, move.blocks)


def _of_pd(pd: PdClusterState) -> str:
    return f"pd{pd.index}"


def _of_prfaas(prfaas: PrfaasClusterState) -> str:
    return f"prfaas{prfaas.index}"
