"""The clusters of a run: PrfaaS clusters with their links, and PD clusters with what their scheduler has seen and decided."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from repro.kvcache.pool import HybridPool
from repro.scheduling.load import Costs, Recent
from repro.scheduling.placement import placement
from repro.scheduling.short_term import ShortTermState
from repro.scheduling.views import ClusterView, LinkView, SchedulerState
from repro.simulate.decode import DecodeStage, StepTimes
from repro.simulate.events import EventQueue
from repro.simulate.lifecycle import RequestLifecycle
from repro.simulate.link import SharedLink, SharedLinkSpec
from repro.simulate.prefill import ChunkedPrefill, WholePrefill
from repro.simulate.spec import PdCluster, PrfaasCluster, Profile, SimulationSpec


class Tables:
    """T_prefill and S_kv by whole tokens, read off the profile once: a list look-up per request instead of array arithmetic."""

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self.prefill = self.kv = np.empty(0)
        self.prefill_s: list[float] = []
        self.kv_bytes: list[float] = []

    def cover(self, tokens: int) -> None:
        """Reach to `tokens` at least."""
        if tokens >= len(self.prefill_s):
            every = np.arange(max(tokens + 1, 2 * len(self.prefill_s)))
            self.prefill = np.asarray(self._profile.prefill_s(every), dtype=np.float64)
            self.kv = np.asarray(self._profile.kv_bytes(every), dtype=np.float64)
            self.prefill_s, self.kv_bytes = self.prefill.tolist(), self.kv.tolist()


class PrfaasClusterState:
    """A PrfaaS cluster."""

    def __init__(
        self, index: int, spec: PrfaasCluster, run: SimulationSpec, events: EventQueue, lifecycle: RequestLifecycle
    ) -> None:
        self.index = index
        self.spec = spec
        self.tables = Tables(spec.profile)
        self.link = SharedLink(spec.link, events)
        back = SharedLinkSpec(
            spec.link.rate_bps, spec.link.rtt_s, spec.link.nic_bps, spec.link.connections, spec.link.connection_bps
        )
        self.ingress = SharedLink(back, events)
        self.half_rtt_s = spec.link.rtt_s / 2
        self.cache = HybridPool(run.cache) if run.cache else None
        self.down_since_s = math.inf
        place = placement(run.scheduler.placement)
        chunk = run.chunk_tokens
        self.prefill: WholePrefill | ChunkedPrefill
        if chunk is None:
            self.prefill = WholePrefill(
                events, place, lifecycle.remote_ended, lifecycle.remote_began, 1 / spec.link.pieces
            )
        else:
            self.prefill = ChunkedPrefill(
                events, place, lifecycle.remote_ended, chunk, _chunk_s(self.tables), lifecycle.remote_part
            )
        for instance in range(spec.instances):
            self.prefill.open(0.0, instance)


class PdClusterState:
    """A PD cluster, with its scheduler's state. `share` is the part of all arrivals that call it home."""

    def __init__(
        self,
        index: int,
        spec: PdCluster,
        share: float,
        run: SimulationSpec,
        events: EventQueue,
        lifecycle: RequestLifecycle,
        prfaas_clusters: Sequence[PrfaasClusterState],
    ) -> None:
        scheduler = run.scheduler
        self.index = index
        self.spec = spec
        self.share = share
        self.tables = Tables(spec.profile)
        place, chunk = placement(scheduler.placement), run.chunk_tokens
        self.prefill: WholePrefill | ChunkedPrefill
        if chunk is None:
            self.prefill = WholePrefill(events, place, lifecycle.local_ended)
        else:
            self.prefill = ChunkedPrefill(events, place, lifecycle.local_ended, chunk, _chunk_s(self.tables))
        steps = StepTimes(spec.profile.decode_step_s, spec.profile.batch_max)
        self.decode = DecodeStage(events, steps, spec.profile.batch_max, lifecycle.finished)
        for instance in range(spec.n_p + spec.n_d):
            (self.prefill if instance < spec.n_p else self.decode).open(0.0, instance)
        self.cache = HybridPool(run.cache) if run.cache else None
        # What the controllers have seen and decided.
        self.state = ShortTermState(scheduler.threshold_tokens)
        self.recent = Recent(scheduler.short_term.window_requests)
        self.costs = _costs(self.tables, prfaas_clusters[0].tables if prfaas_clusters else self.tables)
        self.converting = 0
        self.arrived = 0
        self.rate_per_s = math.nan
        self.slow_rate_per_s = math.nan
        self.slow_capacity_bps = math.nan
        self.measured_s = 0.0
        self.sample_at_s = 0.0
        self.finished = 0
        self.finished_tokens = 0
        batch = spec.profile.batch_max
        context = 0.0 if not steps.grows else batch * 32_768.0
        self.tokens_per_s = batch / (steps.step_s[batch] + steps.slope_s[batch] * context)
        instances = sum(prfaas.spec.instances for prfaas in prfaas_clusters)
        self.situation = SchedulerState(
            scheduler.threshold_tokens, False, ClusterView(spec.n_p), ClusterView(round(instances * share)), LinkView()
        )


def _chunk_s(tables: Tables) -> Callable[[int, int], float]:
    def seconds(done: int, tokens: int) -> float:
        return tables.prefill_s[done + tokens] - tables.prefill_s[done]

    return seconds


def _costs(local: Tables, remote: Tables) -> Costs:
    """What requests of a PD cluster cost, read off the tables as they are when asked."""
    return Costs(
        lambda tokens: remote.prefill[tokens],
        lambda tokens: local.prefill[tokens],
        lambda tokens: remote.kv[tokens],
    )
