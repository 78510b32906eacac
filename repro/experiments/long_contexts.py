"""Prompts of up to a million tokens, outputs of a reasoning model, steps of coding agents: where threshold, split, link and gain go.

The paper's case study has inputs of 27K tokens and outputs of 1,024. Here both move over the range that is served today, and named shapes
of workload are placed in it. PrfaaS's instances only prefill, so what outputs do to the gain is the mirror of what inputs do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from repro.errors import UserError
from repro.experiments.base import EQUATIONS, HOMOGENEOUS, Context, Experiment, Outcome
from repro.experiments.deployment import check_offloading, deployment, profile_files
from repro.profiles.base import PhaseProfile
from repro.record.directory import Record
from repro.record.metrics import value
from repro.report import style
from repro.scheduling.search import search
from repro.scheduling.spec import PolicySpec
from repro.scheduling.throughput import Deployment, OperatingPoint
from repro.settings import Settings
from repro.workload.lengths import TruncatedLogNormal

_MINIMUM_TOKENS = 128.0


@dataclass(frozen=True)
class Shape:
    """A workload by name: uncached inputs, log-normal around a median, and the mean output."""

    name: str
    median_tokens: float
    sigma: float
    output_tokens: float

    def __post_init__(self) -> None:
        if not (self.median_tokens > _MINIMUM_TOKENS and self.sigma > 0 and self.output_tokens >= 1):
            raise UserError(
                f"options.shapes: {self.name}: accepted: a median above {_MINIMUM_TOKENS:g} tokens, sigma above 0, outputs of 1 up"
            )


#: Coding agents by TraceLab (arXiv:2606.30560, June 2026; 4,265 sessions, 357,161 steps, 54.9 G input, 52.6 G cached and 186.9 M output
#: tokens): 6,440 uncached and 523 output tokens per step on a context of 154K. The spread around these means is assumed.
SHAPES = (
    Shape("agent step, prefix cached", 3_900.0, 1.0, 523.0), Shape("agent step, nothing cached", 120_000.0, 0.7, 523.0),
    Shape("reasoning, 8K out", 20_000.0, 1.0, 8_192.0), Shape("reasoning, 32K out", 20_000.0, 1.0, 32_768.0),
    Shape("long documents", 200_000.0, 0.8, 1_024.0),
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    """The grid of medians and outputs, the shapes, and the longest prompt."""

    medians_tokens: tuple[float, ...] = (5e3, 1e4, 2e4, 4e4, 8e4, 1.6e5, 3.2e5)
    outputs_tokens: tuple[float, ...] = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
    sigma: float = 1.0
    maximum_tokens: float = 1_048_576
    shapes: tuple[Shape, ...] = SHAPES

    def __post_init__(self) -> None:
        if not self.medians_tokens or not all(
            _MINIMUM_TOKENS < median < self.maximum_tokens for median in self.medians_tokens
        ):
            raise UserError(
                f"options.medians_tokens: {list(self.medians_tokens)}; accepted: above {_MINIMUM_TOKENS:g}, below options.maximum_tokens"
            )
        if not self.outputs_tokens or min(self.outputs_tokens) < 1 or not self.sigma > 0:
            raise UserError("options.outputs_tokens, options.sigma: outputs of 1 token or more, and a positive sigma")
        if any(shape.median_tokens >= self.maximum_tokens for shape in self.shapes):
            raise UserError("options.shapes: a median lies above options.maximum_tokens")


def run(context: Context) -> Outcome:
    """The configured workload, the shapes and the grid, each at its own best threshold and split."""
    settings, options = context.settings, context.options
    base, rows = deployment(settings), []
    quadratic = replace(base, prfaas=_quadratic(base.prfaas), pd=_quadratic(base.pd))
    named = {"configured": (base.lengths, base.output_tokens)} | {
        shape.name: (_law(shape.median_tokens, shape.sigma, options), shape.output_tokens) for shape in options.shapes
    }
    for case, (law, output) in named.items():
        policy = settings.policy if case == "configured" else _free(settings.policy, options)
        point, gain = _best(replace(base, lengths=law, output_tokens=output), policy, settings)
        _, bent = _best(replace(quadratic, lengths=law, output_tokens=output), policy, settings)
        for metric, number, unit in (
            ("lambda_max", point.lambda_max, "req/s"), ("threshold_tokens", point.threshold_tokens, "tokens"),
            ("n_p", point.n_p, "instances"), ("offload_fraction", point.offload_fraction, ""), ("egress_bps", point.egress_bps, "bit/s"),
            ("mean_input_tokens", law.mean_tokens, "tokens"),
        ):  # fmt: skip
            rows.append(context.metric(case, metric, number, unit, "computed"))
        ends = (min(gain, bent), max(gain, bent))
        rows.append(context.metric(case, "throughput_ratio", gain, "", "computed", interval=ends, n=2))
    grid = pd.DataFrame(_grid(settings, base, options))
    even = _break_even(settings, base)
    if math.isfinite(even):
        rows.append(context.metric("configured", "break_even_output_tokens", even, "tokens", "computed"))
    return Outcome(rows, {"grid": grid})


def _law(median_tokens: float, sigma: float, options: Options) -> TruncatedLogNormal:
    return TruncatedLogNormal(math.log(median_tokens), sigma, _MINIMUM_TOKENS, options.maximum_tokens)


def _free(policy: PolicySpec, options: Options) -> PolicySpec:
    """Threshold and split to be searched, with steps that suit the longest prompt."""
    step = max(policy.threshold_step_tokens, round(options.maximum_tokens / 2000))
    return PolicySpec(policy.name, threshold_step_tokens=step, lengths=policy.lengths)


def _best(base: Deployment, policy: PolicySpec, settings: Settings) -> tuple[OperatingPoint, float]:
    """The best point of PrfaaS-PD, and its Λ_max over that of the homogeneous cluster."""
    free = replace(policy, threshold_tokens=None, n_p=None)
    point = search(base, policy)
    return point, point.lambda_max / search(
        base.without_prfaas(settings.cluster.homogeneous_instances), free
    ).lambda_max


def _quadratic(profile: PhaseProfile) -> PhaseProfile:
    """T_prefill continued as a parabola where the profile's own curve leaves its last measured length in a straight line."""
    return profile.with_interpolation("quadratic") if len(profile.prefill.tokens) > 2 else profile


