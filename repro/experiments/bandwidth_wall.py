"""The bandwidth wall (§2.3): Λ_max against the link's rate for a hybrid model and its dense twin, by equations, simulator and live system.

The twin is the same model on the same instances, but all of its layers keep keys and values of every token (GQA). It prefills and decodes
as fast, so the two differ in S_kv(l) alone, share the Λ_max of an unlimited link, and part where the link begins to bind. At each rate
either has the threshold and the split that are best there: what a thin link does not carry is prefilled in the PD cluster.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from repro.errors import UserError, at_least
from repro.experiments.base import SIMULATED, Context, Experiment, Outcome
from repro.experiments.deployment import check_offloading, deployment, profile_files
from repro.experiments.live import Wire, calibrated, deployed, lambda_max_of, scale_of
from repro.experiments.study import run_points, seeds_of
from repro.experiments.table6_simulated import Searched, search
from repro.link import LinkSpec
from repro.models.architectures import layout_of
from repro.profiles.base import KVSize, PhaseProfile
from repro.record.directory import Record
from repro.record.metrics import Metric, value
from repro.record.statistics import Estimate
from repro.report import style
from repro.scheduling.search import search as best_point
from repro.scheduling.spec import PolicySpec
from repro.scheduling.throughput import Deployment, OperatingPoint, at_thresholds
from repro.serving.scale import Scaling
from repro.settings import Settings
from repro.simulate.deployments import requests, shared_link, simulated
from repro.simulate.stability import lambda_max
from repro.transport.spec import TransportSpec
from repro.workload.arrivals import Poisson
from repro.workload.stream import Independent

_BF16_BYTES = 2
NAMES = {"hybrid": "hybrid", "dense": "dense twin"}


@dataclass(frozen=True)
class Options(Scaling):
    """`rates_bps` of the link for equations and simulator, `live_rates_bps` for the live system (none: it does not run).

    A layer of the twin keeps `kv_heads` keys of `key_dim` and as many values of `value_dim` elements per token; the defaults are MLA's own
    heads, as in the paper's comparison of Ring-2.5-1T. A simulated Λ_max rests on `seeds` searches with `requests` each, a live one
    on one search with `search_requests` per rate that it tries.
    """

    rates_bps: tuple[float, ...] = (1e9, 2e9, 5e9, 10e9, 20e9, 50e9, 100e9, 200e9, 400e9)
    live_rates_bps: tuple[float, ...] = (5e9, 10e9, 20e9, 100e9)
    kv_heads: int = 8
    key_dim: int = 192
    value_dim: int = 128
    requests: int = 6000
    seeds: int = 2
    search_requests: int = 500
    search_width: float = 0.035

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rates_bps or min((*self.rates_bps, *self.live_rates_bps)) <= 0:
            raise UserError("options.rates_bps, live_rates_bps: accepted: rates above 0, one or more of the former")
        at_least(self, "options", kv_heads=1, key_dim=1, value_dim=1, requests=1000, seeds=2, search_requests=100)
        if not self.search_width > 0:
            raise UserError(f"options.search_width: {self.search_width} is not positive")


@dataclass(frozen=True)
class _Cell:
    """One model at one rate of the link, at its own best point there; the same lengths at every rate of arrivals."""

    model: str
    base: Deployment
    point: OperatingPoint
    link: LinkSpec
    transport: TransportSpec
    seed: int

    @property
    def case(self) -> str:
        return f"{self.model}.{self.base.egress_bps / 1e9:g}_gbps"

    @property
    def spec(self) -> Any:
        return simulated(self.base, self.point, shared_link(self.link, self.transport))

    def stream(self, rate_per_s: float, count: int) -> Independent:
        return requests(self.base, Poisson(rate_per_s), count, self.seed)


def twin_of(base: Deployment, options: Options) -> Deployment:
    """The same deployment of a model whose every layer keeps keys and values.

    Raises:
        UserError: where the profiles' model is not one of conf/model, so that its layers are unknown.
    """
    layers = layout_of(base.prfaas.model, "full").layers
    kv = KVSize(bytes_per_token=layers * options.kv_heads * (options.key_dim + options.value_dim) * _BF16_BYTES)

    def dense(profile: PhaseProfile) -> PhaseProfile:
        return replace(profile, kv=kv, kv_source="computed")

    return replace(base, prfaas=dense(base.prfaas), pd=dense(base.pd))


def run(context: Context) -> Outcome:
    """Equations and simulator at every rate, the live system at some."""
    options, settings = context.options, context.settings
    base = deployment(settings)
    models = {"hybrid": base, "dense": twin_of(base, options)}
    policy = replace(settings.policy, lengths="true_mean")
    drawn: list[dict[str, Any]] = []
    rows = [_alone(context, base, policy), *limits(context, models, policy)]
    cells = [_cell(settings, policy, name, own, rate) for name, own in models.items() for rate in options.rates_bps]
    for cell in cells:
        rows += _point_rows(context, cell)
        drawn.append(_drawn(cell, "model", cell.point.lambda_max))
    for cell, found in zip(cells, _simulated(context, cells), strict=True):
        rows.append(_row(context, f"{cell.case}.simulate", found, "simulated"))
        drawn.append(_drawn(cell, "simulate", found.value, found.low, found.high))
    facts: dict[str, float] = {}
    if options.live_rates_bps:
        scale, facts = calibrated(options, max(options.live_rates_bps))
        context.progress(f"time runs {scale.time:g} times as fast")
        live = [
            _cell(settings, policy, name, own, rate) for name, own in models.items() for rate in options.live_rates_bps
        ]
        for cell in live:
            measured, low, high = _live(context, cell, scale.time)
            rows += measured
            drawn.append(_drawn(cell, "emulate", (low + high) / 2, low, high))
    return Outcome(rows, {"wall": pd.DataFrame(drawn)}, provenance={"emulation": facts})


def _cell(settings: Settings, policy: PolicySpec, name: str, base: Deployment, rate_bps: float) -> _Cell:
    own = replace(base, egress_bps=rate_bps)
    link = replace(settings.link, rate_bps=rate_bps, name=f"{name}_{rate_bps / 1e9:g}g")
    return _Cell(name, own, best_point(own, policy), link, settings.transport, settings.seed)


def limits(context: Context, models: Mapping[str, Deployment], policy: PolicySpec) -> list[Metric]:
    """What an unlimited link allows each model, and below which rate it is not unlimited any more."""
    rows = []
    for name, own in models.items():
        free = best_point(replace(own, egress_bps=math.inf), policy)
        rows.append(context.metric(f"{name}.unlimited", "lambda_max", free.lambda_max, "req/s", "computed"))
        side = at_thresholds(replace(own, egress_bps=1.0), free.threshold_tokens, "true_mean")
        wall_bps = float(side.prfaas_prefill_per_s[0] / side.prfaas_egress_per_s[0])
        rows.append(context.metric(name, "link_binds_below_bps", wall_bps, "bit/s", "computed"))
        size = float(own.prfaas.kv_bytes(free.l_long_tokens))
        rows.append(context.metric(name, "kv_bytes", size, "bytes", "computed"))
    return rows


def _alone(context: Context, base: Deployment, policy: PolicySpec) -> Metric:
    """What the PD cluster does without PrfaaS."""
    alone = best_point(base.without_prfaas(base.n_pd), replace(policy, threshold_tokens=None, n_p=None))
    return context.metric("pd_alone", "lambda_max", alone.lambda_max, "req/s", "computed")


def _point_rows(context: Context, cell: _Cell) -> list[Metric]:
    point = cell.point
    found = (
        ("lambda_max", point.lambda_max, "req/s"), ("threshold_tokens", point.threshold_tokens, "tokens"), ("n_p", point.n_p, "instances"),
        ("n_d", point.n_d, "instances"), ("offload_fraction", point.offload_fraction, ""), ("link_utilisation", point.link_utilisation, ""),
    )  # fmt: skip
    return [context.metric(f"{cell.case}.model", metric, number, unit, "computed") for metric, number, unit in found]


def _simulated(context: Context, cells: Sequence[_Cell]) -> list[Estimate]:
    """Λ_max of every cell over seeds."""
    options, seeds = context.options, seeds_of(context, context.options.seeds)
    searches = {
        f"Λ_max of {cell.case}, seed {seed}": Searched(
            cell.spec, cell.base, options.requests, cell.point.lambda_max, seed
        )
        for cell in cells
        for seed in seeds
    }
    found = iter(run_points(context, search, searches))
    return [Estimate.of([next(found) for _ in seeds]) for _ in cells]


def _live(context: Context, cell: _Cell, time_scale: float) -> tuple[list[Metric], float, float]:
    """Λ_max of one cell on the running system, looked for around the simulator's on the same requests."""
    options, settings, count = context.options, context.settings, context.options.search_requests
    scale = scale_of(cell.base, options, time_scale)
    wire = Wire(cell.link, settings.transport, options.pieces, scale)
    logs = context.folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    sim = lambda_max(cell.spec, lambda rate, _: cell.stream(rate, count), cell.point.lambda_max, [cell.seed]).value
    name = f"wall-{cell.case}".replace("_", "-").replace(".", "-")

    def tell(words: str) -> None:
        context.progress(f"{cell.case}: {words}")

    with deployed(cell.spec, wire, logs, name, cell.seed) as live:
        low, high = lambda_max_of(live, lambda rate: cell.stream(rate, count), sim, options.search_width, 0.06, tell)
    estimate = Estimate((low + high) / 2, low, high, 1)
    rows = [
        _row(context, cell.case, estimate, "emulated"),
        context.metric(cell.case, "lambda_max_over_simulated", estimate.value / sim, "", "emulated"),
    ]
    return rows, low, high


