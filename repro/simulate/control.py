"""The scheduler's two loops in a run: measure, let `repro.scheduling` decide, and carry out what it decides (§3.4.3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from repro.scheduling import long_term, short_term
from repro.scheduling.long_term import DecodeView
from repro.scheduling.short_term import Observation
from repro.scheduling.views import ClusterView, LinkView, Situation
from repro.simulate.books import Books
from repro.simulate.clusters import Home, Site
from repro.simulate.events import Agenda
from repro.simulate.spec import SchedulerSpec

_SAMPLES = 20_000


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


class Control:
    """Both loops of every home. `give_up(now, after)` is called with the fast loop's beat, when transfers may be given up."""

    def __init__(
        self,
        scheduler: SchedulerSpec,
        homes: Sequence[Home],
        sites: Sequence[Site],
        agenda: Agenda,
        books: Books,
        give_up: Callable[[float, float], None],
    ) -> None:
        self.samples: list[Sample] = []
        self._scheduler = scheduler
        self._homes = homes
        self._sites = sites
        self._agenda = agenda
        self._books = books
        self._give_up = give_up
        self._sample_every_s = 0.0
        short, slow = scheduler.short_term, scheduler.long_term
        self._period_s = short.period_s
        if short.enabled or slow.enabled or scheduler.fallback_s is not None:
            for home in homes:
                agenda.at(self._period_s, self._tick, home)
            if slow.enabled:
                for home in homes:
                    agenda.at(slow.period_s, self._slow_tick, home)

    def _tick(self, now_s: float, home: Home) -> None:
        """The fast loop: measure, decide, and let routing see it."""
        if not self._books.open:
            return
        self._agenda.at(now_s + self._period_s, self._tick, home)
        seen = self._observe(now_s, home)
        scheduler = self._scheduler
        memory_s = scheduler.long_term.memory_s
        home.slow_capacity_bps = _ewma(home.slow_capacity_bps, seen.link.capacity_bps, self._period_s, memory_s)
        home.state = short_term.step(scheduler.short_term, home.state, seen, home.costs)
        home.situation = Situation(
            home.state.threshold_tokens, home.state.bandwidth_scarce, seen.pd, seen.prfaas, seen.link
        )
        if now_s >= home.sample_at_s:
            self._sample(now_s, home, seen)
        if scheduler.fallback_s is not None and home.index == 0:
            self._give_up(now_s, scheduler.fallback_s)

    def _sample(self, now_s: float, home: Home, seen: Observation) -> None:
        home.sample_at_s = now_s + self._sample_every_s
        self.samples.append(
            Sample(
                now_s, home.index, home.state.threshold_tokens, home.state.bandwidth_scarce, home.prefill.serving,
                home.decode.serving, seen.link.utilisation, seen.prfaas.waiting_s, seen.pd.waiting_s, len(home.decode.waiting),
            )
        )  # fmt: skip
        if len(self.samples) > _SAMPLES:
            # Half of them, for twice the time: what a figure shows stays the same, and so does the memory of an endless run.
            self.samples = self.samples[::2]
            self._sample_every_s = 2 * max(self._sample_every_s, self._period_s)

    def _observe(self, now_s: float, home: Home) -> Observation:
        elapsed = now_s - home.measured_s
        if elapsed > 0:
            rate = home.arrived / elapsed
            home.recent.arrived(home.arrived)
            home.rate_per_s = _ewma(home.rate_per_s, rate, elapsed, 20.0)
            home.slow_rate_per_s = _ewma(home.slow_rate_per_s, rate, elapsed, self._scheduler.long_term.memory_s)
            home.arrived, home.measured_s = 0, now_s
        capacity = used = backlog = rtt_s = waiting = 0.0
        instances = 0
        for site in self._sites:
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

    def _slow_tick(self, now_s: float, home: Home) -> None:
        """The slow loop: one node at a time, and none while one is on its way."""
        if not self._books.open:
            return
        slow = self._scheduler.long_term
        self._agenda.at(now_s + slow.period_s, self._slow_tick, home)
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

    def _restart(self, now_s: float, home: Home, instance: int) -> None:
        self._agenda.at(now_s + self._scheduler.long_term.restart_s, self._converted, (home, instance))

    def _converted(self, now_s: float, moved: tuple[Home, int]) -> None:
        home, instance = moved
        (home.prefill if home.converting > 0 else home.decode).open(now_s, instance)
        home.converting = 0


def _ewma(before: float, value: float, elapsed_s: float, memory_s: float) -> float:
    return value if math.isnan(before) else before + (1 - math.exp(-elapsed_s / memory_s)) * (value - before)
