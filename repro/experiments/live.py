"""A deployment that really runs: its instances as processes, a router in charge, open-loop load, KVCache over the emulated link.

Tier `emulate` replays the profiles: what is real is the scheduler's clock, the messages, the sockets, TCP and the link. One `play` is one
run of a simulated deployment's spec on the live system, so the same value, and the same requests, can be simulated and served.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd

from repro.errors import UserError
from repro.link import Link, LinkSpec, open_link
from repro.processes import Ended
from repro.scheduling.throughput import Deployment as Modelled
from repro.scheduling.views import Sample
from repro.serving.cluster_caches import PD, PRFAAS, Caches, ClusterCaches, InstanceCaches
from repro.serving.faults import FaultSchedule, LiveFault
from repro.serving.fleet import START_TIMEOUT_S, Config, Fleet, Launcher, LocalLauncher, Place
from repro.serving.instance import MAX_PIECE_BYTES, InstanceConfig
from repro.serving.listener import Listener
from repro.serving.live_view import shown
from repro.serving.load import LoadGenerator
from repro.serving.messages import FromInstance, Report
from repro.serving.router import Router
from repro.serving.scale import Scale, Scaling, calibrate
from repro.serving.upkeep import kept_up
from repro.simulate.spec import SimulationSpec
from repro.simulate.stability import TOLERANCE, bisect, growth_of
from repro.transport import TransportSpec
from repro.workload.stream import RequestBatch

#: After the last arrival: so long, unscaled, a run waits for what is under way.
DRAIN_S = 600.0
#: Requests that one run may have.
_NUMBERS = 10_000_000


@dataclass(frozen=True)
class Wire:
    """What KVCache crosses, and how: the configured link, its transport, and in how many pieces a request goes."""

    link: LinkSpec
    transport: TransportSpec
    pieces: int
    scale: Scale


def calibrated(scaling: Scaling, link_bps: float | None) -> tuple[Scale, dict[str, float]]:
    """The scale of an emulation on this machine, and, for the provenance, how late its timers were found to be."""
    found = calibrate()
    scale = scaling.scale(found, link_bps)
    return scale, {
        "time_scale": scale.time,
        "byte_scale": scale.bytes,
        "timers_late_mean_s": found.mean_s,
        "timers_late_p99_s": found.p99_s,
    }


def scale_of(base: Modelled, scaling: Scaling, time_scale: float) -> Scale:
    """The scale of one of several deployments that share a time scale.

    β makes its link `link_bps` on this machine, or less where the largest request would not go in that many pieces.
    """
    if scaling.byte_scale is not None:
        return Scale(time_scale, scaling.byte_scale)
    largest = float(base.prfaas.kv_bytes(base.lengths.maximum_tokens))
    here = base.egress_bps * time_scale / scaling.link_bps
    return Scale(time_scale, max(1.0, here, 1.01 * largest / scaling.pieces / MAX_PIECE_BYTES))


class Computing(Protocol):
    """Makes instances that compute a real model.

    Within `start_timeout_s` they serve. Where they `listen`, every instance has an address, those that only prefill too: somebody reads
    from it what it does not send.
    """

    @property
    def start_timeout_s(self) -> float:
        """What they may take to start."""
        ...

    @property
    def listens(self) -> bool:
        """Whether instances that only prefill have an address."""
        ...

    def config(self, name: str, transport: TransportSpec, host: str | None, batch_max: int, seed: int) -> Config:
        """What an instance of that name is started with."""
        ...


@dataclass(frozen=True)
class Played:
    """A run on the live system. `requests` is unscaled; lateness is in seconds of this machine.

    `wire_bytes` of TCP payload and `payload_bytes` of KVCache left PrfaaS; the former is nan where an instance ended, for what it had sent
    is counted nowhere. `copied_bytes` of prefixes crossed the link, either way, before the prefill that went on from them. `workers`
    tells by instance how its clock stood to the router's.
    """

    requests: pd.DataFrame
    late_p99_s: float
    timer_mean_s: float
    timer_p99_s: float
    cpu_s: float
    wall_s: float
    wire_bytes: float
    payload_bytes: int
    copied_bytes: int
    unfinished: int
    overloaded: bool
    samples: pd.DataFrame
    events: tuple[tuple[float, str], ...]
    tokens: Mapping[int, list[int]]
    workers: Mapping[str, Mapping[str, float]]

    @property
    def wire_overhead(self) -> float:
        """TCP payload on the link ÷ KVCache − 1; nan where nothing crossed."""
        return self.wire_bytes / self.payload_bytes - 1 if self.payload_bytes else math.nan


@dataclass(frozen=True)
class _Reported:
    """What has been sent across the link, and used by all instances, since they were started."""

    wire_bytes: int = 0
    cpu_s: float = 0.0


class Deployment:
    """A running fleet of one spec on an open link; `play` runs one stream of requests through it, any number of times."""

    def __init__(
        self,
        spec: SimulationSpec,
        wire: Wire,
        link: Link,
        log_directory: Path,
        seed: int,
        computing: Computing | None = None,
        launcher: Launcher | None = None,
    ) -> None:
        if len(spec.pd) != 1 or len(spec.prfaas) > 1:
            raise UserError("cluster: the live system serves one PD cluster and at most one PrfaaS cluster")
        if spec.scheduler.rebalance.enabled:
            raise UserError(
                "policy.rebalance: the live system moves a prefix when a request calls for it only; accepted: enabled=false"
            )
        self.spec = spec
        self._wire = wire
        self._router: Router | None = None
        self._link: Link | None = link
        self._computes = computing is not None
        self._launcher = launcher = launcher or LocalLauncher(link, log_directory)
        copies = spec.cache is not None and bool(spec.prfaas)
        self._fleet = Fleet(
            launcher, self._heard, self._ended, hands_over=self._computes, copies=copies,
            start_timeout_s=computing.start_timeout_s if computing is not None else START_TIMEOUT_S,
        )  # fmt: skip
        listens = copies or (computing is not None and computing.listens)
        self._next_number = 0
        self._reported = _Reported()
        pd = spec.pd[0]
        places = [Place("pd0", index, "decode") for index in range(pd.n_p + pd.n_d)]
        profiles: dict[str, Any] = {"pd0": pd.profile}
        if spec.prfaas:
            places += [Place("prfaas0", index, "prefill") for index in range(spec.prfaas[0].instances)]
            profiles["prfaas0"] = spec.prfaas[0].profile
        self.configs: dict[Place, Config] = {}
        for number, place in enumerate(places):
            host = launcher.host(place) if place.side == "decode" or listens else None
            if computing is not None:
                self.configs[place] = computing.config(place.name, wire.transport, host, pd.profile.batch_max, seed)
            else:
                self.configs[place] = InstanceConfig(
                    place.name, profiles[place.cluster], wire.transport, host, wire.scale.time, wire.scale.bytes, wire.pieces,
                    seed + number, copies,
                )  # fmt: skip

    def __enter__(self) -> Deployment:
        self._fleet.__enter__()
        try:
            self._fleet.start(self.configs)
        except BaseException as error:
            self._fleet.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(self, *exit_: Any) -> None:
        self._fleet.__exit__(*exit_)

    @property
    def scale(self) -> Scale:
        """α and β."""
        return self._wire.scale

    @property
    def fleet(self) -> Fleet:
        """Its instances."""
        return self._fleet

    def measured_link(self) -> dict[str, Any]:
        """What lies between the two sides, measured now, before the first run: for the record."""
        assert self._link is not None
        return self._launcher.measured(self._link)

    def _heard(self, name: str, said: FromInstance) -> None:
        if (router := self._router) is not None:
            router.heard(name, said)

    def _ended(self, name: str, how: Ended) -> None:
        if (router := self._router) is not None:
            router.ended(name, how)

    def play(
        self,
        batches: Iterable[RequestBatch],
        *,
        prompts: Sequence[Sequence[int]] | None = None,
        faults: Sequence[LiveFault] = (),
        drain_s: float = DRAIN_S,
        limit_requests: int = 20_000,
    ) -> Played:
        """Serve a stream of requests from an empty system, and wait up to `drain_s`, unscaled, for what is under way after the last.

        `prompts` of all requests in their order are sent along; without them instances that compute draw their own. Instances keep their
        caches from one run to the next.
        """
        spec, fleet = self.spec, self._fleet
        fleet.wait()
        prfaas = spec.prfaas[0] if spec.prfaas else None
        link_bps = self._wire.link.rate_bps or math.inf
        first = self.first_number()
        before = self._reported
        router = self._router = Router(
            spec.scheduler,
            spec.pd[0],
            prfaas,
            self._wire.scale,
            link_bps=link_bps,
            limit_requests=limit_requests,
            hands_over=self._computes,
            caches=self._caches,
            prompt=(lambda number: list(prompts[number - first])) if prompts is not None else lambda number: None,
        )
        batches = list(batches)
        if any(batch.turns for batch in batches):
            raise UserError(
                "workload.sessions.closed_loop: the load generator does not wait for answers; accepted: false"
            )
        router.scheduler.cover(max((batch.longest_tokens() for batch in batches), default=1))
        scale = replace(self._wire.scale, origin_s=self._origin_s())
        load = LoadGenerator(batches, scale, router.submit, first)
        began_s = time.monotonic()
        router.start(fleet, scale)
        load.start()
        try:
            with FaultSchedule(faults, fleet, router, scale, self._replace), shown(router.view):
                while not load.join(0.2):
                    if router.overloaded:
                        load.stop()
                        break
                if not router.overloaded:
                    router.drain(load.count, drain_s / scale.time)
            wall_s = time.monotonic() - began_s
            after = self._reported = self._report(router)
        finally:
            load.stop()
            unfinished = router.close()
            self._router = None
        late = [one for said in router.lateness.values() for one in said]
        timers = sum(one.timers for one in late) or 1
        requests = router.requests()
        requests["id"] -= first
        return Played(
            requests,
            late_p99_s=float(np.quantile(load.late_s, 0.99)) if len(load.late_s) else math.nan,
            timer_mean_s=sum(one.mean_s * one.timers for one in late) / timers,
            timer_p99_s=max((one.p99_s for one in late), default=math.nan),
            cpu_s=after.cpu_s - before.cpu_s,
            wall_s=wall_s,
            wire_bytes=after.wire_bytes - before.wire_bytes if not router.died else math.nan,
            payload_bytes=int(requests.loc[requests["route"] == "prfaas", "payload_bytes"].sum())
            + router.copied_bytes[PRFAAS],
            copied_bytes=router.copied_bytes.total(),
            unfinished=unfinished,
            overloaded=router.overloaded,
            samples=pd.DataFrame(list(router.samples), columns=Sample._fields),
            events=tuple(router.events),
            tokens={number - first: found for number, found in router.tokens.items()},
            workers=fleet.clocks.record(),
        )

    def _caches(self) -> Caches:
        """A router's view of the prefix caches, of one that knows of nothing yet."""
        cache = self.spec.cache
        if cache is None:
            return Caches()
        clusters = [PD, PRFAAS] if self.spec.prfaas else [PD]
        if self._computes:
            return InstanceCaches(cache.block_tokens, any(group.kind == "request" for group in cache.groups), clusters)
        return ClusterCaches(cache, clusters)

    def first_number(self) -> int:
        """The first of ten million request numbers used once, so that what an instance still says of earlier ones is nobody's."""
        first, self._next_number = self._next_number, self._next_number + _NUMBERS
        return first

    @contextmanager
    def serving(self, listener: Listener, limit_requests: int) -> Iterator[Router]:
        """A router for requests that somebody submits one by one until the block ends.

        Instances that end are started anew. Whoever is still in the system at the end is told to the listener as timed out.
        """
        spec, fleet = self.spec, self._fleet
        fleet.wait()
        router = self._router = Router(
            spec.scheduler,
            spec.pd[0],
            spec.prfaas[0] if spec.prfaas else None,
            self._wire.scale,
            link_bps=self._wire.link.rate_bps or math.inf,
            limit_requests=limit_requests,
            hands_over=self._computes,
            caches=self._caches,
            prompt=listener.prompt,
            listener=listener,
        )
        router.start(fleet, replace(self._wire.scale, origin_s=self._origin_s()))
        try:
            with kept_up(fleet, self._replace), shown(router.view):
                yield router
        finally:
            router.close()
            self._router = None

    def _origin_s(self) -> float:
        """The first moment of a run, on CLOCK_MONOTONIC: that of the link's schedule, which begins with the first run."""
        link, self._link = self._link, None
        return link.start() if link is not None and self._wire.link.schedule else time.monotonic() + 0.2

    def _replace(self, name: str) -> None:
        self._fleet.replace(name, next(config for place, config in self.configs.items() if place.name == name))

    def _report(self, router: Router) -> _Reported:
        """Let every instance that lives say what it has sent and how late it was."""
        router.sending.clear()
        wanted = {name for name in self._fleet.names if self._fleet.is_alive(name)}
        self._fleet.tell_all(Report())
        until_s = time.monotonic() + 5.0
        while not wanted <= router.sending.keys() and time.monotonic() < until_s:
            time.sleep(0.01)
        sent = sum(said.wire_bytes for name, said in list(router.sending.items()) if name.startswith("prfaas"))
        late = [one[-1] for one in list(router.lateness.values())]
        return _Reported(sent, sum(one.cpu_s for one in late))


