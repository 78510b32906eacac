"""Layer-wise prefill pipelining (§3.3): how much of a transfer it hides, on links slower and faster than the model's
Φ_kv.

Equation 3 takes a minimum and does not add the times, because a transfer that overlaps prefill costs nothing until
the link is the slower of the two. Here that is held against real processes: Φ_kv is measured first, without a link;
then links of a multiple of it are made, and the same prompts are served in bulk and layer-wise. The lower bound is
that of `repro.serving.bound`, with the *undisturbed* T_prefill: timed on the worker that prefills, with nothing
captured or sent. What a mode adds to T_prefill is therefore part of its ratio, and stands beside it as the slowdown. Layer-wise is
compared with bulk by pairs of the same prompt, one right after the other.

A last chunk's state cannot leave before the last chunk, and recurrent states are final only then. The bound knows
neither: the gap that this leaves is part of the ratio.

The default models are the hybrid whose PyTorch fallback is the quickest on a CPU (its Φ_kv is tens of Mbps, not a few)
and a dense one. What the computing threads' own cores are worth:

    python -m repro experiment=overlap options.own_cores=true,false
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from repro.engine.spans import CLOCK_NOTE
from repro.errors import UserError
from repro.experiments.base import MODEL, Context, Experiment, Outcome
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
from repro.link import LinkSpec, open_link
from repro.processes import placed
from repro.record.directory import Record
from repro.record.metrics import Metric
from repro.record.statistics import Estimate
from repro.report import style
from repro.serving.devices import WorkerDevices, hand_out_devices
from repro.serving.records import requests_frame
from repro.serving.system import MODES
from repro.serving.timeline import Timeline, merged, write_trace
from repro.settings import Settings


@dataclass(frozen=True)
class OverlapOptions:
    """`input_tokens` for each model in their order, or one for all; `link_to_phi` are the links' goodputs as multiples
    of the measured Φ_kv. With `own_cores` each computing thread has its core to itself where there are enough.

    `codec` encodes what crosses the link; the bound and the links are those of the raw S_kv all the same.
    """

    input_tokens: tuple[int, ...] = (1025,)
    output_tokens: int = 4
    repeats: int = 16
    link_to_phi: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    chunk_tokens: int = 256
    threads: int = 1
    prefill: WorkerDevices = field(default_factory=WorkerDevices)
    decode: WorkerDevices = field(default_factory=WorkerDevices)
    share_device: bool = False
    own_cores: bool = True
    codec: CodecSpec = field(default_factory=CodecSpec)

    def __post_init__(self) -> None:
        if not self.link_to_phi or min(self.link_to_phi) <= 0:
            raise UserError(f"options.link_to_phi: {list(self.link_to_phi)}; accepted: multiples above 0")
        if self.repeats < 1 or not self.input_tokens or min(self.input_tokens) < 2:
            raise UserError("options.repeats, options.input_tokens; accepted: 1 repeat and 2 tokens or more")


def run(context: Context) -> Outcome:
    """Of each model, measure Φ_kv without a link, then serve in all modes over a link of each multiple of it."""
    options: OverlapOptions = context.options
    cores = cores_of(options.threads, own=options.own_cores)
    devices = hand_out_devices(options.prefill.devices, options.decode.devices, share=options.share_device)
    ran_on = {}
    metrics, rows, frames, links, gate, timelines = list[Metric](), [], [], {}, {}, dict[str, Timeline]()
    for length, model_spec in zip(_lengths(context), context.settings.model.values(), strict=True):
        engine = engine_of(model_spec, options.chunk_tokens, options.threads)
        vocabulary = vocabulary_of(model_spec)
        repeats = prompts([length], options.repeats, options.output_tokens, vocabulary, context.settings.seed)
        with placed(cores.others), open_link(LinkSpec(name="none", backend="none"), run="overlap") as link:
            link.check(tolerate=True)
            alone = serve(context, engine, repeats, ("unsplit",), link, options.codec, cores, devices)
        name, size = model_spec.name, alone.layout.kv_bytes(length - 1)
        gate[name], ran_on[name] = dict(alone.admission), alone.devices
        phi_bps = 8 * size / alone.prefill_s(length)
        metrics += [
            row(context, name, "phi_kv_bps", [phi_bps], "bit/s"),
            row(context, name, "kv_bytes", [size], "bytes", "computed"),
        ]
        for multiple in options.link_to_phi:
            spec, case = context.settings.link, f"{name}/phi-x{multiple:g}"
            rate_bps = multiple * phi_bps / spec.tcp_goodput_share
            spec = replace(spec, name=f"phi-x{multiple:g}", rate_bps=rate_bps)
            with placed(cores.others), open_link(spec, run="overlap") as link:
                link.check(tolerate=True)
                model = serve(context, engine, repeats, MODES, link, options.codec, cores, devices)
                links[case] = link.record()
            metrics += link_metrics(context, model, case, length)
            rows += overlap_rows(model_spec.title or name, model, multiple, length)
            found = model.runs.values()
            frames += [requests_frame(one, model.origin_s, model=name, link=spec.name) for one in found]
            timelines |= {f"{case} {mode}": one.timeline for mode, one in model.runs.items()}
    write_trace(context.folder / "trace.json", merged(timelines))
    facts = {"link": links, "gate": gate, "cores": cores.record(), "devices": ran_on, "clock": CLOCK_NOTE}
    return Outcome(metrics, {"overlap": pd.DataFrame(rows)}, pd.concat(frames), facts)


def _lengths(context: Context) -> list[int]:
    models, lengths = len(context.settings.model), list(context.options.input_tokens)
    return lengths * models if len(lengths) == 1 else lengths[:models]


def check(settings: Settings, options: OverlapOptions) -> None:
    """Models that can be built, a length for each, and devices for both workers. Raises UserError naming the key."""
    check_models(settings, options)
    hand_out_devices(options.prefill.devices, options.decode.devices, share=options.share_device)
    if 1 < len(options.input_tokens) < len(settings.model):
        raise UserError(
            f"options.input_tokens: {list(options.input_tokens)}; accepted: one length, or one for each of {len(settings.model)} models"
        )


def link_metrics(context: Context, model: ModelRun, link: str, length: int) -> list[Metric]:
    """The rows of one link: tokens, wire, TTFT of each mode, its ratio to the bound, and what the mode costs prefill."""
    rows = [row(context, link, "link_goodput_bps", [model.goodput_bps], "bit/s")]
    for mode in ("bulk", "layerwise"):
        found, case = model.served(mode, length), f"{link}/{mode}"
        rows += [
            *match_metrics(context, model, case, mode),
            row(context, case, "wire_overhead", [model.wire_overhead(mode)], ""),
            *codec_metrics(context, model, case, mode),
            row(context, case, "ttft_mean_s", [served.ttft_s for served in found], "s"),
            good_fraction(context, case, found),
            row(context, case, "transfer_exposed_s", [served.transfer_exposed_s for served in found], "s"),
            row(context, case, "ttft_bound_ratio", [served.ttft_s / model.bound_s(served) for served in found], ""),
            row(context, case, "prefill_slowdown", [model.slowdown(served) for served in found], ""),
        ]
    ratios = model.paired_ratios("layerwise", "bulk", length)
    return [*rows, row(context, f"{link}/layerwise", "ttft_to_bulk", ratios, "")]


def overlap_rows(title: str, model: ModelRun, multiple: float, length: int) -> list[dict[str, object]]:
    """Means for the figure; those of the ratios with their 95 % intervals."""
    rows = list[dict[str, object]]()
    for mode in ("bulk", "layerwise"):
        found = model.served(mode, length)
        bounds = [model.bound_s(served) for served in found]
        ratio = Estimate.of([served.ttft_s / bound_s for served, bound_s in zip(found, bounds, strict=True)])
        slowdown = Estimate.of([model.slowdown(served) for served in found])
        rows.append({
            "model": model.name, "title": title, "link_to_phi": multiple, "mode": mode,
            "ttft_s": float(np.mean([served.ttft_s for served in found])), "bound_s": float(np.mean(bounds)),
            "ratio": ratio.value, "ratio_low": ratio.low, "ratio_high": ratio.high,
            "slowdown": slowdown.value, "slowdown_low": slowdown.low, "slowdown_high": slowdown.high,
        })  # fmt: skip
    return rows


_WORDS = {"bulk": "bulk", "layerwise": "layer-wise"}


def draw(record: Record) -> Figure:
    """A column per model, over the link's goodput in units of Φ_kv: TTFT and its bound, their ratio, and prefill's slowdown."""
    table = record.table("overlap")
    names = list(table["model"].unique())
    figure, panels = style.panels(
        len(names), 3, width_in=1.0 + 4.0 * len(names), height_in=6.4, sharex=True, height_ratios=(2, 1, 1)
    )
    columns = np.asarray(panels, dtype=object).reshape(3, len(names)).T
    for (top, below, last), name in zip(columns, names, strict=True):
        own = table[table["model"] == name]
        for (mode, rows), (colour, marker, line) in zip(own.groupby("mode"), style.SERIES, strict=False):
            look = {"color": colour, "marker": marker, "linestyle": line}
            top.plot(rows["link_to_phi"], rows["ttft_s"], label=_WORDS[str(mode)], **look)
            for axis, column in ((below, "ratio"), (last, "slowdown")):
                ends = [rows[column] - rows[f"{column}_low"], rows[f"{column}_high"] - rows[column]]
                axis.errorbar(rows["link_to_phi"], rows[column], yerr=ends, capsize=2, **look)
        bound = own[own["mode"] == "layerwise"]
        top.plot(bound["link_to_phi"], bound["bound_s"], color="black", linestyle=":", label="lower bound")
        for axis in (top, below, last):
            axis.axvline(1, color=style.GREY, linewidth=0.8)
        for axis in (below, last):
            axis.axhline(1, color="black", linestyle=":")
        top.set(xscale="log", ylabel="TTFT (s)", title=str(own["title"].iloc[0]), ylim=(0, None))
        top.legend()
        below.set(ylabel="TTFT ÷ bound")
        last.set(xlabel="goodput of the link ÷ Φ_kv", ylabel="T_prefill ÷ alone")
        multiples = sorted(own["link_to_phi"].unique())
        last.set_xticks(multiples, [f"{multiple:g}" for multiple in multiples])
        last.minorticks_off()
    return figure


#: The rate is a multiple of the Φ_kv that is measured; everything else of the link is the configuration's.
_LINK = tuple(
    f"link.{item.name}"
    for item in fields(LinkSpec)
    if item.name not in ("rate_bps", "reverse_rate_bps", "capacity_trace", "reverse_capacity_trace")
)
EXPERIMENT = Experiment(
    "overlap",
    {"execute": (*MODEL, *_LINK, "transport", "workload.slo", "seed", "options")},
    run,
    {"overlap": draw},
    OverlapOptions,
    check=check,
)
