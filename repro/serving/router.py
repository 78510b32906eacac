"""The router of a live deployment: the scheduler of §3.4.3 on a real clock.

It adds a clock, messages and an account of who holds what; where a request goes, and every decision of the control loops, is the
scheduler's, the same object that the simulator drives. It runs in one thread of its own: arrivals, messages and news of ended instances
come to it as tasks of one event loop, so nothing in it needs a lock. It sees token counts, never prompts or state.

A request is tried until it is answered or nobody is left: what was lost with an instance or a transfer is dispatched anew with the next
attempt's number, and what an earlier attempt still says is ignored, so that each request is answered once at most.
"""

from __future__ import annotations

import math
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from repro.processes import Ended
from repro.record.requests import ANSWERED, COLUMNS
from repro.scheduling.clusters import PdPlan, PrfaasPlan
from repro.scheduling.decisions import Conversion, Decision
from repro.scheduling.observations import InstanceReport, LinkReport, PdReport, StalledTransfer
from repro.scheduling.placement import FewestHeld
from repro.scheduling.scheduler import Pool, Scheduler
from repro.scheduling.spec import SchedulerSpec
from repro.scheduling.views import Sample
from repro.serving import messages as say
from repro.serving.clockwork import Clockwork
from repro.serving.egress import Egress
from repro.serving.fleet import Fleet
from repro.serving.instance import ATTEMPTS
from repro.serving.scale import Scale


@dataclass
class _Live:
    """A request in the system; moments are CLOCK_MONOTONIC in seconds, nan until they come."""

    number: int
    arrival_s: float
    tokens: int
    output_tokens: int
    attempt: int = 0
    decision: Decision | None = None
    prefill: str = ""
    decode: str = ""
    fell_back: bool = False
    start_s: float = math.nan
    end_s: float = math.nan
    delivered_s: float = math.nan
    joined_s: float = math.nan
    first_s: float = math.nan
    payload_bytes: int = 0
    seen: set[str] = field(default_factory=set)

    def forget(self) -> None:
        """Nothing of the attempt that failed counts."""
        self.start_s = self.end_s = self.delivered_s = self.joined_s = self.first_s = math.nan
        self.prefill = self.decode = ""
        self.payload_bytes = 0


