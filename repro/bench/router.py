"""How many requests a second the live router takes by itself, and how long one waits for it: instances that cost nothing answer at once.

What is asked of it is what a run asks: Scheduler decides, messages are written and read, the account is kept, a row is made. First as
fast as it can, with so many in the system at a time; then open-loop, at half of the rate that is asked of it and at half of that which it
reached, where its own delay is taken: from an arrival until the order to prefill is out, and from the end of a prefill in the PD cluster
until the order to decode is.

    scripts/bench router options.requests=50000
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from repro.errors import UserError
from repro.experiments.base import Context, Experiment, Outcome
from repro.paper import tables, text
from repro.processes.channel import decoded
from repro.profiles.presets import PaperInputs
from repro.record.metrics import Metric
from repro.scheduling.policies import Threshold
from repro.scheduling.spec import SchedulerSpec
from repro.serving import messages as say
from repro.serving.fleet import Fleet
from repro.serving.load import LoadGenerator
from repro.serving.router import Router
from repro.serving.scale import Scale
from repro.simulate.link_spec import SharedLinkSpec
from repro.simulate.spec import PdCluster, PrfaasCluster
from repro.workload.stream import Chains, RequestBatch

#: The bar that the live system was asked to clear.
AT_LEAST_PER_S, DELAY_AT_MOST_S = 2000.0, 0.005
_IN_SYSTEM = 256
_PAUSE_S = 2e-4
_DRAIN_S = 60.0


@dataclass(frozen=True)
class Options:
    """`requests` as fast as the router takes them, and `open_loop_s` of arrivals at `load` of the rate that is asked of it, and
    of the rate that was found, each `repeats` times.
    """

    requests: int = 20_000
    open_loop_s: float = 10.0
    load: float = 0.5
    repeats: int = 3

    def __post_init__(self) -> None:
        if self.requests < 1000 or self.repeats < 1:
            raise UserError(
                f"options.requests, repeats: {self.requests} and {self.repeats}; accepted: 1000 and 1 or more"
            )
        if not (self.open_loop_s > 0 and 0 < self.load < 1):
            raise UserError(
                f"options.open_loop_s, load: {self.open_loop_s:g} and {self.load:g}; accepted: above 0, and a load below 1"
            )


class _Answering(Fleet):
    """Instances that need no time: what they are told is written out, and what they would say is read back, in the router's own thread."""

    def __init__(self, router: Router) -> None:
        super().__init__(None, router.heard, router.ended)  # type: ignore[arg-type]
        self._router = router
        self.sent_s: dict[int, float] = {}
        self.prefilled_s: dict[int, float] = {}
        self.decode_delays_s: list[float] = []

    @property
    def names(self) -> list[str]:
        """No loop of the scheduler asks anybody for a report."""
        return []

    def tell(self, name: str, said: say.ToInstance) -> None:
        """Take an order and answer it."""
        now_s = time.monotonic()
        say.encoded(said)
        match said:
            case say.Prefill(request, attempt, _, _, _, kv_bytes, to):
                self.sent_s[request] = now_s
                self._say(name, say.Prefilled(request, attempt, now_s, now_s))
                if to is None:
                    self.prefilled_s[request] = now_s
                else:
                    self._say(to, say.Delivered(request, attempt, now_s, round(kv_bytes)))
                    self._decode(to, request, attempt, now_s)
            case say.Decode(request, attempt):
                self.decode_delays_s.append(now_s - self.prefilled_s.pop(request))
                self._decode(name, request, attempt, now_s)

    def _decode(self, name: str, request: int, attempt: int, now_s: float) -> None:
        self._say(name, say.Decoding(request, attempt, now_s, now_s))
        self._say(name, say.Finished(request, attempt, now_s))

    def _say(self, name: str, said: say.FromInstance) -> None:
        self._heard(name, say.from_instance(decoded(say.encoded(said))))


@dataclass(frozen=True)
class Ran:
    """One run of the router: its requests per second of wall and of processor time, and its own delays."""

    per_s: float
    per_cpu_s: float
    order_delays_s: NDArray[np.float64]
    decode_delays_s: NDArray[np.float64]


