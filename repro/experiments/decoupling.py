"""What decoupling costs: TTFT of a split request taken apart, per model and link, from the timelines of both workers.

Each part ends where the next begins, so that they add up to TTFT: routing, T_prefill as it is undisturbed, what capture, copies and
sending add to it, what the wire must still carry when prefill is over, what the transport adds to that, the copy to decode's device,
waiting for decode's turn, restoring the cache, and the first step. The wire's part is the least that the link allows (S_kv at its
goodput from the first piece on, and half a round trip); all but undisturbed prefill, wire and step is what an engine could still save.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from repro.configuration import build
from repro.engine.spans import CLOCK_NOTE
from repro.errors import UserError, at_least
from repro.experiments.base import MODEL, Context, Experiment, Outcome
from repro.experiments.split_model import (
    ModelRun,
    check_models,
    cores_of,
    engine_of,
    prompts,
    row,
    serve,
    vocabulary_of,
)
from repro.kvcache.codecs import CodecSpec
from repro.link import LinkSpec, open_link
from repro.presets import preset
from repro.processes import placed
from repro.record.directory import Record
from repro.record.metrics import value
from repro.report import style
from repro.serving.devices import WorkerDevices, hand_out_devices
from repro.serving.system import Served
from repro.settings import Settings

#: Parts of TTFT in their order in time, with what a reader calls them.
PARTS = {
    "routing": "routing", "prefill": "prefill, undisturbed", "capture": "capture and sending beside it", "wire": "wire, at least",
    "transport": "transport beyond it", "copy": "copy to decode's device", "handover": "waiting for decode's turn", "restore": "restore",
    "first_step": "first step",
}  # fmt: skip
#: What no engine can save.
_NEEDED = ("prefill", "wire", "first_step")
_MODES = ("layerwise", "bulk")


@dataclass(frozen=True)
class Options:
    """Prompts of `input_tokens` over each of `links` (names of conf/link), layer-wise and in bulk, `repeats` of them."""

    input_tokens: int = 513
    output_tokens: int = 3
    repeats: int = 2
    links: tuple[str, ...] = ("metro", "continental")
    chunk_tokens: int = 256
    threads: int = 1
    prefill: WorkerDevices = field(default_factory=WorkerDevices)
    decode: WorkerDevices = field(default_factory=WorkerDevices)
    share_device: bool = False
    own_cores: bool = True

    def __post_init__(self) -> None:
        at_least(self, "options", input_tokens=2, output_tokens=2, repeats=1, chunk_tokens=1, threads=1)
        if not self.links:
            raise UserError("options.links: none; accepted: one choice of conf/link or more")


def run(context: Context) -> Outcome:
    """Serve every model over every link, and take every request's TTFT apart."""
    options: Options = context.options
    cores = cores_of(options.threads, own=options.own_cores)
    devices = hand_out_devices(options.prefill.devices, options.decode.devices, share=options.share_device)
    parts, rows, links = [], [], {}
    for spec in context.settings.model.values():
        engine = engine_of(spec, options.chunk_tokens, options.threads)
        asked = prompts(
            [options.input_tokens], options.repeats, options.output_tokens, vocabulary_of(spec), context.settings.seed
        )
        for name in options.links:
            link_spec = build(LinkSpec, preset("link", name), "link")
            with placed(cores.others), open_link(link_spec, run=f"decoupling-{spec.name}") as link:
                link.check(tolerate=True)
                model = serve(context, engine, asked, ("unsplit", *_MODES), link, CodecSpec(), cores, devices)
                links[f"{spec.name}/{name}"] = link.record()
            for mode in _MODES:
                case, found = f"{spec.name}/{name}/{mode}", model.served(mode, options.input_tokens)
                own = [taken_apart(model, served) for served in found]
                parts += [{"model": spec.name, "link": name, "mode": mode, **each} for each in own]
                rows += [
                    row(context, f"{case}/{part}", "ttft_part_s", [each[part] for each in own], "s") for part in PARTS
                ]
                saved = [sum(each[part] for part in PARTS if part not in _NEEDED) for each in own]
                rows += [
                    row(context, case, "ttft_mean_s", [served.ttft_s for served in found], "s"),
                    row(context, case, "ttft_to_unsplit", _to_unsplit(model, found), ""),
                    row(context, case, "saveable_s", saved, "s"),
                    row(context, case, "tokens_match", [model.tokens_match(mode)], ""),
                ]
    return Outcome(
        rows, {"parts": pd.DataFrame(parts)}, provenance={"link": links, "cores": cores.record(), "clock": CLOCK_NOTE}
    )


