"""A run: requests arrive, are routed, prefilled, sent, decoded and recorded, while controllers watch and things fail.

This module only connects. Who goes where is decided by `repro.scheduling` (the code that the live router runs), how long things take by the
profiles, and how resources are shared by the stages and the link. Nothing depends on wall time or on anything drawn here, so a
spec and a stream of requests give the same rows on every run.
"""

from __future__ import annotations

import gc
import heapq
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from repro.errors import UserError
from repro.kvcache.directory import Directory
from repro.kvcache.pool import HybridPool
from repro.scheduling import long_term, short_term
from repro.scheduling.admission import admitted
from repro.scheduling.load import Costs, Recent
from repro.scheduling.long_term import DecodeView
from repro.scheduling.placement import placement
from repro.scheduling.policies import splitmix64
from repro.scheduling.short_term import Observation, ShortTermState
from repro.scheduling.views import ClusterView, LinkView, RequestView, Route, Situation
from repro.simulate.decode import DecodeStage, StepTimes
from repro.simulate.events import Agenda
from repro.simulate.job import NOT_YET, Job
from repro.simulate.link import SharedLink, SharedLinkSpec
from repro.simulate.prefill import ChunkedPrefill, WholePrefill
from repro.simulate.records import Row, Sink
from repro.simulate.spec import Fault, PdCluster, PrfaasCluster, Profile, SimulationSpec
from repro.workload.stream import Chunk

_BATCH = 1 << 15
_SAMPLES = 20_000
_OK, _FAILED, _TIMED_OUT, _FELL_BACK = range(4)


class Sample(NamedTuple):
    """One reading of a home's controllers, for figures."""

    at_s: float
    home: int
    threshold_tokens: float
    bandwidth_scarce: bool
    n_p: int
    n_d: int
    utilisation: float
    waiting_prfaas_s: float
    waiting_pd_s: float
    waiting_decode: int


@dataclass(frozen=True)
class Summary:
    """How a run ended. `overloaded`: it was cut because more requests than the limit were in the system."""

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


class _Tables:
    """T_prefill and S_kv by whole tokens, read off the profile once: a list look-up per request instead of array arithmetic."""

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self.prefill = self.kv = np.empty(0)
        self.prefill_s: list[float] = []
        self.kv_bytes: list[float] = []

    def cover(self, tokens: int) -> None:
        if tokens >= len(self.prefill_s):
            every = np.arange(max(tokens + 1, 2 * len(self.prefill_s)))
            self.prefill = np.asarray(self._profile.prefill_s(every), dtype=np.float64)
            self.kv = np.asarray(self._profile.kv_bytes(every), dtype=np.float64)
            self.prefill_s, self.kv_bytes = self.prefill.tolist(), self.kv.tolist()


class _Site:
    """A PrfaaS cluster at run time."""

    def __init__(self, run: Simulation, index: int, spec: PrfaasCluster) -> None:
        self.index = index
        self.spec = spec
        self.tables = _Tables(spec.profile)
        self.link = SharedLink(spec.link, run.agenda)
        back = SharedLinkSpec(
            spec.link.rate_bps, spec.link.rtt_s, spec.link.nic_bps, spec.link.connections, spec.link.connection_bps
        )
        self.ingress = SharedLink(back, run.agenda)
        self.half_rtt_s = spec.link.rtt_s / 2
        self.cache = HybridPool(run.spec.cache) if run.spec.cache else None
        self.down_since_s = math.inf
        place = placement(run.spec.scheduler.placement)
        chunk = run.spec.chunk_tokens
        self.prefill: WholePrefill | ChunkedPrefill
        if chunk is None:
            self.prefill = WholePrefill(run.agenda, place, run.remote_ended, run.remote_began, 1 / spec.link.pieces)
        else:
            self.prefill = ChunkedPrefill(
                run.agenda, place, run.remote_ended, chunk, _chunk_s(self.tables), run.remote_part
            )
        for instance in range(spec.instances):
            self.prefill.open(0.0, instance)


