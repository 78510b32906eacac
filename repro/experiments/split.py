"""The bandwidth wall on real tensors (§2): a hybrid and a dense model, prefilled in one process, decoded in another.

Everything between the two processes is what the kit would use between clusters: state captured layer by layer, framed,
sent over TCP connections through an emulated link, checked, restored. Three modes run on the same workers and the same
prompts: unsplit (the reference for T_prefill), bulk and layer-wise. The reference for tokens is the
model's own `generate`. The models are small and their weights
random, so what is real here is the mechanism, the bytes and the ratio between the two models; absolute times are this
machine's.

Prefill turns all tokens of a prompt but the last into state, so a request of l tokens ships S_kv(l − 1). Requests are
served one at a time: TTFT has no queueing. A first request of each model warms it up and is not recorded.

What a prefix cache of real state (§3.2) saves of T_prefill, each mode with a cache of its own (and of what crosses the link, with
`options.prefix_cache.increments=true`):

    python -m repro experiment=split options.shared_prefix_tokens=768 options.input_tokens=[1025] \\
        options.prefix_cache.capacity_bytes=1e9 options.prefix_cache.checkpoint_blocks=1
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, ScalarFormatter

from repro.engine.spans import CLOCK_NOTE
from repro.errors import UserError
from repro.experiments.base import MODEL, WIRE, Context, Experiment, Outcome
from repro.experiments.split_model import (
    ModelRun,
    check_models,
    codec_metrics,
    cores_of,
    engine_of,
    good_fraction,
    match_metrics,
    prompts,
    row,
    serve,
    vocabulary_of,
)
from repro.kvcache.codecs import CodecSpec
from repro.kvcache.prefix import PrefixCacheSpec
from repro.link import open_link
from repro.processes import placed
from repro.record.directory import Record
from repro.record.metrics import Metric
from repro.report import style
from repro.serving.devices import WorkerDevices, hand_out_devices
from repro.serving.records import requests_frame
from repro.serving.system import MODES
from repro.serving.timeline import Timeline, merged, write_trace
from repro.settings import Settings


@dataclass(frozen=True)
class SplitOptions:
    """What is served, and how.

    `repeats` prompts of each length go through every mode. `chunk_tokens` is the grain of prefill; `threads` per
    worker, and with `own_cores` each has its core to itself where there are enough. `codec` encodes what crosses the
    link. All prompts begin with the same `shared_prefix_tokens` tokens, whose state a `prefix_cache` lets prefill
    compute once. Each worker computes on its own of `devices`; one that both compute on must be asked for.
    """

    input_tokens: tuple[int, ...] = (257, 513, 1025)
    output_tokens: int = 12
    repeats: int = 3
    chunk_tokens: int = 256
    threads: int = 1
    prefill: WorkerDevices = field(default_factory=WorkerDevices)
    decode: WorkerDevices = field(default_factory=WorkerDevices)
    share_device: bool = False
    own_cores: bool = True
    codec: CodecSpec = field(default_factory=CodecSpec)
    shared_prefix_tokens: int = 0
    prefix_cache: PrefixCacheSpec = field(default_factory=PrefixCacheSpec)

    def __post_init__(self) -> None:
        if not self.input_tokens or min(self.input_tokens) < 2:
            raise UserError(f"options.input_tokens: {list(self.input_tokens)}; accepted: lengths of 2 tokens or more")
        if not 0 <= self.shared_prefix_tokens <= min(self.input_tokens):
            raise UserError(
                f"options.shared_prefix_tokens: {self.shared_prefix_tokens}; accepted: 0 to the shortest of input_tokens"
            )
        for name in ("output_tokens", "repeats"):
            if getattr(self, name) < 1:
                raise UserError(f"options.{name}: {getattr(self, name)}; accepted: 1 or more")


def check(settings: Settings, options: SplitOptions) -> None:
    """Models that can be built, and devices for both workers. Raises UserError naming the key."""
    check_models(settings, options)
    hand_out_devices(options.prefill.devices, options.decode.devices, share=options.share_device)


def run(context: Context) -> Outcome:
    """Serve every model in all modes over the configured link, and compare tokens and bytes with what they must be."""
    options: SplitOptions = context.options
    metrics: list[Metric] = []
    frames, throughputs, timelines = [], [], dict[str, Timeline]()
    facts, gate, cores = {}, {}, cores_of(options.threads, own=options.own_cores)
    devices = hand_out_devices(options.prefill.devices, options.decode.devices, share=options.share_device)
    ran_on = {}
    for name, model_spec in context.settings.model.items():
        engine = engine_of(
            model_spec,
            options.chunk_tokens,
            options.threads,
            options.prefix_cache,
        )
        vocabulary = vocabulary_of(model_spec)
        repeats = prompts(
            options.input_tokens,
            options.repeats,
            options.output_tokens,
            vocabulary,
            context.settings.seed,
            options.shared_prefix_tokens,
        )
        with placed(cores.others), open_link(context.settings.link, run=f"split-{name}") as link:
            link.check(tolerate=True)
            model = serve(context, engine, repeats, MODES, link, options.codec, cores, devices)
            facts[name], gate[name], ran_on[name] = link.record(), dict(model.admission), model.devices
        metrics += model_metrics(context, model, options.input_tokens)
        throughputs += throughput_rows(model, options.input_tokens)
        frames += [requests_frame(served, model.origin_s, model=name) for served in model.runs.values()]
        timelines |= {f"{name} {mode}": served.timeline for mode, served in model.runs.items()}
    write_trace(context.folder / "trace.json", merged(timelines))
    tables = {"throughput": pd.DataFrame(throughputs), "modes": _modes(pd.concat(frames), pd.DataFrame(throughputs))}
    provenance = {"link": facts, "gate": gate, "cores": cores.record(), "devices": ran_on, "clock": CLOCK_NOTE}
    return Outcome(metrics, tables, pd.concat(frames), provenance)


def model_metrics(context: Context, model: ModelRun, lengths: Sequence[int]) -> list[Metric]:
    """The rows of one model: link, bytes, tokens, Φ_kv, and the times of every length and mode."""
    memory = max(run.memory_bytes for run in model.runs.values())
    rows = [
        row(context, model.name, "link_goodput_bps", [model.measured.rate_bps], "bit/s"),
        row(context, model.name, "link_rtt_s", [model.measured.rtt_s], "s"),
        row(context, model.name, "memory_bytes", [memory], "bytes"),
    ]
    rows += match_metrics(context, model, f"{model.name}/unsplit", "unsplit")
    for mode in ("bulk", "layerwise"):
        case = f"{model.name}/{mode}"
        rows += [
            *match_metrics(context, model, case, mode),
            row(context, case, "kv_bytes_match", [model.bytes_match(mode)], ""),
            row(context, case, "wire_overhead", [model.wire_overhead(mode)], ""),
            *codec_metrics(context, model, case, mode),
        ]
    for length in lengths:
        rows += _size_metrics(context, model, length)
        rows += [metric for mode in model.runs for metric in _time_metrics(context, model, mode, length)]
    return rows


def _size_metrics(context: Context, model: ModelRun, length: int) -> list[Metric]:
    size, case = model.layout.kv_bytes(length - 1), f"{model.name}/{length}"
    prefill = [model.undisturbed_s(served) for served in model.served("unsplit", length)]
    served = model.served("layerwise", length)[0]
    shipped, expected_bytes = served.kv_bytes, model.expected_bytes(served)
    rows = [
        row(context, case, "prefill_s", prefill, "s"),
        row(context, case, "phi_kv_bps", [8 * size / seconds for seconds in prefill], "bit/s"),
        row(context, case, "kv_bytes", [sum(shipped.values())], "bytes"),
        row(context, case, "kv_bytes_layout", [sum(expected_bytes.values())], "bytes", "computed"),
    ]
    for kind, expected in expected_bytes.items():
        rows.append(row(context, case, f"kv_bytes_{kind}", [shipped.get(kind, 0)], "bytes"))
        rows.append(row(context, case, f"kv_bytes_{kind}_layout", [expected], "bytes", "computed"))
    return rows


def _time_metrics(context: Context, model: ModelRun, mode: str, length: int) -> list[Metric]:
    found, case = model.served(mode, length), f"{model.name}/{mode}/{length}"
    rows = [
        row(context, case, "ttft_mean_s", [served.ttft_s for served in found], "s"),
        good_fraction(context, case, found),
    ]
    if found[0].request.output_tokens > 1:
        rows.append(row(context, case, "tpot_mean_s", [served.tpot_s for served in found], "s"))
    if mode != "unsplit":
        ratios = [served.ttft_s / model.bound_s(served) for served in found]
        rows += [
            row(context, case, "transfer_s", [served.transfer_s for served in found], "s"),
            row(context, case, "transfer_exposed_s", [served.transfer_exposed_s for served in found], "s"),
            row(context, case, "ttft_bound_ratio", ratios, ""),
        ]
        if not any(served.cached_tokens for served in found):
            rows.append(row(context, case, "prefill_slowdown", [model.slowdown(served) for served in found], ""))
        if any(served.cached_tokens for served in model.runs[mode].served):
            rows += [
                row(context, case, "held_tokens", [served.held_tokens for served in found], "tokens"),
                row(context, case, "cached_tokens", [served.cached_tokens for served in found], "tokens"),
                row(context, case, "prefill_s", [served.prefill_s for served in found], "s"),
            ]
    return rows


def throughput_rows(model: ModelRun, lengths: Sequence[int]) -> list[dict[str, object]]:
    """Φ_kv per length, for the figure."""
    return [
        {
            "model": model.name,
            "input_tokens": length,
            "kv_bytes": model.layout.kv_bytes(length - 1),
            "prefill_s": model.prefill_s(length),
            "phi_kv_bps": 8 * model.layout.kv_bytes(length - 1) / model.prefill_s(length),
            "link_goodput_bps": model.goodput_bps,
        }
        for length in lengths
    ]


def _modes(requests: pd.DataFrame, throughput: pd.DataFrame) -> pd.DataFrame:
    """Mean parts of TTFT by model, mode and length: prefill, what the transfer adds, what is left (joining, first step).

    `slowdown` is prefill ÷ the undisturbed T_prefill of that model and length.
    """
    keys = ["model", "mode", "input_tokens"]
    means = requests.groupby(keys, as_index=False, sort=False)[["prefill_s", "transfer_exposed_s", "ttft_s"]].mean()
    alone = throughput[["model", "input_tokens", "prefill_s"]].rename(columns={"prefill_s": "prefill_alone_s"})
    means = means.merge(alone, on=["model", "input_tokens"], how="left")
    rest_s = means["ttft_s"] - means["prefill_s"] - means["transfer_exposed_s"]
    return means.assign(rest_s=rest_s, slowdown=means["prefill_s"] / means["prefill_alone_s"])


def draw(record: Record) -> Figure:
    """Left: Φ_kv of both models against the link. Right: what TTFT is made of in each mode at the greatest length."""
    throughput, modes = record.table("throughput"), record.table("modes")
    figure, (left, right) = style.panels(2, width_in=7.0, height_in=3.6)
    for (name, rows), (colour, marker, line) in zip(
        throughput.groupby("model", sort=False), style.SERIES, strict=False
    ):
        megabits = rows["phi_kv_bps"] / 1e6
        left.plot(rows["input_tokens"], megabits, color=colour, marker=marker, linestyle=line, label=str(name))
    link_bps = float(throughput["link_goodput_bps"].mean())
    left.axhline(link_bps / 1e6, color=style.GREY, linestyle=":", label=f"link, {link_bps / 1e6:.3g} Mbps")
    left.set(xscale="log", yscale="log", xlabel="input length (tokens)", ylabel="Φ_kv (Mbps)")
    lengths = sorted(throughput["input_tokens"].unique())
    left.set_xticks(lengths, [str(length) for length in lengths])
    drawn = [*(throughput["phi_kv_bps"] / 1e6), link_bps / 1e6]
    left.set_ylim(min(drawn) / 1.5, max(drawn) * 4)  # room for the legend above the lines
    left.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    left.yaxis.set_major_formatter(ScalarFormatter())
    left.minorticks_off()
    left.set_title("What prefill emits")
    left.legend(loc="upper left")

    longest = modes[modes["input_tokens"] == modes["input_tokens"].max()]
    at = np.arange(len(longest))[::-1]
    parts = (("prefill", style.BLUE, "prefill_s"), ("transfer exposed", style.RED, "transfer_exposed_s"),
             ("restore and first step", style.GREY, "rest_s"))  # fmt: skip
    style.stack(right, at, [(name, colour, longest[column].to_numpy()) for name, colour, column in parts])
    right.plot(longest["prefill_alone_s"], at, "k|", markersize=12, label="prefill alone")
    right.set_yticks(at, [f"{model},\n{mode}" for model, mode in zip(longest["model"], longest["mode"], strict=True)])
    right.set_xlabel("TTFT (s)")
    right.set_title(f"TTFT at {int(longest['input_tokens'].iloc[0])} tokens")
    right.grid(axis="y", visible=False)
    figure.legend(
        *right.get_legend_handles_labels(), loc="outside lower center", ncols=4, handlelength=1.0, columnspacing=1.0
    )
    return figure


EXPERIMENT = Experiment(
    "split",
    {"execute": (*MODEL, *WIRE, "workload.slo", "seed", "options")},
    run,
    {"split": draw},
    SplitOptions,
    check=check,
)
