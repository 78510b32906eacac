"""TTFT as Table 6 has it: T_prefill over the length distribution, without queueing.

At the load Λ_max a real queue would be unbounded; what TTFT is below it is a question for the simulator. Here it is what remains when
nobody waits: prefill on the side that the threshold chooses.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from repro.profiles.base import PrefillCurve
from repro.scheduling.throughput import Deployment
from repro.workload.lengths import LengthDistribution


@dataclass(frozen=True)
class PrefillLatency:
    """Mean and 90th percentile of T_prefill in seconds over all requests."""

    mean_s: float
    p90_s: float


def prefill_latency(deployment: Deployment, threshold_tokens: float) -> PrefillLatency:
    """T_prefill of a request that is prefilled by PrfaaS when longer than the threshold, else by a PD-P instance."""
    assert not deployment.sites, "which of several clusters prefills a request depends on their queues"
    return _latency(deployment.lengths, deployment.prfaas.prefill, deployment.pd.prefill, float(threshold_tokens))


@lru_cache(maxsize=64)
def _over_atoms(law: LengthDistribution, curve: PrefillCurve) -> NDArray[np.float64]:
    return curve(law.atoms()[0])


@lru_cache(maxsize=256)
def _latency(
    law: LengthDistribution, prfaas: PrefillCurve, pd: PrefillCurve, threshold_tokens: float
) -> PrefillLatency:
    p = float(law.fraction_above(threshold_tokens))
    mean = 0.0
    if p > 0:
        mean += p * float(law.expectation_above(prfaas, threshold_tokens))
    if p < 1:
        mean += (1 - p) * float(law.expectation_below(pd, threshold_tokens))
    tokens, mass = law.atoms()
    offloaded = tokens > threshold_tokens
    seconds = np.where(offloaded, _over_atoms(law, prfaas), _over_atoms(law, pd))
    order = np.argsort(seconds, kind="stable")  # two runs in order, which this merges
    reached = np.cumsum(mass[order])
    return PrefillLatency(mean, float(np.interp(0.9 * reached[-1], reached - mass[order] / 2, seconds[order])))