class Router:
    """Drives a fleet. Between `start` and `close` it runs in its own thread; `submit`, `heard` and `ended` are safe from any.

    `limit_requests` bounds what is in the system: with more, arrivals are refused, and `overloaded` says so. `link_bps` is what the
    egress was sold as: what is believed of it until it was seen full. `hands_over`: a PD instance that prefills sends the KVCache to the
    one that decodes, so that one is chosen before every prefill.
    """

    def __init__(
        self,
        spec: SchedulerSpec,
        pd_plan: PdPlan,
        prfaas_plan: PrfaasPlan | None,
        scale: Scale,
        *,
        link_bps: float = math.inf,
        limit_requests: int = 20_000,
        hands_over: bool = False,
    ) -> None:
        self.scheduler = Scheduler(spec, [pd_plan], [prfaas_plan] if prfaas_plan is not None else [])
        self.scale = scale
        self.clock = Clockwork()
        self.overloaded = False
        self.samples: list[Sample] = []
        self.rows: list[tuple[Any, ...]] = []
        #: By request, what an engine that computes has answered.
        self.tokens: dict[int, list[int]] = {}
        self.lateness: dict[str, list[say.Lateness]] = {}
        self.sending: dict[str, say.Sending] = {}
        #: Deaths and lost transfers, each with the deployment's time, in words.
        self.events: list[tuple[float, str]] = []
        self._prfaas_plan = prfaas_plan
        self._fleet: Fleet | None = None
        self._live: dict[int, _Live] = {}
        self._holds: defaultdict[str, set[int]] = defaultdict(set)
        self._decoders = FewestHeld()
        for instance in self.scheduler.pd[0].decoding:
            self._decoders.add(instance)
        self._limit = limit_requests
        self._hands_over = hands_over
        self._egress = Egress(link_bps, scale.time, scale.bytes)
        self._conversion: Conversion | None = None
        #: Whether an instance has ended during the run.
        self.died = False
        self._dead = set[str]()
        self._was: dict[str, Pool] = {}
        self._finished = self._finished_tokens = 0
        self._empty = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self.clock.run, name="router", daemon=True)

    # From other threads.

    def start(self, fleet: Fleet, scale: Scale) -> None:
        """Route to that fleet; time counts from the scale's origin."""
        self._fleet, self.scale = fleet, scale
        self._thread.start()
        spec = self.scheduler.spec
        if self.scheduler.watches:
            self.clock.ask(self._every, spec.short_term.period_s, self._beat)
            if spec.long_term.enabled:
                self.clock.ask(self._every, spec.long_term.period_s, self._slow_beat)

    def submit(self, number: int, arrival_s: float, tokens: int, output_tokens: int) -> None:
        """A request, due at `arrival_s` of the deployment's time."""
        self.clock.ask(self._arrive, number, arrival_s, tokens, output_tokens)

    def heard(self, name: str, said: say.FromInstance) -> None:
        """What an instance said."""
        self.clock.ask(self._hear, name, said)

    def ended(self, name: str, how: Ended) -> None:
        """An instance has died, failed or fallen silent."""
        self.clock.ask(self._instance_ended, name, how)

    def drain(self, submitted: int, timeout_s: float) -> bool:
        """Wait until all of the submitted requests have left; False where `timeout_s` of this machine were not enough."""
        with self._empty:
            return self._empty.wait_for(lambda: len(self.rows) >= submitted, timeout_s)

    def close(self) -> int:
        """Stop; whoever is still in the system is recorded as timed out. Returns how many those are."""
        self._closed = True
        self.clock.stop()
        if self._thread.is_alive():
            self._thread.join()
        left = list(self._live.values())
        for request in left:
            for name in {request.prefill, request.decode} - {"", *self._dead}:
                self._tell(name, say.Forget(request.number, request.attempt))
            self._leave(request, "timed_out")
        return len(left)

    def requests(self) -> pd.DataFrame:
        """The requests table, in the order of their numbers; times unscaled."""
        frame = pd.DataFrame(self.rows, columns=[*COLUMNS, "attempts", "payload_bytes"])
        return frame.sort_values("id", ignore_index=True)

    # In the router's own thread.

    def _now_s(self) -> float:
        return self.scale.virtual_s(time.monotonic())

    def _every(self, period_s: float, beat: Any) -> None:
        def again(at_s: float) -> None:
            if not self._closed:
                beat(self._now_s())
                self.clock.at(at_s + period_s / self.scale.time, again, at_s + period_s / self.scale.time)

        first = time.monotonic() + period_s / self.scale.time
        self.clock.at(first, again, first)

    def _arrive(self, number: int, arrival_s: float, tokens: int, output_tokens: int) -> None:
        request = _Live(number, arrival_s, tokens, output_tokens)
        if len(self._live) >= self._limit:
            self.overloaded = True
            self._leave(request, "refused")
            return
        self._live[number] = request
        self._carry_out(request, self.scheduler.arrive(self._now_s(), number, tokens, 0))

    def _carry_out(self, request: _Live, decision: Decision) -> None:
        request.decision = decision
        request.fell_back = request.fell_back or decision.fell_back
        if decision.action in ("refuse", "fail"):
            self._leave(request, "refused" if decision.action == "refuse" else "failed")
            return
        cluster = f"prfaas{decision.prfaas}" if decision.offload else "pd0"
        request.prefill = f"{cluster}.{decision.instance}"
        to = None
        if decision.offload or self._hands_over:
            to = self._decoder(request)
            if to is None:
                return
        self._holds[request.prefill].add(request.number)
        self._tell(
            request.prefill,
            say.Prefill(
                request.number, request.attempt, request.tokens, decision.cached_tokens, request.output_tokens, decision.kv_bytes, to
            ),
        )  # fmt: skip

    def _decoder(self, request: _Live) -> str | None:
        """The decode instance that takes a request: the one that holds fewest; None, and the request fails, where there is none."""
        instance = self._decoders.take()
        if instance is None:
            self._leave(request, "failed")
            return None
        request.decode = f"pd0.{instance}"
        self._holds[request.decode].add(request.number)
        return request.decode

    def _tell(self, name: str, said: say.ToInstance) -> None:
        assert self._fleet is not None
        self._fleet.tell(name, said)

    def _hear(self, name: str, said: say.FromInstance) -> None:
        if isinstance(said, say.Lateness):
            self.lateness.setdefault(name, []).append(said)
        elif isinstance(said, say.Sending):
            self.sending[name] = said
        elif isinstance(said, say.Ready):
            if name in self._dead:
                self._repaired(name)
        elif not isinstance(said, say.Connected):
            request = self._live.get(said.request)
            if request is not None and request.attempt == said.attempt:
                self._of_request(name, request, said)

    def _of_request(self, name: str, request: _Live, said: say.FromInstance) -> None:
        match said:
            case say.Prefilled():
                request.start_s, request.end_s = said.start_s, said.end_s
                self._release(request.prefill, request)
                self._account(request.prefill)
                if not request.decode:
                    request.delivered_s = time.monotonic()
                    to = self._decoder(request)
                    if to is not None:
                        self._tell(
                            to, say.Decode(request.number, request.attempt, request.tokens, request.output_tokens)
                        )
            case say.Delivered():
                request.delivered_s, request.payload_bytes = said.at_s, said.payload_bytes
            case say.Decoding():
                request.joined_s, request.first_s = said.joined_s, said.first_s
            case say.Finished():
                if said.tokens is not None:
                    self.tokens[request.number] = said.tokens
                self._finished += 1
                self._finished_tokens += request.output_tokens
                self._leave(request, "fell_back" if request.fell_back else "ok", said.at_s)
            case say.Undelivered():
                self.events.append((self._now_s(), f"request {request.number} from {name}: {said.why}"))
                self._again(request)

    def _account(self, name: str) -> None:
        """Correct what the scheduler believes of a prefill instance that has just ended something: what it still holds begins now."""
        cluster, _, index = name.partition(".")
        now_s = self._now_s()
        left_s = sum(decision.work_s for number in self._holds[name] if (decision := self._live[number].decision))
        self.scheduler.report(cluster, [InstanceReport(int(index), len(self._holds[name]), now_s + left_s)])

    def _release(self, name: str, request: _Live) -> None:
        self._holds[name].discard(request.number)
        if self._conversion is not None and not self._holds[name]:
            self._drained(name)

    def _again(self, request: _Live) -> None:
        """Prefill a request anew whose prefill, transfer or decode was lost."""
        decision = request.decision
        for name in {request.prefill, request.decode} - {"", *self._dead}:
            self._tell(name, say.Forget(request.number, request.attempt))
        self._unhold(request)
        request.forget()
        request.attempt += 1
        if request.attempt >= ATTEMPTS:
            self._leave(request, "failed")
            return
        offload = decision is not None and decision.offload
        self._carry_out(request, self.scheduler.lost(self._now_s(), request.tokens, 0, None, offload))

    def _unhold(self, request: _Live) -> None:
        if request.prefill:
            self._release(request.prefill, request)
        if request.decode:
            self._decoders.release(int(request.decode.partition(".")[2]))
            self._release(request.decode, request)

    def _leave(self, request: _Live, outcome: str, finish_s: float = math.nan) -> None:
        self._unhold(request)
        decision = request.decision
        offload = decision is not None and decision.offload
        answered = outcome in ANSWERED
        nan, per = math.nan, self.scale.time

        def since(late: float, early: float) -> float:
            return (late - early) * per if answered else nan

        arrival_s = self.scale.wall_s(request.arrival_s)
        tpot_s = since(finish_s, request.first_s) / (request.output_tokens - 1) if request.output_tokens > 1 else 0.0
        self.rows.append((
            request.number, request.arrival_s, request.tokens, decision.cached_tokens if decision is not None else 0,
            request.output_tokens, "prfaas" if offload else "pd", since(request.start_s, arrival_s), since(request.end_s, request.start_s),
            since(request.delivered_s, request.start_s) if offload else 0.0, since(request.delivered_s, request.end_s),
            request.payload_bytes * self.scale.bytes if offload else (decision.kv_bytes if decision is not None else 0.0),
            since(request.joined_s, request.delivered_s), since(request.first_s, arrival_s), tpot_s,
            self.scale.virtual_s(finish_s) if answered else nan, outcome, request.prefill, request.decode,
            request.attempt + 1, request.payload_bytes,
        ))  # fmt: skip
        self._live.pop(request.number, None)
        if not self._live:
            with self._empty:
                self._empty.notify_all()

    # Instances that end and come back.

    def _instance_ended(self, name: str, how: Ended) -> None:
        if self._closed or name in self._dead:
            return
        self.events.append((self._now_s(), str(how)))
        self._dead.add(name)
        self.died = True
        cluster, _, index = name.partition(".")
        instance = int(index)
        for pool in self._pools(cluster, instance):
            self.scheduler.failed(pool, 0, instance)
        if cluster == "pd0":
            self._decoders.remove(instance)
        if self._conversion is not None and self._conversion.instance == instance and cluster == "pd0":
            self._conversion = None
        for number in sorted(self._holds.pop(name, set())):
            if (request := self._live.get(number)) is not None:
                self._again(request)

    def _pools(self, cluster: str, instance: int) -> list[Pool]:
        if cluster.startswith("prfaas"):
            return ["prfaas"]
        home = self.scheduler.pd[0]
        pool: Pool = "pd_d" if instance in home.decoding else "pd_p"
        self._was[f"{cluster}.{instance}"] = pool
        return [pool]

    def _repaired(self, name: str) -> None:
        self._dead.discard(name)
        cluster, _, index = name.partition(".")
        pool: Pool = "prfaas" if cluster.startswith("prfaas") else self._was[name]
        self.scheduler.repaired(self._now_s(), pool, 0, int(index))
        if pool == "pd_d":
            self._decoders.add(int(index))
        self.events.append((self._now_s(), f"{name} serves again"))

    # The control loops.

    def _links(self) -> list[LinkReport]:
        if self._prfaas_plan is None:
            return []
        found = [said for name, said in self.sending.items() if name.startswith("prfaas")]
        return [self._egress.report(time.monotonic(), found)]

    def _beat(self, now_s: float) -> None:
        for name in self._prefillers():
            self._tell(name, say.Report())
        links = self._links()
        if links and links[0].up != self.scheduler.prfaas[0].link_up:
            self.scheduler.link_changed(0, links[0].up)
        state = self.scheduler.short_term(now_s, 0, links)
        home = self.scheduler.pd[0]
        waiting = sum(1 for one in self._live.values() if not math.isnan(one.delivered_s) and math.isnan(one.joined_s))
        self.samples.append(
            Sample(
                now_s, 0, state.threshold_tokens, state.bandwidth_scarce, home.serving, len(home.decoding),
                state.link.utilisation, state.prfaas.waiting_s, state.pd.waiting_s, waiting,
            )
        )  # fmt: skip
        if self.scheduler.spec.fallback_s is not None:
            self._give_up(now_s)

    def _prefillers(self) -> list[str]:
        assert self._fleet is not None
        return [name for name in self._fleet.names if name.startswith("prfaas") and name not in self._dead]

    def _give_up(self, now_s: float) -> None:
        for prfaas in self.scheduler.overdue(now_s):
            stalled = [
                StalledTransfer(one.number, 0, one.tokens, None)
                for one in self._live.values()
                if one.decision is not None and one.decision.offload and not math.isnan(one.end_s) and math.isnan(one.delivered_s)
            ]  # fmt: skip
            for transfer, decision in self.scheduler.give_up(now_s, prfaas, stalled):
                request = self._live[transfer.id]
                for name in {request.prefill, request.decode} - self._dead:
                    self._tell(name, say.Forget(request.number, request.attempt))
                self._unhold(request)
                request.forget()
                request.attempt += 1
                self._carry_out(request, decision)

    def _slow_beat(self, now_s: float) -> None:
        home = self.scheduler.pd[0]

        def reports(instances: Sequence[int]) -> list[InstanceReport]:
            return [InstanceReport(i, len(self._holds[f"pd0.{i}"])) for i in instances]

        report = PdReport(
            reports(list(home.placement.free_at_s)),
            reports(sorted(home.decoding)),
            self._finished,
            self._finished_tokens,
        )
        conversion = self.scheduler.long_term(now_s, 0, self._links(), report)
        if conversion is not None:
            self._conversion = conversion
            if conversion.to == "prefill":
                self._decoders.remove(conversion.instance)
            self.events.append((now_s, f"pd0.{conversion.instance} turns to {conversion.to}"))
            if not self._holds[f"pd0.{conversion.instance}"]:
                self._drained(f"pd0.{conversion.instance}")

    def _drained(self, name: str) -> None:
        """A node that changes its role has finished what it had; it restarts and serves."""
        conversion = self._conversion
        if conversion is None or name != f"pd0.{conversion.instance}":
            return
        self._conversion = None
        restart_s = self.scheduler.spec.long_term.restart_s / self.scale.time
        self.clock.at(time.monotonic() + restart_s, self._converted, conversion)

    def _converted(self, conversion: Conversion) -> None:
        self.scheduler.converted(self._now_s(), conversion)
        if conversion.to == "decode":
            self._decoders.add(conversion.instance)
