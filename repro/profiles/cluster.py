"""Clusters of accelerators, and what they cost."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from repro.errors import UserError
from repro.profiles.failures import FailureSpec


@dataclass(frozen=True)
class PoolSpec:
    """So many instances, each running the named profile (a preset's name or a file)."""

    profile: str
    instances: int


@dataclass(frozen=True)
class PrfaasSiteSpec:
    """Another PrfaaS cluster, in another place: its instances, and the link of its own that leads from there to the PD cluster.

    `profile` null is that of `cluster.prfaas`; another one must be of the same model. Its link has `rate_bps` and `rtt_s` and is in all
    else like the configured one, but for `link.schedule`, which is of that one alone.
    """

    NODE: ClassVar = "cluster.also_prfaas"
    instances: int
    rate_bps: float
    rtt_s: float
    profile: str | None = None

    def __post_init__(self) -> None:
        if self.instances < 1:
            raise UserError(f"{self.NODE}.instances: {self.instances}; accepted: 1 or more")
        if not 0 < self.rate_bps < math.inf:
            raise UserError(f"{self.NODE}.rate_bps: {self.rate_bps}; accepted: bits per second above 0")
        if not 0 <= self.rtt_s < math.inf:
            raise UserError(f"{self.NODE}.rtt_s: {self.rtt_s}; accepted: seconds, 0 or more")


@dataclass(frozen=True)
class DecodeSpec:
    """What decides the decode batch of an instance beside BS_max; the defaults are the paper's, which has neither.

    `steps` reads T_decode as `fitted`, or from the `rows` over batch and context that a profile was measured with. `memory_bytes` is an
    instance's room for KVCache in bytes: requests join while S_kv of their contexts fits, and when growing contexts fill it, the one that
    joined last leaves and is recomputed on return, which is what vLLM does. Null leaves the batch to BS_max.
    """

    steps: Literal["fitted", "rows"] = "fitted"
    memory_bytes: float | None = None

    def __post_init__(self) -> None:
        if self.memory_bytes is not None and not 0 < self.memory_bytes < math.inf:
            raise UserError(
                f"cluster.decode.memory_bytes: {self.memory_bytes}; accepted: a positive number of bytes, or null for BS_max alone"
            )


@dataclass(frozen=True)
class ClusterSpec:
    """A PrfaaS cluster, a local PD cluster with its decode batches, and the homogeneous PD cluster that they are compared with (§4.1).

    Their instances fail as `failures` says. `also_prfaas` are further PrfaaS clusters, in other places; the scheduler chooses.
    """

    name: str
    prfaas: PoolSpec
    pd: PoolSpec
    homogeneous_instances: int
    decode: DecodeSpec = field(default_factory=DecodeSpec)
    failures: FailureSpec = field(default_factory=FailureSpec)
    also_prfaas: tuple[PrfaasSiteSpec, ...] = ()

    def __post_init__(self) -> None:
        # PrfaaS may have no instance; a homogeneous cluster needs one to prefill and one to decode.
        for key, instances, least in (
            ("prfaas.instances", self.prfaas.instances, 0),
            ("pd.instances", self.pd.instances, 1),
            ("homogeneous_instances", self.homogeneous_instances, 2),
        ):
            if instances < least:
                raise UserError(f"cluster.{key}: {instances}; accepted: {least} or more")
        if self.also_prfaas and not self.prfaas.instances:
            raise UserError(
                "cluster.also_prfaas: further clusters beside none; accepted: with cluster.prfaas.instances of 1 or more"
            )
        if self.also_prfaas and self.failures.enabled:
            raise UserError(
                "cluster.failures: of several PrfaaS clusters none fails; accepted: with cluster.also_prfaas empty"
            )


@dataclass(frozen=True)
class CostSpec:
    """Prices per GPU and hour in US dollars, by accelerator, and per GB of egress; `source` says where they are from."""

    name: str
    usd_per_gpu_hour: dict[str, float] = field(default_factory=dict)
    usd_per_egress_gb: float = 0.0
    source: str = ""

    def __post_init__(self) -> None:
        for accelerator, price in self.usd_per_gpu_hour.items():
            if not price > 0:
                raise UserError(f"cost.usd_per_gpu_hour.{accelerator}: {price} is not a positive price")
        if self.usd_per_egress_gb < 0:
            raise UserError(f"cost.usd_per_egress_gb: {self.usd_per_egress_gb} is negative")

    def gpu_hour_usd(self, accelerator: str) -> float:
        """The price of one GPU for an hour.

        Raises:
            UserError: for an accelerator without a price.
        """
        if accelerator not in self.usd_per_gpu_hour:
            known = ", ".join(sorted(self.usd_per_gpu_hour)) or "none"
            raise UserError(f"cost.usd_per_gpu_hour.{accelerator}: no price given in cost={self.name}; it has: {known}")
        return self.usd_per_gpu_hour[accelerator]
