"""H20's profile, which the paper does not print, from what Table 6 says of it.

Four printed values depend on H20's T_prefill alone: Θ_pd-p of PrfaaS-PD and of homogeneous PD (equation 4), and the mean and P90 TTFT of
homogeneous PD, which hold no queueing. A curve of three coefficients is fitted to the four, and each value is also predicted from the
other three, so that a reader sees how much the calibration explains rather than repeats. The decode rate per instance is pinned by the
three Θ_pd-d in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from repro.profiles.base import DecodeStep, KVSize, PhaseProfile, PrefillCurve
from repro.workload.lengths import LengthDistribution

FloatArray = NDArray[np.float64]
Family = Literal["quadratic", "power_law"]

FAMILIES: tuple[Family, ...] = ("quadratic", "power_law")


@dataclass(frozen=True)
class Anchor:
    """One printed value that a calibration uses: what it is, where it stands, its value."""

    name: str
    case: str
    metric: str
    value: float
    unit: str


@dataclass(frozen=True)
class PrefillAnchors:
    """The four values that pin H20's T_prefill, with the lengths at which they were taken."""

    lengths: LengthDistribution
    threshold_tokens: float
    pd_prefill_per_s: float
    pd_prefill_instances: int
    homogeneous_prefill_per_s: float
    homogeneous_instances: int
    ttft_mean_s: float
    ttft_p90_s: float

    def anchors(self) -> tuple[Anchor, ...]:
        """The printed values in the order of the equations."""
        return (
            Anchor("Θ_pd-p, PrfaaS-PD", "prfaas_pd", "theta_pd_p", self.pd_prefill_per_s, "req/s"),
            Anchor("Θ_pd-p, homogeneous PD", "homogeneous_pd", "theta_pd_p", self.homogeneous_prefill_per_s, "req/s"),
            Anchor("mean TTFT, homogeneous PD", "homogeneous_pd", "ttft_mean_s", self.ttft_mean_s, "s"),
            Anchor("P90 TTFT, homogeneous PD", "homogeneous_pd", "ttft_p90_s", self.ttft_p90_s, "s"),
        )

    def seconds(self) -> FloatArray:
        """The four as values of T_prefill in seconds: N/Θ for the capacities, the TTFT itself for the others."""
        return np.array(
            [
                self.pd_prefill_instances / self.pd_prefill_per_s,
                self.homogeneous_instances / self.homogeneous_prefill_per_s,
                self.ttft_mean_s,
                self.ttft_p90_s,
            ]
        )

    def moments(self, exponent: float, scale: float) -> FloatArray:
        """(l/scale)^exponent at l_short, at E[L], on average over L, and at the 90th percentile of L."""
        law = self.lengths
        tokens, mass = law.atoms()
        return np.array(
            [
                (float(law.mean_below(self.threshold_tokens)) / scale) ** exponent,
                (law.mean_tokens / scale) ** exponent,
                float(mass @ (tokens / scale) ** exponent),
                (float(law.quantile(0.9)) / scale) ** exponent,
            ]
        )

    def in_printed_units(self, seconds: FloatArray) -> FloatArray:
        """Back from T_prefill in seconds to the printed quantities."""
        instances = np.array([self.pd_prefill_instances, self.homogeneous_instances])
        return np.concatenate([instances / seconds[:2], seconds[2:]])


@dataclass(frozen=True)
class Residual:
    """A calibrating value, what the fit makes of it, and what the fit to the others predicts for it."""

    anchor: Anchor
    fitted: float
    left_out: float


def _solve(design: FloatArray, seconds: FloatArray) -> FloatArray:
    """Least squares of the relative error."""
    return np.asarray(np.linalg.lstsq(design / seconds[:, None], np.ones(len(seconds)), rcond=None)[0])


def _quadratic(anchors: PrefillAnchors, keep: NDArray[np.intp]) -> tuple[FloatArray, FloatArray]:
    design = np.stack([np.ones(4), anchors.moments(1, 1e4), anchors.moments(2, 1e5)], axis=1)
    coefficients = _solve(design[keep], anchors.seconds()[keep])
    return coefficients, design @ coefficients


