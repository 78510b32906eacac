"""What is asked of the deployment: input lengths, output lengths, and the service level that counts a request as good (§4.1)."""

from __future__ import annotations

from dataclasses import dataclass

from repro.errors import UserError
from repro.workload.lengths import TruncatedLogNormal


@dataclass(frozen=True)
class ServiceLevel:
    """A request is good when its first token comes within `ttft_s` and the others at `tokens_per_s` or faster."""

    tokens_per_s: float = 40.0
    ttft_s: float = 10.0

    def __post_init__(self) -> None:
        for key in ("tokens_per_s", "ttft_s"):
            if not getattr(self, key) > 0:
                raise UserError(f"workload.slo.{key}: {getattr(self, key)} is not positive")


@dataclass(frozen=True)
class WorkloadSpec:
    """A named workload; `lengths` are uncached input lengths in tokens."""

    name: str
    lengths: TruncatedLogNormal
    output_tokens: float
    slo: ServiceLevel = ServiceLevel()

    def __post_init__(self) -> None:
        if not self.output_tokens >= 1:
            raise UserError(f"workload.output_tokens: {self.output_tokens} is below 1")
