"""The path of a request once it has an instance: prefill, its KVCache over the link, decode, the last token (Figure 1 of the paper).

Each method is what one stage calls when it is done with a job; none decides anything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from repro.kvcache.pool import HybridPool
from repro.simulate.books import Books
from repro.simulate.events import Agenda
from repro.simulate.job import Job

if TYPE_CHECKING:
    from repro.simulate.clusters import Home, Site


class Path:
    """Hands jobs from stage to stage. `whole`: prefill is not cut into chunks, so its transfer is one overlapped flow.

    `go_on(now, job)` is called when the turn that follows a job is due.
    """

    def __init__(self, agenda: Agenda, books: Books, whole: bool) -> None:
        self.go_on: Callable[[float, Job], None] | None = None
        self._agenda = agenda
        self._books = books
        self._whole = whole

    def remote_began(self, now_s: float, job: Job) -> None:
        """The first piece of an offloaded prefill exists."""
        site: Site = job.site
        job.flow = site.link.produce(
            now_s, job.prefill_worker, job.kv_bytes, job.kv_bytes / job.work_s, self._sent, job
        )

    def remote_ended(self, now_s: float, job: Job) -> None:
        """An offloaded prefill has ended; what is unsent drains."""
        site: Site = job.site
        if site.cache is not None and job.chain is not None:
            _keep(site.cache, job)
        if self._whole:
            site.link.drain(now_s, job.flow)
        elif not job.parts:
            self._sent(now_s, job)

    def remote_part(self, now_s: float, job: Job, done: int, tokens: int) -> None:
        """A chunk of an offloaded prefill has ended; its KVCache goes at once, the fixed-size state with the last chunk."""
        kv = job.site.tables.kv_bytes
        size = kv[done + tokens] - kv[done]
        if done + tokens >= job.work_tokens:
            size = max(job.kv_bytes - (kv[done] - kv[0]), 1.0)
        job.parts += 1
        job.flow = job.site.link.send(now_s, job.prefill_worker, max(size, 1.0), self._part_sent, job)

    def _part_sent(self, now_s: float, job: Job) -> None:
        job.parts -= 1
        if not job.parts and job.prefill_end_s >= 0:
            self._sent(now_s, job)

    def _sent(self, now_s: float, job: Job) -> None:
        site: Site = job.site
        job.flow = None
        self._agenda.at(now_s + site.half_rtt_s, self._delivered, job)

    def _delivered(self, now_s: float, job: Job) -> None:
        home: Home = job.home
        job.delivered_s = now_s
        if home.cache is not None and job.chain is not None:
            # One state has crossed, that at the end: no checkpoint inside the prompt appears.
            home.cache.insert(job.chain, len(job.chain))
        home.decode.ready(now_s, job)

    def local_ended(self, now_s: float, job: Job) -> None:
        """A prefill in the PD cluster has ended; its RDMA is no bottleneck (equation 4)."""
        home: Home = job.home
        if home.cache is not None and job.chain is not None:
            _keep(home.cache, job)
        job.delivered_s = now_s
        home.decode.ready(now_s, job)

    def finished(self, now_s: float, job: Job) -> None:
        """The last token is out."""
        home: Home = job.home
        home.finished += 1
        home.finished_tokens += job.output_tokens
        if job.kept_chain and home.cache is not None:
            home.cache.insert(job.kept_chain, len(job.chain or ()))
        if job.turn is not None and self.go_on is not None:
            self._agenda.at(now_s + job.turn.after_s, self.go_on, job)
        self._books.finish(now_s, job)


def _keep(cache: HybridPool, job: Job) -> None:
    blocks = job.cached_tokens // cache.spec.block_tokens
    cache.touch(job.chain or (), blocks)
    cache.insert(job.chain or (), blocks)
