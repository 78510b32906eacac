"""From arrival to an instance: what caches hold of a prompt, the router's decision, admission, and a prefix that crosses first.

The decision is `repro.scheduling`'s, the code that the live router runs; here it meets what can be known only at the time, such as that
a cluster has no instance left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from repro.scheduling.admission import admitted
from repro.scheduling.policies import splitmix64
from repro.scheduling.views import RequestView, Route
from repro.simulate.clusters import PdClusterState, PrfaasClusterState
from repro.simulate.events import EventQueue
from repro.simulate.job import NOT_YET, Job
from repro.simulate.ledger import FAILED, RequestLedger
from repro.simulate.spec import SchedulerSpec
from repro.workload.stream import Chains, Turn


class Dispatch:
    """The router's desk of a run. `asked(job)`, if wanted, is told where a request with a known prefix goes."""

    def __init__(
        self,
        scheduler: SchedulerSpec,
        pd_clusters: Sequence[PdClusterState],
        prfaas_clusters: Sequence[PrfaasClusterState],
        events: EventQueue,
        ledger: RequestLedger,
        asked: Callable[[Job], None] | None = None,
    ) -> None:
        self._pd_clusters = pd_clusters
        self._prfaas_clusters = prfaas_clusters
        self._events = events
        self._ledger = ledger
        self._route = scheduler.router.route
        self._limit_s = scheduler.admission.limit_s
        self._asked = asked

    def arrive(
        self,
        now_s: float,
        tokens: int,
        output: int,
        chains: Chains | None,
        turn: Turn | None = None,
        pd: PdClusterState | None = None,
    ) -> None:
        """A new request, the `turn` that follows its answer, and the PD cluster of the conversation if it has one."""
        ledger = self._ledger
        number = ledger.arrived
        ledger.arrived = number + 1
        pd_clusters = self._pd_clusters
        if pd is None:
            pd = pd_clusters[0] if len(pd_clusters) == 1 else self._pd_of(number)
        job = Job(number, now_s, tokens, output, pd)
        if turn is not None:
            job.turn = turn
        ledger.live[number] = job
        pd.arrived += 1
        if chains is None or pd.cache is None:
            request = RequestView(number, tokens)
            pd.recent.append(tokens)
        else:
            request = self._match(job, pd, chains)
        self.dispatch(now_s, job, self._route(request, pd.situation))

    def go_on(self, now_s: float, job: Job) -> None:
        """The next turn of a conversation, at its own PD cluster; none begins after the stream has ended."""
        turn = job.turn
        if turn is not None and self._ledger.arriving:
            self.arrive(now_s, turn.input_tokens, turn.output_tokens, turn.chains, turn.then, job.pd)

    def _pd_of(self, number: int) -> PdClusterState:
        draw = splitmix64(number) / 2.0**64
        for pd in self._pd_clusters:
            draw -= pd.share
            if draw < 0:
                return pd
        return self._pd_clusters[-1]

    def _match(self, job: Job, pd: PdClusterState, chains: Chains) -> RequestView:
        assert pd.cache is not None
        block = pd.cache.spec.block_tokens
        # One token at least is computed, or there is nothing to decode from.
        usable = chains[0][: (job.input_tokens - 1) // block]
        job.chain, job.kept_chain = usable, chains[1]
        local = pd.cache.match_tokens(usable)
        remote = max((prfaas.cache.match_tokens(usable) for prfaas in self._prfaas_clusters if prfaas.cache), default=0)
        pd.recent.append(job.input_tokens - (local if pd.situation.bandwidth_scarce else max(local, remote)))
        return RequestView(job.id, job.input_tokens, local, remote)

    def dispatch(self, now_s: float, job: Job, route: Route) -> None:
        """Carry out a decision, as far as there is still somebody to carry it out."""
        pd: PdClusterState = job.pd
        offload, cached, fetch = route
        prfaas = self._prfaas_for(now_s) if self._prfaas_clusters and (offload or fetch) else None
        if offload and prfaas is None:
            offload, cached, fetch = False, 0, False
        elif not offload and not pd.prefill.serving and self._prfaas_clusters:
            offload, cached, fetch = True, 0, False
            prfaas = self._prfaas_for(now_s)
        job.offloaded = offload
        job.cached_tokens = cached
        job.work_tokens = work = job.input_tokens - cached
        if offload:
            assert prfaas is not None
            job.prfaas = prfaas
            job.work_s = prfaas.tables.prefill_s[work]
            job.kv_bytes = prfaas.tables.kv_bytes[job.input_tokens]
            if job.chain is not None and pd.cache is not None:
                # Attention blocks that the PD cluster holds already need not travel; fixed-size state always does.
                held = pd.cache.attention_blocks(job.chain) * pd.cache.spec.block_tokens
                job.kv_bytes -= prfaas.tables.kv_bytes[held] - prfaas.tables.kv_bytes[0]
            stage = prfaas.prefill
        else:
            job.prfaas = prfaas if fetch else None
            job.work_s = pd.tables.prefill_s[work]
            job.kv_bytes = pd.tables.kv_bytes[job.input_tokens]
            stage = pd.prefill
        if self._asked is not None:
            self._asked(job)
        if self._limit_s < math.inf and not admitted(stage.predicted_wait_s(now_s) + job.work_s, self._limit_s):
            self._ledger.refuse(job)
        elif fetch:
            self._fetch(now_s, job, prfaas, cached)
        else:
            self._assign(now_s, job)

    def again(self, now_s: float, job: Job, route: Route) -> None:
        """Prefill a request anew whose prefill or transfer was lost."""
        job.flow = None
        job.fell_back = True
        job.parts = 0
        job.prefill_end_s = NOT_YET
        self.dispatch(now_s, job, route)

    def _assign(self, now_s: float, job: Job) -> None:
        place: PrfaasClusterState | PdClusterState = job.prfaas if job.offloaded else job.pd
        try:
            place.prefill.assign(now_s, job)
        except LookupError:
            other = (
                job.pd.prefill
                if job.offloaded
                else (self._prfaas_clusters[0].prefill if self._prfaas_clusters else None)
            )
            if other is None or not other.serving:
                self._ledger.record(job, FAILED)
                return
            job.fell_back = True
            self.dispatch(now_s, job, Route(not job.offloaded))

    def _prfaas_for(self, now_s: float) -> PrfaasClusterState | None:
        prfaas_clusters = self._prfaas_clusters
        if len(prfaas_clusters) == 1:
            return prfaas_clusters[0] if prfaas_clusters[0].prefill.serving else None
        able = [prfaas for prfaas in prfaas_clusters if prfaas.prefill.serving and prfaas.link.capacity > 0]
        return min(able, key=lambda prfaas: (prfaas.prefill.predicted_wait_s(now_s), prfaas.index)) if able else None

    def _fetch(self, now_s: float, job: Job, prfaas: PrfaasClusterState | None, cached: int) -> None:
        """Bring the longer prefix over the link before prefill."""
        assert prfaas is not None
        assert prfaas.cache is not None
        assert job.chain is not None
        target = prfaas.cache if job.offloaded else job.pd.cache
        held = target.attention_blocks(job.chain) * target.spec.block_tokens
        kv = prfaas.tables.kv_bytes
        size = kv[cached] - (kv[held] - kv[0]) if held < cached else kv[0]
        link = prfaas.ingress if job.offloaded else prfaas.link
        job.flow = link.send(now_s, -1 - job.pd.index, max(size, 1.0), self._fetched, job)

    def _fetched(self, now_s: float, job: Job) -> None:
        job.flow = None
        self._events.at(now_s + job.prfaas.half_rtt_s, self._prefix_there, job)

    def _prefix_there(self, now_s: float, job: Job) -> None:
        target = job.prfaas.cache if job.offloaded else job.pd.cache
        blocks = job.cached_tokens // target.spec.block_tokens
        # One state has crossed, that at the end: no checkpoint inside the prefix appears.
        target.insert((job.chain or ())[:blocks], blocks)
        self._assign(now_s, job)
