"""Hot-spot rebalancing in a run: copies of prefixes that cross the shared link like any transfer (§3.2).

A copy pins its prefix in the source's pool until the last byte has left, and leases pages of the target's transfer cache until it is kept
there: neither side can lose what it needs halfway, and no page is counted twice or not at all. Links join PrfaaS clusters with PD
clusters only, so nothing moves between two of a kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from repro.kvcache.pool import HybridPool, Lease
from repro.scheduling.kvcache_manager import Move
from repro.scheduling.scheduler import Scheduler
from repro.simulate.events import EventQueue
from repro.simulate.ledger import RequestLedger
from repro.simulate.resources import PdResources, PrfaasResources

#: Numbers of senders on a link: instances count from 0 up, fetched prefixes from −1 down; copies share one NIC of their own.
_SENDER = -(1 << 30)


class Copy(NamedTuple):
    """A move under way: its PrfaaS cluster decides the link and the way, `lease` holds its room at the target.

    `there` says how many blocks of attention are not sent because the target has them.
    """

    move: Move
    prfaas: PrfaasResources
    lease: Lease
    there: int


class Rebalancing:
    """Asks the scheduler which prefixes to copy, and copies them. Counts what was copied."""

    def __init__(
        self,
        scheduler: Scheduler,
        pd_clusters: Sequence[PdResources],
        prfaas_clusters: Sequence[PrfaasResources],
        events: EventQueue,
        ledger: RequestLedger,
    ) -> None:
        self.copies = 0
        self.copied_bytes = 0.0
        assert scheduler.caches is not None
        self._scheduler = scheduler
        self._manager = scheduler.caches
        self._prfaas_clusters = {prfaas.name: prfaas for prfaas in prfaas_clusters}
        pools = {pd.name: pd.cache for pd in pd_clusters} | {prfaas.name: prfaas.cache for prfaas in prfaas_clusters}
        self._pools: dict[str, HybridPool] = {name: pool for name, pool in pools.items() if pool is not None}
        self._events = events
        self._ledger = ledger
        self._period_s = scheduler.spec.rebalance.period_s
        events.at(self._period_s, self._tick)

    def _tick(self, now_s: float, _: None) -> None:
        if not self._ledger.open:
            return
        self._events.at(now_s + self._period_s, self._tick)
        unused_bytes = sum(prfaas.link.unused_bytes(now_s) for prfaas in self._prfaas_clusters.values())
        for move in self._scheduler.rebalance(unused_bytes):
            if self._manager.begin(move) and not self._begun(now_s, move):
                self._manager.end(move)

    def _begun(self, now_s: float, move: Move) -> bool:
        """Whether there was room at the target; making it may evict what the copy builds on."""
        source, target = self._pools[move.source], self._pools[move.target]
        there = target.attention_blocks(move.chain)
        lease = target.lease(move.size_bytes)
        if lease is None:
            return False
        if target.attention_blocks(move.chain) < there:
            target.free(lease)
            return False
        source.pin(move.chain, move.blocks)
        outward = move.source in self._prfaas_clusters
        prfaas = self._prfaas_clusters[move.source if outward else move.target]
        link = prfaas.link if outward else prfaas.ingress
        link.send(now_s, _SENDER, move.size_bytes, self._sent, Copy(move, prfaas, lease, there))
        return True

    def _sent(self, now_s: float, copy: Copy) -> None:
        move = copy.move
        self._pools[move.source].unpin(move.chain, move.blocks)
        self.copies += 1
        self.copied_bytes += move.size_bytes
        self._events.at(now_s + copy.prfaas.half_rtt_s, self._arrived, copy)

    def _arrived(self, now_s: float, copy: Copy) -> None:  # noqa: ARG002
        move, target = copy.move, self._pools[copy.move.target]
        self._manager.end(move)
        target.free(copy.lease)
        # What the target has evicted meanwhile did not come with the copy, which is then of no use.
        if target.attention_blocks(move.chain) >= copy.there:
            target.received(move.chain)
