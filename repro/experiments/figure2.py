"""Figure 2: KV throughput and prefill latency of MiniMax-M2.5 on 8×H200: KVCache that no Ethernet link can carry (§2.2)."""

from __future__ import annotations

from matplotlib.figure import Figure

from repro.experiments.base import Context, Experiment, Outcome
from repro.experiments.table3 import check, implied_prefill, one_model
from repro.record.directory import Record
from repro.record.metrics import each
from repro.report import style


def run(context: Context) -> Outcome:
    """Published Φ_kv as bars, and as a line the T_prefill that its architecture's S_kv implies."""
    model = one_model(context.settings)
    table = implied_prefill([model])
    rows = []
    for row in each(table):
        rows.append(
            context.metric(str(row.label), "phi_kv_bps", row.phi_kv_bps, "bit/s", "published", paper=row.phi_kv_bps)
        )
        rows.append(
            context.metric(
                str(row.label),
                "prefill_s",
                row.prefill_s,
                "s",
                "computed",
                interval=(row.prefill_low_s, row.prefill_high_s),
            )
        )
    return Outcome(rows, {"figure2": table})


def draw(record: Record) -> Figure:
    """Bars and line over length, as in the paper."""
    table = record.table("figure2")
    figure, (bars,) = style.panels(1, height_in=3.2, width_in=4.8)
    line = bars.twinx()
    positions = range(len(table))
    bars.bar(positions, table["phi_kv_bps"] / 1e9, 0.6, color=style.SKY, label="Φ_kv (published)")
    line.plot(positions, table["prefill_s"], color=style.RED, marker="o", label="T_prefill (implied by S_kv)")
    for position, seconds in zip(positions, table["prefill_s"], strict=True):
        line.annotate(f"{seconds:.2f} s", (position, seconds), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=8.5,
                      bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1})  # fmt: skip
    bars.set_xticks(list(positions), list(table["label"]))
    bars.set(
        xlabel="input length (tokens)",
        ylabel="Φ_kv (Gbps)",
        title=f"{table['title'].iloc[0]} emits {table['phi_kv_bps'].max() / 1e9:.0f} Gbps of KVCache per instance",
        ylim=(0, 1.3 * table["phi_kv_bps"].max() / 1e9),
    )
    line.set(ylabel="T_prefill (s)", ylim=(0, 1.26 * table["prefill_s"].max()))
    line.grid(visible=False)
    line.spines["right"].set_visible(True)
    bars.grid(axis="x", visible=False)
    handles = [*bars.get_legend_handles_labels()[0], *line.get_legend_handles_labels()[0]]
    bars.legend(handles, [*bars.get_legend_handles_labels()[1], *line.get_legend_handles_labels()[1]], loc="upper left")
    return figure


EXPERIMENT = Experiment(name="figure2", reads={"model": ("model",)}, run=run, figures={"figure2": draw}, check=check)
