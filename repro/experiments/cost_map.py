"""What a token costs, and when remote prefill pays: over the price ratio, utilisation, tariffs of the link, budgets and hours of a day.

§4.2 states a gain at equal cost without a price, on a link that costs nothing, at full load. Here are the break-even lines: how dear an
H200 or a gigabyte may be; what a flat link costs a half-empty cluster; which mix of both accelerators a budget should buy; and what it is
worth to rent PrfaaS by the hour, where the hour is cheap. Threshold and split are those of the highest throughput, not of the lowest bill.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from repro.errors import UserError
from repro.experiments.base import EQUATIONS, HOMOGENEOUS, Context, Experiment, Outcome
from repro.experiments.cost import SECONDS_PER_HOUR, fleets
from repro.experiments.deployment import check_offloading, deployment, fewest_prfaas, operating_points, profile_files
from repro.record.directory import Record
from repro.record.metrics import Metric, each, value
from repro.report import style
from repro.scheduling.search import search
from repro.scheduling.spec import PolicySpec
from repro.scheduling.throughput import Deployment
from repro.settings import Settings

#: Watts per GPU by NVIDIA's data sheets (B200 1000 W, H200 SXM 700 W, H20 400 W): an upper bound of what a busy one
#: draws, host and cooling aside.
TDP_W = {"B200": 1000.0, "H200": 700.0, "H20": 400.0}


@dataclass(frozen=True)
class Options:
    """Tariffs and ranges; conf/experiment/cost_map.yaml names the public prices that they are from.

    `usd_per_gb` are prices of metered egress; `usd_per_link_hour` is a dedicated link's, both ends. `budgets` are in multiples of what
    the homogeneous cluster costs. A day's demand is a sine of `amplitude` whose peak is PrfaaS-PD's Λ_max; PrfaaS's GPUs then cost
    `peak_factor` as much in `peak_hours` (local hours of the region that rents them out) as in the others, and their configured price on
    average. `shifts_h` are the time differences of regions that rent.
    """

    ratio_low: float = 1.0
    ratio_high: float = 4.0
    usd_per_gb: tuple[float, ...] = (0.0, 0.01, 0.02, 0.05, 0.09)
    usd_per_link_hour: float = 45.0
    utilisations: tuple[float, ...] = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
    budgets: tuple[float, ...] = (1.0, 1.5, 2.0)
    amplitude: float = 0.6
    peak_hours: tuple[int, ...] = (9, 10, 11, 14, 15, 16, 17)
    peak_factor: float = 2.0
    shifts_h: tuple[int, ...] = (0, 6, 12)

    def __post_init__(self) -> None:
        if not 0 < self.ratio_low < self.ratio_high:
            raise UserError("options.ratio_low, options.ratio_high: must be positive and increasing")
        if min(self.usd_per_gb, default=-1) < 0 or self.usd_per_link_hour < 0:
            raise UserError("options.usd_per_gb, options.usd_per_link_hour: one price or more, none negative")
        if not self.utilisations or not all(0 < share <= 1 for share in self.utilisations):
            raise UserError("options.utilisations: accepted: shares above 0, up to 1")
        if not self.budgets or min(self.budgets) <= 0 or not self.shifts_h or not self.peak_factor > 0:
            raise UserError(
                "options.budgets, options.shifts_h, options.peak_factor: one or more, budgets and factor positive"
            )
        if not 0 <= self.amplitude < 1 or not all(0 <= hour < 24 for hour in self.peak_hours):
            raise UserError("options.amplitude, options.peak_hours: accepted: 0 to below 1, and hours of 0 to 23")


@dataclass(frozen=True)
class Bill:
    """A deployment's capacity in req/s, its GPUs' price in USD/h and its egress in GB per request."""

    lambda_max: float
    gpu_usd_per_h: float
    gb_per_request: float

    def usd_per_mtok(
        self, output_tokens: float, utilisation: float, usd_per_gb: float, usd_per_link_hour: float
    ) -> float:
        """USD per 10⁶ output tokens: what is paid by the hour is spread over what is served, what is paid by the gigabyte is not."""
        flat = self.gpu_usd_per_h + (usd_per_link_hour if self.gb_per_request else 0.0)
        per_request = flat / (utilisation * self.lambda_max * SECONDS_PER_HOUR) + usd_per_gb * self.gb_per_request
        return 1e6 * per_request / output_tokens


def bills(settings: Settings, base: Deployment, ratio: float | None = None) -> dict[str, Bill]:
    """The three deployments of Table 6; `ratio` replaces the configured price of PrfaaS's GPU by so many of PD's."""
    points, gpus = operating_points(base, settings), fleets(base, settings.cluster.homogeneous_instances)
    pd_usd = settings.cost.gpu_hour_usd(base.pd.accelerator)
    prfaas_usd = settings.cost.gpu_hour_usd(base.prfaas.accelerator) if ratio is None else ratio * pd_usd
    return {
        case: Bill(
            point.lambda_max,
            gpus[case].prfaas_gpus * prfaas_usd + gpus[case].pd_gpus * pd_usd,
            point.egress_bps / 8e9 / point.lambda_max,
        )
        for case, point in points.items()
    }


def run(context: Context) -> Outcome:
    """The map of price ratio and egress, tariffs over utilisation, the best mix for each budget, and a day."""
    settings, options = context.settings, context.options
    base = deployment(settings)
    usual, tokens = bills(settings, base), base.output_tokens
    rows = []
    for gb in dict.fromkeys((settings.cost.usd_per_egress_gb, *options.usd_per_gb)):
        for case, bill in usual.items():
            at = bill.usd_per_mtok(tokens, 1.0, gb, 0.0)
            rows.append(
                context.metric(
                    f"{case}, {gb:g} USD/GB", "cost_per_mtok_usd", at, "USD per 10^6 output tokens", "computed"
                )
            )
    ours, others = usual["prfaas_pd"], usual["homogeneous_pd"]
    spared = others.gpu_usd_per_h / others.lambda_max - ours.gpu_usd_per_h / ours.lambda_max
    rows += [
        context.metric(
            "prfaas_pd",
            "break_even_egress_usd_per_gb",
            spared / SECONDS_PER_HOUR / ours.gb_per_request,
            "USD/GB",
            "computed",
        ),
        context.metric("prfaas_pd", "break_even_link_usd_per_hour", spared * ours.lambda_max, "USD/h", "computed"),
    ]
    for case, count in fleets(base, settings.cluster.homogeneous_instances).items():
        watts = [TDP_W.get(base.prfaas.accelerator, math.nan), TDP_W.get(base.pd.accelerator, math.nan)]
        total = (count.prfaas_gpus * watts[0] if count.prfaas_gpus else 0.0) + count.pd_gpus * watts[1]
        kwh = total / 1000 * 1e6 / (usual[case].lambda_max * SECONDS_PER_HOUR * tokens)
        if math.isfinite(kwh):
            rows.append(
                context.metric(case, "energy_at_tdp_kwh_per_mtok", kwh, "kWh per 10^6 output tokens", "computed")
            )
    mix = pd.DataFrame(_mix(settings, base, options))
    for row in each(mix[mix["ratio"] == mix["configured_ratio"]]):
        rows.append(context.metric(f"budget × {row.budget:g}", "n_prfaas", row.n_prfaas, "instances", "computed"))
        rows.append(context.metric(f"budget × {row.budget:g}", "n_pd", row.n_pd, "instances", "computed"))
        rows.append(context.metric(f"budget × {row.budget:g}", "gain_over_homogeneous", row.gain, "", "computed"))
    day, hours = _day(context, base)
    tables = {
        "map": _map(settings, base, options),
        "tariffs": _tariffs(usual, tokens, options),
        "mix": mix,
        "day": hours,
    }
    return Outcome([*rows, *day], tables)


def _map(settings: Settings, base: Deployment, options: Options) -> pd.DataFrame:
    """USD per 10⁶ tokens of PrfaaS-PD over homogeneous PD's, over price ratio and price of egress."""
    top, found = max(max(options.usd_per_gb), 0.01), []
    for ratio in np.linspace(options.ratio_low, options.ratio_high, 31):
        own = bills(settings, base, float(ratio))
        for gb in np.linspace(0.0, top, 31):
            ours, others = (
                own[case].usd_per_mtok(base.output_tokens, 1.0, gb, 0.0) for case in ("prfaas_pd", "homogeneous_pd")
            )
            found.append({"price_ratio": ratio, "usd_per_gb": gb, "relative_cost": ours / others})
    return pd.DataFrame(found)