class _Home:
    """A PD cluster at run time, with its scheduler's state."""

    def __init__(self, run: Simulation, index: int, spec: PdCluster, share: float) -> None:
        scheduler = run.spec.scheduler
        self.index = index
        self.spec = spec
        self.share = share
        self.tables = _Tables(spec.profile)
        place, chunk = placement(scheduler.placement), run.spec.chunk_tokens
        self.prefill: WholePrefill | ChunkedPrefill
        if chunk is None:
            self.prefill = WholePrefill(run.agenda, place, run.local_ended)
        else:
            self.prefill = ChunkedPrefill(run.agenda, place, run.local_ended, chunk, _chunk_s(self.tables))
        steps = StepTimes(spec.profile.decode_step_s, spec.profile.batch_max)
        self.decode = DecodeStage(run.agenda, steps, spec.profile.batch_max, run.finished)
        for instance in range(spec.n_p + spec.n_d):
            (self.prefill if instance < spec.n_p else self.decode).open(0.0, instance)
        self.cache = HybridPool(run.spec.cache) if run.spec.cache else None
        self.state = ShortTermState(scheduler.threshold_tokens)
        self.recent = Recent(scheduler.short_term.window_requests)
        self.costs = run.costs(self)
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
        sites = sum(site.spec.instances for site in run.sites)
        self.situation = Situation(
            scheduler.threshold_tokens, False, ClusterView(spec.n_p), ClusterView(round(sites * share)), LinkView()
        )


def _ewma(before: float, value: float, elapsed_s: float, memory_s: float) -> float:
    return value if math.isnan(before) else before + (1 - math.exp(-elapsed_s / memory_s)) * (value - before)


def _chunk_s(tables: _Tables) -> Callable[[int, int], float]:
    def seconds(done: int, tokens: int) -> float:
        return tables.prefill_s[done + tokens] - tables.prefill_s[done]

    return seconds


