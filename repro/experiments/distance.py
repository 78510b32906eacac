"""How far away PrfaaS may be: Λ_max and TTFT over link rate, RTT, loss, congestion control and connections.

The paper gives its link a rate and no distance. A TCP connection carries no more than a window per round trip, and, under CUBIC, no
more than its losses leave of that window (`repro.link.tcp_model`, the law of the simulated link too), so rate alone does not say what
crosses. The law is laid over what iperf3 measured on the emulated link where `measured` names a record of experiment=link_fidelity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from repro.errors import UserError
from repro.experiments.base import EQUATIONS, HOMOGENEOUS, Context, Experiment, Outcome
from repro.experiments.deployment import check_offloading, deployment, profile_files
from repro.link.tcp_model import LINUX_WINDOW_BYTES, TcpPath
from repro.record.directory import Record
from repro.record.metrics import each
from repro.report import style
from repro.scheduling.search import search
from repro.scheduling.spec import PolicySpec
from repro.scheduling.throughput import Deployment
from repro.settings import Settings

#: Λ_max counts as kept down to this share.
_KEPT = 0.95


@dataclass(frozen=True)
class Options:
    """The conditions; `window_bytes` is the largest window of a connection (4 MiB is the most that Linux takes by itself).

    Every instance has so many `connections` to the PD cluster. `measured` is the folder of a record of experiment=link_fidelity.
    """

    rates_bps: tuple[float, ...] = (1e9, 2e9, 5e9, 10e9, 20e9, 50e9, 100e9, 400e9)
    rtts_s: tuple[float, ...] = (0.0, 0.002, 0.01, 0.02, 0.05, 0.1, 0.2)
    losses: tuple[float, ...] = (0.0, 1e-4, 1e-3, 1e-2, 2e-2)
    connections: tuple[int, ...] = (1, 8, 64)
    congestion_controls: tuple[str, ...] = ("cubic", "bbr")
    window_bytes: float = LINUX_WINDOW_BYTES
    measured: str | None = None

    def __post_init__(self) -> None:
        for key, values, low in (
            ("rates_bps", self.rates_bps, 1.0),
            ("rtts_s", self.rtts_s, 0.0),
            ("losses", self.losses, 0.0),
        ):
            if not values or min(values) < low:
                raise UserError(f"options.{key}: {list(values)}; accepted: one value or more, {low:g} or above")
        if max(self.losses) >= 1 or not self.connections or min(self.connections) < 1 or not self.window_bytes > 0:
            raise UserError(
                "options.losses, options.connections, options.window_bytes: accepted: below 1, 1 or more, positive"
            )
        for control in self.congestion_controls:
            if control not in ("cubic", "bbr"):
                raise UserError(f"options.congestion_controls: {control!r}; accepted: cubic, bbr")


def connection_bps(rtt_s: float, loss: float, control: str, window_bytes: float) -> float:
    """What one long-lived connection can carry by TCP's law, whatever the link does beside."""
    return TcpPath(rtt_s, loss, control, window_bytes=window_bytes).goodput_bps


