"""The exhaustive two-dimensional search over the routing threshold t and the split N_p : N_d (§3.4.2; Figure 5 shows two cuts).

Equations 7 and 8 say where the optimum lies when instances are divisible; instances are not, so the grid itself decides, and equation 7
is then a check on what it found.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from repro.errors import UserError
from repro.scheduling.throughput import (
    Deployment,
    Lengths,
    OperatingPoint,
    at_thresholds,
    decode_per_instance,
    evaluate,
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

    def best(self) -> tuple[float, int]:
        """Threshold and N_p of the highest Λ_max; of equals, the smallest threshold, then the smallest N_p."""
        row, column = np.unravel_index(int(np.nanargmax(self.lambda_max)), self.lambda_max.shape)
        return float(self.threshold_tokens[row]), int(self.n_p[column])


def threshold_grid(deployment: Deployment, step_tokens: int) -> FloatArray:
    """Thresholds from the shortest length to the longest in steps of `step_tokens`.

    Raises:
        UserError: if the step leaves fewer than two thresholds.
    """
    law = deployment.lengths
    if not 0 < step_tokens <= law.maximum_tokens:
        raise UserError(f"policy.threshold_step_tokens: {step_tokens} must lie in 1 to {law.maximum_tokens:g}")
    grid = np.arange(0.0, law.maximum_tokens + step_tokens, step_tokens)
    return np.clip(grid, law.minimum_tokens, law.maximum_tokens)


def surface(deployment: Deployment, threshold_tokens: FloatArray, lengths: Lengths) -> Surface:
    """Λ_max at every threshold and every split of the PD cluster that keeps one decode instance."""
    rows = at_thresholds(deployment, threshold_tokens, lengths)
    n_p = np.arange(0, deployment.n_pd)
    p = rows.offload_fraction
    with np.errstate(divide="ignore"):
        # A stage that no request uses bounds nothing.
        prfaas = np.where(p > 0, rows.prfaas_per_s / np.maximum(p, 1e-300), np.inf)
        per_instance = np.where(p < 1, rows.pd_prefill_per_instance_per_s / np.maximum(1 - p, 1e-300), np.inf)
    pd_prefill = np.where(p[:, None] < 1, n_p[None, :] * np.where(np.isinf(per_instance), 0.0, per_instance)[:, None], np.inf)
    pd_decode = (deployment.n_pd - n_p) * decode_per_instance(deployment)
    best = np.minimum(np.minimum(prfaas[:, None], pd_prefill), pd_decode[None, :])
    return Surface(rows.tokens, n_p, best, prfaas, pd_prefill, pd_decode)


def grid_search(deployment: Deployment, step_tokens: int = 100, lengths: Lengths = "representative") -> OperatingPoint:
    """The threshold and split with the highest Λ_max.

    Without PrfaaS instances every request is local, so only the split is searched; a PD cluster that only decodes (naive heterogeneous
    PD) is the corner t = minimum, N_p = 0 of the same grid.
    """
    law = deployment.lengths
    if deployment.n_prfaas == 0:
        grid = np.array([law.maximum_tokens])
    else:
        grid = threshold_grid(deployment, step_tokens)
    threshold, n_p = surface(deployment, grid, lengths).best()
    return evaluate(deployment, threshold, n_p, deployment.n_pd - n_p, lengths)
