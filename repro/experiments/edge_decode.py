"""Prefill in the service, decode on a device at home: TTFT and tokens/s over home and mobile links, against local and cloud only.

A device at home reads its weights fast enough to decode, and has a hundredth of a service's arithmetic for a long prompt. So the service
prefills and the state goes down the device's own link. Times are a roofline: prefill is arithmetic, decode is memory, each at a stated
share of the data sheet; S_kv is exact. A device holds its weights in few bits, the state comes in bfloat16.

Whether coarse weights still answer right from the service's state is measured with `tier=execute model=bytes` (`edge_decode_measured`).

The numbers are yours to set: `options.devices`, `options.links` (names of conf/link), `options.tokens`, `options.weight_bits`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from repro.configuration import build
from repro.errors import UserError
from repro.experiments import edge_decode_measured
from repro.experiments.base import MODEL, Context, Experiment, Outcome
from repro.experiments.edge_decode_measured import MeasuredOptions
from repro.experiments.trained_model import check_trained
from repro.link.spec import LinkSpec
from repro.models import spec
from repro.models.architectures import layout_of
from repro.models.layout import StateLayout
from repro.presets import preset
from repro.record.directory import Record
from repro.record.metrics import Metric, value
from repro.report import style
from repro.report.words import label
from repro.settings import Settings

#: Bytes of one token's id on its way up.
_ID_BYTES = 4
#: Of a device's memory, what weights and state may fill.
_MEMORY_SHARE = 0.9


@dataclass(frozen=True)
class Service:
    """Dense bf16 arithmetic and memory bandwidth, by the data sheet; `fixed_s` of every prefill compute nothing."""

    name: str
    flops_per_s: float
    memory_bytes_per_s: float
    fixed_s: float = 0.0

    def __post_init__(self) -> None:
        if min(self.flops_per_s, self.memory_bytes_per_s) <= 0 or self.fixed_s < 0:
            raise UserError(f"options: device {self.name}: accepted: positive rates, fixed_s of 0 or more")


@dataclass(frozen=True)
class Device(Service):
    """What stands at home: the same, and its memory, which a model and one request's state must fit."""

    memory_bytes: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.memory_bytes > 0:
            raise UserError(f"options.devices: {self.name}: memory_bytes is missing; accepted: above 0")


@dataclass(frozen=True)
class EdgeModel:
    """A model of conf/model, and the parameters that one token passes through, as its publisher states them."""

    name: str
    active_parameters: float

    def __post_init__(self) -> None:
        if self.name not in (*spec.names(), *spec.names_of_today()) or not self.active_parameters > 0:
            known = ", ".join((*spec.names(), *spec.names_of_today()))
            raise UserError(f"options.models: {self.name!r}; accepted, with positive active_parameters: {known}")