def _power_law(anchors: PrefillAnchors, keep: NDArray[np.intp]) -> tuple[FloatArray, FloatArray]:
    seconds = anchors.seconds()

    def fit(exponent: float) -> tuple[FloatArray, FloatArray]:
        design = np.stack([np.ones(4), anchors.moments(exponent, 1e4)], axis=1)
        coefficients = _solve(design[keep], seconds[keep])
        return coefficients, design @ coefficients

    def loss(exponent: float) -> float:
        return float(np.sum((fit(exponent)[1][keep] / seconds[keep] - 1) ** 2))

    # With one anchor left out, three values can lie on two such curves, of exponents near 1.1 and 1.7. The lower is taken: T_prefill of
    # the same model on H200 follows 1.13.
    scan = np.linspace(1.0, 2.0, 21)
    losses = [loss(exponent) for exponent in scan]
    first = next((i for i in range(len(scan) - 1) if losses[i] <= losses[i + 1]), len(scan) - 1)
    low, high = scan[max(first - 1, 0)], scan[min(first + 1, len(scan) - 1)]
    exponent = float(minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-7}).x)
    coefficients, fitted = fit(exponent)
    return np.array([*coefficients, exponent]), fitted


_FITS = {"quadratic": _quadratic, "power_law": _power_law}


def calibrate_prefill(anchors: PrefillAnchors, family: Family = "quadratic") -> PrefillCurve:
    """T_prefill of H20 as the curve of that family nearest to the four anchors."""
    coefficients, _ = _FITS[family](anchors, np.arange(4))
    return PrefillCurve(interpolation=family, coefficients=tuple(float(c) for c in coefficients))


def prefill_residuals(anchors: PrefillAnchors, family: Family = "quadratic") -> tuple[Residual, ...]:
    """Each anchor against the fit to all four, and against the fit to the other three."""
    everything = np.arange(4)
    fitted = anchors.in_printed_units(_FITS[family](anchors, everything)[1])
    rows = []
    for index, anchor in enumerate(anchors.anchors()):
        others = anchors.in_printed_units(_FITS[family](anchors, np.delete(everything, index))[1])
        rows.append(Residual(anchor, float(fitted[index]), float(others[index])))
    return tuple(rows)


@dataclass(frozen=True)
class DecodeAnchors:
    """Θ_pd-d of the three deployments and the decode instances behind each, with L_out and the SLO that sets BS_max."""

    theta_pd_d: tuple[float, ...]
    instances: tuple[int, ...]
    cases: tuple[str, ...]
    output_tokens: float
    slo_tokens_per_s: float

    def per_instance(self, keep: tuple[int, ...] | None = None) -> float:
        """Requests per second and instance: the rate r whose largest |n·r − Θ| over the kept deployments is smallest.

        All three are printed to the same digit, so each allows r a range, and this r lies as deep as possible inside all of them; least
        squares would leave Θ = 6.25 outside its rounding.
        """
        index = list(range(len(self.theta_pd_d))) if keep is None else list(keep)
        theta, n = np.array(self.theta_pd_d)[index], np.array(self.instances)[index]
        rates = theta / n
        if np.ptp(rates) == 0:
            return float(rates[0])
        found = minimize_scalar(
            lambda r: np.max(np.abs(n * r - theta)),
            bounds=(rates.min(), rates.max()),
            method="bounded",
            options={"xatol": 1e-12},
        )
        return float(found.x)

    def step(self) -> DecodeStep:
        """BS_max as the largest whole batch whose step meets the SLO, and the step time that the printed Θ_pd-d then imply (equation 5)."""
        rate = self.per_instance()
        batch = max(1, int(rate * self.output_tokens / self.slo_tokens_per_s + 1e-2))
        return DecodeStep(base_s=batch / (rate * self.output_tokens), batch_max=batch)

    def residuals(self) -> tuple[Residual, ...]:
        """Each Θ_pd-d against the common rate, and against the rate of the other deployments."""
        rows = []
        for i, (case, value) in enumerate(zip(self.cases, self.theta_pd_d, strict=True)):
            others = tuple(j for j in range(len(self.cases)) if j != i)
            anchor = Anchor(f"Θ_pd-d, {case}", case, "theta_pd_d", value, "req/s")
            rows.append(
                Residual(anchor, self.instances[i] * self.per_instance(), self.instances[i] * self.per_instance(others))
            )
        return tuple(rows)


def calibrated_profile(
    name: str,
    model: str,
    accelerator: str,
    gpus: int,
    prefill: PrefillAnchors,
    decode: DecodeAnchors,
    kv: KVSize,
    family: Family,
) -> PhaseProfile:
    """A profile whose prefill and decode come from the anchors; its KVCache size is the model's, whatever the accelerator."""
    return PhaseProfile(
        name=name, model=model, accelerator=accelerator, gpus_per_instance=gpus,
        prefill=calibrate_prefill(prefill, family), kv=kv, decode=decode.step(),
        prefill_source="calibrated", kv_source="published", decode_source="calibrated",
        notes="T_prefill and T_decode solved from Table 6 (§4.1); see experiment=table6, table `calibration`.",
    )  # fmt: skip