def _row(context: Context, case: str, found: Estimate, source: str) -> Metric:
    return context.metric(case, "lambda_max", found.value, "req/s", source, interval=(found.low, found.high), n=found.n)


def _drawn(cell: _Cell, tier: str, found: float, low: float = math.nan, high: float = math.nan) -> dict[str, Any]:
    return {
        "model": cell.model, "rate_bps": cell.base.egress_bps, "tier": tier, "lambda_max": found, "low": low, "high": high,
    }  # fmt: skip


def finding(record: Record) -> str:
    """Where the two are furthest apart, as the most real tier has it, and where either's wall is by the equations."""
    table, wall = record.metrics, record.table("wall")
    tier = "emulate" if "emulate" in set(wall["tier"]) else "simulate"
    own = wall[wall["tier"] == tier]
    found = {name: own[own["model"] == name].set_index("rate_bps")["lambda_max"].to_dict() for name in NAMES}
    rate = max(
        (float(str(rate)) for rate in found["hybrid"]), key=lambda rate: found["hybrid"][rate] / found["dense"][rate]
    )
    hybrid, dense = (
        f"{found[name][rate]:.2f} req/s ({100 * found[name][rate] / value(table, 'lambda_max', f'{name}.unlimited'):.0f} % of what an "
        "unlimited link allows)"
        for name in NAMES
    )
    walls = [
        f"{value(table, 'link_binds_below_bps', name) / 1e9:.0f} Gbps for the {words}" for name, words in NAMES.items()
    ]
    how = "live" if tier == "emulate" else "simulated"
    return (
        f"Through {rate / 1e9:g} Gbps the hybrid sustains {hybrid}, its dense twin {dense}, {how}; by the equations the link "
        f"binds below {' and '.join(walls)}."
    )


