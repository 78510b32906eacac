"""Table 5: KVCache size, prefill latency and Φ_kv of the unnamed 1T hybrid model, recomputed from what the model must be.

The printed sizes are a straight line to 0.06 MiB, if the labels mean 1,024, 8,192, 32,000 and 130,000 tokens. Slope and intercept are then
those of 57 layers, 42 KDA and 15 MLA, in Kimi Linear's pattern. Both readings of the labels are shown, so that the reader can
judge the reconstruction.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from repro.experiments.base import Context, Experiment, Outcome
from repro.experiments.table3 import one_model
from repro.models.architectures import layout_of
from repro.paper import tables
from repro.profiles.base import INTERPOLATIONS
from repro.profiles.presets import MEBIBYTE, PaperInputs
from repro.record.directory import Record
from repro.record.metrics import each
from repro.report import style


def run(context: Context) -> Outcome:
    """Sizes from the reconstructed layout, Φ_kv from equation 1, and the residual of a straight line under both readings."""
    layout = layout_of(one_model(context.settings))
    rows, points = [], []
    for label, printed in tables.TABLE_5.items():
        tokens = tables.TOKENS[label]
        size = layout.kv_bytes(tokens)
        low, high = printed.prefill.interval
        throughput = 8 * size / printed.prefill.value
        rows += [
            # The layout was read off these very sizes, so agreement is the quality of a fit, not a prediction.
            context.metric(label, "kv_bytes", size, "bytes", "calibrated", paper=printed.kv_size.value * MEBIBYTE),
            context.metric(label, "prefill_s", printed.prefill.value, "s", "published", interval=(low, high), paper=printed.prefill.value),
            context.metric(
                label, "phi_kv_bps", throughput, "bit/s", "computed",
                interval=(8 * size / high, 8 * size / low), paper=printed.kv_throughput.value * 1e9,
            ),
        ]  # fmt: skip
        points.append({
            "label": label, "tokens": tokens, "paper_mib": printed.kv_size.value, "ours_mib": size / MEBIBYTE,
            "prefill_s": printed.prefill.value, "paper_gbps": printed.kv_throughput.value, "ours_gbps": throughput / 1e9,
        })  # fmt: skip
    fits = _line_fits()
    for fit in each(fits):
        case = f"labels as {fit.reading}"
        rows.append(context.metric(case, "line_residual_bytes", fit.worst_mib * MEBIBYTE, "bytes", "computed"))
        rows.append(context.metric(case, "bytes_per_token", fit.bytes_per_token, "bytes/token", "computed"))
        rows.append(context.metric(case, "fixed_bytes", fit.fixed_mib * MEBIBYTE, "bytes", "computed"))
    rows.append(
        context.metric("42 KDA + 15 MLA layers", "bytes_per_token", layout.bytes_per_token, "bytes/token", "computed")
    )
    rows.append(context.metric("42 KDA + 15 MLA layers", "fixed_bytes", layout.fixed_bytes, "bytes", "computed"))
    return Outcome(rows, {"sizes": pd.DataFrame(points), "line_fits": fits, "curves": _curves()})


def _line_fits() -> pd.DataFrame:
    """The best straight line through the four printed sizes, for each reading of the labels."""
    sizes = np.array([row.kv_size.value for row in tables.TABLE_5.values()])
    readings: Mapping[str, Mapping[str, int]] = {"reconstructed": tables.TOKENS, "powers of two": tables.TOKENS_BINARY}
    rows = []
    for reading, labels in readings.items():
        tokens = np.array([labels[label] for label in tables.TABLE_5], np.float64)
        slope, intercept = np.polyfit(tokens, sizes, 1)
        worst = float(np.max(np.abs(sizes - slope * tokens - intercept)))
        rows.append(
            {"reading": reading, "bytes_per_token": slope * MEBIBYTE, "fixed_mib": intercept, "worst_mib": worst}
        )
    return pd.DataFrame(rows)


def _curves() -> pd.DataFrame:
    """T_prefill between the four printed points, under every interpolation."""
    tokens = np.geomspace(1024, 131072, 120)
    inputs = PaperInputs.draw()
    return pd.concat(
        pd.DataFrame({"interpolation": name, "tokens": tokens, "prefill_s": inputs.h200(name).prefill_s(tokens)})
        for name in INTERPOLATIONS
    )


def draw(record: Record) -> Figure:
    """Sizes on the layout's line, and T_prefill between the printed points under every interpolation."""
    sizes, curves = record.table("sizes"), record.table("curves")
    figure, (left, right) = style.panels(2, height_in=3.2)
    tokens = np.linspace(1024, 131072, 2)
    slope = (sizes["ours_mib"].iloc[-1] - sizes["ours_mib"].iloc[0]) / (
        sizes["tokens"].iloc[-1] - sizes["tokens"].iloc[0]
    )
    left.plot(
        tokens, sizes["ours_mib"].iloc[0] + slope * (tokens - 1024), color=style.BLUE, label="42 KDA + 15 MLA layers"
    )
    left.plot(sizes["tokens"], sizes["paper_mib"], **style.PAPER)
    worst = (100 * (sizes["ours_mib"] / sizes["paper_mib"] - 1)).abs().max()
    left.text(0.97, 0.06, f"largest deviation {worst:.2f} %", transform=left.transAxes, ha="right", fontsize=9)
    # On a linear axis, where a straight line is one.
    left.set(xlabel="input length (tokens)", ylabel="KVCache size (MiB)", ylim=(0, None))
    left.set_title("S_kv is the layout's straight line")
    left.set_xticks([0, 32768, 65536, 98304, 131072], ["0", "32K", "64K", "96K", "128K"])
    for (name, series), (colour, _, dash) in zip(
        curves.groupby("interpolation", sort=False), style.SERIES, strict=False
    ):
        right.plot(
            series["tokens"],
            series["prefill_s"],
            color=colour,
            linestyle=dash,
            label=str(name).replace("_", " "),
            lw=1.3,
        )
    right.plot(sizes["tokens"], sizes["prefill_s"], **style.PAPER)
    right.set(ylabel="T_prefill on 8×H200 (s)", title="Four points leave room", yscale="log")
    style.tokens_axis(right)
    for axis in (left, right):
        axis.legend(loc="upper left")
    right.set_yticks([0.5, 1, 2, 4, 8], ["0.5", "1", "2", "4", "8"])
    right.minorticks_off()
    return figure


EXPERIMENT = Experiment(name="table5", reads={"model": ("model",)}, run=run, figures={"table5": draw})