def _grid(settings: Settings, base: Deployment, options: Options) -> Iterator[dict[str, float]]:
    policy = _free(settings.policy, options)
    for median in options.medians_tokens:
        law = _law(median, options.sigma, options)
        for output in options.outputs_tokens:
            point, gain = _best(replace(base, lengths=law, output_tokens=float(output)), policy, settings)
            yield {
                "mean_input_tokens": law.mean_tokens, "output_tokens": output, "gain": gain, "n_p": point.n_p,
                "egress_bps": point.egress_bps,
                "offload_fraction": point.offload_fraction, "threshold_tokens": point.threshold_tokens,
            }  # fmt: skip


def _break_even(settings: Settings, base: Deployment) -> float:
    """Outputs from which on PrfaaS-PD serves no more than the homogeneous cluster, on the configured inputs; nan where there are none."""

    def gain(output: float) -> float:
        return (
            _best(replace(base, output_tokens=output), settings.policy, settings)[1] - 1e-9
        )  # indivisible instances tie

    low, high = base.output_tokens, 64 * base.output_tokens
    if gain(low) <= 1 or gain(high) > 1:
        return math.nan
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if gain(middle) > 1 else (low, middle)
    return high


def finding(record: Record) -> str:
    """Where the gain is largest and where it ends."""
    table = record.metrics
    gains = table[table["metric"] == "throughput_ratio"].set_index("case")["value"]
    most, least = str(gains.idxmax()), str(gains.idxmin())
    even = table[table["metric"] == "break_even_output_tokens"]["value"]
    ends = f"; with the configured inputs it ends at outputs of {even.iloc[0]:,.0f} tokens" if len(even) else ""
    egress = table[table["metric"] == "egress_bps"].set_index("case")["value"]
    return (
        f"PrfaaS-PD serves {gains[most]:.2f} times what homogeneous PD does on '{most}' and {gains[least]:.2f} times on '{least}'{ends}; "
        f"no shape of workload here fills more than {egress.max() / 1e9:.0f} Gbps of the link."
    )


