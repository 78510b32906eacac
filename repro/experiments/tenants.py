"""Several tenants of one PrfaaS cluster while one of them bursts: who waits, what isolation costs, and the price of a request.

Each tenant has a PD cluster of its own. Three ways to have PrfaaS: a part for each (what one bursts cannot touch the others, and what one
leaves idle nobody uses), one cluster and one link for all in order of arrival, and the same under the configured control loops, where each
tenant's own scheduler raises its threshold as the shared queue grows. Also with fewer instances, which is what sharing may save.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from repro.errors import UserError
from repro.experiments import simulated
from repro.experiments.base import SCHEDULER, SIMULATED, Context, Experiment, Outcome
from repro.experiments.deployment import check_priced, profile_files
from repro.experiments.study import Point, run_once, run_points, seeds_of
from repro.record.directory import Record
from repro.record.metrics import Metric, value
from repro.record.request_metrics import over_runs, summarise
from repro.record.statistics import Estimate
from repro.report import style
from repro.settings import Settings
from repro.simulate.spec import PrfaasCluster, SimulationSpec
from repro.workload.arrivals import ArrivalProcess, Piecewise, Poisson
from repro.workload.spec import ServiceLevel
from repro.workload.stream import Recorded, RequestBatch

NAMES = {
    "own": "each its own part", "shared": "shared, static t", "shared_loops": "shared, both loops",
    "shared_smaller": "shared, fewer instances",
}  # fmt: skip
WHO = {"bursting": "the tenant that bursts", "others": "the others"}


@dataclass(frozen=True)
class Options:
    """So many `tenants` at `load` of what each could serve alone; the first sends `factor` times as much from `at_s` for `for_s`.

    `smaller` is the share of the PrfaaS instances and of the link that the smallest case has.
    """

    tenants: int = 4
    load: float = 0.6
    factor: float = 2.0
    at_s: float = 300.0
    for_s: float = 300.0
    duration_s: float = 900.0
    smaller: float = 0.875
    seeds: int = 3

    def __post_init__(self) -> None:
        if self.tenants < 2 or self.seeds < 2:
            raise UserError(
                f"options.tenants, options.seeds: {self.tenants} and {self.seeds}; accepted: 2 or more of each"
            )
        if not (self.load > 0 and self.factor > 1 and 0 < self.smaller <= 1):
            raise UserError("options.load, options.factor, options.smaller: accepted: positive, above 1, above 0 to 1")
        if not 0 <= self.at_s < self.at_s + self.for_s <= self.duration_s:
            raise UserError(
                f"options.at_s, options.for_s: {self.at_s:g} and {self.for_s:g}; accepted: within options.duration_s ({self.duration_s:g})"
            )

    def arrivals(self, tenant: int, rate_per_s: float) -> ArrivalProcess:
        """When a tenant's requests come."""
        if tenant:
            return Poisson(rate_per_s)
        spans = (self.at_s, self.for_s, self.duration_s - self.at_s - self.for_s)
        rates = (rate_per_s, self.factor * rate_per_s, rate_per_s)
        kept = [(rate, span) for rate, span in zip(rates, spans, strict=True) if span > 0]
        return Piecewise(tuple(rate for rate, _ in kept), tuple(span for _, span in kept))


@dataclass(frozen=True)
class Measured:
    """By group of tenants, what the requests of the burst amount to; TTFT and good requests by tenant and tenth of the run."""

    groups: Mapping[str, Mapping[str, float]]
    series: pd.DataFrame


@dataclass(frozen=True)
class Measuring:
    """Simulates a point. `tenant` is whose requests these are, where a point holds one tenant's only; else -1 and the stream knows."""

    options: Options
    slo: ServiceLevel

    def __call__(self, point: Point) -> pd.DataFrame:
        """Simulate, and give each request its tenant."""
        frame, _ = run_once(point.spec, point.stream)
        assert isinstance(point.stream, Recorded)
        homes = point.stream.batch.homes
        own = np.asarray(homes)[frame["id"].to_numpy()] if homes is not None else int(point.case.rpartition(" ")[2])
        return frame[["arrival_s", "ttft_s", "tpot_s", "outcome", "route", "queue_s", "kv_bytes", "input_tokens", "cached_tokens",
                      "transfer_exposed_s"]].assign(tenant=own)  # fmt: skip