def _tariffs(usual: Mapping[str, Bill], tokens: float, options: Options) -> pd.DataFrame:
    """USD per 10⁶ tokens over utilisation: homogeneous, and PrfaaS-PD on a link that is free, dedicated, or metered."""
    kinds = {
        "homogeneous PD": ("homogeneous_pd", 0.0, 0.0), "PrfaaS-PD, link free": ("prfaas_pd", 0.0, 0.0),
        f"PrfaaS-PD, {options.usd_per_link_hour:g} USD/h": ("prfaas_pd", 0.0, options.usd_per_link_hour),
        **{f"PrfaaS-PD, {gb:g} USD/GB": ("prfaas_pd", gb, 0.0) for gb in options.usd_per_gb if gb},
    }  # fmt: skip
    return pd.DataFrame([
        {"tariff": name, "utilisation": share, "usd_per_mtok": usual[case].usd_per_mtok(tokens, share, gb, link)}
        for name, (case, gb, link) in kinds.items()
        for share in sorted(options.utilisations)
    ])  # fmt: skip


def _mix(settings: Settings, base: Deployment, options: Options) -> Iterator[dict[str, float]]:
    """For every budget and price ratio: the instances of both kinds that serve most, and by how much more than PD's kind alone."""
    policy, cost = _free(settings.policy), settings.cost
    pd_usd = cost.gpu_hour_usd(base.pd.accelerator) * base.pd.gpus_per_instance
    configured = cost.gpu_hour_usd(base.prfaas.accelerator) / cost.gpu_hour_usd(base.pd.accelerator)
    gpus = base.prfaas.gpus_per_instance / base.pd.gpus_per_instance
    known: dict[tuple[int, int], float] = {}

    def capacity(n_prfaas: int, n_pd: int) -> float:
        if (n_prfaas, n_pd) not in known:
            known[n_prfaas, n_pd] = search(replace(base, n_prfaas=n_prfaas, n_pd=n_pd), policy).lambda_max
        return known[n_prfaas, n_pd]

    for budget in options.budgets:
        money = budget * settings.cluster.homogeneous_instances
        for ratio in sorted({*np.linspace(options.ratio_low, options.ratio_high, 7).round(3), configured}):
            most = int((money - 2) / (ratio * gpus))
            best = max(range(most + 1), key=lambda n, r=ratio, m=money: capacity(n, int(m - n * r * gpus + 1e-9)))  # type: ignore[misc]
            n_pd = int(money - best * ratio * gpus + 1e-9)
            yield {
                "budget": budget, "usd_per_h": money * pd_usd, "ratio": ratio, "configured_ratio": configured, "n_prfaas": best,
                "n_pd": n_pd,
                "lambda_max": capacity(best, n_pd), "gain": capacity(best, n_pd) / capacity(0, int(money)),
            }  # fmt: skip


