"""The life of a request once it has an instance: prefill, its KVCache over the link, decode, the last token (Figure 1 of the paper).

Each method is what one stage calls when it is done with a job; none decides anything.
"""

from __future__ import annotations

from collections.abc import Callable

from repro.simulate.events import EventQueue
from repro.simulate.job import Job
from repro.simulate.ledger import RequestLedger
from repro.simulate.resources import PdResources, PrfaasResources


class RequestLifecycle:
    """Hands jobs from stage to stage. `whole`: prefill is not cut into chunks, so its transfer is one overlapped flow.

    `go_on(now, job)` is called when the turn that follows a job is due.
    """

    def __init__(self, events: EventQueue, ledger: RequestLedger, whole: bool) -> None:
        self.go_on: Callable[[float, Job], None] | None = None
        self._events = events
        self._ledger = ledger
        self._whole = whole
        self._on_sent = self._sent
        self._on_delivered = self._delivered

    def remote_began(self, now_s: float, job: Job) -> None:
        """The first piece of an offloaded prefill exists; what is said a second time changes nothing."""
        if job.flow is not None:
            return
        prfaas: PrfaasResources = job.prfaas
        job.flow = prfaas.link.produce(
            now_s, job.prefill_worker, job.kv_bytes, job.kv_bytes / job.work_s, self._on_sent, job
        )

    def remote_ended(self, now_s: float, job: Job) -> None:
        """An offloaded prefill has ended; what is unsent drains."""
        prfaas: PrfaasResources = job.prfaas
        if prfaas.cache is not None and job.chain is not None:
            prfaas.cache.prefilled(job.chain, job.cached_tokens)
        if self._whole:
            prfaas.link.drain(now_s, job.flow)
        elif not job.parts:
            self._sent(now_s, job)

    def remote_part(self, now_s: float, job: Job, done: int, tokens: int) -> None:
        """A chunk of an offloaded prefill has ended; its KVCache goes at once, the fixed-size state with the last chunk."""
        kv = job.prfaas.state.tables.kv_bytes
        size = kv[done + tokens] - kv[done]
        if done + tokens >= job.work_tokens:
            size = max(job.kv_bytes - (kv[done] - kv[0]), 1.0)
        job.parts += 1
        job.flow = job.prfaas.link.send(now_s, job.prefill_worker, max(size, 1.0), self._part_sent, job)

    def _part_sent(self, now_s: float, job: Job) -> None:
        job.parts -= 1
        if not job.parts and job.prefill_end_s >= 0:
            self._sent(now_s, job)

    def _sent(self, now_s: float, job: Job) -> None:
        prfaas: PrfaasResources = job.prfaas
        job.flow = None
        self._events.at(now_s + prfaas.half_rtt_s, self._on_delivered, job)

    def _delivered(self, now_s: float, job: Job) -> None:
        pd: PdResources = job.pd
        job.delivered_s = now_s
        if pd.cache is not None and job.chain is not None:
            pd.cache.received(job.chain)
        pd.decode.ready(now_s, job)

    def local_ended(self, now_s: float, job: Job) -> None:
        """A prefill in the PD cluster has ended; its RDMA is no bottleneck (equation 4)."""
        pd: PdResources = job.pd
        if pd.cache is not None and job.chain is not None:
            pd.cache.prefilled(job.chain, job.cached_tokens)
        job.delivered_s = now_s
        pd.decode.ready(now_s, job)

    def finished(self, now_s: float, job: Job) -> None:
        """The last token is out."""
        pd: PdResources = job.pd
        pd.finished += 1
        pd.finished_tokens += job.output_tokens
        if job.kept_chain and pd.cache is not None:
            pd.cache.insert(job.kept_chain, len(job.chain or ()))
        if job.turn is not None and self.go_on is not None:
            self._events.at(now_s + job.turn.after_s, self.go_on, job)
        self._ledger.finish(now_s, job)
