"""The scheduler's two loops in a run: measure, let `repro.scheduling` decide, and carry out what it decides (§3.4.3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from repro.scheduling import long_term, short_term
from repro.scheduling.long_term import DecodeView
from repro.scheduling.short_term import Observation
from repro.scheduling.views import ClusterView, LinkView, SchedulerState
from repro.simulate.clusters import PdClusterState, PrfaasClusterState
from repro.simulate.events import EventQueue
from repro.simulate.ledger import RequestLedger
from repro.simulate.spec import SchedulerSpec

_SAMPLES = 20_000


class Sample(NamedTuple):
    """One reading of a PD cluster's controllers, for figures."""

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
    """Both loops of every PD cluster. `give_up(now, after)` is called with the fast loop's beat, when transfers may be given up."""

    def __init__(
        self,
        scheduler: SchedulerSpec,
        pd_clusters: Sequence[PdClusterState],
        prfaas_clusters: Sequence[PrfaasClusterState],
        events: EventQueue,
        ledger: RequestLedger,
        give_up: Callable[[float, float], None],
    ) -> None:
        self.samples: list[Sample] = []
        self._scheduler = scheduler
        self._pd_clusters = pd_clusters
        self._prfaas_clusters = prfaas_clusters
        self._events = events
        self._ledger = ledger
        self._give_up = give_up
        self._sample_every_s = 0.0
        short, slow = scheduler.short_term, scheduler.long_term
        self._period_s = short.period_s
        if short.enabled or slow.enabled or scheduler.fallback_s is not None:
            for pd in pd_clusters:
                events.at(self._period_s, self._tick, pd)
            if slow.enabled:
                for pd in pd_clusters:
                    events.at(slow.period_s, self._slow_tick, pd)

    def _tick(self, now_s: float, pd: PdClusterState) -> None:
        """The fast loop: measure, decide, and let routing see it."""
        if not self._ledger.open:
            return
        self._events.at(now_s + self._period_s, self._tick, pd)
        seen = self._observe(now_s, pd)
        scheduler = self._scheduler
        memory_s = scheduler.long_term.memory_s
        pd.slow_capacity_bps = _ewma(pd.slow_capacity_bps, seen.link.capacity_bps, self._period_s, memory_s)
        pd.state = short_term.step(scheduler.short_term, pd.state, seen, pd.costs)
        pd.situation = SchedulerState(
            pd.state.threshold_tokens, pd.state.bandwidth_scarce, seen.pd, seen.prfaas, seen.link
        )
        if now_s >= pd.sample_at_s:
            self._sample(now_s, pd, seen)
        if scheduler.fallback_s is not None and pd.index == 0:
            self._give_up(now_s, scheduler.fallback_s)

    def _sample(self, now_s: float, pd: PdClusterState, seen: Observation) -> None:
        pd.sample_at_s = now_s + self._sample_every_s
        self.samples.append(
            Sample(
                now_s, pd.index, pd.state.threshold_tokens, pd.state.bandwidth_scarce, pd.prefill.serving,
                pd.decode.serving, seen.link.utilisation, seen.prfaas.waiting_s, seen.pd.waiting_s, len(pd.decode.waiting),
            )
        )  # fmt: skip
        if len(self.samples) > _SAMPLES:
            # Half of them, for twice the time: what a figure shows stays the same, and so does the memory of an endless run.
            self.samples = self.samples[::2]
            self._sample_every_s = 2 * max(self._sample_every_s, self._period_s)

    def _observe(self, now_s: float, pd: PdClusterState) -> Observation:
        elapsed = now_s - pd.measured_s
        if elapsed > 0:
            rate = pd.arrived / elapsed
            pd.recent.arrived(pd.arrived)
            pd.rate_per_s = _ewma(pd.rate_per_s, rate, elapsed, 20.0)
            pd.slow_rate_per_s = _ewma(pd.slow_rate_per_s, rate, elapsed, self._scheduler.long_term.memory_s)
            pd.arrived, pd.measured_s = 0, now_s
        capacity = used = backlog = rtt_s = waiting = 0.0
        instances = 0
        for prfaas in self._prfaas_clusters:
            measured = prfaas.link.measure(now_s)
            capacity += measured.capacity_bps
            used += measured.utilisation * measured.capacity_bps
            backlog += measured.backlog_bytes
            rtt_s = max(rtt_s, prfaas.spec.link.rtt_s)
            serving = prfaas.prefill.serving
            instances += serving
            waiting += prfaas.prefill.waiting_s(now_s) * serving
        return Observation(
            now_s,
            pd.recent,
            pd.rate_per_s,
            ClusterView(max(round(instances * pd.share), min(instances, 1)), waiting / instances if instances else 0.0),
            ClusterView(pd.prefill.serving, pd.prefill.waiting_s(now_s)),
            LinkView(capacity * pd.share, used / capacity if capacity > 0 else 1.0, backlog * pd.share, 0.0, rtt_s),
        )

    def _slow_tick(self, now_s: float, pd: PdClusterState) -> None:
        """The slow loop: one node at a time, and none while one is on its way."""
        if not self._ledger.open:
            return
        slow = self._scheduler.long_term
        self._events.at(now_s + slow.period_s, self._slow_tick, pd)
        if pd.converting or not pd.finished or math.isnan(pd.slow_capacity_bps):
            return
        seen = self._observe(now_s, pd)
        usual = seen._replace(rate_per_s=pd.slow_rate_per_s, link=seen.link._replace(capacity_bps=pd.slow_capacity_bps))
        decode = DecodeView(pd.decode.serving, pd.tokens_per_s, pd.finished_tokens / pd.finished)
        move = long_term.step(slow, usual, decode, pd.costs)
        if not move:
            return
        pd.converting = move
        if move > 0:
            batches = pd.decode.members
            chosen = min(batches, key=lambda i: (len(batches[i].heap), i))
            pd.decode.close(now_s, chosen, lambda now, i: self._restart(now, pd, i))
        else:
            queues = pd.prefill.members
            chosen = min(queues, key=lambda i: (len(queues[i]), i))
            pd.prefill.close(now_s, chosen, lambda now, i: self._restart(now, pd, i))

    def _restart(self, now_s: float, pd: PdClusterState, instance: int) -> None:
        self._events.at(now_s + self._scheduler.long_term.restart_s, self._converted, (pd, instance))

    def _converted(self, now_s: float, moved: tuple[PdClusterState, int]) -> None:
        pd, instance = moved
        (pd.prefill if pd.converting > 0 else pd.decode).open(now_s, instance)
        pd.converting = 0


def _ewma(before: float, value: float, elapsed_s: float, memory_s: float) -> float:
    return value if math.isnan(before) else before + (1 - math.exp(-elapsed_s / memory_s)) * (value - before)