def _free(policy: PolicySpec) -> PolicySpec:
    """The policy with threshold and split to be searched: other deployments than the configured one need their own."""
    return PolicySpec(policy.name, threshold_step_tokens=max(policy.threshold_step_tokens, 500), lengths=policy.lengths)


def _day(context: Context, base: Deployment) -> tuple[list[Metric], pd.DataFrame]:
    """A day's demand served by the fewest PrfaaS instances of each hour, at the price of that hour in each region."""
    settings, options = context.settings, context.options
    policy, cost = _free(settings.policy), settings.cost
    hours = np.arange(24)
    shape = (1 + options.amplitude * np.cos(2 * np.pi * (hours - 14.5) / 24)) / (1 + options.amplitude)
    demand = search(base, policy).lambda_max * shape
    needed = np.array(fewest_prfaas(base, policy, demand))
    alone = next(n for n in range(2, 1000) if search(base.without_prfaas(n), policy).lambda_max >= max(demand) - 1e-9)
    mean = cost.gpu_hour_usd(base.prfaas.accelerator) * base.prfaas.gpus_per_instance
    cheap = 24 / (24 + len(set(options.peak_hours)) * (options.peak_factor - 1))
    tariff = np.array([mean * cheap * (options.peak_factor if hour in options.peak_hours else 1.0) for hour in hours])
    prices = {shift: tariff[(hours + shift) % 24] for shift in options.shifts_h}
    pd_usd = cost.gpu_hour_usd(base.pd.accelerator) * base.pd.gpus_per_instance
    own, mtok = 24 * base.n_pd * pd_usd, float(demand.sum()) * SECONDS_PER_HOUR * base.output_tokens / 1e6
    usd = {
        "homogeneous, sized for the peak": 24 * alone * pd_usd,
        "PrfaaS all day": own + 24 * base.n_prfaas * mean,
        "PrfaaS by the hour, flat price": own + float(needed.sum()) * mean,
        **{f"by the hour, region {shift:+d} h": own + float((needed * price).sum()) for shift, price in prices.items()},
        "by the hour, cheapest region": own + float((needed * np.min(list(prices.values()), axis=0)).sum()),
    }
    rows = [
        context.metric(case, "cost_per_mtok_usd", spent / mtok, "USD per 10^6 output tokens", "computed")
        for case, spent in usd.items()
    ]
    rows.append(
        context.metric("day", "prfaas_instance_hours_share", float(needed.sum()) / (24 * base.n_prfaas), "", "computed")
    )
    frame = pd.DataFrame(
        {"hour": hours, "demand_per_s": demand, "n_prfaas": needed} | {f"usd_{s}": p for s, p in prices.items()}
    )
    return rows, frame


