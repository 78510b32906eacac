"""What the gain is worth (§4.2): throughput at equal cost over the price ratio of the two accelerators, and cost per million tokens.

The paper states a gain of about 15 % at equal cost without giving a price. Turned around, that implies a ratio of prices, which is shown
beside the gain at any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from repro.errors import UserError
from repro.experiments.base import EQUATIONS, HOMOGENEOUS, Context, Experiment, Outcome
from repro.experiments.deployment import check_deployment, deployment, operating_points, profile_files
from repro.paper import text
from repro.record.directory import Record
from repro.record.metrics import value
from repro.report import style
from repro.scheduling.throughput import Deployment, OperatingPoint

SECONDS_PER_HOUR = 3600


@dataclass(frozen=True)
class Options:
    """Range of price ratios (PrfaaS accelerator : PD accelerator) to draw."""

    ratio_low: float = 1.0
    ratio_high: float = 4.0

    def __post_init__(self) -> None:
        if not 0 < self.ratio_low < self.ratio_high:
            raise UserError("options.ratio_low, options.ratio_high: must be positive and increasing")


@dataclass(frozen=True)
class Fleet:
    """GPUs of a deployment by the side they are on."""

    prfaas_gpus: int
    pd_gpus: int


def fleets(base: Deployment, homogeneous_instances: int) -> Mapping[str, Fleet]:
    """GPUs of the three deployments of Table 6."""
    prfaas, pd = base.n_prfaas * base.prfaas.gpus_per_instance, base.n_pd * base.pd.gpus_per_instance
    return {
        "prfaas_pd": Fleet(prfaas, pd),
        "homogeneous_pd": Fleet(0, homogeneous_instances * base.pd.gpus_per_instance),
        "naive_heterogeneous_pd": Fleet(prfaas, pd),
    }


def equal_cost_gain(
    ratio: NDArray[np.float64] | float, points: Mapping[str, OperatingPoint], gpus: Mapping[str, Fleet]
) -> NDArray[np.float64]:
    """Λ_max of PrfaaS-PD over that of a homogeneous cluster of the same cost, minus 1; one H200 costs `ratio` H20."""
    cost = np.asarray(ratio) * gpus["prfaas_pd"].prfaas_gpus + gpus["prfaas_pd"].pd_gpus
    rival = points["homogeneous_pd"].lambda_max * cost / gpus["homogeneous_pd"].pd_gpus
    return np.asarray(points["prfaas_pd"].lambda_max / rival - 1)


def run(context: Context) -> Outcome:
    """Gain over price ratio, break-even and implied ratio; dollars per million tokens at the configured prices."""
    settings, options = context.settings, context.options
    base = deployment(settings)
    if base.n_prfaas == 0:
        raise UserError("cluster.prfaas.instances: 0; the cost comparison needs 1 or more")
    points, gpus = operating_points(base, settings), fleets(base, settings.cluster.homogeneous_instances)
    ratios = np.linspace(options.ratio_low, options.ratio_high, 121)
    gains = equal_cost_gain(ratios, points, gpus)

    def ratio_for(gain: float) -> float:
        prfaas, homogeneous = points["prfaas_pd"].lambda_max, points["homogeneous_pd"].lambda_max
        cost = prfaas / homogeneous / (1 + gain) * gpus["homogeneous_pd"].pd_gpus
        return float((cost - gpus["prfaas_pd"].pd_gpus) / gpus["prfaas_pd"].prfaas_gpus)

    claimed = text.EQUAL_COST_GAIN.value / 100
    rows = [
        context.metric(
            "price ratio 2", "equal_cost_gain", float(equal_cost_gain(2.0, points, gpus)), "", "computed", paper=claimed
        ),
        context.metric("gain of 15 %", "price_ratio", ratio_for(claimed), "H20 per H200", "computed", paper=2.0),
        context.metric("gain of 0 %", "price_ratio", ratio_for(0.0), "H20 per H200", "computed"),
    ]
    gpu_usd, egress_gb = {}, {}
    for case, point in points.items():
        prfaas_usd = (
            settings.cost.gpu_hour_usd(base.prfaas.accelerator) * gpus[case].prfaas_gpus
            if gpus[case].prfaas_gpus
            else 0.0
        )
        gpu_usd[case] = prfaas_usd + settings.cost.gpu_hour_usd(base.pd.accelerator) * gpus[case].pd_gpus
        egress_gb[case] = point.egress_bps / 8e9 * SECONDS_PER_HOUR
        hourly = gpu_usd[case] + settings.cost.usd_per_egress_gb * egress_gb[case]
        tokens = point.lambda_max * SECONDS_PER_HOUR * base.output_tokens
        rows.append(
            context.metric(case, "cost_per_mtok_usd", 1e6 * hourly / tokens, "USD per 10^6 output tokens", "computed")
        )
        rows.append(context.metric(case, "cost_per_hour_usd", hourly, "USD/h", "computed"))
    # The paper's link is a flat cost; where egress is metered, this price per GB eats the whole gain.
    rival = gpu_usd["homogeneous_pd"] * points["prfaas_pd"].lambda_max / points["homogeneous_pd"].lambda_max
    break_even = (rival - gpu_usd["prfaas_pd"]) / egress_gb["prfaas_pd"]
    rows.append(context.metric("prfaas_pd", "break_even_egress_usd_per_gb", break_even, "USD/GB", "computed"))
    return Outcome(rows, {"gain": pd.DataFrame({"price_ratio": ratios, "gain": gains})})


def draw(record: Record) -> Figure:
    """Gain over price ratio, with break-even, the paper's claim and the ratio it implies."""
    table = record.table("gain")
    figure, (axis,) = style.panels(1, height_in=3.2, width_in=5.2)
    axis.plot(
        table["price_ratio"], 100 * table["gain"], color=style.BLUE, label="PrfaaS-PD against H20 for the same money"
    )
    axis.axhline(0, color="black", lw=0.8)
    axis.plot(2.0, text.EQUAL_COST_GAIN.value, **{**style.PAPER, "label": "paper: about 15 % (ratio 2 implied)"})
    even = value(record.metrics, "price_ratio", "gain of 0 %")
    axis.annotate(
        f"break-even at {even:.2f}",
        (even, 0),
        xytext=(even - 0.1, 9),
        arrowprops={"arrowstyle": "-", "lw": 0.8},
        fontsize=9,
    )
    axis.set(xlabel="price of one H200 in H20", ylabel="throughput gain at equal cost (%)")
    axis.set_title(f"The gain lasts while an H200 costs less than {even:.1f} H20")
    axis.legend(loc="upper right")
    return figure


EXPERIMENT = Experiment(
    name="cost",
    reads={"model": (*EQUATIONS, HOMOGENEOUS, "cost", "options")},
    run=run,
    figures={"cost": draw},
    options=Options,
    check=check_deployment,
    inputs=profile_files,
)
