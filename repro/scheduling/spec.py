"""The configuration's `policy` node: the threshold, the split of the PD cluster, and how both are searched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from repro.errors import UserError


@dataclass(frozen=True)
class PolicySpec:
    """Routing and split; what is null is found by the grid search of §3.4.2."""

    name: str
    threshold_tokens: float | None = None
    n_p: int | None = None
    threshold_step_tokens: int = 100
    lengths: Literal["representative", "true_mean"] = "representative"

    def __post_init__(self) -> None:
        if self.threshold_step_tokens < 1:
            raise UserError(f"policy.threshold_step_tokens: {self.threshold_step_tokens} is below 1 token")
        if self.threshold_tokens is not None and not self.threshold_tokens >= 0:
            raise UserError(
                f"policy.threshold_tokens: {self.threshold_tokens} is negative; accepted: 0 or more tokens, or null"
            )
        if self.n_p is not None and self.n_p < 0:
            raise UserError(f"policy.n_p: {self.n_p} is negative; accepted: 0 or more instances, or null")
