"""How far the paper's rounding and the choice of interpolation move a result.

The inputs are printed with two or three digits, and T_prefill is known at four lengths. So each result of the case study is computed
again with every input drawn from within its rounding, H20 calibrated anew each time, under every interpolation of H200's points and both
families of H20's curve. The interval is the range over all of these: what the paper's numbers leave open, not a confidence interval.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cache

import numpy as np

from repro.experiments.deployment import latencies, operating_points
from repro.profiles.base import INTERPOLATIONS, PhaseProfile
from repro.profiles.calibration import FAMILIES
from repro.profiles.presets import PaperInputs
from repro.scheduling.latency import PrefillLatency
from repro.scheduling.throughput import Deployment, Lengths, OperatingPoint
from repro.settings import Settings

#: (case, metric) → lowest value, highest value, number of values.
Ranges = Mapping[tuple[str, str], tuple[float, float, int]]

PAPER_PROFILES = ("paper_1t_h200", "paper_1t_h20")


def is_papers(settings: Settings) -> bool:
    """Whether both clusters run the paper's own profiles, whose rounding and interpolation can be varied."""
    return settings.profile is None and (settings.cluster.prfaas.profile, settings.cluster.pd.profile) == PAPER_PROFILES


def variants(base: Deployment, draws: int, rng: np.random.Generator) -> Iterator[tuple[str, Deployment]]:
    """`base` with the paper's inputs as printed and as drawn, under every interpolation; the name says which interpolation."""
    for index in range(draws + 1):
        for family, prfaas, pd in _printed() if index == 0 else _profiles(PaperInputs.draw(rng)):
            for interpolation in INTERPOLATIONS:
                # The workload stays the user's own; only the calibration sees the drawn one.
                yield (
                    f"{interpolation}, {family}",
                    replace(base, prfaas=prfaas.with_interpolation(interpolation), pd=pd),
                )


def _profiles(inputs: PaperInputs) -> tuple[tuple[str, PhaseProfile, PhaseProfile], ...]:
    """Both clusters' profiles under each family of H20's curve."""
    return tuple((family, inputs.h200(), inputs.h20(family)) for family in FAMILIES)


@cache
def _printed() -> tuple[tuple[str, PhaseProfile, PhaseProfile], ...]:
    return _profiles(PaperInputs.draw())


def quantities(
    points: Mapping[str, OperatingPoint], ttft: Mapping[str, PrefillLatency]
) -> Iterator[tuple[str, str, float]]:
    """(case, metric, value) of everything that Table 6 and §4.3 report."""
    for case, point in points.items():
        yield case, "lambda_max", point.lambda_max
        yield case, "n_prfaas", point.n_prfaas
        yield case, "n_p", point.n_p
        yield case, "n_d", point.n_d
        if point.offload_fraction > 0:
            yield case, "theta_prfaas", point.stages.prfaas
            yield case, "l_long_tokens", point.l_long_tokens
            yield case, "egress_bps", point.egress_bps
            yield case, "link_utilisation", point.link_utilisation
        if point.offload_fraction < 1:
            yield case, "theta_pd_p", point.stages.pd_prefill
            yield case, "l_short_tokens", point.l_short_tokens
        if 0 < point.offload_fraction < 1:
            yield case, "threshold_tokens", point.threshold_tokens
            yield case, "offload_fraction", point.offload_fraction
        yield case, "theta_pd_d", point.stages.pd_decode
        yield case, "ttft_mean_s", ttft[case].mean_s
        yield case, "ttft_p90_s", ttft[case].p90_s
        yield case, "ratio", point.lambda_max / points["homogeneous_pd"].lambda_max
    if "prfaas_pd" in points:
        for metric, attribute in (("ttft_mean_reduction", "mean_s"), ("ttft_p90_reduction", "p90_s")):
            ours, theirs = getattr(ttft["prfaas_pd"], attribute), getattr(ttft["homogeneous_pd"], attribute)
            yield "prfaas_pd", metric, 100 * (1 - ours / theirs)


def ranges(readings: Mapping[Lengths, Settings], deployments: Iterable[Deployment]) -> dict[Lengths, Ranges]:
    """Under each reading of T_prefill's mean, how far the deployments' values reach, each deployment at its own best point."""
    found: dict[Lengths, defaultdict[tuple[str, str], list[float]]] = {
        reading: defaultdict(list) for reading in readings
    }
    for variant in deployments:
        for reading, settings in readings.items():
            points = operating_points(variant, settings)
            ttft = latencies(variant, points, settings.cluster.homogeneous_instances)
            for case, metric, value in quantities(points, ttft):
                found[reading][case, metric].append(value)
    return {
        reading: {key: (min(values), max(values), len(values)) for key, values in table.items()}
        for reading, table in found.items()
    }
