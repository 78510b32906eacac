"""A run: requests arrive, are routed, prefilled, sent, decoded and recorded, while controllers watch and things fail.

This module only connects. Who goes where is decided by `repro.scheduling` (the code that the live router runs), how long things take by the
profiles, and how resources are shared by the stages and the link. Nothing depends on wall time or on anything drawn here, so a
spec and a stream of requests give the same rows on every run.
"""

from __future__ import annotations

import gc
import heapq
from collections.abc import Iterable
from dataclasses import dataclass

from repro.errors import UserError
from repro.simulate.clusters import PdClusterState, PrfaasClusterState
from repro.simulate.control import Control, Sample
from repro.simulate.dispatch import Dispatch
from repro.simulate.events import EventQueue
from repro.simulate.faults import Faults
from repro.simulate.ledger import RequestLedger
from repro.simulate.lifecycle import RequestLifecycle
from repro.simulate.rebalance import Rebalancing
from repro.simulate.records import Sink
from repro.simulate.spec import SimulationSpec
from repro.workload.stream import RequestBatch


@dataclass(frozen=True)
class Summary:
    """How a run ended. `overloaded`: it was cut because more requests than the limit were in the system.

    `egress_bytes` is all that left PrfaaS clusters; `copied_bytes` what rebalancing sent, either way, in `copies`.
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


class Simulation:
    """One run of a spec; `run` may be called once."""

    def __init__(self, spec: SimulationSpec, sink: Sink) -> None:
        self.spec = spec
        self.events = events = EventQueue()
        self._ledger = ledger = RequestLedger(sink)
        lifecycle = RequestLifecycle(events, ledger, spec.chunk_tokens is None)
        shares = sum(pd.share for pd in spec.pd)
        self.prfaas_clusters = prfaas_clusters = [
            PrfaasClusterState(i, prfaas, spec, events, lifecycle) for i, prfaas in enumerate(spec.prfaas)
        ]
        self.pd_clusters = pd_clusters = [
            PdClusterState(i, pd, pd.share / shares, spec, events, lifecycle, prfaas_clusters)
            for i, pd in enumerate(spec.pd)
        ]
        rebalance = spec.scheduler.rebalance
        self.rebalancing = (
            Rebalancing(rebalance, pd_clusters, prfaas_clusters, events, ledger) if rebalance.enabled else None
        )
        asked = self.rebalancing.asked if self.rebalancing else None
        self._dispatch = Dispatch(spec.scheduler, pd_clusters, prfaas_clusters, events, ledger, asked)
        lifecycle.go_on = self._dispatch.go_on
        faults = Faults(spec.faults, pd_clusters, prfaas_clusters, events, self._dispatch)
        self._control = Control(spec.scheduler, pd_clusters, prfaas_clusters, events, ledger, faults.give_up_stalled)

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
            self._cover(batch.longest_tokens())
            chains, turns = batch.chains, batch.turns
            for i, (arrival_s, tokens, output) in enumerate(
                zip(batch.arrival_s.tolist(), batch.input_tokens.tolist(), batch.output_tokens.tolist(), strict=True)
            ):
                while heap and heap[0][0] <= arrival_s:
                    now, _, handler, argument = pop(heap)
                    handler(now, argument)
                if arrival_s < now:
                    raise UserError(
                        f"workload: request {ledger.arrived} arrives at {arrival_s} s, before the one before it"
                    )
                now = arrival_s
                arrive(now, tokens, output, chains[i] if chains else None, turns[i] if turns else None)
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
        return Summary(
            arrived=ledger.arrived,
            completed=ledger.completed,
            refused=ledger.refused,
            unfinished=unfinished,
            overloaded=overloaded,
            last_arrival_s=last_arrival_s,
            last_finish_s=ledger.last_finish_s,
            peak_in_system=ledger.peak,
            egress_bytes=sum((prfaas.link.settle(now) for prfaas in self.prfaas_clusters), 0.0),
            samples=tuple(self._control.samples),
            copies=self.rebalancing.copies if self.rebalancing else 0,
            copied_bytes=self.rebalancing.copied_bytes if self.rebalancing else 0.0,
        )

    def _cover(self, tokens: int) -> None:
        for tables in [pd.tables for pd in self.pd_clusters] + [prfaas.tables for prfaas in self.prfaas_clusters]:
            tables.cover(tokens)
