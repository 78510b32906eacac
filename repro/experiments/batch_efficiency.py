"""Prefill batches and chunks: what throughput a service gains by not taking one request at a time, and what it costs in TTFT.

The paper gives T_prefill of one request and divides instances by it (equations 3 and 4): one request at a time. A pass has a part that does
not grow with its tokens (weights, launches, scheduling), which requests of one batch share. Measured: the real tiny model, batches of equal
prompts in chunks of several sizes. By the profile: a queue before one instance of each pool, under batches of whole prompts and
under a token budget per pass (chunks of several prompts packed together, as engines do); and Λ_max where the fixed part is shared.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.optimize import nnls

from repro.errors import UserError, at_least
from repro.experiments.base import EQUATIONS, HOMOGENEOUS, MODEL, Context, Experiment, Outcome
from repro.experiments.deployment import check_offloading, deployment, profile_files
from repro.experiments.split_model import check_models, vocabulary_of
from repro.models.spec import ModelSpec
from repro.profiles.base import PhaseProfile, PrefillCurve
from repro.record.directory import Record
from repro.record.metrics import Metric, each, value
from repro.record.statistics import Estimate
from repro.report import style
from repro.scheduling.search import search
from repro.scheduling.spec import PolicySpec
from repro.scheduling.throughput import Deployment
from repro.settings import Settings

POOLS = {"prfaas": "PrfaaS, above t", "pd_p": "PD-P, up to t"}
_ONE = "one at a time"


@dataclass(frozen=True)
class Options:
    """Measured: `batches` of prompts of `prompt_tokens`, and one prompt in each of `chunks_tokens`, on `threads`, `repeats` times.

    By the profile: at most so many whole prompts per pass (`profile_batches`), or so many tokens (`budgets_tokens`), at loads that are
    shares of what one request at a time sustains, over `requests` requests.
    """

    prompt_tokens: int = 512
    batches: tuple[int, ...] = (1, 2, 4, 8)
    chunks_tokens: tuple[int, ...] = (32, 64, 128, 256, 512)
    threads: int = 1
    repeats: int = 3
    profile_batches: tuple[int, ...] = (1, 2, 4, 8)
    budgets_tokens: tuple[int, ...] = (8192, 32_768, 131_072)
    loads: tuple[float, ...] = (0.3, 0.5, 0.7, 0.8, 0.9, 1.0)
    compared_load: float = 0.8
    requests: int = 4000

    def __post_init__(self) -> None:
        at_least(self, "options", prompt_tokens=1, threads=1, repeats=1, requests=1)
        for key in ("batches", "chunks_tokens", "profile_batches", "budgets_tokens"):
            if not getattr(self, key) or min(getattr(self, key)) < 1:
                raise UserError(f"options.{key}: {list(getattr(self, key))}; accepted: one or more, each 1 or more")
        if 1 not in self.batches or 1 not in self.profile_batches:
            raise UserError(
                "options.batches, options.profile_batches: accepted: with 1 among them, which all else is compared with"
            )
        if not self.loads or min(self.loads) <= 0 or self.compared_load not in self.loads:
            raise UserError(
                f"options.compared_load: {self.compared_load}; accepted: one of options.loads {list(self.loads)}, above 0"
            )


@dataclass(frozen=True)
class PassCost:
    """Seconds of one forward pass: a fixed part, and for each prompt's tokens a linear and a quadratic one."""

    fixed_s: float
    per_token_s: float
    per_square_s: float

    @staticmethod
    def of(curve: PrefillCurve, shortest: float, longest: float) -> PassCost:
        """Least squares of relative error through a profile's curve, no part below zero."""
        tokens = np.geomspace(max(shortest, 512), longest, 64)
        seconds = curve(tokens)
        design = np.stack([np.ones_like(tokens), tokens, tokens**2], axis=1) / seconds[:, None]
        scale = np.array([1.0, 1e4, 1e8])
        found, _ = nnls(design / scale, np.ones_like(tokens))
        return PassCost(*(float(part) for part in found / scale))

    def work_s(self, start: float, end: float) -> float:
        """What tokens [start, end) of a prompt take beside the fixed part."""
        return self.per_token_s * (end - start) + self.per_square_s * (end**2 - start**2)

    def shared_by(self, requests: int) -> PrefillCurve:
        """T_prefill of a request in a batch of so many."""
        return PrefillCurve(
            "quadratic", coefficients=(self.fixed_s / requests, 1e4 * self.per_token_s, 1e10 * self.per_square_s)
        )


