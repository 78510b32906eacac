"""The clusters of a run as resources: PrfaaS instances with their links, PD instances, and each cluster's prefix cache.

What the scheduler knows of the same clusters is its own (`repro.scheduling.clusters`); here is what really happens in them.
"""

from __future__ import annotations

from collections.abc import Callable

from repro.kvcache.pool import HybridPool
from repro.scheduling.clusters import PdClusterState, PrfaasClusterState
from repro.scheduling.tables import CostTables, StepTimes
from repro.simulate.colocated import ColocatedStage
from repro.simulate.decode import DecodeStage
from repro.simulate.decode_memory import MemoryDecodeStage
from repro.simulate.events import EventQueue
from repro.simulate.job import Job
from repro.simulate.link_spec import SharedLinkSpec
from repro.simulate.prefill import ChunkedPrefill, OnJob, WholePrefill
from repro.simulate.spec import PdCluster, PrfaasCluster, SimulationSpec
from repro.simulate.windowed_link import made


class PrfaasResources:
    """A PrfaaS cluster. `began`, `part` and `ended` are called at a job's first piece, at the end of each chunk, and at its end."""

    def __init__(
        self,
        spec: PrfaasCluster,
        state: PrfaasClusterState,
        cache: HybridPool | None,
        run: SimulationSpec,
        events: EventQueue,
        began: OnJob,
        part: Callable[[float, Job, int, int], None],
        ended: OnJob,
    ) -> None:
        self.index = state.index
        self.name = state.name
        self.spec = spec
        self.state = state
        self.link = made(spec.link, events)
        back = SharedLinkSpec(
            spec.link.rate_bps, spec.link.rtt_s, spec.link.nic_bps, spec.link.connections, spec.link.connection_bps,
            window=spec.link.window,
        )  # fmt: skip
        self.ingress = made(back, events)
        self.half_rtt_s = spec.link.rtt_s / 2
        self.cache = cache
        self.prefill: WholePrefill | ChunkedPrefill
        if run.chunk_tokens is None:
            self.prefill = WholePrefill(events, ended, began, 1 / spec.link.pieces)
        else:
            self.prefill = ChunkedPrefill(events, ended, run.chunk_tokens, _chunk_s(state.tables), part)
        for instance in range(spec.instances):
            self.prefill.open(0.0, instance)


class PdResources:
    """A PD cluster. `prefilled` and `finished` are called at the end of a job's prefill and at its last token."""

    def __init__(
        self,
        spec: PdCluster,
        state: PdClusterState,
        cache: HybridPool | None,
        run: SimulationSpec,
        events: EventQueue,
        prefilled: OnJob,
        finished: OnJob,
    ) -> None:
        self.index = state.index
        self.name = state.name
        self.spec = spec
        self.state = state
        self.prefill: WholePrefill | ChunkedPrefill | ColocatedStage
        self.decode: DecodeStage | MemoryDecodeStage
        steps = StepTimes(spec.profile.decode_step_s, spec.profile.batch_max)
        most, chunk = spec.profile.batch_max, spec.colocated_chunk_tokens
        if chunk is not None:
            both = ColocatedStage(events, steps, most, finished, prefilled, chunk, _chunk_s(state.tables))
            self.prefill = self.decode = both
        else:
            if run.chunk_tokens is None:
                self.prefill = WholePrefill(events, prefilled)
            else:
                self.prefill = ChunkedPrefill(events, prefilled, run.chunk_tokens, _chunk_s(state.tables))
            if spec.decode_memory_bytes is None:
                self.decode = DecodeStage(events, steps, most, finished)
            else:
                tables = CostTables(spec.profile)
                self.decode = MemoryDecodeStage(events, steps, most, finished, tables, spec.decode_memory_bytes)
        for instance in range(spec.n_p + (spec.n_d if chunk is None else 0)):
            (self.prefill if instance < spec.n_p else self.decode).open(0.0, instance)
        self.cache = cache
        self.finished = 0
        self.finished_tokens = 0


def _chunk_s(tables: CostTables) -> Callable[[int, int], float]:
    def seconds(done: int, tokens: int) -> float:
        return tables.prefill_s[done + tokens] - tables.prefill_s[done]

    return seconds