#: GeForce RTX 5090: 209.5 TFLOPS with float32 sums, a quarter of the sparse float16 of its data sheet (838; spheron.network, May 2026).
#: DGX Spark and Mac Studio M3 Ultra: EXO Labs' comparison of both, October 2025.
DEVICES = (
    Device("RTX 5090", 209.5e12, 1792e9, memory_bytes=32e9), Device("DGX Spark", 100e12, 273e9, memory_bytes=128e9),
    Device("M3 Ultra", 26e12, 819e9, memory_bytes=512e9),
)  # fmt: skip
#: One instance of the paper, 8×H200 (989 TFLOPS and 4.8 TB/s each); `experiment=silicon` finds 0.3 s that no kernel explains.
SERVICE = Service("8×H200", 8 * 989e12, 8 * 4.8e12, fixed_s=0.3)
MODELS = (
    EdgeModel("qwen3_6_27b", 27e9), EdgeModel("qwen3_6_35b", 3e9), EdgeModel("kimi_linear", 3e9), EdgeModel("qwen3_5_397b", 17e9),
    EdgeModel("minimax_m2_5", 10e9), EdgeModel("qwen3_235b", 22e9),
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What decodes where, how long prompts are, and which shares of the data sheets are reached.

    `kv_ratio` is what a codec leaves of the state on the link (1 sends it as it is; `experiment=kv_diet` measures it).
    """

    devices: tuple[Device, ...] = DEVICES
    service: Service = SERVICE
    models: tuple[EdgeModel, ...] = MODELS
    links: tuple[str, ...] = ("home_fibre", "home_broadband", "5g_median", "starlink")
    tokens: tuple[int, ...] = (2048, 8192, 32_768, 131_072)
    compared_tokens: int = 32_768
    weight_bits: float = 4.5
    compute_share: float = 0.5
    memory_share: float = 0.7
    kv_ratio: float = 1.0
    measured: MeasuredOptions = field(default_factory=MeasuredOptions)

    def __post_init__(self) -> None:
        if not self.devices or not self.models or not self.links:
            raise UserError("options.devices, options.models, options.links: accepted: one or more of each")
        if not self.tokens or min(self.tokens) < 2 or self.compared_tokens not in self.tokens:
            raise UserError(
                f"options.compared_tokens: {self.compared_tokens}; accepted: one of options.tokens {list(self.tokens)}, each 2 or more"
            )
        for key in ("weight_bits", "compute_share", "memory_share", "kv_ratio"):
            if not 0 < getattr(self, key) <= (16 if key == "weight_bits" else 1):
                raise UserError(
                    f"options.{key}: {getattr(self, key)}; accepted: above 0, a share of at most 1 (16 bits)"
                )


@dataclass(frozen=True)
class Costs:
    """What a model costs a device: arithmetic of a prompt, bytes of a step, and whether it fits."""

    model: spec.ModelSpec
    layout: StateLayout
    active_parameters: float
    options: Options

    def prefill_s(self, device: Service, tokens: int) -> float:
        """Weights times tokens, and attention's share that grows with the square, at the share of arithmetic that is reached."""
        flops = 2 * self.active_parameters * tokens + attention_flops(self.model.values(), tokens)
        return device.fixed_s + flops / (device.flops_per_s * self.options.compute_share)

    def step_s(self, device: Service, tokens: float) -> float:
        """A decode step of one sequence: active weights and the state are read once."""
        read = self.active_parameters * self.options.weight_bits / 8 + self.layout.kv_bytes(int(tokens))
        return read / (device.memory_bytes_per_s * self.options.memory_share)

    def fits(self, device: Device, tokens: int) -> bool:
        """Whether weights and one request's state fit."""
        held = self.model.parameters * self.options.weight_bits / 8 + self.layout.kv_bytes(tokens)
        return held <= _MEMORY_SHARE * device.memory_bytes

    def sent_bytes(self, tokens: int) -> float:
        """What goes down the link: the state of all tokens but the last, after the codec."""
        return self.layout.kv_bytes(tokens - 1) * self.options.kv_ratio


def attention_flops(values: dict[str, Any], tokens: int) -> float:
    """Multiplications and additions of causal softmax attention over a prompt: scores and sums, in each layer as far as it looks."""
    heads, total = values["num_attention_heads"], 0.0
    if values.get("kv_lora_rank"):
        width = values["qk_nope_head_dim"] + values["qk_rope_head_dim"] + values["v_head_dim"]
    else:
        width = values["head_dim"] + (values.get("v_head_dim") or values["head_dim"])
    for kind in values.get("layer_types") or ["full_attention"] * values["num_hidden_layers"]:
        if kind == "full_attention":
            total += heads * width * float(tokens) ** 2
        elif kind == "sliding_attention":
            total += 2 * heads * width * float(tokens) * min(values["sliding_window"], tokens / 2)
    return total


def run(context: Context) -> Outcome:
    """On either tier."""
    return edge_decode_measured.run(context) if context.settings.tier == "execute" else _modelled(context)


def _modelled(context: Context) -> Outcome:
    """Every model on every device over every link at every length; and the slowest link over which the split comes first."""
    options, workload = context.options, context.settings.workload
    links = {name: build(LinkSpec, preset("link", name), "link") for name in options.links}
    grid, rows = [], []
    for asked in options.models:
        costs = Costs(spec.load(asked.name, "full"), layout_of(asked.name), asked.active_parameters, options)
        for device in options.devices:
            case = f"{asked.name} on {device.name}"
            if not costs.fits(device, options.compared_tokens):
                rows.append(context.metric(case, "fits", 0.0, "", "computed"))
                continue
            rows.append(context.metric(case, "fits", 1.0, "", "computed"))
            own = [
                {"model": asked.name, "device": device.name, "link": name, **split(costs, device, link, tokens, workload.output_tokens)}
                for name, link in links.items()
                for tokens in options.tokens
                if costs.fits(device, tokens)
            ]  # fmt: skip
            grid += own
            rows += _metrics(context, case, costs, own)
    return Outcome(rows, {"grid": pd.DataFrame(grid)})


def split(costs: Costs, device: Device, link: LinkSpec, tokens: int, output_tokens: float) -> dict[str, float]:
    """One request in all three ways: the first token, the rate of the others, the whole answer."""
    service, options = costs.options.service, costs.options
    up_s = link.rtt_s / 2 + 8 * _ID_BYTES * tokens / link.ideal_goodput_bps("reverse")
    prefill_s, step_s = costs.prefill_s(service, tokens), costs.step_s(device, tokens + output_tokens / 2)
    wire_s = 8 * costs.sent_bytes(tokens) / link.ideal_goodput_bps()
    found = {
        "tokens": float(tokens),
        "local_ttft_s": costs.prefill_s(device, tokens) + step_s,
        "cloud_ttft_s": up_s + prefill_s + link.rtt_s / 2 + costs.step_s(service, tokens),
        # Layer-wise: what is ready crosses while the rest is computed.
        "edge_ttft_s": up_s + max(prefill_s, service.fixed_s + wire_s) + link.rtt_s / 2 + step_s,
        "device_tokens_per_s": 1 / step_s,
        "smallest_link_bps": smallest_link_bps(costs, device, link, tokens),
    }
    rest = output_tokens - 1
    found["local_answer_s"], found["edge_answer_s"] = (
        found[f"{way}_ttft_s"] + rest * step_s for way in ("local", "edge")
    )
    found["kv_bytes"] = costs.sent_bytes(tokens) / options.kv_ratio
    return found


def smallest_link_bps(costs: Costs, device: Device, link: LinkSpec, tokens: int) -> float:
    """The slowest downlink over which the split's first token comes before the device's own; infinite where none does."""
    service = costs.options.service
    up_s = link.rtt_s / 2 + 8 * _ID_BYTES * tokens / link.ideal_goodput_bps("reverse")
    left_s = costs.prefill_s(device, tokens) - up_s - link.rtt_s / 2
    if left_s <= costs.prefill_s(service, tokens):
        return math.inf
    return 8 * costs.sent_bytes(tokens) / (left_s - service.fixed_s) / link.tcp_goodput_share


def _metrics(context: Context, case: str, costs: Costs, own: list[dict[str, Any]]) -> list[Metric]:
    tokens, slo = context.options.compared_tokens, context.settings.workload.slo.tokens_per_s
    at = [row for row in own if row["tokens"] == tokens]
    rate = at[0]["device_tokens_per_s"]
    rows = [
        context.metric(case, "ttft_local_s", at[0]["local_ttft_s"], "s", "computed"),
        context.metric(case, "tokens_per_s", rate, "tokens/s", "computed"),
        context.metric(case, "tokens_per_s_to_cloud", rate / slo, "", "computed"),
        context.metric(case, "kv_bytes", costs.layout.kv_bytes(tokens - 1), "bytes", "computed"),
    ]
    for row in at:
        where = f"{case} over {row['link']}"
        rows += [
            context.metric(where, "ttft_edge_s", row["edge_ttft_s"], "s", "computed"),
            context.metric(where, "ttft_cloud_s", row["cloud_ttft_s"], "s", "computed"),
            context.metric(where, "ttft_edge_to_local", row["edge_ttft_s"] / row["local_ttft_s"], "", "computed"),
        ]
        if math.isfinite(row["smallest_link_bps"]):
            rows.append(context.metric(where, "smallest_link_bps", row["smallest_link_bps"], "bit/s", "computed"))
    return rows


def check(settings: Settings, options: Options) -> None:
    """Links must be there, with a rate. Raises UserError naming the key."""
    if settings.tier == "execute":
        check_trained(settings, options)
        return
    for name in options.links:
        if build(LinkSpec, preset("link", name), "link").rate_bps is None:
            raise UserError(f"options.links: {name} has no rate; accepted: choices of conf/link with rate_bps")


def finding(record: Record) -> str:
    """Where the split gains most and least, and which link it takes."""
    if record.configuration["tier"] == "execute":
        return edge_decode_measured.finding(record)
    table, options = record.metrics, record.configuration["options"]
    ratio = table[table["metric"] == "ttft_edge_to_local"].set_index("case")["value"]
    best, worst = str(ratio.idxmin()), str(ratio.idxmax())
    least = table[table["metric"] == "smallest_link_bps"].set_index("case")["value"] / 1e6
    narrow, wide = str(least.idxmin()).partition(" over ")[0], str(least.idxmax()).partition(" over ")[0]
    faster = (
        table[(table["metric"] == "tokens_per_s_to_cloud") & (table["value"] > 1)]["case"]
        .str.partition(" on ")[0]
        .nunique()
    )
    return (
        f"At {options['compared_tokens']:,} tokens, prefill in the service brings the first token after "
        f"{value(table, 'ttft_edge_s', best):.1f} s "
        f"in place of {value(table, 'ttft_local_s', best.partition(' over ')[0]):.0f} s ({best}), at worst "
        f"{ratio[worst]:.1f} times the device's own "
        f"({worst}); the downlink that breaks even goes from {least.min():.0f} Mbps ({narrow}) to {least.max():,.0f} Mbps ({wide}). "
        f"{faster} of {len(options['models'])} models decode faster on a device than the service's own {_slo(record):g} tokens/s."
    )


def _slo(record: Record) -> float:
    return float(record.configuration["workload"]["slo"]["tokens_per_s"])


def draw(record: Record) -> Figure:
    """A panel per model: TTFT over the prompt's length, local and split over each link, on the device that decodes it fastest."""
    grid, options = record.table("grid"), record.configuration["options"]
    models = list(dict.fromkeys(grid["model"]))
    columns = min(len(models), 3)
    figure, axes = style.panels(
        columns, -(-len(models) // columns), width_in=3.3 * columns, height_in=2.7 * -(-len(models) // columns)
    )
    for axis, model in zip(axes, models, strict=False):
        own = grid[grid["model"] == model]
        device = own.loc[own["device_tokens_per_s"].idxmax(), "device"]
        own = own[own["device"] == device]
        first = own[own["link"] == options["links"][0]]
        axis.plot(
            first["tokens"], first["local_ttft_s"], color="black", marker="D", markersize=4, label="on the device alone"
        )
        axis.plot(
            first["tokens"],
            first["cloud_ttft_s"],
            color=style.GREY,
            linestyle=":",
            label=f"in the cloud alone ({label(options['links'][0])})",
        )
        for (link, rows), (colour, marker, dash) in zip(own.groupby("link", sort=False), style.SERIES, strict=False):
            axis.plot(
                rows["tokens"],
                rows["edge_ttft_s"],
                color=colour,
                marker=marker,
                linestyle=dash,
                markersize=4,
                label=f"split, {label(str(link))}",
            )
        axis.set(yscale="log", title=f"{label(model)}\n{device}, {own['device_tokens_per_s'].max():.0f} tokens/s")
        axis.title.set_fontsize(9)
        style.tokens_axis(axis)
        axis.set_ylabel("TTFT (s)")
    for axis in axes[len(models) :]:
        axis.set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


#: What the roofline takes; the measurement has a node of its own.
_MODELLED = tuple(f"options.{item.name}" for item in fields(Options) if item.name != "measured")
EXPERIMENT = Experiment(
    name="edge_decode",
    reads={
        "model": ("workload.slo.tokens_per_s", "workload.output_tokens", *_MODELLED),
        "execute": (*MODEL, "options.measured"),
    },
    run=run,
    figures={"edge_decode": draw},
    tier_figures={"execute": {"edge_decode": edge_decode_measured.draw}},
    options=Options,
    check=check,
    finding=finding,
    hinges_on=(
        "devices and service reach the stated shares of their data sheets (half of the arithmetic, 0.7 of the bandwidth), weights take "
        "4.5 bits on the device, one request has the link to itself, and the service is not queued for."
    ),
)