def run(context: Context) -> Outcome:
    """Measure, queue, and put the batched T_prefill into the throughput model."""
    settings = context.settings
    base = deployment(settings)
    measured = pd.DataFrame([row for model in settings.model.values() for row in _measured(context, model)])
    rows = [*_measured_metrics(context, measured)]
    point, law = search(base, settings.policy), base.lengths
    lengths = law.sample(np.random.default_rng(settings.seed), 20 * context.options.requests)
    sides = {
        "prfaas": (base.prfaas, lengths[lengths > point.threshold_tokens]),
        "pd_p": (base.pd, lengths[lengths <= point.threshold_tokens]),
    }
    queued = []
    for pool, (profile, own) in sides.items():
        if not len(own):
            continue  # where the best threshold leaves a pool without requests
        cost = PassCost.of(profile.prefill, law.minimum_tokens, law.maximum_tokens)
        rows.append(context.metric(pool, "prefill_fixed_s", cost.fixed_s, "s", "computed"))
        queued += [
            {"pool": pool, **row} for row in _queued(context, cost, own[: context.options.requests].astype(float))
        ]
    queue = pd.DataFrame(queued)
    for row in each(queue[queue["load"] == context.options.compared_load]):
        case = f"{row.pool}, {row.policy}"
        rows.append(context.metric(case, "ttft_mean_s", row.ttft_mean_s, "s", "computed"))
        rows.append(context.metric(case, "ttft_p90_s", row.ttft_p90_s, "s", "computed"))
        rows.append(context.metric(case, "prefill_capacity_ratio", row.capacity_ratio, "", "computed"))
    shared = pd.DataFrame([*_shared(context, base)])
    for row in each(shared):
        case = f"fixed part shared by {row.batch}"
        rows.append(context.metric(case, "lambda_max", row.prfaas_pd, "req/s", "computed"))
        rows.append(context.metric(case, "throughput_ratio", row.prfaas_pd / row.homogeneous_pd, "", "computed"))
    return Outcome(rows, {"measured": measured, "queue": queue, "shared": shared})


def _measured(context: Context, spec: ModelSpec) -> Iterator[dict[str, object]]:
    """Times of the real model: batches in one chunk, then one prompt in smaller chunks where the model goes on from a chunk exactly."""
    import torch  # two seconds of imports that redrawing a figure does not need

    from repro.engine.gate import admit
    from repro.models.build import build
    from repro.models.prefill import chunked_prefill

    options, threads = context.options, torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        model = build(spec)
        cases = [(batch, options.prompt_tokens) for batch in options.batches]
        if admit(model).chunked:
            cases += [(1, chunk) for chunk in options.chunks_tokens if chunk < options.prompt_tokens]
        random = torch.Generator().manual_seed(context.settings.seed)
        ids = torch.randint(vocabulary_of(spec), (max(options.batches), options.prompt_tokens), generator=random)
        chunked_prefill(model, ids[:1], options.prompt_tokens)  # warms up
        for repeat in range(options.repeats):
            for batch, chunk in cases:
                start_s = time.perf_counter()
                chunked_prefill(model, ids[:batch], chunk)
                seconds = time.perf_counter() - start_s
                yield {"model": spec.name, "batch": batch, "chunk_tokens": chunk, "repeat": repeat, "seconds": seconds,
                       "tokens_per_s": batch * options.prompt_tokens / seconds}  # fmt: skip
            context.progress(f"{spec.name}: {len(cases)} batches and chunks, {repeat + 1} of {options.repeats}")
    finally:
        torch.set_num_threads(threads)


def _measured_metrics(context: Context, measured: pd.DataFrame) -> Iterator[Metric]:
    whole = context.options.prompt_tokens
    for (model, batch, chunk), own in measured.groupby(["model", "batch", "chunk_tokens"], sort=False):
        case = f"{model}, batch of {batch}" if chunk == whole else f"{model}, chunks of {chunk}"
        alone = measured[(measured["model"] == model) & (measured["batch"] == 1) & (measured["chunk_tokens"] == whole)]
        ratios = (
            own.sort_values("repeat")["tokens_per_s"].to_numpy()
            / alone.sort_values("repeat")["tokens_per_s"].to_numpy()
        )
        for metric, values, unit in (
            ("prefill_s", own["seconds"], "s"), ("tokens_per_s", own["tokens_per_s"], "tokens/s"), ("batch_gain", ratios, ""),
        ):  # fmt: skip
            found = Estimate.of([float(number) for number in values])
            yield context.metric(
                str(case), metric, found.value, unit, "measured", interval=(found.low, found.high), n=found.n
            )


