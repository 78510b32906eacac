"""One PrfaaS cluster for several PD clusters: what sharing saves when their peaks fall on different hours.

Tenants are alike but for the hour of their peak. Each alone must have PrfaaS instances and a link for its own peak; together they need
what the hour with the most needs. How a burst of one tenant reaches the others is the question of `experiment=tenants`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from repro.errors import UserError
from repro.experiments.base import EQUATIONS, Context, Experiment, Outcome
from repro.experiments.deployment import check_priced, deployment, fewest_prfaas, profile_files
from repro.record.directory import Record
from repro.record.metrics import each, value
from repro.report import style
from repro.scheduling.search import search
from repro.scheduling.spec import PolicySpec

_HOURS = 24


@dataclass(frozen=True)
class Options:
    """So many `tenants`, whose peaks are spread evenly over `spreads_h` hours; each demand is a sine of `amplitude` up to Λ_max."""

    tenants: tuple[int, ...] = (2, 4, 8)
    spreads_h: tuple[int, ...] = (0, 4, 8, 12, 16, 20, 24)
    amplitude: float = 0.6

    def __post_init__(self) -> None:
        if not self.tenants or min(self.tenants) < 2 or not 0 <= self.amplitude < 1:
            raise UserError("options.tenants, options.amplitude: accepted: 2 tenants or more, and 0 to below 1")
        if not self.spreads_h or not all(0 <= spread <= _HOURS for spread in self.spreads_h):
            raise UserError(f"options.spreads_h: {list(self.spreads_h)}; accepted: one or more of 0 to {_HOURS} hours")


def run(context: Context) -> Outcome:
    """Instances, link and price per request, alone and shared, for every number of tenants and spread of their peaks."""
    settings, options = context.settings, context.options
    base, policy = deployment(settings), settings.policy
    free = PolicySpec(policy.name, threshold_step_tokens=policy.threshold_step_tokens, lengths=policy.lengths)
    hours = np.arange(_HOURS)
    shape = (1 + options.amplitude * np.cos(2 * np.pi * (hours - 14) / _HOURS)) / (1 + options.amplitude)
    demand = search(base, free).lambda_max * shape
    needed = np.array(fewest_prfaas(base, free, demand))
    points = {int(n): search(replace(base, n_prfaas=int(n)), free) for n in set(needed.tolist())}
    sent = np.array([
        points[n].egress_bps * rate / points[n].lambda_max for n, rate in zip(needed.tolist(), demand.tolist(), strict=True)
    ])  # fmt: skip
    usd = settings.cost.gpu_hour_usd(base.prfaas.accelerator) * base.prfaas.gpus_per_instance
    pd_usd = settings.cost.gpu_hour_usd(base.pd.accelerator) * base.pd.gpus_per_instance * base.n_pd
    rows, grid = [], []
    for tenants in options.tenants:
        for spread in options.spreads_h:
            shifts = [round(tenant * spread / tenants) for tenant in range(tenants)]
            together = sum(np.roll(needed, shift) for shift in shifts)
            link = sum(np.roll(sent, shift) for shift in shifts)
            own, shared = tenants * int(needed.max()), int(np.max(together))
            per_request = [_HOURS * count * usd / (3600 * tenants * float(demand.sum())) for count in (own, shared)]
            whole = 1e6 * (_HOURS * pd_usd / (3600 * float(demand.sum())) + per_request[1]) / base.output_tokens
            case = f"{tenants} tenants, peaks over {spread} h"
            for metric, number, unit in (
                ("cost_per_mtok_usd", whole, "USD per 10^6 output tokens"),
                ("n_prfaas", shared, "instances"), ("shared_over_own", shared / own, ""), ("egress_bps", float(np.max(link)), "bit/s"),
                ("prefill_usd_per_1000_requests", 1000 * per_request[1], "USD"),
                ("own_prefill_usd_per_1000_requests", 1000 * per_request[0], "USD"),
            ):  # fmt: skip
                rows.append(context.metric(case, metric, number, unit, "computed"))
            grid.append({
                "tenants": tenants, "spread_h": spread, "shared_over_own": shared / own,
                "link_over_own": float(np.max(link)) / (tenants * sent.max()),
            })  # fmt: skip
    day = pd.DataFrame({"hour": hours, "demand_per_s": demand, "n_prfaas": needed, "egress_bps": sent})
    return Outcome(rows, {"grid": pd.DataFrame(grid), "day": day})


def finding(record: Record) -> str:
    """What the most spread of the largest group saves, and what it is without any spread."""
    most = min(each(record.table("grid")), key=lambda row: (row.shared_over_own, row.link_over_own))
    case = f"{most.tenants} tenants, peaks over {most.spread_h} h"
    alone, shared = (value(record.metrics, f"{which}prefill_usd_per_1000_requests", case) for which in ("own_", ""))
    return (
        f"{most.tenants} tenants, peaks spread over {most.spread_h} h, share {100 * most.shared_over_own:.0f} % of the PrfaaS instances "
        f"that they would own and {100 * most.link_over_own:.0f} % of the links: remote prefill falls from {alone:.2f} to {shared:.2f} USD "
        "per 1,000 requests."
    )


def draw(record: Record) -> Figure:
    """Shared instances and shared link over the spread of the peaks, by number of tenants."""
    figure, axes = style.panels(2, height_in=3.3, width_in=7.0, sharey=True)
    grid = record.table("grid")
    for axis, column, title in (
        (axes[0], "shared_over_own", "PrfaaS instances"), (axes[1], "link_over_own", "Egress of the busiest hour"),
    ):  # fmt: skip
        for index, (tenants, rows) in enumerate(grid.groupby("tenants")):
            colour, marker, dash = style.SERIES[index % len(style.SERIES)]
            axis.plot(
                rows["spread_h"],
                100 * rows[column],
                color=colour,
                marker=marker,
                linestyle=dash,
                label=f"{tenants} tenants",
            )
        axis.set(xlabel="hours over which the peaks are spread", title=title, ylim=(0, 105))
    axes[0].set_ylabel("shared ÷ each its own (%)")
    axes[0].legend(loc="lower left")
    return figure


#: Every number of instances has a threshold and a split of its own: none can be fixed.
_READS = tuple(key for key in EQUATIONS if key not in ("policy.threshold_tokens", "policy.n_p"))
EXPERIMENT = Experiment(
    name="many_clusters",
    reads={"model": (*_READS, "cost.usd_per_gpu_hour", "options")},
    run=run,
    figures={"many_clusters": draw},
    options=Options,
    check=check_priced,
    inputs=profile_files,
    finding=finding,
    hinges_on=(
        "tenants are alike, their days are sines known in advance, every PD cluster reaches the shared cluster over a link as good as its "
        "own, and whole instances are handed over on the hour."
    ),
)
