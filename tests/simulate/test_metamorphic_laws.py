"""Laws that hold whatever the numbers are, with the adaptive policy on: what is scaled alike stays alike, and more is never worse.

Adapting is not monotonic decision by decision, so "never worse" leaves a point of the share within the service level.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest
from tiny import play

from repro.bench._simulate_ours import deployment
from repro.configuration import build
from repro.kvcache.sizing import CacheOptions
from repro.presets import preset
from repro.record.request_metrics import good
from repro.scheduling import link_estimate, loops
from repro.scheduling.policies import Prfaas
from repro.scheduling.spec import PolicySpec
from repro.simulate.deployments import requests, simulated, with_scheduler
from repro.simulate.link_spec import SharedLinkSpec
from repro.simulate.spec import SimulationSpec
from repro.workload.arrivals import Poisson
from repro.workload.sessions import SessionSpec, draw_sessions
from repro.workload.spec import ServiceLevel
from repro.workload.stream import RequestBatch

LOADED = 2.6
SECONDS = 500.0
#: A point of the requests: what noise in the decisions may cost.
SLACK = 0.01


@cache
def deployed(rate_bps: float = 12e9) -> SimulationSpec:
    """The paper's deployment under the adaptive policy, on a link that binds now and then."""
    base, point = deployment()
    chosen = build(PolicySpec, preset("policy", "adaptive"))
    return with_scheduler(
        simulated(base, point, SharedLinkSpec(rate_bps=rate_bps), Prfaas()),
        short_term=chosen.short_term,
        adaptive=chosen.adaptive,
        fallback_s=chosen.fallback_s,
    )


@cache
def stream(rate: float = LOADED, seed: int = 7) -> RequestBatch:
    base, _ = deployment()
    return next(iter(requests(base, Poisson(rate), round(rate * SECONDS), seed)))


def met(table: pd.DataFrame) -> float:
    return float(good(table["ttft_s"].to_numpy(), table["tpot_s"].to_numpy(), ServiceLevel()).mean())


@cache
def usual() -> pd.DataFrame:
    return play(deployed(), [stream()])[0]


@dataclass(frozen=True)
class Scaled:
    """A profile with its sizes or its prefill times multiplied."""

    of: Any
    size: float = 1.0
    prefill: float = 1.0
    decode: float = 1.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.of, name)

    def kv_bytes(self, tokens: Any) -> Any:
        return self.size * self.of.kv_bytes(tokens)

    def prefill_s(self, tokens: Any) -> Any:
        return self.prefill * np.asarray(self.of.prefill_s(tokens))

    def decode_step_s(self, batch: int, context_tokens: float = 0.0) -> float:
        return float(self.decode * self.of.decode_step_s(batch, context_tokens))


def with_profiles(spec: SimulationSpec, **change: float) -> SimulationSpec:
    return replace(
        spec,
        pd=tuple(replace(one, profile=Scaled(one.profile, **change)) for one in spec.pd),
        prfaas=tuple(replace(one, profile=Scaled(one.profile, **change)) for one in spec.prfaas),
    )


def with_link(spec: SimulationSpec, **change: Any) -> SimulationSpec:
    return replace(spec, prfaas=tuple(replace(one, link=replace(one.link, **change)) for one in spec.prfaas))


def test_bytes_and_rates_scaled_alike_leave_every_time_as_it_is() -> None:
    link = deployed().prfaas[0].link
    k = 8.0
    scaled = with_link(
        with_profiles(deployed(), size=k),
        rate_bps=k * link.rate_bps, nic_bps=k * link.nic_bps, connection_bps=k * link.connection_bps,
    )  # fmt: skip
    table = play(scaled, [stream()])[0]
    assert table["ttft_s"].to_numpy() == pytest.approx(usual()["ttft_s"].to_numpy(), rel=1e-5, abs=1e-5)
    assert table["kv_bytes"].to_numpy() == pytest.approx(k * usual()["kv_bytes"].to_numpy())
    assert list(table["route"]) == list(usual()["route"])


def slower(value: Any, k: float) -> Any:
    """A specification whose times are k times as long."""
    times = [item.name for item in fields(value) if item.name.endswith("_s")]
    return replace(value, **{name: k * getattr(value, name) for name in times})