def draw(record: Record) -> Figure:
    """Λ_max over the link's rate: equations as lines, simulated as open marks, live as filled ones with what the search left open."""
    figure, (axis,) = style.panels(1, height_in=3.8)
    curves(axis, record, NAMES, "Gbps", 1e9, ".0f", dict.fromkeys(NAMES, 1.0))
    alone = value(record.metrics, "lambda_max", "pd_alone")
    axis.axhline(alone, color=style.GREY, lw=0.9)
    axis.text(1, alone, "PD cluster alone", transform=axis.get_yaxis_transform(), ha="right", va="bottom", fontsize=8)
    axis.set(ylabel="Λ_max (req/s)", title="The bandwidth wall: dotted, where the link begins to bind")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def curves(
    axis: Axes,
    record: Record,
    names: Mapping[str, str],
    unit: str,
    unit_bps: float,
    digits: str,
    units: Mapping[str, float],
) -> None:
    """Each model's Λ_max ÷ its unit over the link's rate, and where its link begins to bind, in that unit of rates."""
    wall = record.table("wall")
    for index, (name, words) in enumerate(names.items()):
        colour, marker, dash = style.SERIES[index]
        shown = wall[wall["model"] == name].sort_values("rate_bps")
        shown = shown.assign(rate=shown["rate_bps"] / unit_bps, **{
            column: shown[column] / units[name] for column in ("lambda_max", "low", "high")
        })  # fmt: skip
        own = {str(tier): rows for tier, rows in shown.groupby("tier")}
        model, sim = own.pop("model"), own.pop("simulate")
        axis.plot(model["rate"], model["lambda_max"], dash, color=colour, label=f"{words}, equations")
        axis.plot(sim["rate"], sim["lambda_max"], marker, color=colour, mfc="white", ms=5, label="simulated")
        for tier, live in own.items():
            spread = [live["lambda_max"] - live["low"], live["high"] - live["lambda_max"]]
            axis.errorbar(
                live["rate"], live["lambda_max"], spread, fmt=marker, color=colour, ms=7, capsize=3,
                label="live" if tier == "emulate" else "live, computed",
            )  # fmt: skip
        edge = value(record.metrics, "link_binds_below_bps", name) / unit_bps
        axis.axvline(edge, color=colour, lw=0.8, linestyle=":")
        axis.text(
            edge, 0.02, f" {edge:{digits}} {unit}", color=colour, fontsize=8, transform=axis.get_xaxis_transform()
        )
    rates = sorted(set(wall["rate_bps"] / unit_bps))
    axis.set(xscale="log", xlabel=f"link rate B ({unit})")
    axis.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axis.minorticks_off()
    axis.set_ylim(bottom=0)


