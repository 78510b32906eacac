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
from scipy.optimize import curve_fit, nnls

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
class DecodeRows(Value):
    """T_decode as it was measured: `seconds` of one step of `batch` sequences that have `tokens` of context each.

    Attention reads every token of context once, so each measured batch is a straight line over the summed context, fitted by least
    squares of the relative error with neither part negative. Between batches both parts are interpolated, and beyond the largest they
    go on: a batch that fills the tensor cores, or loads all experts, costs what it cost, which three coefficients for all cannot say.
    """

    batch: tuple[int, ...]
    tokens: tuple[float, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if not (len(self.batch) == len(self.tokens) == len(self.seconds) and len(set(self.batch)) >= 2):
            raise UserError(
                "profile.decode_rows: needs as many batches as tokens and seconds, and two different batches"
            )
        if min(self.batch) < 1 or min(self.tokens) < 0 or not min(self.seconds) > 0:
            raise UserError("profile.decode_rows: batches and seconds must be positive, tokens not negative")

    @cached_property
    def _lines(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Measured batches with the base in seconds and the seconds per summed token of context of each."""
        batch, tokens, seconds = (np.asarray(values, np.float64) for values in (self.batch, self.tokens, self.seconds))
        sizes = np.unique(batch)
        parts = []
        for size in sizes:
            own = batch == size
            if np.all(seconds[own] == seconds[own][0]):
                parts.append(np.array([seconds[own][0], 0.0]))  # exactly, where a fit would round
                continue
            design = np.stack([np.ones(own.sum()), size * tokens[own]], axis=1)
            parts.append(nnls(design / seconds[own, None], np.ones(own.sum()))[0])
        base_s, per_token_s = np.array(parts).T
        return sizes, base_s, per_token_s

    def __call__(self, batch: int, context_tokens: float = 0.0) -> float:
        """Seconds of one step of `batch` sequences whose contexts sum to `context_tokens`."""
        sizes, base_s, per_token_s = self._lines
        piece = int(np.clip(np.searchsorted(sizes, batch, side="right") - 1, 0, len(sizes) - 2))
        at = max((batch - sizes[piece]) / (sizes[piece + 1] - sizes[piece]), 0.0)
        base, per_token = (values[piece] + at * (values[piece + 1] - values[piece]) for values in (base_s, per_token_s))
        return float(base + max(per_token, 0.0) * context_tokens)


#: How T_decode is read: three coefficients for all batches and contexts, or the measured rows themselves.
DECODE_STEPS = ("fitted", "rows")


@dataclass(frozen=True)
class PhaseProfile:
    """One model on one instance of one accelerator.

    `decode_rows` are the measurements behind T_decode, where a profile has them; `decode_steps` says whether they are read, or `decode`,
    which was fitted to those that keep the service level. BS_max is that of `decode` in both.
    """

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
    decode_rows: DecodeRows | None = None
    decode_steps: str = "fitted"

    def __post_init__(self) -> None:
        if self.decode_steps not in DECODE_STEPS or (self.decode_steps == "rows" and self.decode_rows is None):
            accepted = ", ".join(DECODE_STEPS if self.decode_rows is not None else DECODE_STEPS[:1])
            raise UserError(f"profile.decode_steps: {self.decode_steps!r} of {self.name}; accepted: {accepted}")
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
        if self.decode_steps == "rows" and self.decode_rows is not None:
            return self.decode_rows(batch, context_tokens)
        return self.decode(batch, context_tokens)

    def kv_throughput_bps(self, tokens: ArrayLike) -> FloatArray:
        """Φ_kv(l) = S_kv(l) / T_prefill(l) in bit/s (equation 1)."""
        return 8 * self.kv_bytes(tokens) / self.prefill_s(tokens)

    def with_decode_steps(self, steps: str) -> PhaseProfile:
        """The same profile with T_decode read as `steps` says. Raises UserError for `rows` where it has none."""
        return self if steps == self.decode_steps else replace(self, decode_steps=steps)

    def with_interpolation(self, interpolation: str) -> PhaseProfile:
        """The same points read through another curve. A calibrated curve has no points, and stays as it is."""
        if self.prefill.coefficients:
            return self
        return replace(self, prefill=replace(self.prefill, interpolation=interpolation))