class Simulation:
    """One run of a spec; `run` may be called once."""

    def __init__(self, spec: SimulationSpec, sink: Sink) -> None:
        self.spec = spec
        self.agenda = Agenda()
        self.sink = sink
        shares = sum(home.share for home in spec.pd)
        self.sites = [_Site(self, i, site) for i, site in enumerate(spec.prfaas)]
        self.homes = [_Home(self, i, home, home.share / shares) for i, home in enumerate(spec.pd)]
        self._route = spec.scheduler.router.route
        self._limit_s = spec.scheduler.admission.limit_s
        self._rows: list[Row] = []
        self._live: dict[int, Job] = {}
        self._arriving = True
        self._counts = {"arrived": 0, "completed": 0, "refused": 0, "peak": 0}
        self._last_finish_s = 0.0
        self._samples: list[Sample] = []
        self._sample_every_s = 0.0
        self._directory = self._make_directory()
        self._period_s = self._schedule_controllers()
        for fault in spec.faults:
            self._check_fault(fault)
            self.agenda.at(fault.at_s, self._fail, fault)

    def run(self, chunks: Iterable[Chunk]) -> Summary:
        """Play all requests of the stream, whose arrivals must not go back in time, and then what is still under way."""
        # A run makes no reference cycles, and a collector that keeps looking for some costs a fifth of it.
        collecting = gc.isenabled()
        gc.disable()
        try:
            return self._run(chunks)
        finally:
            if collecting:
                gc.enable()

    def _run(self, chunks: Iterable[Chunk]) -> Summary:
        heap, pop = self.agenda.heap, heapq.heappop
        now = 0.0
        limit, overloaded = self.spec.limit_requests, False
        live = self._live
        for chunk in chunks:
            self._cover(int(chunk.input_tokens.max(initial=0)))
            chains = chunk.chains
            for i, (arrival_s, tokens, output) in enumerate(
                zip(chunk.arrival_s.tolist(), chunk.input_tokens.tolist(), chunk.output_tokens.tolist(), strict=True)
            ):
                while heap and heap[0][0] <= arrival_s:
                    now, _, handler, argument = pop(heap)
                    handler(now, argument)
                if arrival_s < now:
                    raise UserError(
                        f"workload: request {self._counts['arrived']} arrives at {arrival_s} s, before the one before it"
                    )
                now = arrival_s
                self._arrive(now, tokens, output, chains[i] if chains else None)
            if len(live) > limit:
                overloaded = True
                break
        last_arrival_s = now
        self._arriving = False
        horizon_s = last_arrival_s + (0.0 if overloaded else self.spec.drain_s)
        while heap and heap[0][0] <= horizon_s and live:
            now, _, handler, argument = pop(heap)
            handler(now, argument)
        unfinished = list(live.values())
        for job in unfinished:
            self._record(job, _TIMED_OUT)
        if self._rows:
            self.sink.take(self._rows)
        counts = self._counts
        return Summary(
            arrived=counts["arrived"],
            completed=counts["completed"],
            refused=counts["refused"],
            unfinished=len(unfinished),
            overloaded=overloaded,
            last_arrival_s=last_arrival_s,
            last_finish_s=self._last_finish_s,
            peak_in_system=counts["peak"],
            egress_bytes=sum(site.link.settle(now) for site in self.sites),
            samples=tuple(self._samples),
        )

    # Arrival.

    def _cover(self, tokens: int) -> None:
        for tables in [home.tables for home in self.homes] + [site.tables for site in self.sites]:
            tables.cover(tokens)

    def _arrive(
        self, now_s: float, tokens: int, output: int, chain: tuple[tuple[int, ...], tuple[int, ...]] | None
    ) -> None:
        counts = self._counts
        number = counts["arrived"]
        counts["arrived"] = number + 1
        homes = self.homes
        home = homes[0] if len(homes) == 1 else self._home_of(number)
        job = Job(number, now_s, tokens, output, home)
        self._live[number] = job
        home.arrived += 1
        if chain is None or home.cache is None:
            request = RequestView(number, tokens)
            home.recent.append(tokens)
        else:
            request = self._match(job, home, chain)
        self._dispatch(now_s, job, self._route(request, home.situation))

    def _home_of(self, number: int) -> _Home:
        draw = splitmix64(number) / 2.0**64
        for home in self.homes:
            draw -= home.share
            if draw < 0:
                return home
        return self.homes[-1]

    def _match(self, job: Job, home: _Home, chain: tuple[tuple[int, ...], tuple[int, ...]]) -> RequestView:
        assert home.cache is not None
        block = home.cache.spec.block_tokens
        # One token at least is computed, or there is nothing to decode from.
        usable = chain[0][: (job.input_tokens - 1) // block]
        job.chain, job.kept_chain = usable, chain[1]
        local = home.cache.match_tokens(usable)
        remote = max((site.cache.match_tokens(usable) for site in self.sites if site.cache), default=0)
        home.recent.append(job.input_tokens - (local if home.situation.bandwidth_scarce else max(local, remote)))
        return RequestView(job.id, job.input_tokens, local, remote)

    def _dispatch(self, now_s: float, job: Job, route: Route) -> None:
        home: _Home = job.home
        offload, cached, fetch = route
        site = self._site_for(now_s) if self.sites and (offload or fetch) else None
        if offload and site is None:
            offload, cached, fetch = False, 0, False
        elif not offload and not home.prefill.serving and self.sites:
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
        if self._limit_s < math.inf:
            wait_s = stage.predicted_wait_s(now_s)
            if not admitted(wait_s + job.work_s, self._limit_s):
                self._counts["refused"] += 1
                self._record(job, _FAILED)
                return
        if fetch:
            self._fetch(now_s, job, site, cached)
        else:
            self._assign(now_s, job)

    def _assign(self, now_s: float, job: Job) -> None:
        stage = job.site.prefill if job.offloaded else job.home.prefill
        try:
            stage.assign(now_s, job)
        except LookupError:
            other = job.home.prefill if job.offloaded else (self.sites[0].prefill if self.sites else None)
            if other is None or not other.serving:
                self._record(job, _FAILED)
                return
            job.fell_back = True
            self._dispatch(now_s, job, Route(not job.offloaded))

    def _site_for(self, now_s: float) -> _Site | None:
        sites = self.sites
        if len(sites) == 1:
            return sites[0] if sites[0].prefill.serving else None
        able = [site for site in sites if site.prefill.serving and site.link.capacity > 0]
        return min(able, key=lambda site: (site.prefill.predicted_wait_s(now_s), site.index)) if able else None

    def _fetch(self, now_s: float, job: Job, site: _Site | None, cached: int) -> None:
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
        self.agenda.at(now_s + job.site.half_rtt_s, self._prefix_there, job)

    def _prefix_there(self, now_s: float, job: Job) -> None:
        target = job.site.cache if job.offloaded else job.home.cache
        target.insert((job.chain or ())[: job.cached_tokens // target.spec.block_tokens])
        self._assign(now_s, job)

    # Prefill, transfer, decode.

    def remote_began(self, now_s: float, job: Job) -> None:
        """The first piece of an offloaded prefill exists."""
        job.flow = job.site.link.produce(
            now_s, job.prefill_worker, job.kv_bytes, job.kv_bytes / job.work_s, self._sent, job
        )

    def remote_ended(self, now_s: float, job: Job) -> None:
        """An offloaded prefill has ended; what is unsent drains."""
        if job.site.cache is not None and job.chain is not None:
            self._keep(job.site.cache, job, f"prfaas{job.site.index}")
        if self.spec.chunk_tokens is None:
            job.site.link.drain(now_s, job.flow)
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
        job.flow = None
        self.agenda.at(now_s + job.site.half_rtt_s, self._delivered, job)

    def _delivered(self, now_s: float, job: Job) -> None:
        job.delivered_s = now_s
        if job.home.cache is not None and job.chain is not None:
            job.home.cache.insert(job.chain)
        job.home.decode.ready(now_s, job)

    def local_ended(self, now_s: float, job: Job) -> None:
        """A prefill in the PD cluster has ended; its RDMA is no bottleneck (equation 4)."""
        if job.home.cache is not None and job.chain is not None:
            self._keep(job.home.cache, job, f"pd{job.home.index}")
        job.delivered_s = now_s
        job.home.decode.ready(now_s, job)

    def _keep(self, cache: HybridPool, job: Job, cluster: str) -> None:
        blocks = job.cached_tokens // cache.spec.block_tokens
        if self._directory is not None:
            self._directory.prefilled(cluster, job.chain or (), blocks)
        cache.touch(job.chain or (), blocks)
        cache.insert(job.chain or (), blocks)

    def finished(self, now_s: float, job: Job) -> None:
        """The last token is out."""
        home: _Home = job.home
        home.finished += 1
        home.finished_tokens += job.output_tokens
        if job.kept_chain and home.cache is not None:
            home.cache.insert(job.kept_chain, len(job.chain or ()))
        self._last_finish_s = now_s
        self._counts["completed"] += 1
        self._record(job, _FELL_BACK if job.fell_back else _OK)

    def _record(self, job: Job, outcome: int) -> None:
        live = self._live
        counts = self._counts
        if len(live) > counts["peak"]:
            counts["peak"] = len(live)
        del live[job.id]
        nan = math.nan
        arrival, output = job.arrival_s, job.output_tokens
        if outcome in (_OK, _FELL_BACK):
            delivered, ended, first = job.delivered_s, job.prefill_end_s, job.first_token_s
            finish = job.finish_s
            exposed = delivered - ended
            row: Row = (
                job.id, arrival, job.input_tokens, job.cached_tokens, output, job.offloaded, job.prefill_start_s - arrival,
                ended - job.prefill_start_s, delivered - job.prefill_start_s if job.offloaded else 0.0, exposed, job.kv_bytes,
                job.decode_s - delivered, first - arrival, (finish - first) / (output - 1) if output > 1 else 0.0, finish, outcome,
                job.prefill_worker, job.decode_worker,
            )  # fmt: skip
        else:
            row = (
                job.id, arrival, job.input_tokens, job.cached_tokens, output, job.offloaded, nan, nan, nan, nan, job.kv_bytes,
                nan, nan, nan, nan, outcome, job.prefill_worker, job.decode_worker,
            )  # fmt: skip
        rows = self._rows
        rows.append(row)
        if len(rows) >= _BATCH:
            self.sink.take(rows)
            rows.clear()

    # Controllers.

    def _make_directory(self) -> Directory | None:
        cache = self.spec.cache
        if cache is None or not self.sites:
            return None
        pools = {f"pd{home.index}": home.cache for home in self.homes} | {
            f"prfaas{site.index}": site.cache for site in self.sites
        }
        profile = self.sites[0].spec.profile
        fixed = float(profile.kv_bytes(0))
        growth = float(profile.kv_bytes(cache.block_tokens * 64) - fixed) / 64
        return Directory(
            {name: pool for name, pool in pools.items() if pool is not None}, lambda blocks: fixed + growth * blocks
        )

    def _schedule_controllers(self) -> float:
        scheduler = self.spec.scheduler
        short, slow = scheduler.short_term, scheduler.long_term
        period_s = short.period_s
        if short.enabled or slow.enabled or scheduler.fallback_s is not None:
            for home in self.homes:
                self.agenda.at(period_s, self._tick, home)
            if slow.enabled:
                for home in self.homes:
                    self.agenda.at(slow.period_s, self._slow_tick, home)
        return period_s

    def _tick(self, now_s: float, home: _Home) -> None:
        """The fast loop: measure, decide, and let routing see it."""
        if not (self._arriving or self._live):
            return
        self.agenda.at(now_s + self._period_s, self._tick, home)
        seen = self._observe(now_s, home)
        scheduler = self.spec.scheduler
        memory_s = scheduler.long_term.memory_s
        home.slow_capacity_bps = _ewma(home.slow_capacity_bps, seen.link.capacity_bps, self._period_s, memory_s)
        home.state = short_term.step(scheduler.short_term, home.state, seen, home.costs)
        home.situation = Situation(
            home.state.threshold_tokens, home.state.bandwidth_scarce, seen.pd, seen.prfaas, seen.link
        )
        if now_s >= home.sample_at_s:
            home.sample_at_s = now_s + self._sample_every_s
            self._samples.append(
                Sample(
                    now_s, home.index, home.state.threshold_tokens, home.state.bandwidth_scarce, home.prefill.serving,
                    home.decode.serving, seen.link.utilisation, seen.prfaas.waiting_s, seen.pd.waiting_s, len(home.decode.waiting),
                )
            )  # fmt: skip
        if len(self._samples) > _SAMPLES:
            # Half of them, for twice the time: what a figure shows stays the same, and so does the memory of an endless run.
            self._samples = self._samples[::2]
            self._sample_every_s = 2 * max(self._sample_every_s, self._period_s)
        if scheduler.fallback_s is not None and home.index == 0:
            self._give_up_stalled(now_s, scheduler.fallback_s)

    def _observe(self, now_s: float, home: _Home) -> Observation:
        elapsed = now_s - home.measured_s
        if elapsed > 0:
            rate = home.arrived / elapsed
            home.recent.arrived(home.arrived)
            home.rate_per_s = _ewma(home.rate_per_s, rate, elapsed, 20.0)
            home.slow_rate_per_s = _ewma(home.slow_rate_per_s, rate, elapsed, self.spec.scheduler.long_term.memory_s)
            home.arrived, home.measured_s = 0, now_s
        capacity = used = backlog = rtt_s = waiting = 0.0
        instances = 0
        for site in self.sites:
            measured = site.link.measure(now_s)
            capacity += measured.capacity_bps
            used += measured.utilisation * measured.capacity_bps
            backlog += measured.backlog_bytes
            rtt_s = max(rtt_s, site.spec.link.rtt_s)
            serving = site.prefill.serving
            instances += serving
            waiting += site.prefill.waiting_s(now_s) * serving
        return Observation(
            now_s,
            home.recent,
            home.rate_per_s,
            ClusterView(
                max(round(instances * home.share), min(instances, 1)), waiting / instances if instances else 0.0
            ),
            ClusterView(home.prefill.serving, home.prefill.waiting_s(now_s)),
            LinkView(capacity * home.share, used / capacity if capacity > 0 else 1.0, backlog * home.share, 0.0, rtt_s),
        )

    def costs(self, home: _Home) -> Costs:
        """What requests of a home cost, read off the tables as they are when asked."""
        local = home.tables
        remote = self.sites[0].tables if self.sites else local
        return Costs(
            lambda tokens: remote.prefill[tokens],
            lambda tokens: local.prefill[tokens],
            lambda tokens: remote.kv[tokens],
        )

    def _slow_tick(self, now_s: float, home: _Home) -> None:
        """The slow loop: one node at a time, and none while one is on its way."""
        if not (self._arriving or self._live):
            return
        slow = self.spec.scheduler.long_term
        self.agenda.at(now_s + slow.period_s, self._slow_tick, home)
        if home.converting or not home.finished or math.isnan(home.slow_capacity_bps):
            return
        seen = self._observe(now_s, home)
        usual = seen._replace(
            rate_per_s=home.slow_rate_per_s, link=seen.link._replace(capacity_bps=home.slow_capacity_bps)
        )
        decode = DecodeView(home.decode.serving, home.tokens_per_s, home.finished_tokens / home.finished)
        move = long_term.step(slow, usual, decode, home.costs)
        if not move:
            return
        home.converting = move
        if move > 0:
            batches = home.decode.members
            chosen = min(batches, key=lambda i: (len(batches[i].heap), i))
            home.decode.close(now_s, chosen, lambda now, i: self._restart(now, home, i))
        else:
            queues = home.prefill.members
            chosen = min(queues, key=lambda i: (len(queues[i]), i))
            home.prefill.close(now_s, chosen, lambda now, i: self._restart(now, home, i))

    def _restart(self, now_s: float, home: _Home, instance: int) -> None:
        self.agenda.at(now_s + self.spec.scheduler.long_term.restart_s, self._converted, (home, instance))

    def _converted(self, now_s: float, moved: tuple[_Home, int]) -> None:
        home, instance = moved
        (home.prefill if home.converting > 0 else home.decode).open(now_s, instance)
        home.converting = 0

    # Faults.

    def _give_up_stalled(self, now_s: float, after_s: float) -> None:
        for site in self.sites:
            if site.link.capacity > 0:
                site.down_since_s = math.inf
                continue
            site.down_since_s = min(site.down_since_s, now_s)
            if now_s - site.down_since_s < after_s:
                continue
            for flow in site.link.flows():
                job = flow.payload
                # A running prefill is left to end: its transfer may yet find the link repaired.
                running = not flow.draining or job.prefill_end_s < 0 or job.parts > 1
                if running or not job.offloaded or not job.home.prefill.serving:
                    continue
                # An outage is expected to last as long as it has lasted: worse than prefilling anew only if that is done sooner. What
                # is stalled is late already, so it takes idle instances only; in a queue it would make others late as well.
                anew_s = job.home.tables.prefill_s[job.input_tokens]
                idle = job.home.prefill.predicted_wait_s(now_s) <= 0
                if idle and anew_s < now_s - site.down_since_s:
                    site.link.cancel(now_s, flow)
                    self._again(now_s, job, Route(False))

    def _again(self, now_s: float, job: Job, route: Route) -> None:
        job.flow = None
        job.fell_back = True
        job.parts = 0
        job.prefill_end_s = NOT_YET
        self._dispatch(now_s, job, route)

    def _check_fault(self, fault: Fault) -> None:
        clusters = len(self.sites) if fault.pool == "prfaas" else len(self.homes)
        if fault.cluster >= clusters:
            raise UserError(f"faults.cluster: {fault.cluster} of {fault.pool} does not exist; there are {clusters}")

    def _fail(self, now_s: float, fault: Fault) -> None:
        place = self.sites[fault.cluster] if fault.pool == "prfaas" else self.homes[fault.cluster]
        stage = self.homes[fault.cluster].decode if fault.pool == "pd_d" else place.prefill
        if fault.instance not in stage.members:
            return  # it has been converted, or is down already
        lost = stage.fail(now_s, fault.instance)
        self.agenda.at(now_s + fault.for_s, self._repair, (stage, fault.instance))
        if fault.pool == "prfaas":
            gone = {job.id for job in lost}
            link = self.sites[fault.cluster].link
            for flow in link.flows():
                if flow.payload.id in gone:
                    link.cancel(now_s, flow)
        for job in lost:
            self._again(now_s, job, Route(job.offloaded))

    def _repair(self, now_s: float, repaired: tuple[WholePrefill | ChunkedPrefill | DecodeStage, int]) -> None:
        stage, instance = repaired
        stage.open(now_s, instance)
