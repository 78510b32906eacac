"""What goes wrong in a run: instances that stop and come back, and transfers that a dead link holds up."""

from __future__ import annotations

from collections.abc import Sequence

from repro.errors import UserError
from repro.scheduling.observations import StalledTransfer
from repro.scheduling.scheduler import Pool, Scheduler
from repro.simulate.decode import DecodeStage
from repro.simulate.decode_memory import MemoryDecodeStage
from repro.simulate.dispatch import Dispatch
from repro.simulate.events import EventQueue
from repro.simulate.job import Job
from repro.simulate.link import Flow
from repro.simulate.prefill import ChunkedPrefill, WholePrefill
from repro.simulate.resources import PdResources, PrfaasResources
from repro.simulate.spec import Fault


class Faults:
    """Puts the faults of a spec into the event queue.

    Raises:
        UserError: for a fault of a cluster that does not exist.
    """

    def __init__(
        self,
        faults: Sequence[Fault],
        scheduler: Scheduler,
        pd_clusters: Sequence[PdResources],
        prfaas_clusters: Sequence[PrfaasResources],
        events: EventQueue,
        dispatch: Dispatch,
    ) -> None:
        self._scheduler = scheduler
        self._pd_clusters = pd_clusters
        self._prfaas_clusters = prfaas_clusters
        self._events = events
        self._again = dispatch.again
        for fault in faults:
            clusters = len(prfaas_clusters) if fault.pool == "prfaas" else len(pd_clusters)
            if fault.cluster >= clusters:
                raise UserError(f"faults.cluster: {fault.cluster} of {fault.pool} does not exist; there are {clusters}")
            events.at(fault.at_s, self._fail, fault)

    def _fail(self, now_s: float, fault: Fault) -> None:
        pool: Pool
        if fault.pool == "pd":
            pool = "pd_d" if fault.instance in self._pd_clusters[fault.cluster].decode.members else "pd_p"
        else:
            pool = fault.pool
        stage = self._stage(pool, fault.cluster)
        if fault.instance not in stage.members:
            return  # it has been converted, or is down already
        scheduler = self._scheduler
        scheduler.failed(pool, fault.cluster, fault.instance)
        lost = stage.fail(now_s, fault.instance)
        self._events.at(now_s + fault.for_s, self._repair, (pool, fault))
        if pool == "prfaas":
            gone = {job.id for job in lost}
            link = self._prfaas_clusters[fault.cluster].link
            for flow in link.flows():
                if isinstance(flow.payload, Job) and flow.payload.id in gone:
                    link.cancel(now_s, flow)
        for job in lost:
            self._again(now_s, job, scheduler.lost(now_s, job.input_tokens, job.pd.index, job.chain, job.offloaded))

    def _repair(self, now_s: float, failed: tuple[Pool, Fault]) -> None:
        pool, fault = failed
        self._scheduler.repaired(now_s, pool, fault.cluster, fault.instance)
        self._stage(pool, fault.cluster).open(now_s, fault.instance)

    def _stage(self, pool: Pool, cluster: int) -> WholePrefill | ChunkedPrefill | DecodeStage | MemoryDecodeStage:
        if pool == "prfaas":
            return self._prfaas_clusters[cluster].prefill
        pd = self._pd_clusters[cluster]
        return pd.prefill if pool == "pd_p" else pd.decode

    def give_up_stalled(self, now_s: float) -> None:
        """Offer the scheduler what a link that is down holds up, and prefill anew what it gives up."""
        for index in self._scheduler.overdue(now_s):
            link = self._prfaas_clusters[index].link
            flows = [flow for flow in link.flows() if _stalled(flow)]
            jobs: list[Job] = [flow.payload for flow in flows]
            stalled = [StalledTransfer(job.id, job.pd.index, job.input_tokens, job.chain) for job in jobs]
            decided = {transfer.id: decision for transfer, decision in self._scheduler.give_up(now_s, index, stalled)}
            for flow, job in zip(flows, jobs, strict=True):
                if job.id in decided:
                    link.cancel(now_s, flow)
                    self._again(now_s, job, decided[job.id])


def _stalled(flow: Flow) -> bool:
    """Whether a request waits for this flow alone: its prefill has ended, and this is the last of its transfers.

    A running prefill is left to end, for its transfer may yet find the link repaired; nobody waits for a copy between caches.
    """
    job = flow.payload
    return isinstance(job, Job) and job.offloaded and flow.draining and job.prefill_end_s >= 0 and job.parts <= 1