def taken_apart(model: ModelRun, served: Served) -> dict[str, float]:
    """The parts of one request's TTFT in seconds; what lies between two moments can be negative only for prefill's noise."""
    timeline, request_id = model.runs[served.mode].timeline, served.request.request_id
    alone_s = model.undisturbed_s(served)
    begun_s = served.first_piece_s if served.mode == "layerwise" else served.prefill_end_s
    due_s = (
        max(begun_s + 8 * served.total_kv_bytes / model.goodput_bps, served.prefill_end_s) + model.measured.rtt_s / 2
    )
    wire_s = min(due_s - served.prefill_end_s, served.transfer_exposed_s)
    copy_s, restore_s = (timeline.total_s("decode", what, request_id) for what in ("fetch", "restore"))
    return {
        "routing": served.queue_s, "prefill": alone_s, "capture": served.prefill_s - alone_s, "wire": wire_s,
        "transport": served.transfer_exposed_s - wire_s, "copy": copy_s,
        "handover": served.joined_s - served.complete_s - copy_s - restore_s, "restore": restore_s, "first_step": served.first_step_s,
    }  # fmt: skip


def _to_unsplit(model: ModelRun, found: list[Served]) -> list[float]:
    """TTFT of each request ÷ that of the same prompt unsplit, in the same repeat."""
    whole = {served.request.request_id: served.ttft_s for served in model.runs["unsplit"].served}
    return [served.ttft_s / whole[served.request.request_id] for served in found]


def check(settings: Settings, options: Options) -> None:
    """Models that can be built, and links that exist. Raises UserError naming the key."""
    check_models(settings, options)
    hand_out_devices(options.prefill.devices, options.decode.devices, share=options.share_device)
    for name in options.links:
        build(LinkSpec, preset("link", name), "link")


def finding(record: Record) -> str:
    """How much longer a split request takes, of what, and what could be saved, layer-wise over every link."""
    table, parts = record.metrics, record.table("parts")
    split = parts[parts["mode"] == "layerwise"]
    over = table[(table["metric"] == "ttft_to_unsplit") & table["case"].str.endswith("/layerwise")].set_index("case")[
        "value"
    ]
    cases = {
        case: 100 * value(table, "saveable_s", str(case)) / value(table, "ttft_mean_s", str(case))
        for case in over.index
    }
    means = split.groupby("model", sort=False)[[part for part in PARTS if part not in _NEEDED]].mean()
    words = [f"{PARTS[str(own.idxmax())]} in {model} ({1000 * own.max():.0f} ms)" for model, own in means.iterrows()]
    return (
        f"Layer-wise, a split request's first token takes {over.min():.2f} to {over.max():.2f} times as long as where "
        "prefill and decode are one; "
        f"{min(cases.values()):.0f} to {max(cases.values()):.0f} % of TTFT is neither prefill nor wire nor the first step "
        "and could be saved, most of it "
        f"{' and '.join(words)}."
    )


def draw(record: Record) -> Figure:
    """TTFT as a stack of its parts, a bar for each link and mode, a panel for each model."""
    parts = record.table("parts")
    models = list(dict.fromkeys(parts["model"]))
    figure, axes = style.panels(len(models), width_in=5.4 * len(models), height_in=3.9)
    colours = (
        style.PURPLE,
        style.GREY,
        style.ORANGE,
        style.BLUE,
        style.RED,
        style.SKY,
        style.YELLOW,
        style.GREEN,
        "black",
    )
    for axis, model in zip(axes, models, strict=True):
        means = parts[parts["model"] == model].groupby(["link", "mode"], sort=False)[list(PARTS)].mean()
        at = -np.arange(len(means))
        lengths = {part: 1000 * means[part].clip(lower=0).to_numpy() for part in PARTS}
        edge = style.stack(
            axis, at, [(PARTS[part], colour, lengths[part]) for part, colour in zip(PARTS, colours, strict=True)]
        )
        needless = 1000 * means[[part for part in PARTS if part not in _NEEDED]].clip(lower=0).sum(axis=1)
        for place, right, saved in zip(at, edge, needless, strict=True):
            axis.text(float(right), float(place), f" {saved:.0f} ms saveable", va="center", fontsize=7.5)
        axis.set_yticks(at, [f"{link},\n{mode}" for link, mode in means.index], fontsize=8)
        axis.set(xlabel="TTFT (ms)", title=model)
        axis.set_xlim(0, 1.7 * max(edge))
        axis.grid(axis="y", visible=False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


EXPERIMENT = Experiment(
    name="decoupling",
    reads={"execute": (*MODEL, "transport", "seed", "options")},
    run=run,
    figures={"decoupling": draw},
    options=Options,
    check=check,
    finding=finding,
    hinges_on=(
        "tiny models on two cores of one machine: their parts do not shrink alike on real accelerators (copies to a GPU are missing, "
        "prefill is short against a round trip), so the order of the parts carries over better than their size."
    ),
)
