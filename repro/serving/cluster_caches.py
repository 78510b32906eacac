"""What a live router knows of the clusters' prefix caches (§3.2), so that it can route by what is cached (§3.4.3).

Where phases are replayed there is no state to look for: the router keeps each cluster's pool itself, of the configured capacity, and what
is kept or evicted follows from the messages of instances by the simulator's rules. A pool belongs to all instances of its cluster.
"""

from __future__ import annotations

from collections.abc import Sequence

from repro.kvcache.pool import CacheSpec, HybridPool
from repro.scheduling.scheduler import CacheIndices
from repro.serving.live_request import LiveRequest

PD = "pd0"
PRFAAS = "prfaas0"


class ClusterCaches:
    """The pools of both clusters, without state; without a spec there are none, and nothing is cached."""

    def __init__(self, spec: CacheSpec | None, clusters: Sequence[str]) -> None:
        self._spec = spec
        self._pools = {name: HybridPool(spec) for name in clusters} if spec is not None else {}

    def indices(self) -> CacheIndices | None:
        """What the scheduler looks prefixes up in."""
        if self._spec is None:
            return None
        return CacheIndices(
            self._spec.block_tokens, [self._pools[PD]], [self._pools[PRFAAS]] if PRFAAS in self._pools else []
        )

    def prefilled(self, request: LiveRequest) -> None:
        """Its prefill has ended: the cluster where it was done keeps its prompt."""
        if (pool := self._pools.get(request.prefill.partition(".")[0])) is not None and request.chain is not None:
            pool.prefilled(request.chain, request.cached_tokens)

    def delivered(self, request: LiveRequest) -> None:
        """Its KVCache has crossed the link: the PD cluster has its prompt as well."""
        if (pool := self._pools.get(PD)) is not None and request.chain is not None:
            pool.received(request.chain)

    def copied(self, request: LiveRequest, target: str) -> None:
        """The prefix that it goes on from has crossed the link to that cluster."""
        if (pool := self._pools.get(target)) is not None and request.chain is not None:
            pool.received(request.chain[: request.cached_tokens // pool.spec.block_tokens])

    def finished(self, request: LiveRequest) -> None:
        """Its last token is out: what the PD cluster has of it includes the answer."""
        if (pool := self._pools.get(PD)) is not None and request.kept_chain:
            pool.insert(request.kept_chain, len(request.chain or ()))