def check(settings: Settings, options: Options) -> None:
    """A deployment that offloads, of one model whose layers are known. Raises UserError naming the key."""
    check_offloading(settings)
    base = deployment(settings)
    if base.prfaas.model != base.pd.model:
        raise UserError(
            f"cluster.pd.profile: of {base.pd.model}, while cluster.prfaas.profile is of {base.prfaas.model}; accepted: of the same model"
        )
    twin_of(base, options)


#: The link's rate is what is varied, so what changes it is not read.
LINK = tuple(
    f"link.{item.name}"
    for item in fields(LinkSpec)
    if item.name not in ("rate_bps", "reverse_rate_bps", "schedule", "capacity_trace", "reverse_capacity_trace")
)
_READS = tuple(key for key in SIMULATED if not key.startswith(("link.", "transport.")) and key != "workload.slo")
EXPERIMENT = Experiment(
    "bandwidth_wall",
    {"emulate": (*_READS, *LINK, "transport", "options")},
    run,
    {"bandwidth_wall": draw},
    Options,
    check,
    profile_files,
    effort=("seed", "options.seeds", "options.requests", "options.search_requests", "options.search_width"),
    finding=finding,
    hinges_on=(
        "What the twin is: it prefills as fast as the hybrid. A dense model is slower at long prompts, which moves its wall to the left "
        "and its Λ_max down."
    ),
)
