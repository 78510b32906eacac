"""Figure 5: Λ_max over the split N_p : N_d at t = 19.4K (a), and over the threshold t at 3 : 5 (b), with the bound of each stage (§3.4.2).

The two cuts run through the paper's operating point, so that they can be compared with the paper's; table6 lets the grid choose.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from repro.errors import UserError
from repro.experiments.base import EQUATIONS, Context, Experiment, Outcome
from repro.experiments.deployment import check_deployment, deployment, profile_files
from repro.paper import tables
from repro.record.directory import Record
from repro.record.metrics import value
from repro.report import style
from repro.scheduling.search import Surface, surface
from repro.settings import Settings


@dataclass(frozen=True)
class Options:
    """The point through which both cuts run, and how far the second goes."""

    threshold_tokens: float = 19_400
    n_p: int = 3
    threshold_end_tokens: float = 60_000

    def __post_init__(self) -> None:
        if not self.threshold_tokens > 0 or not self.threshold_end_tokens > 0:
            raise UserError("options.threshold_tokens, options.threshold_end_tokens: must be positive")


def _frame(cut: Surface) -> pd.DataFrame:
    rows = []
    for i, threshold in enumerate(cut.threshold_tokens):
        for j, n_p in enumerate(cut.n_p):
            rows.append({
                "threshold_tokens": threshold, "n_p": n_p, "lambda_max": cut.lambda_max[i, j], "prfaas_bound": cut.prfaas_bound[i],
                "pd_prefill_bound": cut.pd_prefill_bound[i, j], "pd_decode_bound": cut.pd_decode_bound[j],
            })  # fmt: skip
    return pd.DataFrame(rows)


def check(settings: Settings, options: Options) -> None:
    """The deployment must be able to serve, and the split must leave an instance on either side."""
    check_deployment(settings, options)
    if not 0 < options.n_p < settings.cluster.pd.instances:
        raise UserError(f"options.n_p: {options.n_p}; accepted: 1 to {settings.cluster.pd.instances - 1}")


def run(context: Context) -> Outcome:
    """Both cuts, their peaks, and where the falling PD-P bound meets the rising PrfaaS bound (equation 7)."""
    base, options, settings = deployment(context.settings), context.options, context.settings
    lengths = settings.policy.lengths
    split = _frame(surface(base, np.array([options.threshold_tokens]), np.arange(1, base.n_pd), lengths))
    grid = np.arange(
        max(base.lengths.minimum_tokens, settings.policy.threshold_step_tokens), options.threshold_end_tokens + 1,
        settings.policy.threshold_step_tokens,
    )  # fmt: skip
    cut = surface(base, grid, np.array([options.n_p]), lengths)
    paper = tables.TABLE_6["prfaas_pd"]
    # More offloading (smaller t) leaves PD-P less and longer work per PrfaaS request: the difference of the bounds changes sign once.
    gap = cut.pd_prefill_bound[:, 0] - cut.prfaas_bound
    crossing = float(np.interp(0.0, -gap, cut.threshold_tokens))
    best_t, _ = cut.best()
    rows = [
        context.metric(
            "figure5a",
            "n_p",
            float(split["n_p"].iloc[int(np.argmax(split["lambda_max"]))]),
            "instances",
            "computed",
            paper=paper["n_p"].value,
        ),
        context.metric(
            "figure5a", "lambda_max", split["lambda_max"].max(), "req/s", "computed", paper=paper["lambda_max"].value
        ),
        context.metric(
            "figure5b", "threshold_tokens", best_t, "tokens", "computed", paper=paper["threshold_tokens"].value
        ),
        context.metric(
            "figure5b", "crossing_tokens", crossing, "tokens", "computed", paper=paper["threshold_tokens"].value
        ),
        context.metric(
            "figure5b", "lambda_max", np.nanmax(cut.lambda_max), "req/s", "computed", paper=paper["lambda_max"].value
        ),
    ]
    return Outcome(rows, {"figure5a": split, "figure5b": _frame(cut)})


def draw(record: Record) -> Figure:
    """Λ_max and the three bounds along both cuts."""
    over_split, over_threshold = record.table("figure5a"), record.table("figure5b")
    figure, (left, right) = style.panels(2, height_in=3.5, sharey=True)
    bounds = (
        ("prfaas_bound", "Θ_prfaas / p", style.ORANGE, ":"),
        ("pd_prefill_bound", "Θ_pd-p / (1 − p)", style.GREEN, "-."),
        ("pd_decode_bound", "Θ_pd-d", style.RED, "--"),
    )
    for axis, table, x, scale in ((left, over_split, "n_p", 1), (right, over_threshold, "threshold_tokens", 1e3)):
        for column, label, colour, dash in bounds:
            axis.plot(table[x] / scale, table[column], color=colour, linestyle=dash, lw=1.3, label=label)
        axis.plot(
            table[x] / scale,
            table["lambda_max"],
            color=style.BLUE,
            lw=2.4,
            label="Λ_max",
            marker="o" if x == "n_p" else None,
        )
    paper = tables.TABLE_6["prfaas_pd"]
    left.plot(paper["n_p"].value, paper["lambda_max"].value, **style.PAPER)
    right.plot(paper["threshold_tokens"].value / 1e3, paper["lambda_max"].value, **style.PAPER)
    crossing = value(record.metrics, "crossing_tokens")
    right.annotate(f"bounds cross at {crossing / 1e3:.1f}K", (crossing / 1e3, paper["lambda_max"].value), xytext=(26, 5.1),
                   arrowprops={"arrowstyle": "-", "color": "black", "lw": 0.8}, fontsize=8.5)  # fmt: skip
    left.set(
        xlabel="N_p of 8 PD instances, at t = 19.4K", ylabel="throughput (req/s)", title="(a) split", ylim=(0, 6.5)
    )
    right.set(xlabel="threshold t (K tokens), at N_p : N_d = 3 : 5", title="(b) threshold", xlim=(0, None))
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


EXPERIMENT = Experiment(
    name="figure5",
    reads={
        "model": (
            *(key for key in EQUATIONS if key not in ("policy.threshold_tokens", "policy.n_p")),
            "options",
        )
    },
    run=run,
    figures={"figure5": draw},
    options=Options,
    check=check,
    inputs=profile_files,
)