def run(context: Context) -> Outcome:
    """All cases on the same requests, seed by seed."""
    settings, options = context.settings, context.options
    setting = simulated.Setting.of(context)
    policies, tenants = setting.policies(), options.tenants
    specs = {
        "shared": _shared(policies["static"], tenants, 1.0),
        "shared_loops": _shared(policies["two_timescale"], tenants, 1.0),
        "shared_smaller": _shared(policies["two_timescale"], tenants, options.smaller),
    }
    points: dict[str, Point] = {}
    for seed in seeds_of(context, options.seeds):
        streams = [_stream(setting, options, tenant, seed) for tenant in range(tenants)]
        for tenant, stream in enumerate(streams):
            points[f"own, seed {seed}, tenant {tenant}"] = Point(
                f"own {tenant}", seed, policies["static"], Recorded(stream)
            )
        together = Recorded(_merged(streams))
        points |= {f"{case}, seed {seed}": Point(case, seed, spec, together) for case, spec in specs.items()}
    measured = dict(zip(points, run_points(context, Measuring(options, setting.slo), points), strict=True))
    found: dict[str, list[Measured]] = {case: [] for case in NAMES}
    for seed in seeds_of(context, options.seeds):
        own = pd.concat([measured[f"own, seed {seed}, tenant {tenant}"] for tenant in range(tenants)])
        for case in NAMES:
            requests = own if case == "own" else measured[f"{case}, seed {seed}"]
            found[case].append(_of(requests, options, setting.slo, case, seed))
    instances = {case: float(tenants * setting.base.n_prfaas) for case in ("own", "shared", "shared_loops")}
    instances["shared_smaller"] = float(specs["shared_smaller"].prfaas[0].instances)
    usd = settings.cost.gpu_hour_usd(setting.base.prfaas.accelerator) * setting.base.prfaas.gpus_per_instance
    pd_usd = settings.cost.gpu_hour_usd(setting.base.pd.accelerator) * setting.base.pd.gpus_per_instance
    pd_usd *= tenants * setting.base.n_pd
    rate = (
        tenants * setting.rate(options.load) * (1 + (options.factor - 1) / tenants * options.for_s / options.duration_s)
    )
    rows = []
    for case, runs in found.items():
        price = 1000 * instances[case] * usd / 3600 / rate
        rows.append(context.metric(case, "prefill_usd_per_1000_requests", price, "USD", "computed"))
        whole = 1000 * (instances[case] * usd + pd_usd) / 3600 / rate
        rows.append(context.metric(case, "usd_per_1000_requests", whole, "USD", "computed"))
        rows.append(context.metric(case, "n_prfaas", instances[case], "instances", "computed"))
        rows += [row for who in WHO for row in _metrics(context, case, who, runs, found["own"])]
    return Outcome(rows, {"series": pd.concat([run.series for runs in found.values() for run in runs])})


def _shared(spec: SimulationSpec, tenants: int, share: float) -> SimulationSpec:
    """The deployment of one tenant, times so many, with one PrfaaS cluster behind one link for all of them."""
    (pd_cluster,), (prfaas,) = spec.pd, spec.prfaas
    link = replace(
        prfaas.link, rate_bps=share * tenants * prfaas.link.rate_bps, nic_bps=tenants * prfaas.link.nic_bps,
        changes=tuple(replace(change, rate_bps=share * tenants * change.rate_bps) for change in prfaas.link.changes),
    )  # fmt: skip
    one = PrfaasCluster(prfaas.profile, max(1, round(share * tenants * prfaas.instances)), link)
    return replace(spec, pd=(replace(pd_cluster, share=1 / tenants),) * tenants, prfaas=(one,))


def _stream(setting: simulated.Setting, options: Options, tenant: int, seed: int) -> RequestBatch:
    """One tenant's requests: its own arrivals and lengths, from a stream of random numbers of its own."""
    when, what = (np.random.default_rng(s) for s in np.random.SeedSequence((seed, tenant)).spawn(2))
    times = next(options.arrivals(tenant, setting.rate(options.load)).times(when, 1 << 16))
    times = times[times < options.duration_s]
    outputs = np.full(len(times), round(setting.base.output_tokens), dtype=np.int64)
    return RequestBatch(times, setting.base.lengths.sample(what, len(times)), outputs)


def _merged(streams: list[RequestBatch]) -> RequestBatch:
    """All tenants' requests in order of arrival, each with its home."""
    times = np.concatenate([stream.arrival_s for stream in streams])
    order = np.argsort(times, kind="stable")
    homes = np.concatenate([np.full(len(stream.arrival_s), tenant, np.int64) for tenant, stream in enumerate(streams)])
    tokens, outputs = (np.concatenate([getattr(s, key) for s in streams]) for key in ("input_tokens", "output_tokens"))
    return RequestBatch(times[order], tokens[order], outputs[order], homes=homes[order])


def _of(requests: pd.DataFrame, options: Options, slo: ServiceLevel, case: str, seed: int) -> Measured:
    window = (options.at_s, options.at_s + options.for_s)
    groups = {"bursting": requests[requests["tenant"] == 0], "others": requests[requests["tenant"] > 0]}
    bins = 30
    series = []
    for who, own in groups.items():
        at = (own["arrival_s"] * bins / options.duration_s).astype(int)
        means = own.groupby(at)["ttft_s"].mean()
        series.append(pd.DataFrame({"case": case, "seed": seed, "who": who, "at_s": (means.index + 0.5) * options.duration_s / bins,
                                    "ttft_s": means.to_numpy()}))  # fmt: skip
    return Measured({who: summarise(own, window, slo).values() for who, own in groups.items()}, pd.concat(series))


