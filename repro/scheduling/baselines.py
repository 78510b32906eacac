"""Λ_max of deployments that the paper does not compare with, from the same three stages as equations 3–6.

Table 6 holds PrfaaS-PD against a homogeneous cluster and against offloading everything, so it cannot say how much of the gain is due
to the second kind of accelerator, to the length rule or to disaggregation. Each function here takes one of these away.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from repro.profiles.base import PhaseProfile
from repro.scheduling.search import search
from repro.scheduling.spec import PolicySpec
from repro.scheduling.throughput import Deployment, Lengths, decode_per_instance, evaluate


def _prefill_s(profile: PhaseProfile, deployment: Deployment, lengths: Lengths) -> float:
    """Mean T_prefill over all requests, in the reading of the paper or as the true mean."""
    law = deployment.lengths
    if lengths == "representative":
        return float(profile.prefill_s(law.mean_tokens))
    tokens, mass = law.atoms()
    return float(np.sum(mass * profile.prefill_s(tokens)) / np.sum(mass))


def load_balanced(deployment: Deployment, lengths: Lengths) -> float:
    """Λ_max of both clusters when prefills go to whichever has room, whatever their length.

    With the share of requests free, the capacities of the two prefill pools add up; what is left to choose is N_p.
    """
    tokens, mass = deployment.lengths.atoms()
    size = float(np.sum(mass * deployment.prfaas.kv_bytes(tokens)) / np.sum(mass))
    remote = 0.0
    if deployment.n_prfaas:
        remote = min(
            deployment.n_prfaas / _prefill_s(deployment.prfaas, deployment, lengths), deployment.egress_bps / (8 * size)
        )
    local, decode = 1 / _prefill_s(deployment.pd, deployment, lengths), decode_per_instance(deployment)
    return max(min(remote + n_p * local, (deployment.n_pd - n_p) * decode) for n_p in range(deployment.n_pd))


def bandwidth_unaware(deployment: Deployment, policy: PolicySpec) -> float:
    """Λ_max when threshold and split are searched as if the link had no limit, and then meet the link that there is."""
    chosen = search(replace(deployment, egress_bps=float("inf")), policy)
    return evaluate(deployment, chosen.threshold_tokens, chosen.n_p, chosen.n_d, policy.lengths).lambda_max


def colocated(deployment: Deployment, lengths: Lengths, *, overlapped: bool) -> float:
    """Λ_max of one pool of all instances that each prefill and decode their own requests (chunked prefill); nothing is sent.

    `overlapped` hides the shorter phase behind the longer one entirely, which no kernel achieves; otherwise they take turns. Either
    way the steps that carry prefill chunks take longer than a decode step alone, so TPOT is not held to the SLO: upper bounds.
    """
    total = 0.0
    for profile, instances in ((deployment.prfaas, deployment.n_prfaas), (deployment.pd, deployment.n_pd)):
        prefill_s = _prefill_s(profile, deployment, lengths)
        decode_s = 1 / decode_per_instance(replace(deployment, pd=profile))
        total += instances / (max(prefill_s, decode_s) if overlapped else prefill_s + decode_s)
    return total
