"""Hot-spot rebalancing in a run: copies of prefixes that cross the shared link like any transfer (§3.2).

A copy pins its prefix in the source's pool until the last byte has left, and leases pages of the target's transfer cache until it is kept
there: neither side can lose what it needs halfway, and no page is counted twice or not at all. Links join PrfaaS clusters with PD
clusters only, so nothing moves between two of a kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from repro.kvcache.directory import Directory, Move
from repro.kvcache.pool import HybridPool, Lease
from repro.scheduling.rebalance import RebalanceSpec
from repro.simulate.books import Books
from repro.simulate.clusters import Home, Site
from repro.simulate.events import Agenda
from repro.simulate.job import Job

#: Numbers of senders on a link: instances count from 0 up, fetched prefixes from −1 down; copies share one NIC of their own.
_SENDER = -(1 << 30)


class Copy(NamedTuple):
    """A move under way: its site decides the link and the way, `lease` holds its room at the target, and `there` says how many blocks of
    attention are not sent because the target has them.
    """

    move: Move
    site: Site
    lease: Lease
    there: int


class Rebalancing:
    """Notes what clusters lack, and copies it there. Counts what was copied."""

    def __init__(
        self,
        spec: RebalanceSpec,
        homes: Sequence[Home],
        sites: Sequence[Site],
        agenda: Agenda,
        books: Books,
    ) -> None:
        self.copies = 0
        self.copied_bytes = 0.0
        self._spec = spec
        self._homes = homes
        self._sites = {_of_site(site): site for site in sites}
        self._agenda = agenda
        self._books = books
        self._under_way: set[tuple[str, int]] = set()
        self._unused_bytes = 0.0
        caches = {_of_home(home): home.cache for home in homes} | {
            name: site.cache for name, site in self._sites.items()
        }
        self._pools: dict[str, HybridPool] = {name: pool for name, pool in caches.items() if pool is not None}
        self._directory = Directory(
            dict(self._pools), self._size_bytes, linked=lambda a, b: (a in self._sites) != (b in self._sites)
        )
        agenda.at(spec.period_s, self._tick)

    def _size_bytes(self, blocks: int) -> float:
        site = next(iter(self._sites.values()))
        assert site.cache is not None
        return float(site.spec.profile.kv_bytes(blocks * site.cache.spec.block_tokens))

    def asked(self, job: Job) -> None:
        """A request goes to a cluster: what that one, and the request's home, lack of its prefix is what copies could have saved."""
        chain = job.chain
        if not chain:
            return
        home = _of_home(job.home)
        self._directory.lacked(home, chain, self._pools[home].match_blocks(chain))
        if job.offloaded:
            site = _of_site(job.site)
            self._directory.lacked(site, chain, self._pools[site].match_blocks(chain))

    def _tick(self, now_s: float, _: None) -> None:
        if not self._books.open:
            return
        self._agenda.at(now_s + self._spec.period_s, self._tick)
        before, self._unused_bytes = (
            self._unused_bytes,
            sum(site.link.unused_bytes(now_s) for site in self._sites.values()),
        )
        budget = self._spec.link_share * (self._unused_bytes - before)
        for move in self._directory.rebalance(budget, self._spec.at_least_blocks):
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
        outward = move.source in self._sites
        site = self._sites[move.source if outward else move.target]
        link = site.link if outward else site.ingress
        link.send(now_s, _SENDER, move.size_bytes, self._sent, Copy(move, site, lease, there))

    def _sent(self, now_s: float, copy: Copy) -> None:
        move = copy.move
        self._pools[move.source].unpin(move.chain, move.blocks)
        self.copies += 1
        self.copied_bytes += move.size_bytes
        self._agenda.at(now_s + copy.site.half_rtt_s, self._arrived, copy)

    def _arrived(self, now_s: float, copy: Copy) -> None:  # noqa: ARG002
        move, target = copy.move, self._pools[copy.move.target]
        self._under_way.discard((move.target, move.chain[-1]))
        target.free(copy.lease)
        # What the target has evicted meanwhile did not come with the copy, which is then of no use.
        if target.attention_blocks(move.chain) >= copy.there:
            # One state crossed, that at the end: no checkpoint inside the prefix appears.
            target.insert(move.chain, move.blocks)


def _of_home(home: Home) -> str:
    return f"pd{home.index}"


def _of_site(site: Site) -> str:
    return f"prfaas{site.index}"