def draw(record: Record) -> Figure:
    """Gain, PD-P instances and egress over mean input and output, with the named workloads in their places."""
    grid = record.table("grid")
    outputs = grid["output_tokens"].drop_duplicates().to_list()
    inputs = grid["mean_input_tokens"].drop_duplicates().to_list()
    figure, axes = style.panels(3, height_in=4.3, width_in=7.0, sharey=True)
    for axis, column, title, scale, form in (
        (axes[0], "gain", "Λ_max ÷ homogeneous", 1.0, "{:.2f}"), (axes[1], "n_p", "PD-P instances", 1.0, "{:.0f}"),
        (axes[2], "egress_bps", "Egress (Gbps)", 1e9, "{:.1f}"),
    ):  # fmt: skip
        values = grid.pivot(index="output_tokens", columns="mean_input_tokens", values=column).to_numpy(float) / scale
        colours: dict[str, Any] = (
            {"cmap": "RdBu", "norm": TwoSlopeNorm(1.0, 0.5, 2.3)} if column == "gain" else {"cmap": "Blues"}
        )
        axis.imshow(values, origin="lower", aspect="auto", **colours)
        for (row, at), number in np.ndenumerate(values):
            dark = not 0.65 < number < 1.65 if column == "gain" else number > 0.6 * values.max()
            axis.text(
                at, row, form.format(number), ha="center", va="center", fontsize=7, color="white" if dark else "black"
            )
        axis.set_xticks(range(len(inputs)), [_tokens(tokens) for tokens in inputs], fontsize=7, rotation=45)
        axis.grid(visible=False)
        axis.set(title=title, xlabel="mean input (tokens)")
    axes[0].set_yticks(range(len(outputs)), [_tokens(tokens) for tokens in outputs])
    axes[0].set_ylabel("output (tokens)")
    _place(figure, axes[0], record, inputs, outputs)
    return figure


def _place(figure: Figure, axis: Axes, record: Record, inputs: list[float], outputs: list[float]) -> None:
    """Number the named workloads on the grid, and say below what each number is."""
    shapes = [(item["name"], float(item["output_tokens"])) for item in record.configuration["options"]["shapes"]]
    words = []
    for index, (name, output) in enumerate(shapes, 1):
        mean = value(record.metrics, "mean_input_tokens", name)
        x = float(np.interp(math.log(mean), np.log(inputs), range(len(inputs))))
        y = float(np.interp(math.log(output), np.log(outputs), range(len(outputs))))
        axis.text(x + 0.33, y + 0.3, str(index), fontsize=7, ha="center", va="center",
                  bbox={"boxstyle": "circle,pad=0.15", "facecolor": "white", "edgecolor": "black", "linewidth": 0.8})  # fmt: skip
        words.append(f"{index} {name}: {value(record.metrics, 'throughput_ratio', name):.2f}")
    half = (len(words) + 1) // 2
    below = "   ".join(words[:half]) + "\n" + "   ".join(words[half:])
    figure.supxlabel(f"In the circles, with Λ_max ÷ homogeneous:\n{below}", fontsize=8)


def _tokens(tokens: float) -> str:
    return f"{tokens / 1024:.0f}K" if tokens >= 1024 else f"{tokens:g}"


EXPERIMENT = Experiment(
    name="long_contexts",
    reads={"model": (*EQUATIONS, HOMOGENEOUS, "options")},
    run=run,
    figures={"long_contexts": draw},
    options=Options,
    check=check_offloading,
    inputs=profile_files,
    finding=finding,
    hinges_on=(
        "T_prefill is known up to 130K tokens and continued beyond (a straight line, or the interval's parabola); BS_max stays what it is "
        "however long contexts grow; PrfaaS's instances never decode."
    ),
)