def _queued(context: Context, cost: PassCost, lengths: NDArray[np.float64]) -> Iterator[dict[str, object]]:
    """TTFT before one instance at each load under each way to fill a pass, and what each sustains against one request at a time."""
    options = context.options
    policies: dict[str, tuple[int, float]] = {_ONE: (1, np.inf)}
    policies |= {f"batches of {batch}": (batch, np.inf) for batch in options.profile_batches if batch > 1}
    policies |= {f"{budget // 1024}K tokens a pass": (len(lengths), float(budget)) for budget in options.budgets_tokens}
    unit = np.cumsum(np.random.default_rng((context.settings.seed, 1)).exponential(size=len(lengths)))
    alone_s = float(np.mean([cost.fixed_s + cost.work_s(0, length) for length in lengths]))
    for name, (batch, budget) in policies.items():
        done_s = served(np.zeros(len(lengths)), lengths, cost, batch, budget)
        ratio = alone_s * len(lengths) / float(done_s.max())
        for load in options.loads:
            arrivals = unit * alone_s / load
            waited = served(arrivals, lengths, cost, batch, budget) - arrivals
            settled = waited[len(waited) // 10 :]
            yield {"policy": name, "load": load, "ttft_mean_s": float(settled.mean()), "ttft_p90_s": float(np.quantile(settled, 0.9)),
                   "capacity_ratio": ratio}  # fmt: skip


def served(
    arrival_s: NDArray[np.float64], lengths: NDArray[np.float64], cost: PassCost, batch: int, budget: float
) -> NDArray[np.float64]:
    """When each prompt's prefill ends on one instance that fills a pass with waiting prompts in their order: at most `batch` of them and
    `budget` tokens, of which the last prompt may be cut.
    """
    end_s, now_s, first, done = np.empty(len(lengths)), 0.0, 0, 0.0
    while first < len(lengths):
        now_s = max(now_s, float(arrival_s[first]))
        pass_s, left, taken, at = cost.fixed_s, budget, list[tuple[int, float]](), first
        while at < len(lengths) and arrival_s[at] <= now_s and len(taken) < batch and left > 0:
            start = done if at == first else 0.0
            until = min(float(lengths[at]), start + left)
            pass_s += cost.work_s(start, until)
            left -= until - start
            taken.append((at, until))
            at += 1
        now_s += pass_s
        for at, until in taken:
            if until >= lengths[at]:
                end_s[at], first, done = now_s, at + 1, 0.0
            else:
                done = until
    return end_s


def _shared(context: Context, base: Deployment) -> Iterator[dict[str, float]]:
    """Λ_max of PrfaaS-PD and of homogeneous PD, both with batches of that size in every prefill pool, threshold and split searched anew."""
    settings, law = context.settings, base.lengths
    free = PolicySpec(
        settings.policy.name,
        threshold_step_tokens=settings.policy.threshold_step_tokens,
        lengths=settings.policy.lengths,
    )

    def batched(profile: PhaseProfile, batch: int) -> PhaseProfile:
        cost = PassCost.of(profile.prefill, law.minimum_tokens, law.maximum_tokens)
        return replace(profile, prefill=cost.shared_by(batch))

    for batch in context.options.profile_batches:
        own = replace(base, prfaas=batched(base.prfaas, batch), pd=batched(base.pd, batch))
        yield {
            "batch": batch, "prfaas_pd": search(own, free).lambda_max,
            "homogeneous_pd": search(own.without_prfaas(settings.cluster.homogeneous_instances), free).lambda_max,
        }  # fmt: skip


def check(settings: Settings, options: object) -> None:
    """Models that can be built, and a PrfaaS cluster. Raises UserError naming the key."""
    check_models(settings, options)
    check_offloading(settings)


def finding(record: Record) -> str:
    """What batches gain, measured and by the profile, and what they do to the paper's ratio."""
    table, options = record.metrics, record.configuration["options"]
    gains = table[(table["metric"] == "batch_gain") & table["case"].str.contains("batch of")].set_index("case")["value"]
    best = str(gains.idxmax())
    largest = max(options["profile_batches"])
    case, local = (f"{pool}, batches of {largest}" for pool in POOLS)
    beside = (
        f" and {value(table, 'prefill_capacity_ratio', local):.2f} times on PD-P" if local in set(table["case"]) else ""
    )
    ratios = [value(table, "throughput_ratio", f"fixed part shared by {batch}") for batch in (1, largest)]
    return (
        f"Measured, {best} prefills {gains[best]:.2f} times the tokens per second of one request at a time. By the profile, "
        f"{value(table, 'prefill_fixed_s', 'prfaas'):.2f} s of every prefill on PrfaaS do not grow: up to {largest} prompts "
        "in a pass sustain "
        f"{value(table, 'prefill_capacity_ratio', case):.2f} times as much there{beside}, "
        f"at {100 * options['compared_load']:.0f} % load with a mean TTFT of "
        f"{value(table, 'ttft_mean_s', case):.1f} s in place of "
        f"{value(table, 'ttft_mean_s', f'prfaas, {_ONE}'):.1f} s; with batches everywhere PrfaaS-PD serves {ratios[1]:.2f} "
        "times what homogeneous PD does, "
        f"not {ratios[0]:.2f}."
    )


def draw(record: Record) -> Figure:
    """Measured throughput against time to the whole state; TTFT over load by the profile; Λ_max where the fixed part is shared."""
    measured, queue, shared = (record.table(name) for name in ("measured", "queue", "shared"))
    figure, axes = style.panels(3, width_in=11.0, height_in=3.7)
    whole = record.configuration["options"]["prompt_tokens"]
    for (model, own), (colour, _, _) in zip(measured.groupby("model", sort=False), style.SERIES, strict=False):
        means = own.groupby(["batch", "chunk_tokens"])[["seconds", "tokens_per_s"]].median().reset_index()
        batches, chunks = means[means["chunk_tokens"] == whole], means[means["batch"] == 1]
        axes[0].plot(batches["seconds"], batches["tokens_per_s"], color=colour, marker="o", label=f"{model}, batches")
        axes[0].plot(
            chunks["seconds"],
            chunks["tokens_per_s"],
            color=colour,
            marker="x",
            linestyle=":",
            label=f"one, chunks from {chunks['chunk_tokens'].min()}",
        )
        for row in each(batches):
            axes[0].annotate(
                str(row.batch), (row.seconds, row.tokens_per_s), (4, -9), textcoords="offset points", fontsize=7
            )
    axes[0].set(
        xlabel="until the whole state is there (s)",
        ylabel="prefilled tokens/s",
        title="Measured, tiny models",
    )
    axes[0].set_ylim(0, None)
    own = queue[queue["pool"] == "prfaas"]
    for (policy, rows), (colour, marker, dash) in zip(own.groupby("policy", sort=False), style.SERIES, strict=False):
        label = f"{policy} ({rows['capacity_ratio'].iloc[0]:.2f} ×)"
        axes[1].plot(
            rows["load"], rows["ttft_mean_s"], color=colour, marker=marker, linestyle=dash, markersize=4, label=label
        )
    axes[1].set(
        xlabel="load ÷ capacity of one at a time",
        ylabel="mean TTFT (s)",
        yscale="log",
        title="PrfaaS, by its profile (capacity)",
    )
    figure.legend(
        *axes[1].get_legend_handles_labels(),
        loc="outside lower right",
        ncols=3,
        fontsize=7,
        title="PrfaaS, prompts or tokens of a pass",
    )
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=1, fontsize=7, title="measured")
    for case in ("prfaas_pd", "homogeneous_pd"):
        axes[2].plot(
            shared["batch"], shared[case], color=style.CASE_COLOURS[case], marker="o", label=style.CASE_NAMES[case]
        )
    for row in each(shared):
        axes[2].annotate(f"{row.prfaas_pd / row.homogeneous_pd:.2f} ×", (row.batch, row.prfaas_pd), (0, 6), textcoords="offset points",
                         fontsize=7.5, ha="center")  # fmt: skip
    axes[2].set(
        xscale="log",
        xlabel="requests that share a pass",
        ylabel="Λ_max (req/s)",
        title="Every pool in batches",
        ylim=(0, 1.2 * shared["prfaas_pd"].max()),
    )
    axes[2].set_xticks(shared["batch"], [str(batch) for batch in shared["batch"]])
    axes[2].minorticks_off()
    axes[2].margins(x=0.12)
    axes[2].legend(loc="lower right")
    return figure


EXPERIMENT = Experiment(
    name="batch_efficiency",
    reads={"execute": (*MODEL, *EQUATIONS, HOMOGENEOUS, "seed", "options")},
    run=run,
    figures={"batch_efficiency": draw},
    options=Options,
    check=check,
    inputs=profile_files,
    finding=finding,
    hinges_on=(
        "the part of T_prefill that does not grow belongs to a pass and not to a request (time spent on the host for each request is not "
        "shared), and a batch does not run out of memory."
    ),
)
