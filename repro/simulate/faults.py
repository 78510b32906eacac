"""What goes wrong in a run: instances that stop and come back, and transfers that a dead link holds up."""

from __future__ import annotations

import math
from collections.abc import Sequence

from repro.errors import UserError
from repro.scheduling.views import Route
from repro.simulate.clusters import PdClusterState, PrfaasClusterState
from repro.simulate.decode import DecodeStage
from repro.simulate.dispatch import Dispatch
from repro.simulate.events import EventQueue
from repro.simulate.job import Job
from repro.simulate.prefill import ChunkedPrefill, WholePrefill
from repro.simulate.spec import Fault


class Faults:
    """Puts the faults of a spec into the event queue.

    Raises:
        UserError: for a fault of a cluster that does not exist.
    """

    def __init__(
        self,
        faults: Sequence[Fault],
        pd_clusters: Sequence[PdClusterState],
        prfaas_clusters: Sequence[PrfaasClusterState],
        events: EventQueue,
        dispatch: Dispatch,
    ) -> None:
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
        place = self._prfaas_clusters[fault.cluster] if fault.pool == "prfaas" else self._pd_clusters[fault.cluster]
        stage = self._pd_clusters[fault.cluster].decode if fault.pool == "pd_d" else place.prefill
        if fault.instance not in stage.members:
            return  # it has been converted, or is down already
        lost = stage.fail(now_s, fault.instance)
        self._events.at(now_s + fault.for_s, self._repair, (stage, fault.instance))
        if fault.pool == "prfaas":
            gone = {job.id for job in lost}
            link = self._prfaas_clusters[fault.cluster].link
            for flow in link.flows():
                if isinstance(flow.payload, Job) and flow.payload.id in gone:
                    link.cancel(now_s, flow)
        for job in lost:
            self._again(now_s, job, Route(job.offloaded))

    def _repair(self, now_s: float, repaired: tuple[WholePrefill | ChunkedPrefill | DecodeStage, int]) -> None:
        stage, instance = repaired
        stage.open(now_s, instance)

    def give_up_stalled(self, now_s: float, after_s: float) -> None:
        """Prefill anew, in the PD cluster, what a link that has been down for `after_s` holds up, where that is sooner."""
        for prfaas in self._prfaas_clusters:
            if prfaas.link.capacity > 0:
                prfaas.down_since_s = math.inf
                continue
            prfaas.down_since_s = min(prfaas.down_since_s, now_s)
            if now_s - prfaas.down_since_s < after_s:
                continue
            for flow in prfaas.link.flows():
                job = flow.payload
                if not isinstance(job, Job):
                    continue  # a copy between caches, for which nobody waits
                # A running prefill is left to end: its transfer may yet find the link repaired.
                running = not flow.draining or job.prefill_end_s < 0 or job.parts > 1
                if running or not job.offloaded or not job.pd.prefill.serving:
                    continue
                # An outage is expected to last as long as it has lasted: worse than prefilling anew only if that is done sooner. What
                # is stalled is late already, so it takes idle instances only; in a queue it would make others late as well.
                anew_s = job.pd.tables.prefill_s[job.input_tokens]
                idle = job.pd.prefill.predicted_wait_s(now_s) <= 0
                if idle and anew_s < now_s - prfaas.down_since_s:
                    prfaas.link.cancel(now_s, flow)
                    self._again(now_s, job, Route(False))
