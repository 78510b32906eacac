"""Layer-wise prefill pipelining (§3.3): how much of a transfer it hides, on links slower and faster than the model's
Φ_kv.

Equation 3 takes a minimum and does not add the times, because a transfer that overlaps prefill costs nothing until
the link is the slower of the two. Here that is held against real processes: Φ_kv is measured first, without a link;
then links of a multiple of it are made, and the same prompts are served in bulk and layer-wise. The lower bound is
that of `repro.serving.bound`, with the T_prefill of the request itself; what capture costs prefill is given beside
it.

A last chunk's state cannot leave before the last chunk, and recurrent states are final only then. The bound knows
neither: the gap that this leaves is part of the ratio.

The default is the hybrid whose PyTorch fallback is the quickest on a CPU: its Φ_kv is tens of Mbps, not a few.
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
    check_one,
    codec_metrics,
    engine_of,
    match_metrics,
    prompts,
    row,
    serve,
    vocabulary_of,
)
from repro.kvcache.codecs import CodecSpec
from repro.link import LinkSpec, open_link
from repro.record.directory import Record
from repro.record.metrics import Metric
from repro.report import style
from repro.serving.records import requests_frame
from repro.serving.system import MODES
from repro.serving.timeline import Timeline, merged, write_trace


@dataclass(frozen=True)
class OverlapOptions:
    """One length; `link_to_phi` are the links' goodputs as multiples of the measured Φ_kv.

    `codec` encodes what crosses the link; the bound and the links are those of the raw S_kv all the same.
    """

    input_tokens: int = 4097
    output_tokens: int = 4
    repeats: int = 3
    link_to_phi: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    chunk_tokens: int = 256
    threads: int = 1
    device: str = "cpu"
    codec: CodecSpec = field(default_factory=CodecSpec)

    def __post_init__(self) -> None:
        if not self.link_to_phi or min(self.link_to_phi) <= 0:
            raise UserError(f"options.link_to_phi: {list(self.link_to_phi)}; accepted: multiples above 0")
        if self.repeats < 1 or self.input_tokens < 2:
            raise UserError("options.repeats, options.input_tokens; accepted: 1 repeat and 2 tokens or more")


def run(context: Context) -> Outcome:
    """Measure Φ_kv unsplit, then serve in all modes over a link of each multiple of it."""
    options: OverlapOptions = context.options
    (model_spec,) = context.settings.model.values()
    engine = engine_of(model_spec, options.chunk_tokens, options.threads, options.device)
    repeats = prompts(
        [options.input_tokens],
        options.repeats,
        options.output_tokens,
        vocabulary_of(model_spec),
        context.settings.seed,
    )
    with open_link(LinkSpec(name="none", backend="none"), run="overlap") as link:
        link.check(tolerate=True)
        alone = serve(context, engine, repeats, ("unsplit",), link, options.codec)
    size = alone.layout.kv_bytes(options.input_tokens - 1)
    phi_bps = 8 * size / alone.prefill_s(options.input_tokens)
    metrics = [
        row(context, model_spec.name, "phi_kv_bps", [phi_bps], "bit/s"),
        row(context, model_spec.name, "kv_bytes", [size], "bytes", "computed"),
    ]
    rows, frames, links, timelines = [], [], {}, dict[str, Timeline]()
    for multiple in options.link_to_phi:
        spec = context.settings.link
        spec = replace(spec, name=f"phi-x{multiple:g}", rate_bps=multiple * phi_bps / spec.tcp_goodput_share)
        with open_link(spec, run="overlap") as link:
            link.check(tolerate=True)
            model = serve(context, engine, repeats, MODES, link, options.codec)
            links[spec.name] = link.record()
        metrics += link_metrics(context, model, spec.name, options.input_tokens)
        rows += overlap_rows(model, multiple, options.input_tokens)
        frames += [requests_frame(found, model.origin_s, link=spec.name) for found in model.runs.values()]
        timelines |= {f"{spec.name} {mode}": found.timeline for mode, found in model.runs.items()}
    write_trace(context.folder / "trace.json", merged(timelines))
    facts = {"link": links, "gate": {model_spec.name: dict(alone.admission)}, "clock": CLOCK_NOTE}
    return Outcome(metrics, {"overlap": pd.DataFrame(rows)}, pd.concat(frames), facts)


def link_metrics(context: Context, model: ModelRun, link: str, length: int) -> list[Metric]:
    """The rows of one link: tokens, wire, TTFT of each mode and its ratio to the bound, what capture costs prefill."""
    rows = [row(context, link, "link_goodput_bps", [model.goodput_bps], "bit/s")]
    unsplit = model.served("unsplit", length)
    for mode in ("bulk", "layerwise"):
        found, case = model.served(mode, length), f"{link}/{mode}"
        slowdown = [mine.prefill_s / plain.prefill_s for mine, plain in zip(found, unsplit, strict=True)]
        rows += [
            *match_metrics(context, model, case, mode),
            row(context, case, "wire_overhead", [model.wire_overhead(mode)], ""),
            *codec_metrics(context, model, case, mode),
            row(context, case, "ttft_mean_s", [served.ttft_s for served in found], "s"),
            row(context, case, "transfer_exposed_s", [served.transfer_exposed_s for served in found], "s"),
            row(context, case, "ttft_bound_ratio", [served.ttft_s / model.bound_s(served) for served in found], ""),
            row(context, case, "prefill_slowdown", slowdown, ""),
        ]
    return rows


def overlap_rows(model: ModelRun, multiple: float, length: int) -> list[dict[str, object]]:
    """Means for the figure."""
    return [
        {
            "link_to_phi": multiple,
            "mode": mode,
            "ttft_s": float(np.mean([served.ttft_s for served in model.served(mode, length)])),
            "bound_s": float(np.mean([model.bound_s(served) for served in model.served(mode, length)])),
        }
        for mode in ("bulk", "layerwise")
    ]


def draw(record: Record) -> Figure:
    """TTFT over the link's goodput in units of Φ_kv: bulk, layer-wise, and the bound; below, the ratio to the bound."""
    table = record.table("overlap")
    figure, (top, below) = style.panels(1, 2, height_in=4.6, sharex=True, height_ratios=(2, 1))
    for (mode, rows), (colour, marker, line) in zip(table.groupby("mode"), style.SERIES, strict=False):
        top.plot(rows["link_to_phi"], rows["ttft_s"], color=colour, marker=marker, linestyle=line, label=str(mode))
        ratio = rows["ttft_s"] / rows["bound_s"]
        below.plot(rows["link_to_phi"], ratio, color=colour, marker=marker, linestyle=line)
    bound = table[table["mode"] == "layerwise"]
    top.plot(bound["link_to_phi"], bound["bound_s"], color="black", linestyle=":", label="lower bound")
    for axis in (top, below):
        axis.axvline(1, color=style.GREY, linewidth=0.8)
    top.set(xscale="log", ylabel="TTFT (s)")
    top.set_title("Layer-wise transfer hides behind prefill once the link keeps up with Φ_kv")
    top.legend()
    below.set(xlabel="goodput of the link ÷ Φ_kv", ylabel="TTFT ÷ bound")
    multiples = sorted(table["link_to_phi"].unique())
    below.set_xticks(multiples, [f"{multiple:g}" for multiple in multiples])
    below.minorticks_off()
    return figure


#: The rate is a multiple of the Φ_kv that is measured; everything else of the link is the configuration's.
_LINK = tuple(
    f"link.{item.name}"
    for item in fields(LinkSpec)
    if item.name not in ("rate_bps", "reverse_rate_bps", "capacity_trace", "reverse_capacity_trace")
)
EXPERIMENT = Experiment(
    "overlap",
    {"execute": (*MODEL, *_LINK, "transport", "seed", "options")},
    run,
    {"overlap": draw},
    OverlapOptions,
    check=check_one,
)