def check(settings: Settings, _: object) -> None:
    """There must be a PrfaaS cluster, and prices for both accelerators."""
    check_offloading(settings)
    bills(settings, deployment(settings))


def finding(record: Record) -> str:
    """Break-even of egress and link, and what renting by the hour saves, with and without a cheap hour."""
    table = record.metrics
    gigabyte, link = (
        value(table, f"break_even_{name}", "prfaas_pd") for name in ("egress_usd_per_gb", "link_usd_per_hour")
    )
    daily, flat, cheapest = (
        value(table, "cost_per_mtok_usd", case)
        for case in ("PrfaaS all day", "PrfaaS by the hour, flat price", "by the hour, cheapest region")
    )
    options = record.configuration["options"]
    metered = min((gb for gb in options["usd_per_gb"] if gb), default=math.nan)
    rented, moved = 100 * (1 - flat / daily), 100 * (1 - cheapest / flat)
    return (
        f"PrfaaS-PD is cheaper than homogeneous PD up to {gigabyte:.4f} USD per GB of egress, or {link:.0f} USD per hour for the link (the "
        f"tariffs compared here begin at {metered:g} and {options['usd_per_link_hour']:g}); over a day with a peak, renting PrfaaS by the "
        f"hour saves {rented:.0f} % of the whole bill, and choosing the region where the hour is cheap another {moved:.0f} %."
    )


def draw_map(record: Record) -> Figure:
    """Relative cost over price ratio and egress with its break-even line; cost over utilisation by tariff."""
    figure, (left, right) = style.panels(2, height_in=3.7, width_in=7.0)
    grid = record.table("map").pivot(index="usd_per_gb", columns="price_ratio", values="relative_cost")
    x, y, z = grid.columns.to_numpy(float), grid.index.to_numpy(float), grid.to_numpy(float)
    filled = left.contourf(
        x, 100 * y, z, levels=np.arange(0.6, 2.01, 0.1), cmap="RdBu_r", extend="both", vmin=0.4, vmax=1.6
    )
    figure.colorbar(filled, ax=left, label="cost ÷ homogeneous PD's")
    left.set(
        xlabel="price of a PrfaaS GPU in PD GPUs",
        ylabel="egress (US cents per GB)",
        title="Metered egress eats the gain",
    )
    left.grid(visible=False)
    cheapest = z[:, 0]  # where both GPUs cost the least apart
    dearest = float(y[cheapest.searchsorted(1.0)]) if cheapest.max() > 1 else float(y[-1])
    left.set_ylim(0, 100 * min(1.6 * dearest, y[-1]))
    line = left.contour(x, 100 * y, z, levels=[1.0], colors="black", linewidths=1.6)
    left.clabel(line, fmt="break-even", fontsize=8)
    for gb in record.configuration["options"]["usd_per_gb"]:
        if 0 < gb < 1.6 * dearest:
            left.axhline(100 * gb, color="black", lw=0.8, linestyle=":")
    tariffs = record.table("tariffs").pivot(index="utilisation", columns="tariff", values="usd_per_mtok")
    for index, name in enumerate(dict.fromkeys(record.table("tariffs")["tariff"])):
        colour, marker, dash = style.SERIES[index % len(style.SERIES)]
        relative = tariffs[name] / tariffs["homogeneous PD"]
        right.plot(100 * tariffs.index, relative, color=colour, marker=marker, linestyle=dash, markersize=4, label=name)
    right.set(xlabel="utilisation (%)", ylabel="cost ÷ homogeneous PD's", title="A gigabyte weighs less on idle GPUs")
    right.set_ylim(top=1.45 * right.get_ylim()[1])  # room for the legend above the lines
    right.legend(fontsize=7, loc="upper left")
    return figure


