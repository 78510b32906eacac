"""A run: requests arrive, are routed, prefilled, sent, decoded and recorded, while controllers watch and things fail.

This module only connects. Who goes where is decided by `repro.scheduling` (the code that the live router runs), how long things take by the
profiles, and how resources are shared by the stages and the link. Nothing depends on wall time or on anything drawn here, so a
spec and a stream of requests give the same rows on every run.
"""

from __future__ import annotations

import gc
import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from repro.kvcache.pool import HybridPool
from repro.kvcache.tiers import TieredPool, made
from repro.scheduling.scheduler import CacheIndices, Scheduler
from repro.scheduling.views import Sample
from repro.simulate.control import Control
from repro.simulate.dispatch import Dispatch
from repro.simulate.events import EventQueue
from repro.simulate.faults import Faults
from repro.simulate.ledger import RequestLedger
from repro.simulate.lifecycle import RequestLifecycle
from repro.simulate.rebalance import Rebalancing
from repro.simulate.records import Sink
from repro.simulate.resources import PdResources, PrfaasResources
from repro.simulate.spec import SimulationSpec
from repro.workload.stream import RequestBatch


@dataclass(frozen=True)
class Summary:
    """How a run ended. `overloaded`: it was cut because more requests than the limit were in the system.

    `egress_bytes` is all that left PrfaaS clusters, `cluster_egress_bytes` what left each of them; `copied_bytes` what rebalancing sent,
    either way, in `copies`; `conversions` is how many nodes left their role; `preemptions` how often a request had to leave a decode
    batch for want of memory.
    """

    arrived: int
    completed: int
    refused: int
    unfinished: int
    overloaded: bool
    last_arrival_s: float
    last_finish_s: float
    peak_in_system: int
    egress_bytes: float
    samples: tuple[Sample, ...]
    copies: int = 0
    copied_bytes: float = 0.0
    conversions: int = 0
    preemptions: int = 0
    cluster_egress_bytes: tuple[float, ...] = ()


class Simulation:
    """One run of a spec; `run` may be called once."""

    def __init__(self, spec: SimulationSpec, sink: Sink) -> None:
        self.spec = spec
        self.events = events = EventQueue()
        self._ledger = ledger = RequestLedger(sink)
        pd_pools = [made(spec.cache) if spec.cache else None for _ in spec.pd]
        prfaas_pools = [made(spec.cache) if spec.cache else None for _ in spec.prfaas]
        self.scheduler = scheduler = Scheduler(
            spec.scheduler, spec.pd, spec.prfaas, _indices(spec, pd_pools, prfaas_pools)
        )
        lifecycle = RequestLifecycle(events, ledger, spec.chunk_tokens is None)
        self.prfaas_clusters = [
            PrfaasResources(
                cluster,
                state,
                pool,
                spec,
                events,
                lifecycle.remote_began,
                lifecycle.remote_part,
                lifecycle.remote_ended,
            )
            for cluster, state, pool in zip(spec.prfaas, scheduler.prfaas, prfaas_pools, strict=True)
        ]
        self.pd_clusters = [
            PdResources(cluster, state, pool, spec, events, lifecycle.local_ended, lifecycle.finished)
            for cluster, state, pool in zip(spec.pd, scheduler.pd, pd_pools, strict=True)
        ]
        clusters = self.pd_clusters, self.prfaas_clusters
        for prfaas in self.prfaas_clusters:
            prfaas.link.changed = partial(scheduler.link_changed, prfaas.index)
        self.rebalancing = (
            Rebalancing(scheduler, *clusters, events, ledger) if spec.scheduler.rebalance.enabled else None
        )
        self._dispatch = Dispatch(scheduler, *clusters, events, ledger)
        lifecycle.go_on = self._dispatch.go_on
        faults = Faults(spec.faults, scheduler, *clusters, events, self._dispatch)
        self._control = Control(scheduler, *clusters, events, ledger, faults.give_up_stalled)

    def run(self, batches: Iterable[RequestBatch]) -> Summary:
        """Play all requests of the stream, whose arrivals must not go back in time, and then what is still under way."""
        # A run makes no reference cycles, and a collector that keeps looking for some costs a fifth of it.
        collecting = gc.isenabled()
        gc.disable()
        try:
            return self._run(batches)
        finally:
            if collecting:
                gc.enable()

    def _run(self, batches: Iterable[RequestBatch]) -> Summary:
        heap, pop = self.events.heap, heapq.heappop
        ledger, arrive = self._ledger, self._dispatch.arrive
        now = 0.0
        limit, overloaded = self.spec.limit_requests, False
        live = ledger.live
        for batch in batches:
            batch.check(after_s=now)
            self.scheduler.cover(batch.longest_tokens())
            chains, turns = batch.chains, batch.turns
            homes = [self.pd_clusters[home] for home in batch.homes.tolist()] if batch.homes is not None else None
            for i, (arrival_s, tokens, output) in enumerate(
                zip(batch.arrival_s.tolist(), batch.input_tokens.tolist(), batch.output_tokens.tolist(), strict=True)
            ):
                while heap and heap[0][0] <= arrival_s:
                    now, _, handler, argument = pop(heap)
                    handler(now, argument)
                now = arrival_s
                chain, turn = chains[i] if chains else None, turns[i] if turns else None
                arrive(now, tokens, output, chain, turn, homes[i] if homes else None)
            if len(live) > limit:
                overloaded = True
                break
        last_arrival_s = now
        ledger.arriving = False
        horizon_s = last_arrival_s + (0.0 if overloaded else self.spec.drain_s)
        while heap and heap[0][0] <= horizon_s and live:
            now, _, handler, argument = pop(heap)
            handler(now, argument)
        unfinished = ledger.close()
        egress_bytes = tuple([prfaas.link.settle(now) for prfaas in self.prfaas_clusters])
        return Summary(
            arrived=ledger.arrived,
            completed=ledger.completed,
            refused=ledger.refused,
            unfinished=unfinished,
            overloaded=overloaded,
            last_arrival_s=last_arrival_s,
            last_finish_s=ledger.last_finish_s,
            peak_in_system=ledger.peak,
            egress_bytes=sum(egress_bytes, 0.0),
            samples=tuple(self._control.samples),
            copies=self.rebalancing.copies if self.rebalancing else 0,
            copied_bytes=self.rebalancing.copied_bytes if self.rebalancing else 0.0,
            conversions=self._control.conversions,
            preemptions=sum(pd.decode.preemptions for pd in self.pd_clusters),
            cluster_egress_bytes=egress_bytes,
        )


def _indices(
    spec: SimulationSpec, pd: Sequence[HybridPool | None], prfaas: Sequence[HybridPool | None]
) -> CacheIndices | None:
    """The pools themselves tell the scheduler what they hold, and what loading it takes."""
    if spec.cache is None:
        return None
    block_tokens = spec.cache.block_tokens
    pools = {f"pd{i}": pool for i, pool in enumerate(pd)} | {f"prfaas{i}": pool for i, pool in enumerate(prfaas)}

    def load_s(cluster: str, chain: Sequence[int], tokens: int) -> float:
        pool = pools[cluster]
        return pool.load_s(chain, tokens // block_tokens) if isinstance(pool, TieredPool) else 0.0

    return CacheIndices(
        block_tokens,
        [pool for pool in pd if pool is not None],
        [pool for pool in prfaas if pool is not None],
        load_s=load_s if spec.cache.lower else None,
    )
