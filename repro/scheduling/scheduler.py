"""The scheduler of a deployment (§3.4.3): told what happens and what is measured, it says what to do. It has no clock and does no I/O.

The simulator and the live router drive this one object and add nothing of their own to its decisions; time comes as an argument, and the
same calls in the same order give the same decisions. One scheduler serves all PD clusters and PrfaaS clusters of a deployment.

| call | when | the simulator has it from | a live router has it from |
|---|---|---|---|
| `arrive` | a request comes | the stream of requests | the API's socket |
| `fetched` | a prefix has crossed the link | the link's event | the transport's completion |
| `lost` | its prefill or transfer is lost | a fault of the spec | a worker's or connection's end |
| `failed`, `repaired` | an instance stops, serves again | a fault of the spec | heartbeats |
| `report` | a worker says what it has to do | (its account is exact) | the worker's messages |
| `link_changed` | a link stops or carries again | the link's schedule | the transport's progress |
| `short_term` | every `short_term.period_s` | `LinkReport`: the simulated link's counters | `LinkReport`: the sender's estimate |
| `overdue`, `give_up` | after `short_term`, with `fallback_s` | the link's flows | transfers without progress |
| `long_term` | every `slow_period_s` | `PdReport`: queues, batches, finished requests | `PdReport`: the workers' messages |
| `converted` | a node serves its new role | `restart_s` after it has drained | the worker's message |
| `rebalance` | every `rebalance.period_s` | what the links could have carried | the sender's estimate |
| prefix indices | on every match | the pools themselves | pools of its own, or `Replica`s that instances' messages update |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from repro.scheduling import loops
from repro.scheduling.admission import admitted
from repro.scheduling.clusters import PdClusterState, PdPlan, PrefillState, PrfaasClusterState, PrfaasPlan
from repro.scheduling.decisions import Conversion, Decision
from repro.scheduling.kvcache_manager import KVCacheManager, Move, PrefixIndex
from repro.scheduling.observations import InstanceReport, LinkReport, PdReport, StalledTransfer
from repro.scheduling.policies import splitmix64
from repro.scheduling.spec import SchedulerSpec
from repro.scheduling.views import LOCAL, RequestView, Route, SchedulerState

#: A phase's instances in a cluster: PrfaaS, or a PD cluster's prefill or decode.
Pool = Literal["prfaas", "pd_p", "pd_d"]


class CacheIndices(NamedTuple):
    """What says which prefixes each cluster holds, in the clusters' order, by blocks of so many tokens.

    Where caches have several tiers, `load_s(cluster, chain, tokens)` is what loading a prefix takes an instance. None: nothing.

    Where instances have caches of their own, `holder(cluster, chain)` is the one that serves most of a chain, to which the request then
    goes. None there: a cache belongs to its whole cluster.
    """

    block_tokens: int
    pd: Sequence[PrefixIndex]
    prfaas: Sequence[PrefixIndex]
    load_s: Callable[[str, Sequence[int], int], float] | None = None
    holder: Callable[[str, Sequence[int]], int | None] | None = None


class Scheduler:
    """Routing, admission, placement, both loops, fallback and the KVCache manager of one deployment.

    `pd` and `prfaas` are the clusters' states, for whoever shows them; nobody else changes them. `caches` is null without prefix caches.
    """

    def __init__(
        self,
        spec: SchedulerSpec,
        pd: Sequence[PdPlan],
        prfaas: Sequence[PrfaasPlan] = (),
        indices: CacheIndices | None = None,
    ) -> None:
        self.spec = spec
        shares = sum(plan.share for plan in pd)
        self.prfaas = [PrfaasClusterState(i, plan, spec) for i, plan in enumerate(prfaas)]
        self.pd = [PdClusterState(i, plan, plan.share / shares, spec, self.prfaas) for i, plan in enumerate(pd)]
        self.caches = self._manager(indices, (prfaas[0] if prfaas else pd[0])) if indices else None
        self._load_s = indices.load_s if indices else None
        self._holder = indices.holder if indices else None
        self._route = spec.router.route
        self._limit_s = spec.admission.limit_s
        self._limited = self._limit_s < math.inf
        self._covered = -1
        self._unused_bytes = 0.0

    def _manager(self, indices: CacheIndices, plan: PdPlan | PrfaasPlan) -> KVCacheManager:
        pd = {state.name: index for state, index in zip(self.pd, indices.pd, strict=True)}
        remote = {state.name: index for state, index in zip(self.prfaas, indices.prfaas, strict=True)}
        block, profile = indices.block_tokens, plan.profile
        return KVCacheManager(
            pd | remote,
            block,
            lambda blocks: float(profile.kv_bytes(blocks * block)),
            linked=lambda source, target: (source in remote) != (target in remote),
        )

    # Requests.

    def cover(self, tokens: int) -> None:
        """Be ready for prompts of so many tokens; longer ones are priced when they come."""
        for pd in self.pd:
            pd.tables.cover(tokens)
        for prfaas in self.prfaas:
            prfaas.tables.cover(tokens)
        self._covered = tokens

    def home_of(self, number: int) -> int:
        """The PD cluster that a request without a conversation calls home, by the clusters' shares and a hash of its number."""
        draw = splitmix64(number) / 2.0**64
        for pd in self.pd:
            draw -= pd.share
            if draw < 0:
                return pd.index
        return len(self.pd) - 1

    def arrive(
        self, now_s: float, number: int, tokens: int, pd: int = 0, chain: Sequence[int] | None = None
    ) -> Decision:
        """Where a new request of `tokens` goes; `chain` is what a cache could serve of its prompt (`KVCacheManager.usable`)."""
        if tokens > self._covered:
            self.cover(tokens)
        home = self.pd[pd]
        home.arrived += 1
        caches = self.caches
        if chain is None or caches is None:
            home.recent.append(tokens)
            request = tuple.__new__(RequestView, (number, tokens, 0, 0))
        else:
            own, elsewhere = caches.match_tokens(home.name, chain)
            home.recent.append(tokens - (own if home.state.bandwidth_scarce else max(own, elsewhere)))
            request = RequestView(number, tokens, own, elsewhere)
        return self._dispatch(now_s, home, tokens, chain, self._route(request, home.state), False)

    def fetched(self, now_s: float, tokens: int, pd: int, chain: Sequence[int] | None, decision: Decision) -> Decision:
        """What follows a `fetch`, once the prefix is in the cluster's cache: an instance, as far as there still is one."""
        state: PrefillState = self.prfaas[decision.prfaas] if decision.offload else self.pd[pd]
        try:
            instance = self._instance(now_s, state, decision.work_s, chain)
            return decision._replace(action="prefill", instance=instance)
        except LookupError:
            return self._elsewhere(now_s, self.pd[pd], tokens, chain, decision)

    def lost(self, now_s: float, tokens: int, pd: int, chain: Sequence[int] | None, offload: bool) -> Decision:
        """Prefill a request anew that a failed instance held, on the same side and without its cached prefix."""
        return self._dispatch(now_s, self.pd[pd], tokens, chain, Route(offload), True)

    def _dispatch(
        self,
        now_s: float,
        home: PdClusterState,
        tokens: int,
        chain: Sequence[int] | None,
        route: Route,
        fell_back: bool,
        last: bool = False,
    ) -> Decision:
        """A route made good: which cluster and instance, at what cost, as far as there is anybody; `last`: there is no other way."""
        offload, cached, fetch = route
        remote: PrfaasClusterState | None = None
        if offload or fetch:
            remote = self._soonest(now_s, tokens)
            if remote is None:
                # Nobody prefills there, nor is there a link for what it holds: what the PD cluster holds itself has to do.
                cached = 0 if offload or chain is None else self._own_tokens(home, chain)
                offload = fetch = False
        if not offload and not home.placement.free_at_s:
            remote = self._soonest(now_s, tokens)
            if remote is not None:
                offload, cached, fetch = True, 0, False
        state: PrefillState = home if not offload or remote is None else remote
        index = remote.index if remote is not None else -1
        tables = state.tables
        work_s = tables.prefill_s[tokens - cached]
        kv_bytes = tables.kv_bytes[tokens]
        if chain is not None and self.caches is not None:
            if cached and not fetch:
                work_s += self.load_s(state.name, chain, cached)
            if offload:
                # Attention blocks that the PD cluster holds already need not travel; fixed-size state always does.
                kv_bytes -= tables.kv_bytes[self.caches.attention_tokens(home.name, chain)] - tables.kv_bytes[0]
            if chain and self.spec.rebalance.enabled:
                self.caches.asked(home.name, chain)
                if offload:
                    self.caches.asked(state.name, chain)
        if self._limited and not admitted(state.predicted_wait_s(now_s) + work_s, self._limit_s):
            return Decision("refuse", offload, index, -1, cached, work_s, kv_bytes, 0.0, fell_back)
        if fetch and remote is not None:
            fetch_bytes = self._fetch_bytes(remote, state, chain or (), cached)
            return Decision("fetch", offload, index, -1, cached, work_s, kv_bytes, fetch_bytes, fell_back)
        try:
            own = self._holder is not None and cached
            instance = self._instance(now_s, state, work_s, chain) if own else state.placement.take(now_s, work_s)
        except LookupError:
            nobody = Decision("fail", offload, index, -1, cached, work_s, kv_bytes, 0.0, fell_back)
            return nobody if last else self._elsewhere(now_s, home, tokens, chain, nobody)
        if offload and len(self.prfaas) > 1:
            self.prfaas[index].given(now_s, kv_bytes)
        # What a NamedTuple's own constructor does, at half its price: this is the one made for every request.
        return tuple.__new__(Decision, ("prefill", offload, index, instance, cached, work_s, kv_bytes, 0.0, fell_back))

    def _instance(self, now_s: float, state: PrefillState, work_s: float, chain: Sequence[int] | None) -> int:
        """For a request with a cached prefix: the instance that holds it, where instances have caches of their own."""
        placement = state.placement
        if self._holder is not None and chain is not None:
            holder = self._holder(state.name, chain)
            if holder is not None and holder in placement.free_at_s:
                placement.add(holder, max(placement.free_at_s[holder], now_s) + work_s)
                return holder
        return placement.take(now_s, work_s)

    def _elsewhere(
        self, now_s: float, home: PdClusterState, tokens: int, chain: Sequence[int] | None, decision: Decision
    ) -> Decision:
        """The other side, if anybody prefills there, when nobody does any more where a request was to go."""
        there = home.serving if decision.offload else sum([cluster.serving for cluster in self.prfaas])
        if not there:
            return decision._replace(action="fail", instance=-1)
        return self._dispatch(now_s, home, tokens, chain, Route(not decision.offload), True, last=True)

    def _soonest(self, now_s: float, tokens: int) -> PrfaasClusterState | None:
        """The PrfaaS cluster from which the KVCache would be here first, by its instances, its link and its distance; of equals the first.

        Among several, one with a link that carries.
        """
        clusters = self.prfaas
        if len(clusters) == 1:
            only = clusters[0]
            return only if only.placement.free_at_s else None
        able = [cluster for cluster in clusters if cluster.serving and cluster.link_up]
        return min(able, key=lambda cluster: (cluster.delivers_s(now_s, tokens), cluster.index)) if able else None

    def load_s(self, cluster: str, chain: Sequence[int], tokens: int) -> float:
        """What it takes an instance of `cluster` to load that much of a cached prefix from the tiers that hold it."""
        return self._load_s(cluster, chain, tokens) if self._load_s is not None else 0.0

    def _own_tokens(self, home: PdClusterState, chain: Sequence[int]) -> int:
        assert self.caches is not None
        return self.caches.match_tokens(home.name, chain)[0]

    def _fetch_bytes(
        self, remote: PrfaasClusterState, target: PrefillState, chain: Sequence[int], cached: int
    ) -> float:
        """What crosses for a prefix of `cached` tokens: attention blocks that the target lacks, and the fixed-size state."""
        assert self.caches is not None
        held, kv = self.caches.attention_tokens(target.name, chain), remote.tables.kv_bytes
        return max(kv[cached] - (kv[held] - kv[0]) if held < cached else kv[0], 1.0)

    # Instances and links.

    def report(self, cluster: str, reports: Sequence[InstanceReport]) -> None:
        """Replace what is believed of prefill instances of `cluster` ("pd0", "prfaas0", …) by what they say of themselves."""
        for state in (*self.pd, *self.prfaas):
            if state.name == cluster:
                for one in reports:
                    if one.busy_until_s is not None:
                        state.placement.correct(one.instance, one.busy_until_s)

    def failed(self, pool: Pool, cluster: int, instance: int) -> None:
        """An instance gets no more work; what it held comes back through `lost`. A conversion that it was part of ends with it."""
        if pool == "prfaas":
            self.prfaas[cluster].placement.remove(instance)
            return
        pd = self.pd[cluster]
        pd.placement.remove(instance)
        pd.decoding.discard(instance)
        pd.conversions = [conversion for conversion in pd.conversions if conversion.instance != instance]

    def repaired(self, now_s: float, pool: Pool, cluster: int, instance: int) -> None:
        """An instance serves in that pool again."""
        if pool == "pd_d":
            self.pd[cluster].decoding.add(instance)
        else:
            state: PrefillState = self.prfaas[cluster] if pool == "prfaas" else self.pd[cluster]
            state.placement.add(instance, now_s)

    def link_changed(self, prfaas: int, up: bool) -> None:
        """A link carries nothing any more, or does again."""
        self.prfaas[prfaas].link_up = up

    # The loops.

    @property
    def watches(self) -> bool:
        """Whether `short_term` is to be called at all."""
        spec = self.spec
        return spec.short_term.enabled or spec.slow_period_s is not None or spec.fallback_s is not None

    def short_term(self, now_s: float, pd: int, links: Sequence[LinkReport]) -> SchedulerState:
        """The fast loop of a PD cluster: measure, move the threshold, and let routing see both."""
        home, reports = self.pd[pd], self._estimated(now_s, links)
        if len(self.prfaas) > 1:
            for cluster in self.prfaas:
                cluster.told(now_s, reports[cluster.index])
        seen = loops.observe(now_s, self.spec, home, self.prfaas, reports)
        loops.move_threshold(self.spec, home, seen)
        return home.state

    def long_term(self, now_s: float, pd: int, links: Sequence[LinkReport], report: PdReport) -> Conversion | None:
        """The slow loop of a PD cluster: which node changes its role, if any; none while nothing has finished.

        The paper's rule moves one node at a time; the adaptive one sends the next while others are on their way. A timetable is
        followed as it is written.
        """
        home = self.pd[pd]
        if self.spec.timetable:
            return loops.follow(now_s, self.spec, home, report)
        if self.spec.adaptive.enabled:
            seen = loops.observe(now_s, self.spec, home, self.prfaas, self._estimated(now_s, links))
            return loops.adapt(now_s, self.spec, home, seen, report)
        if home.conversions or not report.finished or math.isnan(home.slow_capacity_bps):
            return None
        return loops.move_node(self.spec, home, loops.observe(now_s, self.spec, home, self.prfaas, links), report)

    def _estimated(self, now_s: float, links: Sequence[LinkReport]) -> Sequence[LinkReport]:
        """For adaptive policies, the links' rates as what crossed shows them; the paper's rules take what is reported."""
        if not self.spec.adaptive.enabled:
            return links
        return [cluster.link_estimate.seen(now_s, links[cluster.index]) for cluster in self.prfaas]

    def converted(self, now_s: float, conversion: Conversion) -> None:
        """The node serves its new role."""
        home = self.pd[conversion.pd]
        home.conversions = [other for other in home.conversions if other.instance != conversion.instance]
        home.history.came(now_s, conversion.instance, conversion.to)
        if conversion.to == "prefill":
            home.placement.add(conversion.instance, now_s)
        else:
            home.decoding.add(conversion.instance)

    def overdue(self, now_s: float) -> list[int]:
        """PrfaaS clusters whose link has been down for `fallback_s`: their transfers may be given up. To be asked with every beat."""
        found = []
        for cluster in self.prfaas:
            if cluster.link_up:
                cluster.down_since_s = math.inf
                continue
            cluster.down_since_s = min(cluster.down_since_s, now_s)
            if self.spec.fallback_s is not None and now_s - cluster.down_since_s >= self.spec.fallback_s:
                found.append(cluster.index)
        return found

    def give_up(
        self, now_s: float, prfaas: int, stalled: Sequence[StalledTransfer]
    ) -> list[tuple[StalledTransfer, Decision]]:
        """Transfers to give up and prefill anew in the PD cluster, where that is sooner, each with its new decision.

        An outage is expected to last as long as it has lasted: worse than prefilling anew only if that is done sooner. What is stalled is
        late already, so it takes idle instances only; in a queue it would make others late as well.
        """
        down_s = now_s - self.prfaas[prfaas].down_since_s
        given_up = []
        for transfer in stalled:
            home = self.pd[transfer.pd]
            anew_s = home.tables.prefill_s[transfer.input_tokens]
            if home.serving and home.predicted_wait_s(now_s) <= 0 and anew_s < down_s:
                decision = self._dispatch(now_s, home, transfer.input_tokens, transfer.chain, LOCAL, True)
                given_up.append((transfer, decision))
        return given_up

    def rebalance(self, unused_bytes: float) -> list[Move]:
        """Copies worth making with a part of what the links left unused; `unused_bytes` counts from the start, over all egress links."""
        before, self._unused_bytes = self._unused_bytes, unused_bytes
        spec = self.spec.rebalance
        if self.caches is None:
            return []
        return self.caches.rebalance(spec.link_share * (unused_bytes - before), spec.at_least_blocks)
