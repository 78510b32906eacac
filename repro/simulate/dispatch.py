"""From arrival to an instance: asks the scheduler where a request goes, and carries out what it decides."""

from __future__ import annotations

from collections.abc import Sequence

from repro.scheduling.decisions import Decision
from repro.scheduling.scheduler import Scheduler
from repro.simulate.events import EventQueue
from repro.simulate.job import NOT_YET, Job
from repro.simulate.ledger import FAILED, RequestLedger
from repro.simulate.resources import PdResources, PrfaasResources
from repro.workload.stream import Chains, Turn


class Dispatch:
    """Hands arrivals to the scheduler, and jobs to the stages that it names."""

    def __init__(
        self,
        scheduler: Scheduler,
        pd_clusters: Sequence[PdResources],
        prfaas_clusters: Sequence[PrfaasResources],
        events: EventQueue,
        ledger: RequestLedger,
    ) -> None:
        self._scheduler = scheduler
        self._pd_clusters = pd_clusters
        self._prfaas_clusters = prfaas_clusters
        self._events = events
        self._ledger = ledger

    def arrive(
        self,
        now_s: float,
        tokens: int,
        output: int,
        chains: Chains | None,
        turn: Turn | None = None,
        pd: PdResources | None = None,
    ) -> None:
        """A new request, the `turn` that follows its answer, and the PD cluster of the conversation if it has one."""
        ledger, scheduler = self._ledger, self._scheduler
        number = ledger.arrived
        ledger.arrived = number + 1
        if pd is None:
            clusters = self._pd_clusters
            pd = clusters[0] if len(clusters) == 1 else clusters[scheduler.home_of(number)]
        job = Job(number, now_s, tokens, output, pd)
        if turn is not None:
            job.turn = turn
        ledger.live[number] = job
        if chains is not None and scheduler.caches is not None:
            job.chain, job.kept_chain = scheduler.caches.usable(chains[0], tokens), chains[1]
        self.carry_out(now_s, job, scheduler.arrive(now_s, number, tokens, pd.index, job.chain))

    def go_on(self, now_s: float, job: Job) -> None:
        """The next turn of a conversation, at its own PD cluster; none begins after the stream has ended."""
        turn = job.turn
        if turn is not None and self._ledger.arriving:
            self.arrive(now_s, turn.input_tokens, turn.output_tokens, turn.chains, turn.then, job.pd)

    def carry_out(self, now_s: float, job: Job, decision: Decision) -> None:
        """Do with a job what the scheduler has decided."""
        action, offload, prfaas, instance, job.cached_tokens, job.work_s, job.kv_bytes, _, fell_back = decision
        job.offloaded = offload
        job.prfaas = self._prfaas_clusters[prfaas] if prfaas >= 0 else None
        if fell_back:
            job.fell_back = True
        if instance >= 0:
            (job.prfaas if offload else job.pd).prefill.assign(now_s, job, instance)
        elif action == "fetch":
            # The prefix that is elsewhere comes over the link before prefill, from whichever tier holds it there.
            job.decision = decision
            source = job.pd.name if offload else job.prfaas.name
            load_s = self._scheduler.load_s(source, job.chain or (), job.cached_tokens)
            if load_s > 0:
                self._events.at(now_s + load_s, self._send_prefix, job)
            else:
                self._send_prefix(now_s, job)
        elif action == "refuse":
            self._ledger.refuse(job)
        else:
            self._ledger.record(job, FAILED)

    def again(self, now_s: float, job: Job, decision: Decision) -> None:
        """Prefill a request anew whose prefill or transfer was lost."""
        job.flow = None
        job.parts = 0
        job.prefill_end_s = NOT_YET
        self.carry_out(now_s, job, decision)

    def _send_prefix(self, now_s: float, job: Job) -> None:
        link = job.prfaas.ingress if job.offloaded else job.prfaas.link
        job.flow = link.send(now_s, -1 - job.pd.index, job.decision.fetch_bytes, self._fetched, job)

    def _fetched(self, now_s: float, job: Job) -> None:
        job.flow = None
        self._events.at(now_s + job.prfaas.half_rtt_s, self._prefix_there, job)

    def _prefix_there(self, now_s: float, job: Job) -> None:
        target = job.prfaas.cache if job.offloaded else job.pd.cache
        blocks = job.cached_tokens // target.spec.block_tokens
        target.received((job.chain or ())[:blocks])
        self.carry_out(
            now_s,
            job,
            self._scheduler.fetched(now_s, job.input_tokens, job.pd.index, job.chain, job.decision),
        )
