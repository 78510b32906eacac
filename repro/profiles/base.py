"""Phase profiles: what one instance of an accelerator takes to prefill, to decode, and how many bytes of KVCache it emits.

A profile is the only thing that the throughput model, the simulator and the emulation know of a model on an accelerator (the paper
feeds Table 5 into its equations in the same way, §4.1). It is data: knots or coefficients with their source, in one YAML file, so
that a measured profile can take the place of a published one by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.interpolate import PchipInterpolator
from scipy.optimize import curve_fit

from repro.configuration import Value
from repro.errors import UserError

FloatArray = NDArray[np.float64]

#: How T_prefill is read between its measured lengths. Four published points leave room for several smooth curves; every result of the
#: throughput model is therefore reported with its spread over all of these.
INTERPOLATIONS = ("monotone_cubic", "linear", "log_log", "power_law", "quadratic")

SOURCES = ("published", "public", "silicon", "measured", "calibrated", "computed")


@dataclass(frozen=True)
class PrefillCurve(Value):
    """T_prefill(l) of one instance in seconds.

    Either measured `tokens` and `seconds` read through `interpolation`, or, for the two parametric ones, `coefficients` directly:
    `quadratic` is a + b·(l/10⁴) + c·(l/10⁵)², `power_law` is a + b·(l/10⁴)^c. `monotone_cubic` (the default) passes through every
    point and cannot overshoot between them; outside the points it and `linear` continue with the end slope, `log_log` with the end
    exponent. The parametric ones are least-squares fits of relative error and need not touch the points.
    """

    interpolation: str = "monotone_cubic"
    tokens: tuple[float, ...] = ()
    seconds: tuple[float, ...] = ()
    coefficients: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.interpolation not in INTERPOLATIONS:
            raise UserError(
                f"profile.prefill.interpolation: {self.interpolation!r} is unknown; accepted: {', '.join(INTERPOLATIONS)}"
            )
        if self.coefficients:
            if self.interpolation not in ("power_law", "quadratic") or len(self.coefficients) != 3:
                raise UserError("profile.prefill.coefficients: three numbers, for power_law or quadratic only")
            return
        tokens, seconds = np.asarray(self.tokens), np.asarray(self.seconds)
        if tokens.shape != seconds.shape or len(tokens) < 2:
            raise UserError("profile.prefill: needs two or more tokens and as many seconds")
        if not (np.all(np.diff(tokens) > 0) and tokens[0] > 0):
            raise UserError("profile.prefill.tokens: must be positive and increasing")
        if not np.all(seconds > 0):
            raise UserError("profile.prefill.seconds: must be positive")
        if len(tokens) < 3 and self.interpolation in ("power_law", "quadratic"):
            raise UserError(f"profile.prefill.interpolation: {self.interpolation} needs three or more measured lengths")

    @cached_property
    def _function(self) -> Callable[[FloatArray], FloatArray]:
        x, y = np.asarray(self.tokens, np.float64), np.asarray(self.seconds, np.float64)
        if self.interpolation == "quadratic":
            a, b, c = self.coefficients or _fit_quadratic(x, y)
            return lambda l: a + b * (l / 1e4) + c * (l / 1e5) ** 2
        if self.interpolation == "power_law":
            a, b, c = self.coefficients or _fit_power_law(x, y)
            return lambda l: a + b * (l / 1e4) ** c
        if self.interpolation == "log_log":
            line = _piecewise_linear(np.log(x), np.log(y))
            return lambda l: np.exp(line(np.log(l)))
        if self.interpolation == "linear" or len(x) < 3:
            return _piecewise_linear(x, y)
        return _monotone_cubic(x, y)

    def __call__(self, tokens: ArrayLike) -> FloatArray:
        """T_prefill in seconds for each length in tokens; 0 for a length of 0 (a complete prefix hit)."""
        length = np.asarray(tokens, dtype=np.float64)
        return np.where(length > 0, self._function(np.maximum(length, 1.0)), 0.0)


def _piecewise_linear(x: FloatArray, y: FloatArray) -> Callable[[FloatArray], FloatArray]:
    slope = np.diff(y) / np.diff(x)

    def line(at: FloatArray) -> FloatArray:
        piece = np.clip(np.searchsorted(x, at, side="right") - 1, 0, len(slope) - 1)
        return np.asarray(y[piece] + slope[piece] * (at - x[piece]))

    return line


def _monotone_cubic(x: FloatArray, y: FloatArray) -> Callable[[FloatArray], FloatArray]:
    inner = PchipInterpolator(x, y)
    slope = inner.derivative()
    low_slope, high_slope = float(slope(x[0])), float(slope(x[-1]))

    def curve(at: FloatArray) -> FloatArray:
        clipped = np.clip(at, x[0], x[-1])
        beyond = np.where(at < x[0], low_slope * (at - x[0]), high_slope * (at - clipped))
        return np.asarray(inner(clipped) + beyond)

    return curve


def _fit_quadratic(x: FloatArray, y: FloatArray) -> tuple[float, float, float]:
    design = np.stack([np.ones_like(x), x / 1e4, (x / 1e5) ** 2], axis=1)
    a, b, c = np.linalg.lstsq(design / y[:, None], np.ones_like(y), rcond=None)[0]
    return float(a), float(b), float(c)


def _fit_power_law(x: FloatArray, y: FloatArray) -> tuple[float, float, float]:
    start = (float(y[0]) * 0.9, float((y[-1] - y[0]) / (x[-1] / 1e4)), 1.1)
    (a, b, c), _ = curve_fit(lambda l, a, b, c: a + b * (l / 1e4) ** c, x, y, p0=start, sigma=y, maxfev=20_000)
    return float(a), float(b), float(c)


@dataclass(frozen=True)
class KVSize:
    """S_kv(l) = fixed + per token · l + per window token · min(l, window), in bytes.

    Recurrent and convolution states are the fixed part, full-attention layers (GQA, MLA) the part per token, sliding-window layers
    the part that stops growing at the window.
    """

    fixed_bytes: float = 0.0
    bytes_per_token: float = 0.0
    window_tokens: int = 0
    window_bytes_per_token: float = 0.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 0:
                raise UserError(f"profile.kv.{name}: {value} is negative")

    def __call__(self, tokens: ArrayLike) -> FloatArray:
        """Bytes of KVCache after `tokens` tokens."""
        length = np.asarray(tokens, dtype=np.float64)
        windowed = self.window_bytes_per_token * np.minimum(length, self.window_tokens)
        return np.asarray(self.fixed_bytes + self.bytes_per_token * length + windowed)


@dataclass(frozen=True)
class DecodeStep:
    """T_decode of one step: base + per sequence · batch + per context token · the batch's summed context, in seconds.

    The paper fixes one number, the step at BS_max (equation 5), which is `base_s` alone; a measured profile fits all three.
    """

    base_s: float
    per_sequence_s: float = 0.0
    per_context_token_s: float = 0.0
    batch_max: int = 1

    def __post_init__(self) -> None:
        if self.batch_max < 1:
            raise UserError(f"profile.decode.batch_max: {self.batch_max} is below 1")
        if min(self.base_s, self.per_sequence_s, self.per_context_token_s) < 0 or not self(1, 1.0) > 0:
            raise UserError("profile.decode: step times must not be negative, and not all zero")

    def __call__(self, batch: int, context_tokens: float = 0.0) -> float:
        """Seconds of one step of `batch` sequences whose contexts sum to `context_tokens`."""
        return self.base_s + self.per_sequence_s * batch + self.per_context_token_s * context_tokens


@dataclass(frozen=True)
class PhaseProfile:
    """One model on one instance of one accelerator."""

    name: str
    model: str
    accelerator: str
    gpus_per_instance: int
    prefill: PrefillCurve
    kv: KVSize
    decode: DecodeStep
    prefill_source: str = "measured"
    kv_source: str = "measured"
    decode_source: str = "measured"
    notes: str = ""
    provenance: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.gpus_per_instance < 1:
            raise UserError(f"profile.gpus_per_instance: {self.gpus_per_instance} is below 1")
        for key in ("prefill_source", "kv_source", "decode_source"):
            if getattr(self, key) not in SOURCES:
                raise UserError(f"profile.{key}: {getattr(self, key)!r} is unknown; accepted: {', '.join(SOURCES)}")

    @property
    def batch_max(self) -> int:
        """BS_max of equation 5."""
        return self.decode.batch_max

    def prefill_s(self, tokens: ArrayLike) -> FloatArray:
        """T_prefill(l) in seconds."""
        return self.prefill(tokens)

    def kv_bytes(self, tokens: ArrayLike) -> FloatArray:
        """S_kv(l) in bytes."""
        return self.kv(tokens)

    def decode_step_s(self, batch: int, context_tokens: float = 0.0) -> float:
        """T_decode in seconds of one step."""
        return self.decode(batch, context_tokens)

    def kv_throughput_bps(self, tokens: ArrayLike) -> FloatArray:
        """Φ_kv(l) = S_kv(l) / T_prefill(l) in bit/s (equation 1)."""
        return 8 * self.kv_bytes(tokens) / self.prefill_s(tokens)

    def with_interpolation(self, interpolation: str) -> PhaseProfile:
        """The same points read through another curve. A calibrated curve has no points, and stays as it is."""
        if self.prefill.coefficients:
            return self
        return replace(self, prefill=replace(self.prefill, interpolation=interpolation))