def run(context: Context) -> Outcome:
    """Both loads, `repeats` times."""
    options = context.options
    assert isinstance(options, Options)
    lengths = PaperInputs.draw().lengths.sample(np.random.default_rng(context.settings.seed), options.requests)
    full = [_as_fast_as_it_takes(lengths) for _ in range(options.repeats)]
    rate = float(np.median([one.per_s for one in full]))
    context.progress(f"as fast as it takes them: {rate:,.0f} requests a second")
    rows = _throughput_rows(context, full)
    asked = options.load * AT_LEAST_PER_S
    worst = {}
    for suffix, open_per_s in (("", asked), ("_at_its_own_load", options.load * rate)):
        found = [_open_loop(lengths, open_per_s, options.open_loop_s) for _ in range(options.repeats)]
        orders = np.concatenate([one.order_delays_s for one in found])
        decodes = np.concatenate([one.decode_delays_s for one in found])
        for case, delays in (("to_prefill", orders), ("to_decode", decodes)):
            for metric, value in (
                ("router_delay_p50_s", float(np.quantile(delays, 0.5))),
                ("router_delay_p99_s", float(np.quantile(delays, 0.99))),
            ):
                rows.append(context.metric(case + suffix, metric, value, "s", "measured", n=len(delays)))
        worst[suffix] = float(np.quantile(orders, 0.99))
        context.progress(
            f"at {open_per_s:,.0f} a second an order to prefill is out after {1e3 * np.quantile(orders, 0.5):.2f} ms "
            f"(P99 {1e3 * worst[suffix]:.2f} ms)"
        )
    bar = rate >= AT_LEAST_PER_S and worst[""] < DELAY_AT_MOST_S
    context.progress(
        f"{'meets' if bar else 'misses'} {AT_LEAST_PER_S:,.0f} requests a second and {1e3 * DELAY_AT_MOST_S:g} ms"
    )
    return Outcome(rows)


def _throughput_rows(context: Context, full: list[Ran]) -> list[Metric]:
    return [
        context.metric(
            "as_fast_as_it_takes", metric, float(np.median(values)), "req/s", "measured",
            interval=(min(values), max(values)) if len(values) > 1 else (math.nan, math.nan), n=len(values),
        )
        for metric, values in (
            ("routed_per_s", [one.per_s for one in full]), ("routed_per_cpu_s", [one.per_cpu_s for one in full]),
        )
    ]  # fmt: skip


def _router(lengths: NDArray[np.int64]) -> tuple[Router, _Answering]:
    """A router over the deployment of §4.1 at its threshold."""
    inputs = PaperInputs.draw()
    printed = tables.TABLE_6["prfaas_pd"]
    pd = PdCluster(inputs.h20(), int(printed["n_p"].value), int(printed["n_d"].value))
    prfaas = PrfaasCluster(inputs.h200(), text.PRFAAS_GPUS // text.GPUS_PER_INSTANCE, SharedLinkSpec())
    spec = SchedulerSpec(Threshold(), threshold_tokens=printed["threshold_tokens"].value)
    router = Router(spec, pd, prfaas, Scale())
    router.scheduler.cover(int(lengths.max()))
    return router, _Answering(router)


def _as_fast_as_it_takes(lengths: NDArray[np.int64]) -> Ran:
    """Every request at once, but never more than a few hundred in the router's queue: a queue without end would measure memory."""
    router, fleet = _router(lengths)
    router.start(fleet, Scale(origin_s=time.monotonic()))
    began_s, cpu_s = time.monotonic(), time.process_time()
    for number, tokens in enumerate(lengths.tolist()):
        while number - len(router.rows) >= _IN_SYSTEM:
            time.sleep(_PAUSE_S)
        router.submit(number, time.monotonic() - began_s, tokens, 128)
    _drained(router, len(lengths))
    wall_s, cpu_s = time.monotonic() - began_s, time.process_time() - cpu_s
    router.close()
    return Ran(len(lengths) / wall_s, len(lengths) / cpu_s, np.empty(0), np.empty(0))


def _open_loop(lengths: NDArray[np.int64], rate_per_s: float, for_s: float) -> Ran:
    """Arrivals at random, whatever becomes of them; delays count from the moment at which each was due."""
    count = max(round(rate_per_s * for_s), 100)
    rng = np.random.default_rng(count)
    arrival_s = np.cumsum(rng.exponential(1 / rate_per_s, count))
    tokens = np.resize(lengths, count)
    router, fleet = _router(lengths)
    scale = replace(Scale(), origin_s=time.monotonic() + 0.05)
    router.start(fleet, scale)
    asked_s: dict[int, float] = {}

    def submit(number: int, due_s: float, input_tokens: int, output_tokens: int, chains: Chains | None) -> None:
        asked_s[number] = time.monotonic()
        router.submit(number, due_s, input_tokens, output_tokens, chains)

    load = LoadGenerator([RequestBatch(arrival_s, tokens, np.full(count, 128))], scale, submit)
    cpu_s = time.process_time()
    load.start()
    load.join()
    _drained(router, count)
    wall_s, cpu_s = time.monotonic() - scale.origin_s, time.process_time() - cpu_s
    router.close()
    delays = np.array([fleet.sent_s[number] - at_s for number, at_s in asked_s.items()])
    return Ran(count / wall_s, count / cpu_s, delays, np.asarray(fleet.decode_delays_s))


def _drained(router: Router, count: int) -> None:
    if not router.drain(count, _DRAIN_S):
        raise UserError(
            f"bench=router: {count - len(router.rows)} of {count} requests were not answered within {_DRAIN_S:g} s"
        )


EXPERIMENT = Experiment("bench_router", reads={"emulate": ("seed", "options")}, run=run, options=Options, timed=True)