def draw_mix(record: Record) -> Figure:
    """The best share of the money for PrfaaS over the price ratio, by budget, and the gain over PD's accelerator alone."""
    mix = record.table("mix")
    figure, (left, right) = style.panels(2, height_in=3.3, width_in=7.0)
    for index, (_, rows) in enumerate(mix.groupby("budget")):
        colour, marker, dash = style.SERIES[index % len(style.SERIES)]
        spent = rows["n_prfaas"] * rows["ratio"] / (rows["n_prfaas"] * rows["ratio"] + rows["n_pd"])
        look: dict[str, Any] = {
            "color": colour,
            "marker": marker,
            "linestyle": dash,
            "markersize": 4,
            "label": f"{rows['usd_per_h'].iloc[0]:.0f} USD/h",
        }
        left.plot(rows["ratio"], 100 * spent, **look)
        right.plot(rows["ratio"], rows["gain"], **look)
    left.set(
        xlabel="price of a PrfaaS GPU in PD GPUs", ylabel="money spent on PrfaaS (%)", title="The mix that serves most"
    )
    right.set(
        xlabel="price of a PrfaaS GPU in PD GPUs",
        ylabel="Λ_max ÷ that of PD GPUs alone",
        title="What the mix gains",
    )
    left.legend(title="budget")
    return figure


def draw_day(record: Record) -> Figure:
    """Demand and rented instances by hour; the day's cost per million tokens by way of renting."""
    day, table = record.table("day"), record.metrics
    figure, (left, right) = style.panels(2, height_in=3.4, width_in=7.0)
    left.step(day["hour"], day["n_prfaas"], where="mid", color=style.BLUE, label="PrfaaS instances rented")
    left.plot(day["hour"], day["demand_per_s"], color=style.GREY, linestyle="--", label="demand (req/s)")
    left.set(xlabel="hour at the PD cluster", ylabel="instances, req/s", ylim=(0, None), title="A day with a peak")
    left.set_xticks(range(0, 25, 6))
    left.set_ylim(top=1.35 * left.get_ylim()[1])
    left.legend(fontsize=8, loc="upper left")
    rows = table[(table["metric"] == "cost_per_mtok_usd") & ~table["case"].str.contains("USD/GB")].iloc[::-1]
    colours = [style.GREY if case.startswith("homogeneous") else style.BLUE for case in rows["case"]]
    right.barh(range(len(rows)), rows["value"], color=colours)
    for index, row in enumerate(each(rows)):
        right.text(row.value, index, f" {row.value:.1f}", va="center", fontsize=8)
    right.set_yticks(range(len(rows)), rows["case"].tolist(), fontsize=8)
    right.set(xlabel="USD per million output tokens", title="Cost of the day")
    right.margins(x=0.12)
    right.grid(axis="y", visible=False)
    return figure


EXPERIMENT = Experiment(
    name="cost_map",
    reads={"model": (*EQUATIONS, HOMOGENEOUS, "cost", "options")},
    run=run,
    figures={"map": draw_map, "mix": draw_mix, "day": draw_day},
    options=Options,
    check=check,
    inputs=profile_files,
    finding=finding,
    hinges_on=(
        "H200 costs two H20, which the paper's own gain at equal cost implies; PrfaaS can be rented by the hour while the PD cluster and "
        "the homogeneous one are paid all day; threshold and split are chosen for throughput, not for the bill."
    ),
)
