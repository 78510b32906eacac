"""The exhaustive two-dimensional search over the routing threshold t and the split N_p : N_d (§3.4.2; Figure 5 shows two cuts).

Equations 7 and 8 say where the optimum lies when instances are divisible; instances are not, so the grid itself decides, and equation 7
is then a check on what it found.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from repro.errors import UserError
from repro.scheduling.spec import PolicySpec
from repro.scheduling.throughput import (
    Deployment,
    Lengths,
    OperatingPoint,
    Thresholds,
    at_thresholds,
    decode_per_instance,
    operating_point,
)

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Surface:
    """Λ_max in req/s over thresholds (rows) and PD-P instances (columns), and the bound that each stage sets."""

    threshold_tokens: FloatArray
    n_p: NDArray[np.int64]
    lambda_max: FloatArray
    prfaas_bound: FloatArray
    pd_prefill_bound: FloatArray
    pd_decode_bound: FloatArray
    rows: Thresholds

    def best_row(self) -> tuple[int, int]:
        """The row and N_p of the highest Λ_max; of equals, the smallest threshold, then the smallest N_p."""
        row, column = np.unravel_index(int(np.nanargmax(self.lambda_max)), self.lambda_max.shape)
        return int(row), int(self.n_p[column])

    def best(self) -> tuple[float, int]:
        """Threshold and N_p of the highest Λ_max."""
        row, n_p = self.best_row()
        return float(self.threshold_tokens[row]), n_p


def threshold_grid(deployment: Deployment, step_tokens: int) -> FloatArray:
    """Thresholds from the shortest length to the longest in steps of `step_tokens`.

    Raises:
        UserError: if the step is longer than the longest request.
    """
    law = deployment.lengths
    if not 0 < step_tokens <= law.maximum_tokens:
        raise UserError(f"policy.threshold_step_tokens: {step_tokens} must lie in 1 to {law.maximum_tokens:g}")
    grid = np.arange(0.0, law.maximum_tokens + step_tokens, step_tokens)
    return np.asarray(np.clip(grid, law.minimum_tokens, law.maximum_tokens))


def surface(deployment: Deployment, threshold_tokens: FloatArray, n_p: NDArray[np.int64], lengths: Lengths) -> Surface:
    """Λ_max at every threshold and every split (`n_p` PD-P instances, the others decode)."""
    rows = at_thresholds(deployment, threshold_tokens, lengths)
    p, stay = rows.offload_fraction, 1 - rows.offload_fraction
    with np.errstate(divide="ignore", invalid="ignore"):
        # A stage that no request uses bounds nothing.
        prfaas = np.where(p > 0, rows.prfaas_per_s / p, np.inf)
        pd_prefill = np.where(
            stay[:, None] > 0, n_p[None, :] * (rows.pd_prefill_per_instance_per_s / stay)[:, None], np.inf
        )
    pd_decode = np.asarray((deployment.n_pd - n_p) * decode_per_instance(deployment), np.float64)
    best = np.minimum(np.minimum(prfaas[:, None], pd_prefill), pd_decode[None, :])
    return Surface(rows.tokens, n_p, best, prfaas, pd_prefill, pd_decode, rows)


def grid_search(deployment: Deployment, step_tokens: int = 100, lengths: Lengths = "representative") -> OperatingPoint:
    """The threshold and split with the highest Λ_max."""
    return search(deployment, PolicySpec("search", threshold_step_tokens=step_tokens, lengths=lengths))


def search(deployment: Deployment, policy: PolicySpec) -> OperatingPoint:
    """The best threshold and split among those that `policy` leaves open.

    Without PrfaaS instances every request is local, so only the split is searched; a PD cluster that only decodes (naive heterogeneous
    PD) is the corner t = minimum, N_p = 0 of the same grid.

    Raises:
        UserError: for a fixed threshold outside the distribution, or a fixed split that leaves a needed stage without an instance.
    """
    law = deployment.lengths
    if deployment.n_prfaas == 0:
        if policy.threshold_tokens is not None and policy.threshold_tokens < law.maximum_tokens:
            raise UserError(
                f"policy.threshold_tokens: {policy.threshold_tokens:g} offloads requests, but cluster.prfaas.instances is 0; "
                f"accepted: null, or {law.maximum_tokens:g} tokens"
            )
        thresholds = np.array([law.maximum_tokens])
    elif policy.threshold_tokens is None:
        thresholds = threshold_grid(deployment, policy.threshold_step_tokens)
    elif not law.minimum_tokens <= policy.threshold_tokens <= law.maximum_tokens:
        raise UserError(
            f"policy.threshold_tokens: {policy.threshold_tokens:g} lies outside the workload's input lengths; accepted: "
            f"{law.minimum_tokens:g} to {law.maximum_tokens:g} tokens"
        )
    else:
        thresholds = np.array([policy.threshold_tokens])
    if policy.n_p is not None and policy.n_p >= deployment.n_pd:
        raise UserError(
            f"policy.n_p: {policy.n_p} of {deployment.n_pd} PD instances leaves none to decode; accepted: 0 to {deployment.n_pd - 1}"
        )
    splits = np.arange(deployment.n_pd) if policy.n_p is None else np.array([policy.n_p])
    found = surface(deployment, thresholds, splits, policy.lengths)
    row, n_p = found.best_row()
    return operating_point(deployment, found.rows, row, n_p, deployment.n_pd - n_p)
