"""The router of a live deployment: the scheduler of §3.4.3 on a real clock.

It adds a clock, messages and an account of who holds what; where a request goes, and every decision of the control loops, is the
scheduler's, the same object that the simulator drives. It runs in one thread of its own: arrivals, messages and news of ended instances
come to it as tasks of one event loop, so nothing in it needs a lock. It sees token counts, never prompts or state.

A request is tried until it is answered: what was lost with an instance or a transfer is dispatched anew with the next attempt's number, and
what an earlier attempt still says is ignored, so that each request is answered once at most. While nobody is there to take it, it waits.

A `Listener` makes it a router that serves for as long as it is asked to: requests are submitted one by one, their tokens are told as they
come, and nothing is kept of those that have left.
"""

from __future__ import annotations

import gc
import math
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, MutableSequence, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import pandas as pd

from repro.processes import Ended
from repro.record.requests import ANSWERED
from repro.scheduling.clusters import PdPlan, PrfaasPlan
from repro.scheduling.decisions import Conversion, Decision
from repro.scheduling.observations import InstanceReport, LinkReport, PdReport, StalledTransfer
from repro.scheduling.placement import FewestHeld
from repro.scheduling.scheduler import Pool, Scheduler
from repro.scheduling.spec import SchedulerSpec
from repro.scheduling.views import Sample
from repro.serving import messages as say
from repro.serving.clockwork import Clockwork
from repro.serving.cluster_caches import PD, PRFAAS, Caches
from repro.serving.egress import Egress
from repro.serving.fleet import Fleet
from repro.serving.listener import PHASES, Listener, View
from repro.serving.live_request import LIVE_COLUMNS, LiveRequest
from repro.serving.messages import ATTEMPTS
from repro.serving.scale import Scale
from repro.workload.stream import Chains

#: What a router that serves without end keeps of samples, events and lateness.
_KEPT = 1000
#: A decode instance that had no memory for a request is passed over for so long, in seconds of the deployment.
_REST_S = 5.0