def run(context: Context) -> Outcome:
    """Λ_max and TTFT of every condition, and how far each way of sending reaches at the configured rate."""
    settings, options = context.settings, context.options
    base, rows = deployment(settings), []
    free = PolicySpec(
        settings.policy.name,
        threshold_step_tokens=settings.policy.threshold_step_tokens,
        lengths=settings.policy.lengths,
    )
    alone = search(base.without_prfaas(settings.cluster.homogeneous_instances), free).lambda_max
    rows.append(context.metric("homogeneous_pd", "lambda_max", alone, "req/s", "computed"))
    best = search(base, settings.policy).lambda_max
    grid = []
    for rate in options.rates_bps:
        point = search(replace(base, egress_bps=rate), settings.policy)
        rows.append(
            context.metric(f"{rate / 1e9:g} Gbps, no distance", "lambda_max", point.lambda_max, "req/s", "computed")
        )
    for control in options.congestion_controls:
        for connections in options.connections:
            for loss in options.losses:
                reach = 0.0
                for rtt in sorted(options.rtts_s):
                    served, ttft = _at(
                        base, settings, connections * connection_bps(rtt, loss, control, options.window_bytes), rtt
                    )
                    grid.append({
                        "congestion_control": control, "connections": connections, "loss": loss, "rtt_s": rtt, "lambda_max": served,
                        "ttft_mean_s": ttft,
                    })  # fmt: skip
                    reach = rtt if served >= _KEPT * best and reach == _before(options.rtts_s, rtt) else reach
                rows.append(
                    context.metric(f"{connections} × {control}, loss {loss:g}", "reach_rtt_s", reach, "s", "computed")
                )
    tables = {"grid": pd.DataFrame(grid)}
    if options.measured is not None:
        tables["measured"] = _measured(Path(options.measured), options.window_bytes)
        lossy = tables["measured"][tables["measured"]["loss"] > 0]
        ratio = lossy["law_bps"] / lossy["measured_bps"]
        if len(ratio):
            ends = (float(ratio.min()), float(ratio.max()))
            rows.append(
                context.metric(
                    "median under loss",
                    "law_over_measured",
                    float(ratio.median()),
                    "",
                    "computed",
                    interval=ends,
                    n=len(ratio),
                )
            )
    return Outcome(rows, tables)


def _before(rtts_s: Sequence[float], rtt_s: float) -> float:
    """The next shorter RTT: reach ends at the first that is too long."""
    return max((shorter for shorter in rtts_s if shorter < rtt_s), default=0.0)


def _at(base: Deployment, settings: Settings, instance_bps: float, rtt_s: float) -> tuple[float, float]:
    """Λ_max when an instance sends no faster than that, and the mean TTFT without queues at its threshold: prefill and transfer overlap."""
    through = replace(base, egress_bps=min(base.egress_bps, base.n_prfaas * instance_bps))
    point = search(through, settings.policy)
    tokens, mass = base.lengths.atoms()
    sent = 8 * base.prfaas.kv_bytes(tokens) / min(base.egress_bps, instance_bps)
    remote = np.maximum(base.prfaas.prefill_s(tokens), sent) + rtt_s / 2
    seconds = np.where(tokens > point.threshold_tokens, remote, base.pd.prefill_s(tokens))
    return point.lambda_max, float(np.sum(mass * seconds) / np.sum(mass))


def _measured(folder: Path, window_bytes: float) -> pd.DataFrame:
    """Goodput by iperf3 under loss on the emulated link, and what the law says for the same conditions."""
    table = pd.read_csv(folder / "tables" / "iperf3.csv")
    table = table[(table["backend"] == "packet") & (table["asked_rtt_s"] > 0)]
    rows = []
    for row in each(table):
        law = row.connections * connection_bps(row.asked_rtt_s, row.asked_loss, row.congestion_control, window_bytes)
        rows.append({
            "congestion_control": row.congestion_control, "connections": row.connections, "loss": row.asked_loss, "rtt_s": row.asked_rtt_s,
            "rate_bps": row.asked_rate_bps, "measured_bps": row.goodput_bps, "law_bps": min(row.goodput_bps / row.share, law),
        })  # fmt: skip
    return pd.DataFrame(rows)


def _inputs(settings: Settings) -> list[Path]:
    """The measurements that are laid beside the law."""
    folder = settings.options.get("measured")
    return [Path(folder) / "tables" / "iperf3.csv"] if folder else []


def check(settings: Settings, options: Options) -> None:
    """There must be a PrfaaS cluster, and what `measured` names a record."""
    check_offloading(settings)
    if options.measured is not None and not (Path(options.measured) / "tables" / "iperf3.csv").is_file():
        raise UserError(
            f"options.measured: {options.measured} is no record of experiment=link_fidelity; accepted: its folder, or null"
        )


