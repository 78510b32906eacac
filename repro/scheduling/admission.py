"""Who is let in when the system is overloaded: a request that would miss its first-token target by far is refused at once.

Refusing costs one request; queueing it costs every request behind it. The router predicts from what it knows on arrival: work
already promised to the chosen instance, and T_prefill of this request's own uncached length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from repro.errors import UserError


@dataclass(frozen=True)
class AdmissionSpec:
    """`ttft_limit_s`: highest predicted time to first token that is let in; null lets everything in."""

    ttft_limit_s: float | None = None

    def __post_init__(self) -> None:
        if self.ttft_limit_s is not None and not self.ttft_limit_s > 0:
            raise UserError(
                f"policy.admission.ttft_limit_s: {self.ttft_limit_s} is not positive; accepted: seconds, or null"
            )

    @property
    def limit_s(self) -> float:
        """The limit as a number."""
        return math.inf if self.ttft_limit_s is None else self.ttft_limit_s


def admitted(predicted_ttft_s: float, limit_s: float) -> bool:
    """Whether a request is let in."""
    return predicted_ttft_s <= limit_s