class Router:
    """Drives a fleet. Between `start` and `close` it runs in its own thread; what stands before that is safe from any.

    `limit_requests` bounds what is in the system: with more, arrivals are refused, and `overloaded` says so. `link_bps` is what the
    egress was sold as: what is believed of it until it was seen full. `hands_over`: a PD instance that prefills sends the KVCache to the
    one that decodes, so that one is chosen before every prefill. `caches` makes a fresh view of the prefix caches. `prompt` gives the
    prompt of a request to send along, where instances do not draw it.
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
        caches: Callable[[], Caches] = Caches,
        prompt: Callable[[int], list[int] | None] = lambda number: None,
        listener: Listener | None = None,
    ) -> None:
        self._listener = listener
        kept = None if listener is None else _KEPT
        self._spec, self._pd_plan, self._prfaas_plan = spec, pd_plan, prfaas_plan
        self._link_bps = link_bps
        self.scale = scale
        self.clock = Clockwork()
        self.overloaded = False
        self.samples: MutableSequence[Sample] = deque(maxlen=kept)
        self.rows: list[tuple[Any, ...]] = []
        #: By request, what an engine that computes has answered.
        self.tokens: dict[int, list[int]] = {}
        self.lateness: defaultdict[str, deque[say.Lateness]] = defaultdict(partial(deque[say.Lateness], maxlen=kept))
        self.sending: dict[str, say.Sending] = {}
        #: Faults, deaths, conversions and lost transfers, each with the deployment's time, in words.
        self.events: MutableSequence[tuple[float, str]] = deque(maxlen=kept)
        self._fleet: Fleet | None = None
        self._live: dict[int, LiveRequest] = {}
        self._limit = limit_requests
        self._hands_over = hands_over
        self._view_of_caches, self._prompt = caches, prompt
        #: By the cluster that had them, bytes of prefixes that have crossed the link.
        self.copied_bytes: Counter[str] = Counter()
        #: Whether an instance has ended during the run.
        self.died = False
        self._dead = set[str]()
        self._is_down = False
        #: What came while the router was down: whoever sent it asks again.
        self._unheard: list[LiveRequest] = []
        self._empty = threading.Condition()
        self._closed = False
        #: For the view, since the start: what came and left, and the KVCache that offloaded requests had delivered.
        self._arrived = self._answered = self._unanswered = self._crossed_bytes = 0
        self._thread = threading.Thread(target=self.clock.run, name="router", daemon=True)
        self._forget_all()

    def _forget_all(self) -> None:
        """Know what a router knows that has just been started: the deployment as it is configured, and nothing that happened before."""
        prfaas = [self._prfaas_plan] if self._prfaas_plan is not None else []
        self._caches = self._view_of_caches()
        self.scheduler = Scheduler(self._spec, [self._pd_plan], prfaas, self._caches.indices())
        #: By request whose prefix crosses the link, the instances that send and receive it.
        self._copying: dict[int, tuple[str, str]] = {}
        self._holds: defaultdict[str, set[int]] = defaultdict(set)
        self._decoders = FewestHeld()
        for instance in self.scheduler.pd[0].decoding:
            self._decoders.add(instance)
        self._egress = Egress(self._link_bps, self.scale.time, self.scale.bytes)
        #: By instance, from the decision until it serves its new role.
        self._conversions: dict[str, Conversion] = {}
        self._was: dict[str, Pool] = {}
        #: Requests, with their attempt, that wait for an instance, as there is none to prefill or none to decode.
        self._parked: list[tuple[LiveRequest, int]] = []
        self._finished = self._finished_tokens = 0

    # From other threads.

    def start(self, fleet: Fleet, scale: Scale) -> None:
        """Route to that fleet; time counts from the scale's origin."""
        self._fleet, self.scale = fleet, scale
        # What exists by now stays: a collection that walked it would stop every thread for a tenth of a second.
        gc.freeze()
        self._thread.start()
        spec = self.scheduler.spec
        if self.scheduler.watches:
            self.clock.ask(self._every, spec.short_term.period_s, self._beat)
            if spec.slow_period_s is not None:
                self.clock.ask(self._every, spec.slow_period_s, self._slow_beat)

    def submit(
        self, number: int, arrival_s: float, tokens: int, output_tokens: int, chains: Chains | None = None
    ) -> None:
        """A request, due at `arrival_s` of the deployment's time; `chains` name its blocks, where prompts share their beginning."""
        self.clock.ask(self._arrive, number, arrival_s, tokens, output_tokens, chains)

    def stop(self, number: int, outcome: str, output_tokens: int) -> None:
        """Let a request leave before its last token, with that outcome and so many tokens: it is complete, too late, or nobody waits."""
        self.clock.ask(self._stop, number, outcome, output_tokens)

    def view(self) -> Future[View]:
        """How it stands, once its thread comes to it."""
        found = Future[View]()
        self.clock.ask(lambda: found.set_result(self._view()))
        return found

    def heard(self, name: str, said: say.FromInstance) -> None:
        """What an instance said."""
        self.clock.ask(self._hear, name, said)

    def ended(self, name: str, how: Ended) -> None:
        """An instance has died, failed or fallen silent."""
        self.clock.ask(self._instance_ended, name, how)

    def note(self, words: str) -> None:
        """Put an event into the record, as of now."""
        self.clock.ask(self._note, words)

    def go_down(self) -> None:
        """A fault: the router ends. Whatever is sent to it is lost until it comes up."""
        self.clock.ask(self._go_down)

    def come_up(self) -> None:
        """It is started anew and knows nothing; the clients ask again for all that has not been answered."""
        self.clock.ask(self._come_up)

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
        gc.unfreeze()
        left = [*self._live.values(), *self._unheard]
        for request in left:
            self._give_up_at(request)
            self._leave(request, "timed_out")
        return len(left)

    def requests(self) -> pd.DataFrame:
        """The requests table, in the order of their numbers; times unscaled."""
        frame = pd.DataFrame(self.rows, columns=list(LIVE_COLUMNS))
        return frame.sort_values("id", ignore_index=True)

    # In the router's own thread.

    def _now_s(self) -> float:
        return self.scale.virtual_s(time.monotonic())

    def _note(self, words: str) -> None:
        self.events.append((self._now_s(), words))

    def _every(self, period_s: float, beat: Any) -> None:
        def again(at_s: float) -> None:
            if not self._closed:
                if not self._is_down:
                    beat(self._now_s())
                self.clock.at(at_s + period_s / self.scale.time, again, at_s + period_s / self.scale.time)

        first = time.monotonic() + period_s / self.scale.time
        self.clock.at(first, again, first)

    def _arrive(self, number: int, arrival_s: float, tokens: int, output_tokens: int, chains: Chains | None) -> None:
        self._arrived += 1
        request = LiveRequest(number, arrival_s, tokens, output_tokens)
        if chains is not None and (caches := self.scheduler.caches) is not None:
            request.chain, request.kept_chain = caches.usable(chains[0], tokens), chains[1]
        self._take(request)

    def _take(self, request: LiveRequest) -> None:
        if self._is_down:
            self._unheard.append(request)
            return
        if len(self._live) >= self._limit:
            self.overloaded = True
            self._leave(request, "refused")
            return
        self._live[request.number] = request
        self._route(request)

    def _route(self, request: LiveRequest) -> None:
        self._carry_out(request, self.scheduler.arrive(self._now_s(), request.number, request.tokens, 0, request.chain))

    def _carry_out(self, request: LiveRequest, decision: Decision) -> None:
        request.decision = decision
        request.fell_back = request.fell_back or decision.fell_back
        if decision.action == "refuse":
            self._leave(request, "refused")
            return
        if decision.action == "fail":
            self._parked.append((request, request.attempt))
            return
        if decision.action == "fetch":
            self._fetch(request, decision)
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
                request.number, request.attempt, request.tokens, decision.cached_tokens, request.output_tokens, decision.kv_bytes, to,
                self._prompt(request.number),
            ),
        )  # fmt: skip

    def _fetch(self, request: LiveRequest, decision: Decision) -> None:
        """Have the prefix that a request goes on from cross the link first, from the instance that has it to one that prefills.

        Where caches belong to whole clusters, that is any instance.
        """
        assert self.scheduler.caches is not None
        chain = self.scheduler.caches.first(request.chain or (), decision.cached_tokens)
        here, there = (PD, PRFAAS) if decision.offload else (PRFAAS, PD)
        holder = self._caches.holder(here, chain)
        source = f"{here}.{holder}" if holder is not None else self._freest(self._alive(here))
        target = self._freest(self._alive(there) if holder is None else self._prefilling(there))
        if source is None or target is None:
            self._parked.append((request, request.attempt))
            return
        self._copying[request.number] = (source, target)
        blocks = [say.name_of(key) for key in chain] if holder is not None else []
        self._tell(
            source,
            say.Copy(request.number, request.attempt, decision.cached_tokens, decision.fetch_bytes, target, blocks),
        )

    def _freest(self, names: Sequence[str]) -> str | None:
        return min(names, key=lambda name: len(self._holds[name]), default=None)

    def _prefilling(self, cluster: str) -> list[str]:
        state = self.scheduler.pd[0] if cluster == PD else self.scheduler.prfaas[0]
        return [f"{cluster}.{index}" for index in sorted(state.placement.free_at_s)]

    def _alive(self, cluster: str) -> list[str]:
        assert self._fleet is not None
        return [name for name in self._fleet.names if name.startswith(f"{cluster}.") and name not in self._dead]

    def _decoder(self, request: LiveRequest) -> str | None:
        """The decode instance that takes a request: the one that holds fewest; None, and the request waits, while there is none."""
        instance = self._decoders.take()
        if instance is None:
            self._parked.append((request, request.attempt))
            return None
        request.decode = f"pd0.{instance}"
        self._holds[request.decode].add(request.number)
        return request.decode

    def _unpark(self) -> None:
        """Somebody serves who did not: who waited for that goes on."""
        parked, self._parked = self._parked, []
        for request, attempt in parked:
            if self._live.get(request.number) is request and request.attempt == attempt:
                self._again(request)

    def _tell(self, name: str, said: say.ToInstance) -> None:
        assert self._fleet is not None
        self._fleet.tell(name, said)

    def _hear(self, name: str, said: say.FromInstance) -> None:
        if isinstance(said, say.Lateness):
            self.lateness[name].append(said)
        elif isinstance(said, say.Sending):
            self.sending[name] = said
            if self._listener is not None:
                self._listener.sent(name, said)
        elif isinstance(said, say.Ready):
            if name in self._dead:
                self._repaired(name)
        elif isinstance(said, say.Stepped):
            self._stepped(said)
        elif isinstance(said, say.Cached):
            if not self._is_down:
                self._caches.heard(name, said)
        elif not (self._is_down or isinstance(said, say.Connected | say.Time)):
            request = self._live.get(said.request)
            if request is not None and request.attempt == said.attempt:
                self._of_request(name, request, said)

    def _of_request(self, name: str, request: LiveRequest, said: say.FromInstance) -> None:
        match said:
            case say.Prefilled():
                request.start_s, request.end_s = said.start_s, said.end_s
                request.found_tokens = said.cached_tokens
                self._caches.prefilled(request)
                self._release(request.prefill, request)
                self._account(request.prefill)
                if not request.decode:
                    request.delivered_s = time.monotonic()
                    to = self._decoder(request)
                    if to is not None:
                        self._tell(
                            to, say.Decode(request.number, request.attempt, request.tokens, request.output_tokens)
                        )
                if request.ended is not None:
                    self._finish(request, request.ended)
            case say.Delivered():
                request.delivered_s, request.payload_bytes = said.at_s, said.payload_bytes
                if request.offloaded:
                    self._crossed_bytes += said.payload_bytes
                    self._caches.delivered(request)
            case say.Copied():
                source, target = (one.partition(".")[0] for one in self._copying.pop(request.number))
                self.copied_bytes[source] += said.payload_bytes
                self._caches.copied(request, target)
                assert request.decision is not None
                there = self.scheduler.fetched(self._now_s(), request.tokens, 0, request.chain, request.decision)
                self._carry_out(request, there)
            case say.Decoding():
                request.joined_s, request.first_s = said.joined_s, said.first_s
            case say.Finished():
                # Nothing orders what two instances say: without the word of the other, its times and its prefix would be lost.
                if math.isnan(request.end_s):
                    request.ended = said
                else:
                    self._finish(request, said)
            case say.Undelivered():
                self._note(f"request {request.number} from {name}: {said.why}")
                if said.full:
                    self._rest(int(name.partition(".")[2]))
                self._again(request)

    def _finish(self, request: LiveRequest, said: say.Finished) -> None:
        if said.tokens is not None and self._listener is None:
            self.tokens[request.number] = said.tokens
        self._finished += 1
        self._finished_tokens += request.output_tokens
        self._caches.finished(request)
        self._leave(request, "fell_back" if request.fell_back else "ok", said.at_s)

    def _stepped(self, said: say.Stepped) -> None:
        """Hand on the tokens of a step, but for those of attempts that were given up."""
        if self._listener is not None and not self._is_down:
            live = self._live
            self._listener.stepped([
                (number, index, token)
                for number, attempt, index, token in said.tokens
                if number in live and live[number].attempt == attempt
            ])  # fmt: skip

    def _stop(self, number: int, outcome: str, output_tokens: int) -> None:
        request = self._live.get(number)
        if request is None:
            return
        self._give_up_at(request)
        request.output_tokens = output_tokens
        if outcome == "ok":
            self._finished += 1
            self._finished_tokens += output_tokens
            outcome = "fell_back" if request.fell_back else "ok"
        self._leave(request, outcome, time.monotonic())

    def _view(self) -> View:
        home, phases = self.scheduler.pd[0], dict.fromkeys(PHASES, 0)
        for request in self._live.values():
            phases[request.phase] += 1
        names = self._fleet.names if self._fleet is not None else []
        state = home.state
        return View(
            state.threshold_tokens,
            state.bandwidth_scarce,
            self.scheduler.prfaas[0].link_up if self.scheduler.prfaas else False,
            state.link.utilisation,
            phases,
            {name: len(self._holds.get(name, ())) for name in names},
            {name: self._role(name) for name in names},
            self._now_s(),
            self._arrived,
            self._answered,
            self._unanswered,
            self._crossed_bytes * self.scale.bytes,
            self._link_bps,
        )

    def _role(self, name: str) -> str:
        if name in self._dead:
            return "down"
        cluster, _, index = name.partition(".")
        return "decode" if cluster == "pd0" and int(index) in self.scheduler.pd[0].decoding else "prefill"

    def _rest(self, instance: int) -> None:
        """Pass a decode instance over that has no memory: holding the fewest requests, it would be given all that come."""
        self._decoders.pause(instance)
        self.clock.at(time.monotonic() + _REST_S / self.scale.time, self._decoders.resume, instance)

    def _account(self, name: str) -> None:
        """Correct what the scheduler believes of a prefill instance that has just ended something: what it still holds begins now."""
        cluster, _, index = name.partition(".")
        now_s = self._now_s()
        left_s = sum(decision.work_s for number in self._holds[name] if (decision := self._live[number].decision))
        self.scheduler.report(cluster, [InstanceReport(int(index), len(self._holds[name]), now_s + left_s)])

    def _release(self, name: str, request: LiveRequest) -> None:
        self._holds[name].discard(request.number)
        if name in self._conversions and not self._holds[name]:
            self._drained(name)

    def _again(self, request: LiveRequest) -> None:
        """Prefill a request anew whose prefill, transfer or decode was lost."""
        offload = request.offloaded
        if self._next_attempt(request):
            self._carry_out(request, self.scheduler.lost(self._now_s(), request.tokens, 0, request.chain, offload))

    def _next_attempt(self, request: LiveRequest) -> bool:
        """Give up what was tried; whether it may be tried again."""
        self._give_up_at(request)
        self._unhold(request)
        request.next_attempt()
        if request.attempt >= ATTEMPTS:
            self._leave(request, "failed")
            return False
        return True

    def _give_up_at(self, request: LiveRequest) -> None:
        """Tell the instances that have a request to forget it."""
        having = {request.prefill, request.decode, *self._copying.get(request.number, ())}
        for name in having - {"", *self._dead}:
            self._tell(name, say.Forget(request.number, request.attempt))

    def _unhold(self, request: LiveRequest) -> None:
        self._copying.pop(request.number, None)
        if request.prefill:
            self._release(request.prefill, request)
        if request.decode:
            self._decoders.release(int(request.decode.partition(".")[2]))
            self._release(request.decode, request)

    def _leave(self, request: LiveRequest, outcome: str, finish_s: float = math.nan) -> None:
        self._unhold(request)
        if outcome in ANSWERED:
            self._answered += 1
        else:
            self._unanswered += 1
        row = request.row(outcome, finish_s, self.scale)
        self._live.pop(request.number, None)
        if self._listener is not None:
            self._listener.left(dict(zip(LIVE_COLUMNS, row, strict=True)))
        else:
            self.rows.append(row)
        if not self._live:
            with self._empty:
                self._empty.notify_all()

    # Instances that end and come back, and the router itself.

    def _instance_ended(self, name: str, how: Ended) -> None:
        if self._closed or name in self._dead:
            return
        self._note(str(how))
        self._dead.add(name)
        self.died = True
        if self._is_down:
            return
        self._take_out(name)
        self._caches.ended(name)
        copied = {number for number, pair in self._copying.items() if name in pair}
        for number in sorted(self._holds.pop(name, set()) | copied):
            if (request := self._live.get(number)) is None:
                continue
            if request.ended is not None:
                self._finish(request, request.ended)
            else:
                self._again(request)

    def _take_out(self, name: str) -> None:
        """Give an instance that has ended no more work."""
        cluster, _, index = name.partition(".")
        instance = int(index)
        for pool in self._pools(cluster, instance):
            self.scheduler.failed(pool, 0, instance)
        if cluster == "pd0":
            self._decoders.remove(instance)
        self._conversions.pop(name, None)

    def _pools(self, cluster: str, instance: int) -> list[Pool]:
        if cluster.startswith("prfaas"):
            return ["prfaas"]
        home = self.scheduler.pd[0]
        pool: Pool = "pd_d" if instance in home.decoding else "pd_p"
        self._was[f"{cluster}.{instance}"] = pool
        return [pool]

    def _repaired(self, name: str) -> None:
        self._dead.discard(name)
        self._note(f"{name} serves again")
        if self._is_down:
            return
        cluster, _, index = name.partition(".")
        pool: Pool = "prfaas" if cluster.startswith("prfaas") else self._was[name]
        self.scheduler.repaired(self._now_s(), pool, 0, int(index))
        if pool == "pd_d":
            self._decoders.add(int(index))
        self._unpark()

    def _go_down(self) -> None:
        self._is_down = True
        self._note(f"the router is down, with {len(self._live)} requests in flight")

    def _come_up(self) -> None:
        """Begin anew. What instances still do for attempts of before is given up, as nobody knows where it is."""
        assert self._fleet is not None
        self._is_down = False
        waiting, self._unheard = self._unheard, []
        self._note(
            f"the router serves again: {len(self._live)} requests are asked for anew, {len(waiting)} for the first time"
        )
        self._forget_all()
        for name in self._dead:
            self._take_out(name)
        in_flight = list(self._live.values())
        for request in in_flight:
            for name in self._fleet.names:
                if name not in self._dead:
                    self._tell(name, say.Forget(request.number, request.attempt))
            request.prefill = request.decode = ""
        for request in in_flight:
            if self._next_attempt(request):
                self._route(request)
        for request in waiting:
            self._take(request)

    # The control loops.

    def _links(self) -> list[LinkReport]:
        if self._prfaas_plan is None:
            return []
        found = [said for name, said in self.sending.items() if name.startswith("prfaas")]
        return [self._egress.report(time.monotonic(), found)]

    def _beat(self, now_s: float) -> None:
        for name in self._alive(PRFAAS):
            self._tell(name, say.Report())
        links = self._links()
        if links and links[0].up != self.scheduler.prfaas[0].link_up:
            self.scheduler.link_changed(0, links[0].up)
        state = self.scheduler.short_term(now_s, 0, links)
        home = self.scheduler.pd[0]
        self.samples.append(
            Sample(
                now_s, 0, state.threshold_tokens, state.bandwidth_scarce, home.serving, len(home.decoding),
                state.link.utilisation, state.prfaas.waiting_s, state.pd.waiting_s, self._waiting_decode(),
            )
        )  # fmt: skip
        if self.scheduler.spec.fallback_s is not None:
            self._give_up(now_s)

    def _waiting_decode(self) -> int:
        """Requests whose KVCache is there and that have no place in a batch yet."""
        return sum(1 for one in self._live.values() if not math.isnan(one.delivered_s) and math.isnan(one.joined_s))

    def _give_up(self, now_s: float) -> None:
        for prfaas in self.scheduler.overdue(now_s):
            stalled = [
                StalledTransfer(one.number, 0, one.tokens, one.chain)
                for one in self._live.values()
                if one.offloaded and not math.isnan(one.end_s) and math.isnan(one.delivered_s)
            ]
            for transfer, decision in self.scheduler.give_up(now_s, prfaas, stalled):
                request = self._live[transfer.id]
                if self._next_attempt(request):
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
            self._waiting_decode(),
        )
        conversion = self.scheduler.long_term(now_s, 0, self._links(), report)
        if conversion is not None:
            name = f"pd0.{conversion.instance}"
            self._conversions[name] = conversion
            if conversion.to == "prefill":
                self._decoders.remove(conversion.instance)
            self._note(f"{name} turns to {conversion.to}")
            if not self._holds[name]:
                self._drained(name)

    def _drained(self, name: str) -> None:
        """A node that changes its role has finished what it had; it restarts and serves."""
        restart_s = self.scheduler.spec.restart_s / self.scale.time
        self.clock.at(time.monotonic() + restart_s, self._converted, name, self._conversions[name])

    def _converted(self, name: str, conversion: Conversion) -> None:
        if self._conversions.get(name) is not conversion:
            return  # it has ended meanwhile, or the router has
        del self._conversions[name]
        self.scheduler.converted(self._now_s(), conversion)
        self._note(f"{name} serves as {conversion.to}")
        if conversion.to == "decode":
            self._decoders.add(conversion.instance)
        self._unpark()
