"""What the paper's idea is worth on hardware that one can rent: its case study with published models, measured kernels and public prices.

H200 and H20 are replaced by every pair of accelerators with points (`profile=silicon:…`), the unnamed model by Kimi-K3,
Qwen3.5-397B and, as the dense contrast, MiniMax-M2.5. Equations 1–8, the search and the length distribution are the
paper's. A PrfaaS-PD deployment is held against homogeneous clusters of either accelerator with as many GPUs, since whoever pays for the
better one may buy nothing else: gain at equal cost is Λ_max per dollar against the better.

A model that does not fit 8 GPUs runs on a pipeline. Its stages count as instances (a pipeline of s stages holds s
requests), so instances and splits come in multiples of s. T_prefill without the fixed part is kernels alone; with it,
`fixed_s` is added at every length on both sides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from repro.errors import UserError
from repro.experiments.base import TRACE_LENGTHS, Context, Experiment, Outcome
from repro.experiments.silicon import points_files
from repro.profiles.base import PhaseProfile
from repro.profiles.silicon import PREFIX, committed, meets, silicon_profile
from repro.record.directory import Record
from repro.record.metrics import Metric
from repro.report import style
from repro.scheduling.search import surface, threshold_grid
from repro.scheduling.throughput import Deployment, OperatingPoint, evaluate
from repro.settings import Settings

_GPUS: Final = 8


@dataclass(frozen=True)
class Options:
    """Models, accelerators, GPUs (of PrfaaS at most: what pays best is taken), and the part of T_prefill that no kernel explains."""

    models: tuple[str, ...] = ("kimi_k3", "qwen3_5_397b", "minimax_m2_5")
    prefill: tuple[str, ...] = ("h100", "h200", "b200", "gb200")
    decode: tuple[str, ...] = ("h100", "h200", "l40s", "a100", "h20")
    prfaas_gpus: int = 64
    pd_gpus: int = 128
    fixed_s: float = 0.37

    def __post_init__(self) -> None:
        for name in ("models", "prefill", "decode"):
            if not getattr(self, name):
                raise UserError(f"options.{name}: empty; accepted: one or more")
        for name in ("prfaas_gpus", "pd_gpus"):
            if getattr(self, name) < _GPUS or getattr(self, name) % _GPUS:
                raise UserError(f"options.{name}: {getattr(self, name)}; accepted: a multiple of {_GPUS}")
        if not self.fixed_s > 0:
            raise UserError(
                f"options.fixed_s: {self.fixed_s}; accepted: seconds above 0 (a run without is part of the result)"
            )


def check(settings: Settings, options: Options) -> None:
    """Refuse a model that has no points on any system, a link without a rate, and an accelerator with points but no price."""
    if settings.link.rate_bps is None:
        raise UserError("link.rate_bps: null; accepted: a rate in bit/s")
    known = committed("points")
    for model in options.models:
        if model not in set(known["model"]):
            raise UserError(
                f"options.models: {model!r} has no points; accepted: {', '.join(sorted(set(known['model'])))}"
            )
    for system in dict.fromkeys((*options.prefill, *options.decode)):
        if system in set(known["system"]):
            settings.cost.gpu_hour_usd(system.upper())


def run(context: Context) -> Outcome:
    """Every model on every pair of accelerators, without and with the fixed part; what has no data says so."""
    settings, options = context.settings, context.options
    rows, metrics, refused = [], list[Metric](), []
    for model in options.models:
        for prefill in options.prefill:
            for decode in options.decode:
                if prefill == decode:
                    continue
                context.progress(f"{model}, {prefill} and {decode}")
                for fixed_s in (0.0, options.fixed_s):
                    try:
                        row = pair(settings, options, model, prefill, decode, fixed_s)
                    except UserError as error:
                        refused.append(
                            {"model": model, "prefill": prefill, "decode": decode, "reason": _brief(str(error))}
                        )
                        break
                    rows.append(row)
                    metrics += _metrics(context, row)
    if not rows:
        raise UserError(f"options: no pair can run; {refused[0]['reason']}")
    prices = [{"accelerator": name, "usd_per_gpu_hour": usd} for name, usd in settings.cost.usd_per_gpu_hour.items()]
    tables = {"deployments": pd.DataFrame(rows), "prices": pd.DataFrame(prices)}
    if refused:
        tables["no_result"] = pd.DataFrame(refused)
    return Outcome(metrics, tables, provenance={"prices": settings.cost.source})


def _brief(reason: str) -> str:
    return reason.split("; accepted")[0] + (
        f" ({reason.rpartition(' (')[2]}" if reason.endswith(")") and "; accepted" in reason else ""
    )


def profile_on(settings: Settings, model: str, system: str, fixed_s: float) -> PhaseProfile:
    """The model's profile on a system at this workload and service level, with the fixed part added to T_prefill."""
    slo = settings.workload.slo.tokens_per_s
    law = settings.workload.length_law()
    context = law.mean_tokens + settings.workload.mean_output_tokens() / 2
    found = silicon_profile(f"{PREFIX}{model}@{system}", "options", slo, context)
    seconds = tuple(value + fixed_s for value in found.prefill.seconds)
    return replace(found, prefill=replace(found.prefill, seconds=seconds))