def _metrics(context: Context, case: str, who: str, runs: list[Measured], alone: list[Measured]) -> list[Metric]:
    rows, name = [], f"{case}, {who}"
    for metric, unit in (("ttft_mean_s", "s"), ("ttft_p90_s", "s"), ("good_fraction", "")):
        own = [run.groups[who][metric] for run in runs]
        estimate = over_runs(metric, own)
        ends = (estimate.low, estimate.high)
        rows.append(context.metric(name, metric, estimate.value, unit, "simulated", interval=ends, n=estimate.n))
        if case != "own":
            paired = Estimate.paired(own, [run.groups[who][metric] for run in alone])
            ends = (paired.low, paired.high)
            rows.append(
                context.metric(name, f"{metric}_minus_own", paired.value, unit, "simulated", interval=ends, n=paired.n)
            )
    return rows


def check(settings: Settings, options: object) -> None:
    """A PrfaaS cluster, and a price for both accelerators. Raises UserError naming the key."""
    simulated.check(settings, options)
    check_priced(settings)


def finding(record: Record) -> str:
    """What a burst does to those who do not burst, shared and apart, and what the smaller cluster saves."""
    table, options = record.metrics, record.configuration["options"]

    def good(case: str, who: str) -> float:
        return 100 * value(table, "good_fraction", f"{case}, {who}")

    def ttft(case: str, who: str) -> float:
        return value(table, "ttft_mean_s", f"{case}, {who}")

    saved = 1 - value(table, "prefill_usd_per_1000_requests", "shared_smaller") / value(
        table, "prefill_usd_per_1000_requests", "own"
    )
    return (
        f"While one of {options['tenants']} tenants sends {options['factor']:g} times its usual, "
        f"{good('own', 'bursting'):.0f} % of its requests keep the "
        f"service level on its own part, {good('shared', 'bursting'):.0f} % on a shared cluster with the same static threshold and "
        f"{good('shared_loops', 'bursting'):.0f} % there with both loops; the others' mean TTFT goes from "
        f"{ttft('own', 'others'):.2f} to {ttft('shared', 'others'):.2f} s with a static threshold and "
        f"{ttft('shared_loops', 'others'):.2f} s with both "
        f"loops ({good('shared_loops', 'others'):.0f} % within it). {100 * saved:.0f} % fewer PrfaaS instances, shared: "
        f"{good('shared_smaller', 'bursting'):.0f} and {good('shared_smaller', 'others'):.0f} %."
    )


def draw(record: Record) -> Figure:
    """Mean TTFT over time of the bursting tenant and of the others; requests within the SLO during the burst, by case."""
    series, table, options = record.table("series"), record.metrics, record.configuration["options"]
    figure, axes = style.panels(3, width_in=10.5, height_in=3.5)
    for axis, (who, title) in zip(axes[:2], WHO.items(), strict=True):
        axis.axvspan(options["at_s"], options["at_s"] + options["for_s"], color="#EEEEEE")
        for (case, name), (colour, _, dash) in zip(NAMES.items(), style.SERIES, strict=False):
            own = series[(series["case"] == case) & (series["who"] == who)].groupby("at_s")["ttft_s"].mean()
            axis.plot(own.index, own, color=colour, linestyle=dash, label=name)
        axis.set(xlabel="time (s), burst shaded", ylabel="mean TTFT (s)", title=title.capitalize(), ylim=(0, None))
    for at, case in enumerate(NAMES):
        for offset, who, colour in ((0.19, "bursting", style.RED), (-0.19, "others", style.BLUE)):
            share = 100 * value(table, "good_fraction", f"{case}, {who}")
            axes[2].barh(-at + offset, share, height=0.36, color=colour, label=WHO[who] if not at else None)
    prices = [value(table, "prefill_usd_per_1000_requests", case) for case in NAMES]
    names = [f"{name}\n{price:.2f} USD" for name, price in zip(NAMES.values(), prices, strict=True)]
    axes[2].set_yticks([-at for at in range(len(NAMES))], names, fontsize=7.5)
    axes[2].set(xlabel="within the SLO during the burst (%)", title="Who is served (prefill per 1,000)", xlim=(0, 100))
    axes[2].grid(axis="y", visible=False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=2, fontsize=8)
    figure.legend(*axes[2].get_legend_handles_labels(), loc="outside lower right", ncols=1, fontsize=8)
    return figure


EXPERIMENT = Experiment(
    name="tenants",
    reads={"simulate": (*SIMULATED, *SCHEDULER, "cost.usd_per_gpu_hour", "options")},
    run=run,
    figures={"tenants": draw},
    options=Options,
    check=check,
    inputs=profile_files,
    finding=finding,
    hinges_on=(
        "requests wait in one queue in order of arrival, whoever sent them (no quota per tenant), bursts of different tenants do not fall "
        "together, and each tenant decodes on a PD cluster of its own."
    ),
)
