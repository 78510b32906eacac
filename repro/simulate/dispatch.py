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
from repro.simulate.books import FAILED, Books
from repro.simulate.clusters import Home, Site
from repro.simulate.events import Agenda
from repro.simulate.job import NOT_YET, Job
from repro.simulate.spec import SchedulerSpec
from repro.workload.stream import Chains, Turn


class Dispatch:
    """The router's desk of a run. `asked(job)`, if wanted, is told where a request with a known prefix goes."""

    def __init__(
        self,
        scheduler: SchedulerSpec,
        homes: Sequence[Home],
        sites: Sequence[Site],
        agenda: Agenda,
        books: Books,
        asked: Callable[[Job], None] | None = None,
    ) -> None:
        self._homes = homes
        self._sites = sites
        self._agenda = agenda
        self._books = books
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
        home: Home | None = None,
    ) -> None:
        """A new request, the `turn` that follows its answer, and the home of the conversation if it has one."""
        books = self._books
        number = books.arrived
        books.arrived = number + 1
        homes = self._homes
        if home is None:
            home = homes[0] if len(homes) == 1 else self._home_of(number)
        job = Job(number, now_s, tokens, output, home)
        if turn is not None:
            job.turn = turn
        books.live[number] = job
        home.arrived += 1
        if chains is None or home.cache is None:
            request = RequestView(number, tokens)
            home.recent.append(tokens)
        else:
            request = self._match(job, home, chains)
        self.dispatch(now_s, job, self._route(request, home.situation))

    def go_on(self, now_s: float, job: Job) -> None:
        """The next turn of a conversation, at its own home; none begins after the stream has ended."""
        turn = job.turn
        if turn is not None and self._books.arriving:
            self.arrive(now_s, turn.input_tokens, turn.output_tokens, turn.chains, turn.then, job.home)

    def _home_of(self, number: int) -> Home:
        draw = splitmix64(number) / 2.0**64
        for home in self._homes:
            draw -= home.share
            if draw < 0:
                return home
        return self._homes[-1]

    def _match(self, job: Job, home: Home, chains: Chains) -> RequestView:
        assert home.cache is not None
        block = home.cache.spec.block_tokens
        # One token at least is computed, or there is nothing to decode from.
        usable = chains[0][: (job.input_tokens - 1) // block]
        job.chain, job.kept_chain = usable, chains[1]
        local = home.cache.match_tokens(usable)
        remote = max((site.cache.match_tokens(usable) for site in self._sites if site.cache), default=0)
        home.recent.append(job.input_tokens - (local if home.situation.bandwidth_scarce else max(local, remote)))
        return RequestView(job.id, job.input_tokens, local, remote)

    def dispatch(self, now_s: float, job: Job, route: Route) -> None:
        """Carry out a decision, as far as there is still somebody to carry it out."""
        home: Home = job.home
        offload, cached, fetch = route
        site = self._site_for(now_s) if self._sites and (offload or fetch) else None
        if offload and site is None:
            offload, cached, fetch = False, 0, False
        elif not offload and not home.prefill.serving and self._sites:
            offload, cached, fetch = True, 0, False
            site = self._site_for(now_s)
        job.offloaded = offload
        job.cached_tokens = cached
        job.work_tokens = work = job.input_tokens - cached
        if offload:
            assert site is not None
            job.site = site
            job.work_s = site.tables.prefill_s[work]
            job.kv_bytes = site.tables.kv_bytes[job.input_tokens]
            if job.chain is not None and home.cache is not None:
                # Attention blocks that the PD cluster holds already need not travel; fixed-size state always does.
                held = home.cache.attention_blocks(job.chain) * home.cache.spec.block_tokens
                job.kv_bytes -= site.tables.kv_bytes[held] - site.tables.kv_bytes[0]
            stage = site.prefill
        else:
            job.site = site if fetch else None
            job.work_s = home.tables.prefill_s[work]
            job.kv_bytes = home.tables.kv_bytes[job.input_tokens]
            stage = home.prefill
        if self._asked is not None:
            self._asked(job)
        if self._limit_s < math.inf and not admitted(stage.predicted_wait_s(now_s) + job.work_s, self._limit_s):
            self._books.refuse(job)
        elif fetch:
            self._fetch(now_s, job, site, cached)
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
        place: Site | Home = job.site if job.offloaded else job.home
        try:
            place.prefill.assign(now_s, job)
        except LookupError:
            other = job.home.prefill if job.offloaded else (self._sites[0].prefill if self._sites else None)
            if other is None or not other.serving:
                self._books.record(job, FAILED)
                return
            job.fell_back = True
            self.dispatch(now_s, job, Route(not job.offloaded))

    def _site_for(self, now_s: float) -> Site | None:
        sites = self._sites
        if len(sites) == 1:
            return sites[0] if sites[0].prefill.serving else None
        able = [site for site in sites if site.prefill.serving and site.link.capacity > 0]
        return min(able, key=lambda site: (site.prefill.predicted_wait_s(now_s), site.index)) if able else None

    def _fetch(self, now_s: float, job: Job, site: Site | None, cached: int) -> None:
        """Bring the longer prefix over the link before prefill."""
        assert site is not None
        assert site.cache is not None
        assert job.chain is not None
        target = site.cache if job.offloaded else job.home.cache
        held = target.attention_blocks(job.chain) * target.spec.block_tokens
        kv = site.tables.kv_bytes
        size = kv[cached] - (kv[held] - kv[0]) if held < cached else kv[0]
        link = site.ingress if job.offloaded else site.link
        job.flow = link.send(now_s, -1 - job.home.index, max(size, 1.0), self._fetched, job)

    def _fetched(self, now_s: float, job: Job) -> None:
        job.flow = None
        self._agenda.at(now_s + job.site.half_rtt_s, self._prefix_there, job)

    def _prefix_there(self, now_s: float, job: Job) -> None:
        target = job.site.cache if job.offloaded else job.home.cache
        blocks = job.cached_tokens // target.spec.block_tokens
        # One state has crossed, that at the end: no checkpoint inside the prefix appears.
        target.insert((job.chain or ())[:blocks], blocks)
        self._assign(now_s, job)
