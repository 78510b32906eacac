"""What a profile says, read off once: T_prefill and S_kv by whole tokens, T_decode by batch size.

A scheduler asks for both on every arrival; a list look-up costs a hundredth of interpolating a profile's arrays for one number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike


class Profile(Protocol):
    """What scheduler and simulator ask of one model on one instance (`repro.profiles.base.PhaseProfile` fits)."""

    @property
    def name(self) -> str:
        """For messages."""
        ...

    @property
    def batch_max(self) -> int:
        """BS_max of equation 5."""
        ...

    def prefill_s(self, tokens: ArrayLike) -> Any:
        """T_prefill(l) in seconds."""
        ...

    def kv_bytes(self, tokens: ArrayLike) -> Any:
        """S_kv(l) in bytes."""
        ...

    def decode_step_s(self, batch: int, context_tokens: float = 0.0) -> float:
        """T_decode of one step in seconds."""
        ...


class CostTables:
    """T_prefill in seconds and S_kv in bytes by whole tokens, as lists for look-ups and as arrays for searches."""

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self.prefill = self.kv = np.empty(0)
        self.prefill_s: list[float] = []
        self.kv_bytes: list[float] = []

    def cover(self, tokens: int) -> None:
        """Reach to `tokens` at least."""
        if tokens >= len(self.prefill_s):
            every = np.arange(max(tokens + 1, 2 * len(self.prefill_s)))
            self.prefill = np.asarray(self._profile.prefill_s(every), dtype=np.float64)
            self.kv = np.asarray(self._profile.kv_bytes(every), dtype=np.float64)
            self.prefill_s, self.kv_bytes = self.prefill.tolist(), self.kv.tolist()


class StepTimes:
    """T_decode(batch, context) as step(b) + slope(b) · context, read off a profile once per batch size."""

    def __init__(self, decode_step_s: Callable[[int, float], float], batch_max: int) -> None:
        probe = 1e6
        self.step_s = [0.0] + [float(decode_step_s(b, 0.0)) for b in range(1, batch_max + 1)]
        self.slope_s = [0.0] + [
            (float(decode_step_s(b, probe)) - self.step_s[b]) / probe for b in range(1, batch_max + 1)
        ]
        self.grows = any(slope > 0 for slope in self.slope_s)

    def tokens_per_s(self, context_tokens: float) -> float:
        """Tokens per second of an instance at full batch, with so much context per request."""
        batch = len(self.step_s) - 1
        context = batch * context_tokens if self.grows else 0.0
        return batch / (self.step_s[batch] + self.slope_s[batch] * context)
