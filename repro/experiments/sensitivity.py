"""What the 1.54 × hangs on: each input of the case study moved through a plausible range, and all of them at once.

The paper compares PrfaaS-PD with two baselines at one point. Here every input moves alone (a tornado plot), then all move together, and
every draw meets the paper's baselines and those that it lacks: load balancing without a length rule, a length rule that does not see the
link, chunked prefill without disaggregation, PrfaaS without a local prefill pool (which is naive heterogeneous PD), and a cluster of
PrfaaS's accelerators alone. The ranges are a judgement, not a measurement; they are options, and the finding is theirs as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from repro.errors import UserError
from repro.experiments import spread
from repro.experiments.base import EQUATIONS, HOMOGENEOUS, TRACE_LENGTHS, Context, Experiment, Outcome
from repro.experiments.deployment import check_priced, deployment, operating_points, profile_files
from repro.profiles.base import PhaseProfile, PrefillCurve
from repro.record.directory import Record
from repro.record.metrics import each, value
from repro.report import style
from repro.scheduling import baselines
from repro.scheduling.search import search
from repro.scheduling.spec import PolicySpec
from repro.scheduling.throughput import Deployment
from repro.settings import Settings

Range = tuple[float, float]

BASELINES = {
    "homogeneous_pd": "homogeneous PD", "naive_heterogeneous_pd": "PrfaaS without local prefill",
    "load_balanced": "load balancing, no length rule", "bandwidth_unaware": "length rule blind to the link",
    "colocated": "colocated, phases take turns", "colocated_overlapped": "colocated, phases overlap fully",
    "homogeneous_prfaas": "homogeneous, PrfaaS's GPU",
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """Plausible ranges, as factors on what is configured; `draws` of all inputs at once.

    `prfaas_prefill` and `pd_prefill` scale T_prefill, `prfaas_fixed` and `pd_fixed` only what it costs at no length. `batch_max` moves
    BS_max at the same step, `tokens_per_s` the step that the SLO allows at the same BS_max. `prfaas_decode` is the decode rate of PrfaaS's
    accelerator over what its profile says: the paper gives H200 no step of its own, so its profile holds H20's, and 1.2 is the
    ratio of their memory bandwidths (4.8 and 4.0 TB/s by NVIDIA's data sheets); null takes 1.2 there and 1 for any other profile.
    """

    draws: int = 400
    prfaas_prefill: Range = (0.8, 1.25)
    pd_prefill: Range = (0.8, 1.25)
    prfaas_fixed: Range = (0.0, 2.0)
    pd_fixed: Range = (0.0, 2.0)
    median_length: Range = (0.5, 2.0)
    length_sigma: Range = (0.7, 1.3)
    output_tokens: Range = (0.5, 2.0)
    batch_max: Range = (0.5, 2.0)
    tokens_per_s: Range = (0.5, 1.5)
    link_rate: Range = (0.1, 4.0)
    price_ratio: Range = (0.75, 1.5)
    prfaas_decode: float | None = None

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise UserError(f"options.draws: {self.draws} is below 1")
        for name, (low, high) in ranges(self).items():
            least = 0.0 if name.endswith("_fixed") else 1e-9
            if not least <= low < high:
                raise UserError(
                    f"options.{name}: {low}, {high}; accepted: two increasing factors, positive but for a fixed part"
                )


def ranges(options: Options) -> Mapping[str, Range]:
    """The range of every input by its name."""
    return {item.name: getattr(options, item.name) for item in fields(options) if item.type == "Range"}


@dataclass(frozen=True)
class Case:
    """The case study with its inputs moved."""

    base: Deployment
    settings: Settings
    price_ratio: float
    prfaas_decode: float

    def lambda_max(self) -> dict[str, float]:
        """Λ_max of PrfaaS-PD and of every baseline, each at its own best threshold and split."""
        policy, points = self.settings.policy, operating_points(self.base, self.settings)
        faster = _decoding(self.base.prfaas, self.prfaas_decode)
        free = PolicySpec(policy.name, threshold_step_tokens=policy.threshold_step_tokens, lengths=policy.lengths)
        alone = replace(self.base, pd=faster).without_prfaas(self.settings.cluster.homogeneous_instances)
        both = replace(self.base, prfaas=faster)
        return {
            **{name: point.lambda_max for name, point in points.items()},
            "load_balanced": baselines.load_balanced(self.base, policy.lengths),
            "bandwidth_unaware": baselines.bandwidth_unaware(self.base, policy),
            "colocated": baselines.colocated(both, policy.lengths, overlapped=False),
            "colocated_overlapped": baselines.colocated(both, policy.lengths, overlapped=True),
            "homogeneous_prfaas": search(alone, free).lambda_max,
        }

    def gains(self) -> dict[str, tuple[float, float]]:
        """Of each baseline: Λ_max of PrfaaS-PD over its own, and the same per unit of money."""
        found, base = self.lambda_max(), self.base
        others = self.settings.cluster.homogeneous_instances
        prfaas = base.prfaas.gpus_per_instance * self.price_ratio
        both = base.n_prfaas * prfaas + base.n_pd * base.pd.gpus_per_instance
        cost = {"homogeneous_pd": others * base.pd.gpus_per_instance, "homogeneous_prfaas": others * prfaas}
        ours = found["prfaas_pd"]
        return {name: (ours / found[name], ours / found[name] * cost.get(name, both) / both) for name in BASELINES}


def moved(base: Deployment, settings: Settings, factors: Mapping[str, float], prfaas_decode: float) -> Case:
    """The case study with each named input multiplied by its factor."""

    def factor(name: str) -> float:
        return factors.get(name, 1.0)

    law, prices = settings.workload.lengths, settings.cost
    lengths = replace(law, mu=law.mu + math.log(factor("median_length")), sigma=law.sigma * factor("length_sigma"))
    changed = replace(
        base,
        prfaas=_with_prefill(base.prfaas, factor("prfaas_prefill"), factor("prfaas_fixed")),
        pd=_with_prefill(base.pd, factor("pd_prefill"), factor("pd_fixed")),
        lengths=replace(settings.workload, lengths=lengths).length_law(),
        output_tokens=base.output_tokens * factor("output_tokens"),
        egress_bps=base.egress_bps * factor("link_rate"),
    )
    batch, rate = factor("batch_max"), factor("tokens_per_s")
    changed = replace(
        changed, prfaas=_decoding(changed.prfaas, 1 / rate, batch), pd=_decoding(changed.pd, 1 / rate, batch)
    )
    ratio = prices.gpu_hour_usd(base.prfaas.accelerator) / prices.gpu_hour_usd(base.pd.accelerator)
    return Case(changed, settings, ratio * factor("price_ratio"), prfaas_decode)


def _with_prefill(profile: PhaseProfile, scale: float, fixed: float) -> PhaseProfile:
    """T_prefill with another fixed part (what it takes at a single token), and as a whole scaled."""
    curve, least = profile.prefill, 1e-6
    shift = (fixed - 1) * min(float(curve(1.0)), *(curve.seconds or (math.inf,)))
    if curve.coefficients:
        a, b, c = curve.coefficients
        changed: PrefillCurve = replace(curve, coefficients=(scale * max(a + shift, least), scale * b, scale * c))
    else:
        changed = replace(curve, seconds=tuple(scale * max(second + shift, least) for second in curve.seconds))
    return replace(profile, prefill=changed)


def _decoding(profile: PhaseProfile, rate: float, batch: float = 1.0) -> PhaseProfile:
    """The same profile with steps `rate` times as fast, and BS_max scaled."""
    step = profile.decode
    return replace(
        profile,
        decode=replace(
            step, base_s=step.base_s / rate, per_sequence_s=step.per_sequence_s / rate,
            per_context_token_s=step.per_context_token_s / rate, batch_max=max(1, round(step.batch_max * batch)),
        ),
    )  # fmt: skip


def run(context: Context) -> Outcome:
    """The tornado, then the draws: how often, and by how much, PrfaaS-PD is ahead of each baseline."""
    settings, options = context.settings, context.options
    base, papers = deployment(settings), spread.is_papers(settings)
    decode = options.prfaas_decode or (1.2 if base.prfaas.name == spread.PAPER_PROFILES[0] else 1.0)
    usual = moved(base, settings, {}, decode)
    found, gains = usual.lambda_max(), usual.gains()
    rows = [context.metric(case, "lambda_max", number, "req/s", "computed") for case, number in found.items()]
    for case, (throughput, money) in gains.items():
        rows += [
            context.metric(case, "throughput_ratio", throughput, "", "computed"),
            context.metric(case, "equal_cost_ratio", money, "", "computed"),
        ]
    bars = []
    for name, ends in ranges(options).items():
        reached = [moved(base, settings, {name: end}, decode).gains()["homogeneous_pd"] for end in ends]
        bars.append((name, *ends, *(gain for pair in zip(*reached, strict=True) for gain in pair)))
    other = replace(
        settings.policy, lengths="true_mean" if settings.policy.lengths == "representative" else "representative"
    )
    others = moved(base, replace(settings, policy=other), {}, decode).gains()
    rows += [
        context.metric(f"{case}.{other.lengths}", "throughput_ratio", throughput, "", "computed")
        for case, (throughput, _) in others.items()
    ]
    reading = others["homogeneous_pd"]
    bars.append(
        ("reading", math.nan, math.nan, gains["homogeneous_pd"][0], reading[0], gains["homogeneous_pd"][1], reading[1])
    )
    rng = np.random.default_rng(settings.seed)
    if papers:
        drawn = [
            moved(variant, settings, {}, decode).gains()["homogeneous_pd"]
            for _, variant in spread.variants(base, 8, rng)
        ]
        low, high = np.min(drawn, axis=0), np.max(drawn, axis=0)
        bars.append(("rounding", math.nan, math.nan, low[0], high[0], low[1], high[1]))
    columns = ["input", "low", "high", "gain_at_low", "gain_at_high", "money_at_low", "money_at_high"]
    context.progress(f"tornado done; {options.draws} draws of all inputs")
    draws = [
        gain
        for _ in range(options.draws)
        for gain in moved(base, settings, _drawn(options, rng), decode).gains().values()
    ]
    gained = np.array(draws).reshape(options.draws, len(BASELINES), 2)
    for index, case in enumerate(BASELINES):
        for axis, metric in enumerate(("probability_ahead", "probability_ahead_at_equal_cost")):
            rows.append(
                context.metric(
                    case, metric, float(np.mean(gained[:, index, axis] > 1 + 1e-9)), "", "computed", n=options.draws
                )
            )
        for axis, metric in enumerate(("drawn_ratio", "drawn_equal_cost_ratio")):
            low, median, high = np.quantile(gained[:, index, axis], (0.05, 0.5, 0.95))
            rows.append(context.metric(case, metric, median, "", "computed", interval=(low, high), n=options.draws))
    return Outcome(rows, {"tornado": pd.DataFrame(bars, columns=columns)})


def _drawn(options: Options, rng: np.random.Generator) -> dict[str, float]:
    """A factor for every input: log-uniform in its range, uniform where that begins at nothing."""
    return {
        name: float(rng.uniform(low, high) if low == 0 else math.exp(rng.uniform(math.log(low), math.log(high))))
        for name, (low, high) in ranges(options).items()
    }


def finding(record: Record) -> str:
    """The gain, what moves it most, and how much of it each missing baseline explains."""
    table, bars = record.metrics, record.table("tornado").dropna()
    most = max(each(bars), key=lambda bar: abs(bar.gain_at_high - bar.gain_at_low))
    low, high = sorted((most.gain_at_low, most.gain_at_high))
    gain, money = value(table, "throughput_ratio", "homogeneous_pd"), value(table, "equal_cost_ratio", "homogeneous_pd")
    by_mean = table[table["case"].str.startswith("load_balanced") & (table["metric"] == "throughput_ratio")]["value"]
    ahead = value(table, "probability_ahead_at_equal_cost", "homogeneous_pd")
    worth = [100 * (gained - 1) for gained in (by_mean.min(), by_mean.max())]
    return (
        f"The gain of {gain:.2f} × over homogeneous PD moves most with {LABELS[most.input]} ({low:.2f} to {high:.2f}); the length "
        f"rule itself is worth {worth[0]:.1f} to {worth[1]:.1f} % (by the reading of T_prefill's mean) over load balancing on the same "
        f"GPUs, and at equal cost ({money:.2f} ×) PrfaaS-PD is ahead of homogeneous PD in {100 * ahead:.0f} % of the draws."
    )


LABELS = {
    "prfaas_prefill": "T_prefill on PrfaaS", "pd_prefill": "T_prefill on PD", "prfaas_fixed": "fixed part of T_prefill, PrfaaS",
    "pd_fixed": "fixed part of T_prefill, PD", "median_length": "median input length", "length_sigma": "σ of the lengths",
    "output_tokens": "output length", "batch_max": "BS_max", "tokens_per_s": "SLO in tokens/s", "link_rate": "link rate",
    "price_ratio": "price ratio", "reading": "E[T(L)] for T(E[L])", "rounding": "rounding, interpolation",
}  # fmt: skip


def draw_tornado(record: Record) -> Figure:
    """Gain over homogeneous PD at either end of every range; throughput left, at equal cost right."""
    bars = record.table("tornado")
    width = (bars["gain_at_high"] - bars["gain_at_low"]).abs() + (bars["money_at_high"] - bars["money_at_low"]).abs()
    bars = bars.loc[width.sort_values().index]
    figure, axes = style.panels(2, height_in=4.6, width_in=7.0, sharey=True)
    names = [LABELS[row.input] + (f"  × {row.low:g}–{row.high:g}" if row.low == row.low else "") for row in each(bars)]
    for axis, kind, metric, title in (
        (axes[0], "gain", "throughput_ratio", "On as many GPUs"), (axes[1], "money", "equal_cost_ratio", "At equal cost"),
    ):  # fmt: skip
        usual = value(record.metrics, metric, "homogeneous_pd")
        for index, row in enumerate(each(bars)):
            for end, colour in (("low", style.SKY), ("high", style.BLUE)):
                reached = getattr(row, f"{kind}_at_{end}")
                axis.barh(index, reached - usual, left=usual, height=0.62, color=colour)
        axis.axvline(usual, color="black", lw=0.9)
        axis.axvline(1, color=style.RED, lw=0.9, linestyle=":")
        axis.set(xlabel="PrfaaS-PD ÷ homogeneous PD", title=f"{title}: {usual:.2f} ×")
        axis.grid(axis="y", visible=False)
    axes[0].set_yticks(range(len(names)), names)
    ends = [Patch(color=style.SKY, label="at the low end"), Patch(color=style.BLUE, label="at the high end")]
    figure.legend(handles=ends, loc="outside lower center", ncols=2)
    return figure


def draw_baselines(record: Record) -> Figure:
    """How often PrfaaS-PD is ahead of each baseline, and by how much."""
    table = record.metrics
    figure, (left, right) = style.panels(2, height_in=3.9, width_in=7.0, sharey=True)
    for shift, colour, label, probability, gain, drawn in (
        (0.18, style.BLUE, "on as many GPUs", "probability_ahead", "throughput_ratio", "drawn_ratio"),
        (
            -0.18,
            style.ORANGE,
            "at equal cost",
            "probability_ahead_at_equal_cost",
            "equal_cost_ratio",
            "drawn_equal_cost_ratio",
        ),
    ):
        for index, case in enumerate(reversed(BASELINES)):
            share = value(table, probability, case)
            left.barh(index + shift, 100 * share, 0.34, color=colour, label=label if not index else None)
            row = table[(table["case"] == case) & (table["metric"] == drawn)].iloc[0]
            right.plot([row["ci_low"], row["ci_high"]], [index + shift] * 2, color=colour, lw=2.5)
            right.plot(
                value(table, gain, case),
                index + shift,
                "o",
                color=colour,
                markersize=5,
                label=label if not index else None,
            )
    right.axvline(1, color="black", lw=0.9)
    left.set_yticks(range(len(BASELINES)), list(reversed(BASELINES.values())))
    left.set(xlabel="draws that it wins (%)", title="Whom PrfaaS-PD beats")
    right.set(xlabel="PrfaaS-PD ÷ baseline (5–95 %)", title="By how much")
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    for axis in (left, right):
        axis.grid(axis="y", visible=False)
    return figure


EXPERIMENT = Experiment(
    name="sensitivity",
    reads={
        "model": (
            *(key for key in EQUATIONS if key not in TRACE_LENGTHS),
            HOMOGENEOUS,
            "cost.usd_per_gpu_hour",
            "seed",
            "options",
        )
    },
    run=run,
    figures={"tornado": draw_tornado, "baselines": draw_baselines},
    options=Options,
    check=check_priced,
    inputs=profile_files,
    effort=("seed", "options.draws"),
    finding=finding,
    hinges_on=(
        "the ranges are a judgement and inputs are drawn independently; colocation is not held to the SLO, and H200 decodes by its memory "
        "bandwidth."
    ),
)
