"""The scheduler's timers in a run: reports of links and instances go in, and what it decides is carried out (§3.4.3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from repro.scheduling.decisions import Conversion
from repro.scheduling.observations import InstanceReport, LinkReport, PdReport
from repro.scheduling.scheduler import Scheduler
from repro.scheduling.views import Sample, SchedulerState
from repro.simulate.colocated import ColocatedStage
from repro.simulate.events import EventQueue
from repro.simulate.ledger import RequestLedger
from repro.simulate.resources import PdResources, PrfaasResources

_SAMPLES = 20_000


class Control:
    """Both loops of every PD cluster. `give_up(now)` is called with the fast loop's beat, when transfers may be given up."""

    def __init__(
        self,
        scheduler: Scheduler,
        pd_clusters: Sequence[PdResources],
        prfaas_clusters: Sequence[PrfaasResources],
        events: EventQueue,
        ledger: RequestLedger,
        give_up: Callable[[float], None],
    ) -> None:
        self.samples: list[Sample] = []
        self.conversions = 0
        self._scheduler = scheduler
        self._prfaas_clusters = prfaas_clusters
        self._events = events
        self._ledger = ledger
        self._give_up = give_up
        self._sample_every_s = 0.0
        self._sample_at_s = [0.0] * len(pd_clusters)
        spec = scheduler.spec
        self._period_s = spec.short_term.period_s
        slow_s = spec.slow_period_s
        self._slow_period_s = slow_s or 0.0
        if scheduler.watches:
            for pd in pd_clusters:
                events.at(self._period_s, self._tick, pd)
            if slow_s is not None:
                for pd in pd_clusters:
                    events.at(self._slow_period_s, self._slow_tick, pd)

    def _tick(self, now_s: float, pd: PdResources) -> None:
        """The fast loop's beat."""
        if not self._ledger.open:
            return
        self._events.at(now_s + self._period_s, self._tick, pd)
        scheduler = self._scheduler
        state = scheduler.short_term(now_s, pd.index, self._links(now_s))
        if now_s >= self._sample_at_s[pd.index]:
            self._sample(now_s, pd, state)
        if pd.index == 0 and scheduler.spec.fallback_s is not None:
            self._give_up(now_s)

    def _sample(self, now_s: float, pd: PdResources, state: SchedulerState) -> None:
        self._sample_at_s[pd.index] = now_s + self._sample_every_s
        self.samples.append(
            Sample(
                now_s, pd.index, state.threshold_tokens, state.bandwidth_scarce, pd.state.serving, len(pd.state.decoding),
                state.link.utilisation, state.prfaas.waiting_s, state.pd.waiting_s, len(pd.decode.waiting),
            )
        )  # fmt: skip
        if len(self.samples) > _SAMPLES:
            # Half of them, for twice the time: what a figure shows stays the same, and so does the memory of an endless run.
            self.samples = self.samples[::2]
            self._sample_every_s = 2 * max(self._sample_every_s, self._period_s)

    def _links(self, now_s: float) -> list[LinkReport]:
        """The simulated links' own counters: the simulator knows what a live sender has to estimate."""
        return [prfaas.link.measure(now_s) for prfaas in self._prfaas_clusters]

    def _slow_tick(self, now_s: float, pd: PdResources) -> None:
        """The slow loop's beat."""
        if not self._ledger.open:
            return
        self._events.at(now_s + self._slow_period_s, self._slow_tick, pd)
        assert not isinstance(pd.prefill, ColocatedStage)  # refused beside a slow loop
        prefill, decode = pd.prefill.members, pd.decode.members
        report = PdReport(
            [InstanceReport(i, len(queue)) for i, queue in prefill.items()],
            [InstanceReport(i, batch.size) for i, batch in decode.items()],
            pd.finished,
            pd.finished_tokens,
            len(pd.decode.waiting),
        )
        conversion = self._scheduler.long_term(now_s, pd.index, self._links(now_s), report)
        if conversion is not None:
            self.conversions += 1
            stage = pd.decode if conversion.to == "prefill" else pd.prefill
            stage.close(now_s, conversion.instance, lambda now, _: self._restart(now, pd, conversion))

    def _restart(self, now_s: float, pd: PdResources, conversion: Conversion) -> None:
        restart_s = self._scheduler.spec.restart_s
        self._events.at(now_s + restart_s, self._converted, (pd, conversion))

    def _converted(self, now_s: float, moved: tuple[PdResources, Conversion]) -> None:
        pd, conversion = moved
        self._scheduler.converted(now_s, conversion)
        (pd.prefill if conversion.to == "prefill" else pd.decode).open(now_s, conversion.instance)