def pair(settings: Settings, options: Options, model: str, prefill: str, decode: str, fixed_s: float) -> dict[str, Any]:
    """One model on one pair of accelerators: the best PrfaaS-PD, and what it is compared with.

    Raises:
        UserError: where a side has no data, too few GPUs for its pipelines, or misses the service level.
    """
    fast, slow = (profile_on(settings, model, system, fixed_s) for system in (prefill, decode))
    n_most, n_pd = options.prfaas_gpus // _GPUS, options.pd_gpus // _GPUS
    largest = Deployment(
        fast, n_most, slow, n_pd, settings.link.rate_bps or float("inf"), settings.workload.length_law(),
        settings.workload.mean_output_tokens(),
    )  # fmt: skip
    slo = settings.workload.slo.tokens_per_s
    usd = {"fast": settings.cost.gpu_hour_usd(prefill.upper()), "slow": settings.cost.gpu_hour_usd(decode.upper())}

    def cost_usd(point: OperatingPoint) -> float:
        egress = settings.cost.usd_per_egress_gb * point.egress_bps / 8e9 * 3600
        return usd["fast"] * _GPUS * point.n_prfaas + usd["slow"] * options.pd_gpus + egress

    sizes = prfaas_sizes(n_most, int(fast.provenance["prefill stages"]))
    tried = [best(replace(largest, n_prfaas=n), settings, slo) for n in sizes]
    own = max(tried, key=lambda point: point.lambda_max / cost_usd(point))
    n_prfaas, cost = own.n_prfaas, cost_usd(own)
    base = replace(largest, n_prfaas=n_prfaas)
    free = best(replace(base, egress_bps=float("inf")), settings, slo)
    everything = replace(base, n_prfaas=0, n_pd=n_prfaas + n_pd)
    rivals = {
        "pd": _or_none(everything, settings, slo),
        "prefill": _or_none(replace(everything, pd=fast), settings, slo),
    }
    naive = evaluate(base, base.lengths.minimum_tokens, 0, n_pd, settings.policy.lengths)
    gpus = _GPUS * (n_prfaas + n_pd)
    per_dollar = {"pd": rivals["pd"] / (usd["slow"] * gpus), "prefill": rivals["prefill"] / (usd["fast"] * gpus)}
    better = max(per_dollar.values())
    long_bytes = float(base.prfaas.kv_bytes(free.l_long_tokens)) if free.offload_fraction else 0.0
    long_s = float(base.prfaas.prefill_s(free.l_long_tokens)) if free.offload_fraction else float("inf")
    return {
        "model": model, "prefill": prefill, "decode": decode, "fixed_s": fixed_s,
        "prefill_case": fast.provenance["prefill"], "decode_case": slow.provenance["decode"],
        "prefill_stages": fast.provenance["prefill stages"], "decode_stages": slow.provenance["decode stages"],
        "batch_max": slow.batch_max, "threshold_tokens": own.threshold_tokens, "n_prfaas": n_prfaas, "n_p": own.n_p, "n_d": own.n_d,
        "offload_fraction": own.offload_fraction, "lambda_max": own.lambda_max, "lambda_max_homogeneous": rivals["pd"],
        "lambda_max_homogeneous_prefill": rivals["prefill"], "lambda_max_naive": naive.lambda_max, "egress_bps": own.egress_bps,
        "link_binds_below_bps": n_prfaas / long_s * 8 * long_bytes, "cost_per_hour_usd": cost,
        "equal_cost_gain_pd": own.lambda_max / cost / per_dollar["pd"] - 1 if per_dollar["pd"] else float("inf"),
        "equal_cost_gain_prefill": own.lambda_max / cost / per_dollar["prefill"] - 1 if per_dollar["prefill"] else float("inf"),
        "equal_cost_gain": own.lambda_max / cost / better - 1 if better else float("inf"),
        "extrapolated": fast.provenance["extrapolated"],
    }  # fmt: skip


