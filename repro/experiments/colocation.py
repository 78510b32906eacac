"""Colocation: as many instances as Table 6's homogeneous PD, each doing both phases by chunked prefill, on the same requests.

Table 6 holds PrfaaS-PD against homogeneous PD, which is disaggregated itself. The other baseline prefills in chunks between decode steps:
no instance waits for the other phase, but each token waits for the chunks of others. The chunk says how much.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from matplotlib.figure import Figure

from repro.errors import UserError
from repro.experiments import simulated
from repro.experiments.base import HOMOGENEOUS, SIMULATED, Context, Experiment, Outcome
from repro.experiments.deployment import operating_points, profile_files
from repro.record.directory import Record
from repro.record.metrics import value
from repro.report import style
from repro.scheduling.baselines import colocated
from repro.scheduling.policies import Homogeneous
from repro.scheduling.spec import SchedulerSpec
from repro.simulate.deployments import requests
from repro.simulate.deployments import simulated as deployed
from repro.simulate.spec import PdCluster, SimulationSpec
from repro.workload.arrivals import Poisson


@dataclass(frozen=True)
class Options:
    """`loads` are of homogeneous PD's Λ_max by the model with true means; `chunks_tokens` of a prefill between two decode steps."""

    loads: tuple[float, ...] = (0.3, 0.5, 0.7, 0.9)
    chunks_tokens: tuple[int, ...] = (256, 1024, 8192)
    duration_s: float = 1200.0
    warmup_s: float = 200.0
    seeds: int = 3

    def __post_init__(self) -> None:
        simulated.check_effort(self.duration_s, self.seeds, self.warmup_s)
        for key, values in (("loads", self.loads), ("chunks_tokens", self.chunks_tokens)):
            if not values or min(values) <= 0:
                raise UserError(f"options.{key}: {list(values)}; accepted: numbers above 0")


def run(context: Context) -> Outcome:
    """Every deployment at every load."""
    options, settings = context.options, context.settings
    setting = simulated.Setting.of(context)
    base, instances = setting.base, settings.cluster.homogeneous_instances
    one_pool = base.without_prfaas(instances)
    true = replace(settings, policy=replace(settings.policy, lengths="true_mean"))
    homogeneous = operating_points(base, true, ("homogeneous_pd",))["homogeneous_pd"]
    together = SimulationSpec(
        (PdCluster(base.pd, instances, instances, colocated_chunk_tokens=options.chunks_tokens[0]),),
        scheduler=SchedulerSpec(Homogeneous()),
    )
    cases = {
        "homogeneous_pd": deployed(one_pool, homogeneous, setting.link),
        "prfaas_pd": deployed(base, setting.point, setting.link),
        **{
            f"colocated_{chunk}": replace(
                together, pd=tuple(replace(pd, colocated_chunk_tokens=chunk) for pd in together.pd)
            )
            for chunk in options.chunks_tokens
        },
    }  # fmt: skip
    comparisons = []
    for load in options.loads:
        rate = load * homogeneous.lambda_max
        stream = partial(requests, base, Poisson(rate), round(rate * options.duration_s))
        comparisons.append(simulated.Comparison(cases, stream, "homogeneous_pd", f"load_{load:g}."))
    window_s = (options.warmup_s, options.duration_s)
    outcome = simulated.compare(context, comparisons, window_s, setting.slo, options.seeds)
    capacity = {
        "homogeneous_pd": homogeneous.lambda_max, "prfaas_pd": setting.point.lambda_max,
        "colocated": colocated(one_pool, "true_mean", overlapped=False),
    }  # fmt: skip
    rows = [context.metric(case, "lambda_max", most, "req/s", "computed") for case, most in capacity.items()]
    return replace(outcome, metrics=[*rows, *outcome.metrics])


def _name(case: str) -> str:
    return f"colocated, chunks of {case.rpartition('_')[2]}" if case.startswith("colocated") else style.CASE_NAMES[case]


def finding(record: Record) -> str:
    """What the best chunk keeps within the service level, and the tokens' time at the lowest and the highest load."""
    table, options = record.metrics, record.configuration["options"]
    words = []
    for load in sorted({min(options["loads"]), max(options["loads"])}):
        where = f"load_{load:g}"
        chunk = max(options["chunks_tokens"], key=lambda one: value(table, "good_fraction", f"{where}.colocated_{one}"))
        cases = {"colocated": f"colocated_{chunk}", "disaggregated": "homogeneous_pd", "PrfaaS-PD": "prfaas_pd"}
        met, tpot = (
            [scale * value(table, metric, f"{where}.{case}") for case in cases.values()]
            for metric, scale in (("good_fraction", 100), ("tpot_mean_s", 1000))
        )
        words.append(
            f"at {100 * load:.0f} % of homogeneous PD's Λ_max, in chunks of {chunk:,} tokens, it keeps {met[0]:.0f} % of the requests "
            f"within the service level, disaggregated instances {met[1]:.0f} % and PrfaaS-PD {met[2]:.0f} %, with a mean TPOT of "
            f"{tpot[0]:.0f}, {tpot[1]:.0f} and {tpot[2]:.0f} ms"
        )
    return f"Chunked prefill on the same instances: {'; '.join(words)}."


def draw(record: Record) -> Figure:
    """Requests within the service level, mean TTFT and mean TPOT over the load, one line per deployment."""
    options, table = record.configuration["options"], record.metrics
    cases = ["homogeneous_pd", "prfaas_pd", *(f"colocated_{chunk}" for chunk in options["chunks_tokens"])]
    panels = (
        ("good_fraction", 100, "within the SLO (%)"), ("ttft_mean_s", 1, "mean TTFT (s)"), ("tpot_mean_s", 1000, "mean TPOT (ms)"),
    )  # fmt: skip
    figure, axes = style.panels(len(panels), width_in=10.5, height_in=3.6)
    for axis, (metric, factor, label) in zip(axes, panels, strict=True):
        for case, (colour, marker, dash) in zip(cases, style.SERIES, strict=False):
            found = [factor * value(table, metric, f"load_{load:g}.{case}") for load in options["loads"]]
            axis.plot(options["loads"], found, color=colour, marker=marker, linestyle=dash, label=_name(case))
        axis.set(xlabel="load of homogeneous PD (1 is Λ_max)", ylabel=label)
        if metric == "ttft_mean_s":
            axis.set_yscale("log")
        else:
            axis.set_ylim(0, 105 if metric == "good_fraction" else None)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


EXPERIMENT = Experiment(
    "colocation",
    {"simulate": (*SIMULATED, HOMOGENEOUS, "options")},
    run,
    {"colocation": draw},
    Options,
    simulated.check,
    profile_files,
    finding=finding,
    hinges_on=(
        "the paper's T_decode is as long as its service level allows, so that any chunk breaks it; TPOT itself says more. "
        "A step with a chunk takes both times together; kernels that overlap them in part lie between this and no cost at all."
    ),
)