def test_times_scaled_alike_leave_the_share_within_the_scaled_service_level(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not each request's time: how far a queue strays within a horizon is a usual number of seconds to the fast loop's search."""
    link, scheduler = deployed().prfaas[0].link, deployed().scheduler
    k = 2.0
    monkeypatch.setattr(loops, "_RATE_MEMORY_S", k * loops._RATE_MEMORY_S)
    monkeypatch.setattr(link_estimate, "_PROBE_S", k * link_estimate._PROBE_S)
    slow = with_link(
        with_profiles(deployed(), prefill=k, decode=k),
        rate_bps=link.rate_bps / k, nic_bps=link.nic_bps / k, connection_bps=link.connection_bps / k, rtt_s=k * link.rtt_s,
    )  # fmt: skip
    assert scheduler.fallback_s is not None
    slow = with_scheduler(
        slow,
        short_term=slower(scheduler.short_term, k),
        adaptive=slower(scheduler.adaptive, k),
        fallback_s=k * scheduler.fallback_s,
    )
    asked = stream()
    table = play(slow, [RequestBatch(k * asked.arrival_s, asked.input_tokens, asked.output_tokens)])[0]
    level = ServiceLevel()
    slo = ServiceLevel(level.tokens_per_s / k, level.ttft_s * k)
    share = float(good(table["ttft_s"].to_numpy(), table["tpot_s"].to_numpy(), slo).mean())
    assert share == pytest.approx(met(usual()), abs=SLACK)
    assert table["tpot_s"].mean() == pytest.approx(k * usual()["tpot_s"].mean(), rel=0.01)


def test_the_same_again_is_the_same() -> None:
    assert play(deployed(), [stream()])[0].equals(usual())


def test_how_requests_are_cut_into_batches_does_not_matter() -> None:
    whole = stream()
    cut = len(whole.arrival_s) // 3
    parts = [RequestBatch(*(column[piece] for column in whole[:3])) for piece in (slice(None, cut), slice(cut, None))]
    assert play(deployed(), parts)[0].equals(usual())


def test_requests_after_a_moment_change_nothing_before_it() -> None:
    whole = stream()
    first = RequestBatch(*(column[: len(whole.arrival_s) // 2] for column in whole[:3]))
    end_s = float(first.arrival_s[-1])
    table = play(deployed(), [first])[0].sort_values("id").set_index("id")
    same = usual().sort_values("id").set_index("id").loc[table.index]
    done = (same["finish_s"] < end_s).to_numpy()
    assert done.sum() > 100
    assert table.loc[done, "ttft_s"].equals(same.loc[done, "ttft_s"])


MORE: dict[str, Callable[[SimulationSpec], SimulationSpec]] = {
    "bandwidth": lambda spec: with_link(spec, rate_bps=4 * spec.prfaas[0].link.rate_bps),
    "PrfaaS instances": lambda spec: replace(spec, prfaas=(replace(spec.prfaas[0], instances=6),)),
    "PD instances": lambda spec: replace(spec, pd=(replace(spec.pd[0], n_p=spec.pd[0].n_p + 1, n_d=spec.pd[0].n_d + 1),)),
    "speed of prefill": lambda spec: with_profiles(spec, prefill=0.8),
    "smaller states": lambda spec: with_profiles(spec, size=0.5),
}  # fmt: skip


#: On a link that binds, more prefill at once means more transfers that share it, each slower: a law only where the link does not bind.
NEEDS_ROOM = ("PrfaaS instances", "speed of prefill")


@pytest.mark.parametrize("what", MORE)
def test_more_is_never_worse(what: str) -> None:
    spec = deployed(100e9 if what in NEEDS_ROOM else 12e9)
    before = play(spec, [stream()])[0]
    assert met(play(MORE[what](spec), [stream()])[0]) >= met(before) - SLACK


def test_more_cache_is_never_worse() -> None:
    base, _ = deployment()
    pool = CacheOptions(enabled=True).spec(base.prfaas)
    agents = draw_sessions(SessionSpec(0.55), SECONDS, 3)
    shares, hits = [], []
    for capacity in (None, 1e11, 1e12, math.inf):
        cache = None if capacity is None else replace(pool, capacity_bytes=capacity)
        table = play(replace(deployed(), cache=cache), agents)[0]
        shares.append(met(table))
        hits.append(int(table["cached_tokens"].sum()))
    assert hits == sorted(hits)
    assert hits[-1] > 0
    assert all(more >= less - SLACK for less, more in itertools.pairwise(shares))


def test_fewer_requests_are_served_no_worse() -> None:
    assert met(play(deployed(), [stream(0.7 * LOADED)])[0]) >= met(usual()) - SLACK


def test_twice_the_instances_and_twice_the_requests_wait_no_longer() -> None:
    spec = deployed(24e9)
    (pd_cluster,), (prfaas,) = spec.pd, spec.prfaas
    doubled = replace(
        spec,
        pd=(replace(pd_cluster, n_p=2 * pd_cluster.n_p, n_d=2 * pd_cluster.n_d),),
        prfaas=(replace(prfaas, instances=2 * prfaas.instances),),
    )
    assert met(play(doubled, [stream(2 * LOADED)])[0]) >= met(usual()) - SLACK


def test_a_longer_round_trip_costs_at_least_its_way_and_moves_no_decision_of_an_idle_link() -> None:
    near, far = (play(with_link(deployed(100e9), rtt_s=rtt), [stream(1.0)])[0] for rtt in (0.0, 0.2))
    remote = (near["route"] == "prfaas").to_numpy()
    assert list(near["route"]) == list(far["route"])
    later = (far["ttft_s"] - near["ttft_s"]).to_numpy()
    assert later[remote].mean() == pytest.approx(0.1, abs=0.03)
    assert abs(later[~remote].mean()) < 0.02
