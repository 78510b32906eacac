"""Egress bandwidth of a PrfaaS cluster (equation 2): 512 GPUs in §2.3, the case study and datacenter scale in §4.3.1."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from repro.experiments import table3
from repro.experiments.base import EQUATIONS, Context, Experiment, Outcome
from repro.experiments.deployment import check_deployment, deployment, profile_files
from repro.experiments.table3 import implied_prefill
from repro.paper import tables, text
from repro.record.directory import Record
from repro.record.metrics import Metric, each
from repro.report import style
from repro.scheduling.search import search
from repro.settings import Settings

_PAPER_BPS = {
    ("minimax_m2_5", "32K"): text.EGRESS_MINIMAX_32K.value * 1e12,
    ("qwen3_235b", "32K"): text.EGRESS_QWEN3_32K.value * 1e12,
    ("ring_2_5_1t", "32K"): text.EGRESS_RING_32K.value * 1e9,
}


def run(context: Context) -> Outcome:
    """B_out of 64 instances for every model and length, how many instances the link carries, and the case study scaled to a datacenter."""
    instances = text.FLEET_GPUS / text.FLEET_GPUS_PER_INSTANCE
    table = implied_prefill(context.settings.model.values())
    table["egress_bps"] = instances * table["phi_kv_bps"]
    table["paper_bps"] = [_PAPER_BPS.get((row.model, row.label), float("nan")) for row in each(table)]
    rows = [
        context.metric(
            f"{row.model} {row.label}, 512 GPUs", "egress_bps", row.egress_bps, "bit/s", "computed", paper=row.paper_bps
        )
        for row in each(table)
    ]
    if context.settings.link.rate_bps is not None:
        rows += [
            context.metric(
                f"{row.model} {row.label}, this link",
                "instances_per_link",
                context.settings.link.rate_bps / row.phi_kv_bps,
                "instances",
                "computed",
            )
            for row in each(table)
        ]
    if "ring_2_5_1t" in context.settings.model:
        rows.append(_datacenter(context))
    base = deployment(context.settings)
    point = search(base, context.settings.policy)
    gpus = base.n_prfaas * base.prfaas.gpus_per_instance
    if gpus:
        per_gpu = point.egress_bps / gpus
        rows.append(
            context.metric(
                "case study", "egress_bps", point.egress_bps, "bit/s", "computed", paper=text.EGRESS.value * 1e9
            )
        )
        rows.append(
            context.metric(
                "case study",
                "link_utilisation",
                point.link_utilisation,
                "",
                "computed",
                paper=text.LINK_UTILISATION.value,
            )
        )
        # §4.3.1: "thousands of GPUs" on the order of 1 Tbps; how many that is at the case study's egress per GPU.
        rows.append(
            context.metric("case study", "gpus_per_tbps", text.IDC_EGRESS.value * 1e12 / per_gpu, "GPUs", "computed")
        )
        scale = [
            {"prfaas_gpus": count, "egress_bps": count * per_gpu} for count in (32, 100, 320, 1_000, 3_200, 10_000)
        ]
    else:
        scale = []
    return Outcome(rows, {"fleet": table, "scale": pd.DataFrame(scale, columns=["prfaas_gpus", "egress_bps"])})


def _datacenter(context: Context) -> Metric:
    """§2.3: B_out of a datacenter of 10,000 GPUs at the KV throughput of Ring-2.5-1T at 128K."""
    ring = tables.TABLE_3["ring_2_5_1t"]["128K"]
    instances = text.DATACENTER_GPUS / text.FLEET_GPUS_PER_INSTANCE
    low, high = (instances * bound * 1e9 for bound in ring.interval)
    return context.metric(
        "ring_2_5_1t 128K, 10,000 GPUs", "egress_bps", instances * ring.value * 1e9, "bit/s", "computed",
        interval=(low, high), paper=text.DATACENTER_EGRESS.value * 1e12,
    )  # fmt: skip


def check(settings: Settings, options: object) -> None:
    """The models must be Table 3's, and the deployment one that can serve."""
    table3.check(settings, options)
    check_deployment(settings, options)


def draw(record: Record) -> Figure:
    """Egress of 512 GPUs per model at 32K and 128K on a logarithmic axis, with common link sizes as lines."""
    table = record.table("fleet")
    figure, (axis,) = style.panels(1, height_in=3.5)
    titles = list(dict.fromkeys(table["title"]))
    for shift, label, colour in ((-0.2, "32K", style.BLUE), (0.2, "128K", style.SKY)):
        series = table[table["label"] == label].set_index("title").loc[titles]
        positions = [index + shift for index in range(len(titles))]
        axis.bar(positions, series["egress_bps"] / 1e9, 0.38, color=colour, label=f"{label} tokens")
        marked = series["paper_bps"].notna().to_numpy()
        axis.plot([p for p, m in zip(positions, marked, strict=True) if m], series["paper_bps"][marked] / 1e9,
                  **{**style.PAPER, "label": "paper (§2.3)" if label == "32K" else None})  # fmt: skip
    for bps, name in ((100, "100 Gbps link"), (400, "400 Gbps"), (800, "800 Gbps")):
        axis.axhline(bps, color="black", lw=0.7, linestyle=":")
        axis.text(len(titles) - 0.45, bps, name, va="center", fontsize=8)
    axis.set_xticks(
        range(len(titles)), [title.replace("-", "-\n", 1).replace("Kimi ", "Kimi\n") for title in titles], fontsize=8.5
    )
    axis.set(
        yscale="log",
        ylabel="egress of 512 H200 GPUs (Gbps)",
        title="Only hybrid models bring the KVCache within reach of Ethernet",
    )
    axis.set_yticks([50, 100, 200, 500, 1000, 2000, 5000], ["50", "100", "200", "500", "1,000", "2,000", "5,000"])
    axis.minorticks_off()
    axis.grid(axis="x", visible=False)
    axis.legend(loc="upper left", ncols=3)
    axis.set_ylim(40, 9000)
    return figure


EXPERIMENT = Experiment(
    name="egress",
    reads={"model": (*EQUATIONS, "model")},
    run=run,
    figures={"egress": draw},
    check=check,
    inputs=profile_files,
)
