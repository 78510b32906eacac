"""What is simulated: PD clusters, PrfaaS clusters with their links, the scheduler, caches and faults, as one frozen value."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from repro.errors import UserError
from repro.kvcache.pool import CacheSpec
from repro.scheduling.policies import Homogeneous, Naive
from repro.scheduling.spec import SchedulerSpec
from repro.scheduling.tables import Profile
from repro.simulate.link_spec import SharedLinkSpec


@dataclass(frozen=True)
class PdCluster:
    """A PD cluster: `n_p` instances prefill, `n_d` decode; `share` of the arrivals call it home.

    A decode instance has `decode_memory_bytes` for KVCache; None leaves its batch to BS_max. With `colocated_chunk_tokens` the `n_p`
    instances are all: each prefills in such chunks between its own decode steps, and `n_d` is `n_p`.
    """

    profile: Profile
    n_p: int
    n_d: int
    share: float = 1.0
    decode_memory_bytes: float | None = None
    colocated_chunk_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.colocated_chunk_tokens is not None:
            if self.colocated_chunk_tokens < 1:
                raise UserError(f"chunk_tokens: {self.colocated_chunk_tokens} is below 1")
            if self.n_p != self.n_d or self.decode_memory_bytes is not None:
                raise UserError("cluster.pd: colocated instances do both phases, and their memory is not counted")
        if self.n_p < 0 or self.n_d < 1:
            raise UserError(
                f"cluster.pd: n_p {self.n_p} and n_d {self.n_d}; accepted: 0 or more to prefill, 1 or more to decode"
            )
        if not self.share > 0:
            raise UserError(f"cluster.pd.share: {self.share} is not positive")
        if self.decode_memory_bytes is not None and not self.decode_memory_bytes > 0:
            raise UserError(f"cluster.decode.memory_bytes: {self.decode_memory_bytes} is not positive")


@dataclass(frozen=True)
class PrfaasCluster:
    """A PrfaaS cluster: prefill instances behind one egress link."""

    profile: Profile
    instances: int
    link: SharedLinkSpec

    def __post_init__(self) -> None:
        if self.instances < 1:
            raise UserError(f"cluster.prfaas.instances: {self.instances} is below 1; leave the cluster out instead")


@dataclass(frozen=True)
class Fault:
    """Instance `instance` of a pool stops at `at_s` and serves again `for_s` later; what it was doing is lost.

    In `pd_p` and `pd_d` only an instance that prefills or decodes by then, in `pd` one of either role; none between two roles.
    """

    pool: Literal["prfaas", "pd", "pd_p", "pd_d"]
    instance: int
    at_s: float
    for_s: float
    cluster: int = 0

    def __post_init__(self) -> None:
        if self.pool not in ("prfaas", "pd", "pd_p", "pd_d"):
            raise UserError(f"faults.pool: {self.pool!r} is unknown; accepted: prfaas, pd, pd_p, pd_d")
        if self.at_s < 0 or not self.for_s > 0:
            raise UserError(f"faults: at_s {self.at_s} must not be negative and for_s {self.for_s} must be positive")


@dataclass(frozen=True)
class SimulationSpec:
    """One run, but for its arrivals.

    `limit_requests`: with more in the system than this, the run stops and is flagged overloaded. `drain_s`: how long after the last arrival
    the run waits for what is under way.
    """

    pd: tuple[PdCluster, ...]
    prfaas: tuple[PrfaasCluster, ...] = ()
    scheduler: SchedulerSpec = field(default_factory=SchedulerSpec)
    chunk_tokens: int | None = None
    cache: CacheSpec | None = None
    faults: tuple[Fault, ...] = ()
    limit_requests: int = 200_000
    drain_s: float = 3600.0

    def __post_init__(self) -> None:
        router = self.scheduler.router
        if not self.pd:
            raise UserError("cluster.pd: none given; accepted: one or more, since something must decode")
        loops = self.scheduler.long_term.enabled or self.scheduler.adaptive.enabled or self.scheduler.timetable
        if any(home.colocated_chunk_tokens for home in self.pd) and (self.prfaas or self.faults or loops):
            raise UserError(
                "cluster.pd: colocated instances serve alone; accepted: without PrfaaS, faults and conversions"
            )
        if isinstance(router, Naive) and not self.prfaas:
            raise UserError("policy.router: naive sends every prefill to PrfaaS, but there is no PrfaaS cluster")
        if any(not home.n_p for home in self.pd) and (not self.prfaas or isinstance(router, Homogeneous)):
            raise UserError(
                "policy.n_p: 0 leaves nobody to prefill what stays local; accepted: 1 or more, or a router that offloads"
            )
        if self.scheduler.rebalance.enabled and not (self.cache and self.prfaas):
            raise UserError(
                "policy.rebalance: needs caches and a PrfaaS cluster, between which and the PD cluster it copies"
            )
        if self.chunk_tokens is not None and self.chunk_tokens < 1:
            raise UserError(
                f"simulate.chunk_tokens: {self.chunk_tokens} is below 1; accepted: tokens, or null for whole prefill"
            )
        if self.chunk_tokens is not None and self.cache is not None and self.cache.lower:
            raise UserError(
                "policy.cache.lower: loads before whole prefills; accepted: with simulate.chunk_tokens null"
            )
        if not (self.limit_requests >= 1 and 0 <= self.drain_s < math.inf):
            raise UserError("simulate.limit_requests and simulate.drain_s: must be positive and finite")
