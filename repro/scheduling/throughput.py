"""The throughput model of §3.4.1: three stages, the slowest of which sets Λ_max.

A PrfaaS request is prefilled and sent at the same time (layer-wise), so its stage runs at the slower of the two: that is why equation 3
takes a minimum and does not add the times. The two baselines of Table 6 are its corners: nothing is offloaded (homogeneous PD), or
everything is (naive heterogeneous PD).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from repro.errors import UserError
from repro.profiles.base import KVSize, PhaseProfile, PrefillCurve
from repro.workload.lengths import LengthDistribution

FloatArray = NDArray[np.float64]

#: `representative` is the paper's reading, T_prefill(E[L]); `true_mean` is E[T_prefill(L)], which is larger because T_prefill is convex.
Lengths = Literal["representative", "true_mean"]


@dataclass(frozen=True)
class Stages:
    """Capacity of each stage in req/s, before the routing split (equations 3–5)."""

    prfaas: float
    pd_prefill: float
    pd_decode: float

    def lambda_max(self, offload_fraction: float) -> float:
        """Highest sustained arrival rate in req/s when `offload_fraction` of requests go to PrfaaS (equation 6)."""
        p = offload_fraction
        bounds = [self.pd_decode]
        if p > 0:
            bounds.append(self.prfaas / p)
        if p < 1:
            bounds.append(self.pd_prefill / (1 - p))
        return min(bounds)


@dataclass(frozen=True)
class PrfaasSite:
    """A PrfaaS cluster behind a link of its own, beside the first one."""

    profile: PhaseProfile
    instances: int
    egress_bps: float

    def __post_init__(self) -> None:
        if self.instances < 1 or not self.egress_bps > 0:
            raise UserError(
                f"cluster.also_prfaas: {self.instances} instances behind {self.egress_bps} bit/s; accepted: 1 or more, above 0"
            )


@dataclass(frozen=True)
class Deployment:
    """Clusters, link and workload of one experiment, as the throughput model sees them.

    `prfaas` prefills requests longer than the threshold on `n_prfaas` instances and sends their KVCache over `egress_bps`; the PD
    cluster's `n_pd` instances of `pd` prefill the rest and decode everything. `sites` are further PrfaaS clusters of the same model.
    Each works at the slower of its prefill and its own link, whatever the others do: equation 3 becomes a sum of such minima, which
    holds where the scheduler sends a request to whichever is ahead (`repro.scheduling.scheduler`), all with the same mix of lengths.
    """

    prfaas: PhaseProfile
    n_prfaas: int
    pd: PhaseProfile
    n_pd: int
    egress_bps: float
    lengths: LengthDistribution
    output_tokens: float
    sites: tuple[PrfaasSite, ...] = ()

    def __post_init__(self) -> None:
        if self.sites and not self.n_prfaas:
            raise UserError(
                "cluster.also_prfaas: beside no PrfaaS cluster; accepted: with cluster.prfaas.instances of 1 or more"
            )
        if self.n_prfaas < 0 or self.n_pd < 1:
            raise UserError(
                f"cluster.prfaas.instances, cluster.pd.instances: got {self.n_prfaas} and {self.n_pd}; PrfaaS may have none, "
                "the PD cluster needs one or more"
            )
        if not self.egress_bps > 0:
            raise UserError(f"link.rate_bps: {self.egress_bps} is not a positive rate")
        if not self.output_tokens > 0:
            raise UserError(f"workload.output_tokens: {self.output_tokens} is not positive")

    def without_prfaas(self, n_pd: int) -> Deployment:
        """A homogeneous PD cluster of `n_pd` instances (Table 6's baseline)."""
        return replace(self, n_prfaas=0, n_pd=n_pd, sites=())

    def every_site(self) -> tuple[PrfaasSite, ...]:
        """All PrfaaS clusters, the first one too; none without instances."""
        return (PrfaasSite(self.prfaas, self.n_prfaas, self.egress_bps), *self.sites) if self.n_prfaas else ()


@dataclass(frozen=True)
class Thresholds:
    """Everything about routing thresholds that does not depend on the split of the PD cluster; arrays of one entry per threshold.

    An empty side of a threshold (all requests longer, or none) leaves its length and capacity nan, and its fraction 0.
    """

    tokens: FloatArray
    offload_fraction: FloatArray
    l_long_tokens: FloatArray
    l_short_tokens: FloatArray
    prfaas_per_s: FloatArray
    prfaas_prefill_per_s: FloatArray
    prfaas_egress_per_s: FloatArray
    pd_prefill_per_instance_per_s: FloatArray


def at_thresholds(deployment: Deployment, threshold_tokens: ArrayLike, lengths: Lengths) -> Thresholds:
    """Equations 3 and 4 for every threshold at once, the latter per PD-P instance; equation 3 summed over PrfaaS clusters."""
    tokens = np.atleast_1d(np.asarray(threshold_tokens, dtype=np.float64))
    law, prfaas, pd = deployment.lengths, deployment.prfaas, deployment.pd
    sides = _sides(law, prfaas.prefill, prfaas.kv, pd.prefill, tokens.tobytes(), lengths)
    prefill_rate = deployment.n_prfaas / sides.long_s
    egress_rate = deployment.egress_bps / (8 * sides.long_bytes)
    per_s = np.minimum(prefill_rate, egress_rate)
    for site in deployment.sites:
        there = _sides(law, site.profile.prefill, site.profile.kv, pd.prefill, tokens.tobytes(), lengths)
        prefill, egress = site.instances / there.long_s, site.egress_bps / (8 * there.long_bytes)
        per_s, prefill_rate, egress_rate = (
            per_s + np.minimum(prefill, egress),
            prefill_rate + prefill,
            egress_rate + egress,
        )
    return Thresholds(
        tokens=tokens,
        offload_fraction=sides.offload_fraction,
        l_long_tokens=sides.long_tokens,
        l_short_tokens=sides.short_tokens,
        prfaas_per_s=per_s,
        prfaas_prefill_per_s=prefill_rate,
        prfaas_egress_per_s=egress_rate,
        pd_prefill_per_instance_per_s=1 / sides.short_s,
    )


@dataclass(frozen=True)
class _Sides:
    """What lies above and below each threshold: lengths, times and bytes; of no link and no number of instances."""

    offload_fraction: FloatArray
    long_tokens: FloatArray
    short_tokens: FloatArray
    long_s: FloatArray
    long_bytes: FloatArray
    short_s: FloatArray


# Kept, because the points of a sweep over links, splits and prices ask for the same ones.
@lru_cache(maxsize=256)
def _sides(
    law: LengthDistribution, prfaas: PrefillCurve, kv: KVSize, pd: PrefillCurve, thresholds: bytes, lengths: Lengths
) -> _Sides:
    tokens = np.frombuffer(thresholds, dtype=np.float64)
    long_tokens, short_tokens = law.mean_above(tokens), law.mean_below(tokens)
    if lengths == "representative":
        long_s, long_bytes, short_s = prfaas(long_tokens), kv(long_tokens), pd(short_tokens)
    else:
        long_s, long_bytes = law.expectation_above(prfaas, tokens), law.expectation_above(kv, tokens)
        short_s = law.expectation_below(pd, tokens)
    found = _Sides(
        law.fraction_above(tokens),
        long_tokens,
        short_tokens,
        np.where(np.isfinite(long_tokens), long_s, np.nan),
        np.asarray(long_bytes),
        np.where(np.isfinite(short_tokens), short_s, np.nan),
    )
    for values in vars(found).values():
        values.flags.writeable = False
    return found


@lru_cache(maxsize=256)
def _bytes_above(law: LengthDistribution, kv: KVSize, threshold_tokens: float) -> float:
    return float(law.expectation_above(kv, threshold_tokens))


def decode_per_instance(deployment: Deployment) -> float:
    """Requests per second that one PD-D instance completes: BS_max / (T_decode · L_out) (equation 5)."""
    pd = deployment.pd
    context = pd.batch_max * (deployment.lengths.mean_tokens + deployment.output_tokens / 2)
    return pd.batch_max / (pd.decode_step_s(pd.batch_max, context) * deployment.output_tokens)


@dataclass(frozen=True)
class OperatingPoint:
    """One deployment at one threshold and one split, with every quantity of Table 6 that the equations give."""

    threshold_tokens: float
    n_prfaas: int
    n_p: int
    n_d: int
    offload_fraction: float
    l_long_tokens: float
    l_short_tokens: float
    stages: Stages
    lambda_max: float
    egress_bps: float
    link_utilisation: float


def evaluate(deployment: Deployment, threshold_tokens: float, n_p: int, n_d: int, lengths: Lengths) -> OperatingPoint:
    """Equations 3–6 at one point.

    Raises:
        UserError: when requests are routed to a stage that has no instance.
    """
    return operating_point(deployment, at_thresholds(deployment, threshold_tokens, lengths), 0, n_p, n_d)


def operating_point(deployment: Deployment, rows: Thresholds, row: int, n_p: int, n_d: int) -> OperatingPoint:
    """Equations 5 and 6 at one of the thresholds for which equations 3 and 4 are known.

    Raises:
        UserError: when requests are routed to a stage that has no instance.
    """
    threshold_tokens = float(rows.tokens[row])
    p = float(rows.offload_fraction[row])
    if p > 0 and deployment.n_prfaas == 0:
        raise UserError(
            f"policy.threshold_tokens: {threshold_tokens:g} sends {p:.1%} of requests to PrfaaS, which has no instance; "
            f"accepted with cluster.prfaas.instances=0: {deployment.lengths.maximum_tokens:g} or more"
        )
    if p < 1 and n_p == 0:
        raise UserError(
            f"policy.n_p: 0 leaves no PD-P instance, but {1 - p:.1%} of requests are at most {threshold_tokens:g} tokens long and "
            "need local prefill; accepted: 1 or more"
        )
    if n_d < 1:
        raise UserError(f"policy.n_d: {n_d} leaves no PD-D instance; accepted: 1 or more")
    prfaas = float(rows.prfaas_per_s[row]) if p > 0 else 0.0
    pd_prefill = n_p * float(rows.pd_prefill_per_instance_per_s[row]) if p < 1 else 0.0
    stages = Stages(prfaas, pd_prefill, n_d * decode_per_instance(deployment))
    sustained = stages.lambda_max(p)
    egress = 0.0
    if p > 0:
        egress = sustained * p * 8 * _bytes_above(deployment.lengths, deployment.prfaas.kv, threshold_tokens)
    return OperatingPoint(
        threshold_tokens=threshold_tokens,
        n_prfaas=deployment.n_prfaas + sum(site.instances for site in deployment.sites),
        n_p=n_p,
        n_d=n_d,
        offload_fraction=p,
        l_long_tokens=float(rows.l_long_tokens[row]),
        l_short_tokens=float(rows.l_short_tokens[row]),
        stages=stages,
        lambda_max=sustained,
        egress_bps=egress,
        link_utilisation=egress / (deployment.egress_bps + sum(site.egress_bps for site in deployment.sites)),
    )