def prfaas_sizes(most: int, stages: int) -> list[int]:
    """How many PrfaaS instances to try: whole pipelines, an eighth, a quarter, half and all of the most that are allowed.

    Raises:
        UserError: where not one pipeline is allowed.
    """
    if most < stages:
        raise UserError(f"options.prfaas_gpus: {most * _GPUS}, and one pipeline needs {stages * _GPUS}")
    return sorted({max(most * share // 8 // stages, 1) * stages for share in (1, 2, 4, 8)})


def _or_none(base: Deployment, settings: Settings, slo: float) -> float:
    """Λ_max of a homogeneous cluster; 0 where its accelerator cannot keep the service level or hold the model."""
    try:
        return best(base, settings, slo).lambda_max
    except UserError:
        return 0.0


def best(base: Deployment, settings: Settings, slo_tokens_per_s: float) -> OperatingPoint:
    """The best threshold and split, instances in whole pipelines.

    Raises:
        UserError: for fewer GPUs than a pipeline needs, or a decode step that misses the service level.
    """
    stages = int(base.pd.provenance["decode stages"])
    ahead = int(base.prfaas.provenance["prefill stages"])
    if base.n_prfaas % ahead or base.n_pd < stages * (1 if base.n_prfaas else 2):
        raise UserError(f"options.pd_gpus: {base.pd.model} needs pipelines of {stages} × {_GPUS} {base.pd.accelerator}")
    context = base.lengths.mean_tokens + base.output_tokens / 2
    if not meets(base.pd.decode, slo_tokens_per_s, context):
        raise UserError(
            f"workload.slo.tokens_per_s: one request of {base.pd.model} on {base.pd.accelerator} misses {slo_tokens_per_s:g} tokens/s"
        )
    splits = np.arange(0 if base.n_prfaas else stages, base.n_pd, stages)
    policy = settings.policy
    law = base.lengths
    thresholds = threshold_grid(base, policy.threshold_step_tokens) if base.n_prfaas else np.array([law.maximum_tokens])
    threshold, n_p = surface(base, thresholds, splits, policy.lengths).best()
    return evaluate(base, threshold, n_p, base.n_pd - n_p, policy.lengths)


_SHOWN: Final[Mapping[str, str]] = {
    "lambda_max": "req/s", "lambda_max_homogeneous": "req/s", "lambda_max_homogeneous_prefill": "req/s", "lambda_max_naive": "req/s",
    "threshold_tokens": "tokens", "n_prfaas": "instances", "n_p": "instances", "n_d": "instances", "offload_fraction": "",
    "egress_bps": "bit/s", "link_binds_below_bps": "bit/s",
    "cost_per_hour_usd": "USD/h", "equal_cost_gain_pd": "", "equal_cost_gain_prefill": "", "equal_cost_gain": "",
}  # fmt: skip


def _metrics(context: Context, row: Mapping[str, Any]) -> list[Metric]:
    case = f"{row['model']} {row['prefill']}+{row['decode']}" + (
        f", fixed part {row['fixed_s']:g} s" if row["fixed_s"] else ""
    )
    finite = ((name, float(row[name]), unit) for name, unit in _SHOWN.items())
    return [context.metric(case, name, value, unit, "silicon") for name, value, unit in finite if np.isfinite(value)]


#: Gains in per cent are drawn up to here; what an accelerator gains that can hardly serve a model alone is much more.
_HIGHEST: Final = 50.0


def draw(record: Record) -> Figure:
    """Gain at equal cost against the better homogeneous cluster, per model and pair; without and with the fixed part."""
    table = record.table("deployments")
    models = list(dict.fromkeys(table["model"]))
    figure, axes = style.panels(len(models), width_in=3.6 * len(models) + 1.0, height_in=3.9, sharey=True)
    for axis, model in zip(axes, models, strict=True):
        part = table[table["model"] == model]
        pairs = list(dict.fromkeys(zip(part["prefill"], part["decode"], strict=True)))
        for index, (prefill, decode) in enumerate(pairs):
            both = part[(part["prefill"] == prefill) & (part["decode"] == decode)].sort_values("fixed_s")
            gains = (100 * both["equal_cost_gain"]).clip(upper=_HIGHEST)
            axis.bar(index, gains.iloc[0], 0.6, color=style.BLUE, label="kernels alone" if index == 0 else None)
            if len(gains) > 1:
                label = "with the fixed part" if index == 0 else None
                axis.plot(index, gains.iloc[1], color=style.RED, marker="s", ls="none", label=label)
            over = 100 * both["equal_cost_gain_pd"].iloc[0]
            if over > _HIGHEST:
                axis.annotate(
                    f"{over:.0f}",
                    (index, _HIGHEST),
                    (0, -7),
                    textcoords="offset points",
                    ha="center",
                    va="top",
                    fontsize=7,
                )
            axis.plot(
                index,
                min(over, _HIGHEST),
                color=style.GREEN,
                marker="^",
                ls="none",
                label="over the PD side's kind alone" if index == 0 else None,
            )
        axis.axhline(0, color="black", lw=0.8)
        axis.set_xticks(range(len(pairs)), [f"{p.upper()} + {d.upper()}" for p, d in pairs], rotation=90, fontsize=7.5)
        axis.grid(axis="x", visible=False)
        axis.set_title(
            {"kimi_k3": "Kimi-K3", "qwen3_5_397b": "Qwen3.5-397B", "minimax_m2_5": "MiniMax-M2.5 (dense)"}.get(
                model, model
            )
        )
    highest = 100 * table["equal_cost_gain"].max()
    found = "no pair beats buying one kind alone" if highest <= 0 else f"the best pair gains {highest:.1f} %"
    figure.suptitle(f"At these prices {found}", fontsize=11, weight="bold")
    axes[0].set_ylabel("gain at equal cost over the\nbetter homogeneous cluster (%)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


EXPERIMENT = Experiment(
    name="public_hardware",
    reads={
        "model": (
            "link.rate_bps", "workload.lengths", "workload.mixture", *TRACE_LENGTHS, "workload.output_tokens", "workload.slo.tokens_per_s",
            "policy.threshold_step_tokens", "policy.lengths", "cost", "options",
        )
    },
    run=run,
    figures={"public_hardware": draw},
    options=Options,
    check=check,
    inputs=points_files,
)  # fmt: skip
