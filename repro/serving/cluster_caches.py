"""What a live router knows of the clusters' prefix caches (§3.2), so that it can route by what is cached (§3.4.3).

Where phases are replayed there is no state to look for: the router keeps each cluster's pool itself, of the configured capacity, and what
is kept or evicted follows from the messages of instances by the simulator's rules. A pool belongs to all instances of its cluster.

Instances that compute have state, each in a pool of its own. What came into it and what was evicted they say themselves, and a request goes
to the instance that serves most of its prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

from repro.kvcache.pool import CacheSpec, HybridPool
from repro.scheduling.kvcache_manager import Replica
from repro.scheduling.scheduler import CacheIndices
from repro.serving.live_request import LiveRequest
from repro.serving.messages import Cached, named

PD = "pd0"
PRFAAS = "prfaas0"


class Caches:
    """What the router is told of caches, and what it asks of them. This base is the case without any."""

    def indices(self) -> CacheIndices | None:
        """What the scheduler looks prefixes up in; None where nothing is cached."""
        return None

    def holder(self, cluster: str, chain: Sequence[int]) -> int | None:  # noqa: ARG002
        """The instance that serves most of a chain; None where a cache belongs to its whole cluster."""
        return None

    def prefilled(self, request: LiveRequest) -> None:
        """Its prefill has ended, and the cluster where it was done keeps its prompt."""

    def delivered(self, request: LiveRequest) -> None:
        """Its KVCache has crossed the link to the PD cluster."""

    def copied(self, request: LiveRequest, target: str) -> None:
        """The prefix that it goes on from has crossed the link to that cluster."""

    def finished(self, request: LiveRequest) -> None:
        """Its last token is out."""

    def heard(self, name: str, said: Cached) -> None:
        """An instance has said what its own cache serves."""

    def ended(self, name: str) -> None:
        """An instance has ended, and with it what it had."""


class ClusterCaches(Caches):
    """The pools of both clusters, without state."""

    def __init__(self, spec: CacheSpec, clusters: Sequence[str]) -> None:
        self._spec = spec
        self._pools = {name: HybridPool(spec) for name in clusters}

    def indices(self) -> CacheIndices:
        """Both clusters' pools."""
        return CacheIndices(
            self._spec.block_tokens, [self._pools[PD]], [self._pools[PRFAAS]] if PRFAAS in self._pools else []
        )

    def prefilled(self, request: LiveRequest) -> None:
        """The prompt goes into the pool of the cluster that prefilled it."""
        if request.chain is not None:
            self._pools[request.prefill.partition(".")[0]].prefilled(request.chain, request.cached_tokens)

    def delivered(self, request: LiveRequest) -> None:
        """The prompt is in the PD cluster's pool as well."""
        if request.chain is not None:
            self._pools[PD].received(request.chain)

    def copied(self, request: LiveRequest, target: str) -> None:
        """The prefix is in that cluster's pool as well."""
        if request.chain is not None:
            self._pools[target].received(request.chain[: request.cached_tokens // self._spec.block_tokens])

    def finished(self, request: LiveRequest) -> None:
        """The PD cluster keeps the answer with the prompt."""
        if request.kept_chain:
            self._pools[PD].insert(request.kept_chain, len(request.chain or ()))


class _Instances:
    """A cluster's instances as one index: it serves what the one serves that serves most."""

    def __init__(self, needs_checkpoint: bool) -> None:
        self._needs_checkpoint = needs_checkpoint
        self.replicas: dict[int, Replica] = {}

    def of(self, instance: int) -> Replica:
        return self.replicas.setdefault(instance, Replica(self._needs_checkpoint))

    def holder(self, chain: Sequence[int]) -> int | None:
        return max(self.replicas, key=lambda one: (self.replicas[one].match_blocks(chain), -one), default=None)

    def match_blocks(self, chain: Sequence[int]) -> int:
        return max((one.match_blocks(chain) for one in self.replicas.values()), default=0)

    def attention_blocks(self, chain: Sequence[int]) -> int:  # noqa: ARG002
        """None: the instance that decodes keeps nothing, so all of a request's KVCache is sent to it."""
        return 0


class InstanceCaches(Caches):
    """The caches of single instances, by what they say of themselves."""

    def __init__(self, block_tokens: int, needs_checkpoint: bool, clusters: Sequence[str]) -> None:
        self._block_tokens = block_tokens
        self._clusters = {name: _Instances(needs_checkpoint) for name in clusters}

    def indices(self) -> CacheIndices:
        """Each cluster as the best of its instances."""
        prfaas = [self._clusters[PRFAAS]] if PRFAAS in self._clusters else []
        return CacheIndices(self._block_tokens, [self._clusters[PD]], prfaas, holder=self.holder)

    def holder(self, cluster: str, chain: Sequence[int]) -> int | None:
        """Of equals, the first instance."""
        return self._clusters[cluster].holder(chain)

    def heard(self, name: str, said: Cached) -> None:
        """Bring the instance's replica up to date."""
        cluster, _, index = name.partition(".")
        self._clusters[cluster].of(int(index)).apply(
            *(
                list(map(named, keys))
                for keys in (said.added, said.removed, said.added_checkpoints, said.removed_checkpoints)
            )
        )

    def ended(self, name: str) -> None:
        """Forget the instance's replica."""
        cluster, _, index = name.partition(".")
        self._clusters[cluster].replicas.pop(int(index), None)
