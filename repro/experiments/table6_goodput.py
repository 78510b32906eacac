"""Goodput at the service level over absolute arrival rates, the three deployments of Table 6 in one figure, beside the paper's Λ_max.

The paper compares the deployments at Λ_max, each at a rate of its own and without a bound on TTFT. At one rate for all, what counts is how
many requests still meet the service level: below Λ_max nearly all, above it fewer the longer it lasts. Drawn from the record of tier
`simulate` or `emulate`, whose loads are shares of each deployment's own Λ_max there.
"""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from repro.paper import tables
from repro.record.directory import Record
from repro.record.metrics import value
from repro.report import style


def rates(record: Record) -> pd.DataFrame:
    """Goodput by deployment, tier and absolute rate of arrivals; bounds are nan where there are none."""
    loads = record.table("loads")
    found = loads[loads["metric"] == "goodput"].copy()
    if "tier" not in found:
        found["tier"] = record.configuration["tier"]
    best = {case: value(record.metrics, "lambda_max", str(case)) for case in found["case"].unique()}
    found["rate_per_s"] = found["load"] * found["case"].map(best)
    return found.reindex(columns=["case", "tier", "rate_per_s", "value", "low", "high"]).sort_values("rate_per_s")


def draw(record: Record) -> Figure:
    """Left goodput over the rate, right the most that was reached, as bars beside the paper's Λ_max."""
    found = rates(record)
    figure, (left, right) = style.panels(2, height_in=4.0)
    cases = [case for case in tables.CASES if case in set(found["case"])]
    for index, case in enumerate(cases):
        colour, name = style.CASE_COLOURS[case], style.CASE_NAMES[case]
        printed = tables.TABLE_6[case]["lambda_max"].value
        for tier, own in found[found["case"] == case].groupby("tier"):
            live = tier == "emulate"
            look = {"marker": "o", "linestyle": "none", "ms": 7} if live else {"marker": ".", "linestyle": "-"}
            label = f"{name}, {'live' if live else 'simulated'}"
            left.plot(own["rate_per_s"], own["value"], color=colour, label=label, **look)
            if own["low"].notna().any():
                left.fill_between(own["rate_per_s"], own["low"], own["high"], color=colour, alpha=0.2, lw=0)
        left.plot(printed, printed, **{**style.PAPER, "label": "Λ_max printed" if index == 0 else None})
        most = found[(found["case"] == case) & (found["tier"] == record.configuration["tier"])]["value"].max()
        right.bar(index - 0.2, most, 0.38, color=colour)
        right.bar(index + 0.2, printed, 0.38, color="white", edgecolor="black", hatch="///", lw=0.8)
        for x, height in ((index - 0.2, most), (index + 0.2, printed)):
            right.text(x, height + 0.04, f"{height:.2f}", ha="center", fontsize=8)
    most_per_s = max(float(found["rate_per_s"].max()), *(tables.TABLE_6[case]["lambda_max"].value for case in cases))
    left.plot([0, most_per_s], [0, most_per_s], color="black", lw=0.7, linestyle=":", zorder=0)
    left.set(xlabel="arrivals (req/s)", ylabel="goodput (req/s)", title="Requests within the service level")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    names = [style.CASE_NAMES[case].replace(" ", "\n", 1).replace(" PD", "\nPD") for case in cases]
    right.set_xticks(range(len(cases)), names)
    right.grid(axis="x", visible=False)
    right.set(ylabel="req/s", title="Most of it; hatched: Λ_max printed")
    for axis in (left, right):
        axis.set_ylim(bottom=0)
    return figure