@contextmanager
def deployed(
    spec: SimulationSpec,
    wire: Wire,
    log_directory: Path,
    run: str,
    seed: int = 0,
    computing: Computing | None = None,
    launcher: Launcher | None = None,
) -> Iterator[Deployment]:
    """Open the scaled link and start the deployment on it; its instances replay their profiles, or compute.

    `launcher` starts them, by default as processes of this machine on the two sides of the link.
    """
    with (
        open_link(wire.link, run=run, time_scale=wire.scale.time, byte_scale=wire.scale.bytes) as link,
        Deployment(spec, wire, link, log_directory, seed, computing, launcher) as running,
    ):
        yield running


def lambda_max_of(
    live: Deployment,
    stream: Callable[[float], Iterable[RequestBatch]],
    guess_per_s: float,
    width: float,
    near: float,
    tell: Callable[[str], None],
) -> tuple[float, float]:
    """The highest rate whose queues stay and the lowest whose queues grow, on the running system; `stream` draws the requests of a rate."""

    def stable(rate_per_s: float) -> bool:
        played = live.play(stream(rate_per_s), drain_s=0.0)
        done = played.requests
        grows = math.inf if played.overloaded else growth_of(done["arrival_s"].to_numpy(), done["finish_s"].to_numpy())
        tell(f"{rate_per_s:.3f} req/s is {'stable' if grows <= TOLERANCE else 'too much'} (growth {grows:+.4f})")
        return bool(grows <= TOLERANCE)

    return bisect(stable, guess_per_s, width, near)