def finding(record: Record) -> str:
    """How far CUBIC and BBR reach with a little loss, and which rate is enough."""
    table = record.metrics
    reach = table[table["metric"] == "reach_rtt_s"].set_index("case")["value"]
    served = table[(table["metric"] == "lambda_max") & table["case"].str.endswith("no distance")].set_index("case")[
        "value"
    ]
    enough = served[served >= _KEPT * served.max()].index[0].split(",")[0]
    ends = []
    for clean in (True, False):
        own = {str(case): 1000 * far for case, far in reach.items() if str(case).endswith("loss 0") == clean}
        if own:
            least, most = min(own, key=own.__getitem__), max(own, key=own.__getitem__)
            ends.append(f"from {own[least]:g} ms ({least}) to {own[most]:g} ms ({most})")
    window = record.configuration["options"]["window_bytes"] / 2**20
    return (
        f"{enough} keep {100 * _KEPT:.0f} % of Λ_max when distance costs nothing; on the configured link, with windows of {window:g} MiB, "
        f"the longest round trip that keeps it goes {', and with loss '.join(ends)}."
    )


def draw(record: Record) -> Figure:
    """Λ_max over RTT for each way of sending at the smallest and a typical loss; TTFT likewise; the law over measurements, where given."""
    grid, table = record.table("grid"), record.metrics
    measured = record.table("measured") if (record.path / "tables" / "measured.csv").exists() else None
    figure, axes = style.panels(2 if measured is None else 3, height_in=3.7, width_in=8.4 if measured is None else 11.5)
    losses = sorted(grid["loss"].unique())
    shown = [loss for loss in losses if loss in (losses[0], losses[len(losses) // 2])]
    for index, ((control, connections), rows) in enumerate(
        grid.groupby(["congestion_control", "connections"], sort=False)
    ):
        colour, marker, _ = style.SERIES[index % len(style.SERIES)]
        for loss, dash in zip(shown, ("-", ":"), strict=False):
            own = rows[rows["loss"] == loss]
            look = f"{connections} × {control}" if loss == shown[0] else None
            axes[0].plot(
                1000 * own["rtt_s"],
                own["lambda_max"],
                color=colour,
                linestyle=dash,
                marker=marker,
                markersize=3.5,
                label=look,
            )
            axes[1].plot(
                1000 * own["rtt_s"], own["ttft_mean_s"], color=colour, linestyle=dash, marker=marker, markersize=3.5
            )
    alone = table[table["case"] == "homogeneous_pd"]["value"].iloc[0]
    axes[0].axhline(alone, color="black", lw=0.9, linestyle="--")
    axes[0].text(
        1.0, alone, "homogeneous PD", transform=axes[0].get_yaxis_transform(), fontsize=8.5, ha="right", va="bottom"
    )
    axes[0].set(xlabel="RTT (ms)", ylabel="Λ_max (req/s)", title=f"Throughput (dotted: loss {shown[-1]:g})")
    axes[1].set(xlabel="RTT (ms)", ylabel="mean TTFT without queues (s)", title="Latency", ylim=(0, None))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    if measured is not None:
        for index, (control, rows) in enumerate(measured.groupby("congestion_control", sort=False)):
            colour, marker, _ = style.SERIES[index]
            axes[2].plot(
                rows["measured_bps"] / 1e6, rows["law_bps"] / 1e6, marker, color=colour, markersize=5, label=control
            )
        ends = [measured["measured_bps"].min() / 1e6, measured["measured_bps"].max() / 1e6]
        axes[2].plot(ends, ends, color="black", lw=0.8)
        axes[2].set(
            xscale="log", yscale="log", xlabel="measured (Mbps)", ylabel="law (Mbps)", title="The law over measurements"
        )
        axes[2].legend()
    return figure


EXPERIMENT = Experiment(
    name="distance",
    reads={"model": (*EQUATIONS, HOMOGENEOUS, "options")},
    run=run,
    figures={"distance": draw},
    options=Options,
    check=check,
    inputs=lambda settings: [*profile_files(settings), *_inputs(settings)],
    finding=finding,
    hinges_on=(
        "losses are independent and connections long-lived (no slow start per transfer), BBR takes no loss for congestion, and every "
        "instance keeps its own connections busy."
    ),
)
