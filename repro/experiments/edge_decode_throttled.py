"""Edge decode in execution: prefill at full speed, decode on a side that is slowed down, over the state's own bytes.

The decode side computes the same model on the same cores, and rests after every forward pass (`repro.engine.pace`). What it was slowed
down by is measured against the same passes without rests, for prefill and for steps. The state crosses framed and is restored; the link's
time is the arithmetic of its bytes and nothing here waits for it, so the smallest link on which the split comes first is what these times
and bytes leave for the wire.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pandas as pd
from matplotlib.ticker import LogLocator

from repro.engine.pace import throttled
from repro.record.metrics import Metric, value
from repro.record.statistics import Estimate
from repro.report import style

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes

    from repro.experiments.base import Context
    from repro.record.directory import Record

#: Between rests a prefill computes so many tokens.
_CHUNK_TOKENS = 64


def timed(
    model: torch.nn.Module, ids: torch.Tensor, prompt_tokens: int, factors: tuple[float, ...]
) -> Iterator[dict[str, float]]:
    """For each factor, one prompt: prefill of the service, of the device alone, restore and decode steps, in seconds; the state's bytes.

    The first row is of factor 1, the same side without rests.
    """
    from repro.kvcache.state import State, extract, restore, seal
    from repro.models.prefill import chunked_prefill, forward

    config: Any = model.config
    seen = prompt_tokens - 1  # the device computes the last token itself, and with it the first of the answer
    chunked_prefill(model, ids[:, :prompt_tokens], _CHUNK_TOKENS)  # warm
    begun = time.perf_counter()
    cache, _ = chunked_prefill(model, ids[:, :seen], _CHUNK_TOKENS)
    service_s = time.perf_counter() - begun
    states = [State(s.layer, s.kind, s.slot, s.start, s.end, s.tensor.clone()) for s in extract(cache, config, seen)]
    sent = sum(seal(state, 0, index).header.payload_bytes for index, state in enumerate(states))
    for factor in (1.0, *factors):
        with throttled(model, factor):
            begun = time.perf_counter()
            chunked_prefill(model, ids[:, :prompt_tokens], _CHUNK_TOKENS)
            local_s = time.perf_counter() - begun
            begun = time.perf_counter()
            restored = restore(states, config, seen)
            time.sleep((factor - 1) * (time.perf_counter() - begun))
            restore_s = time.perf_counter() - begun
            steps_s = []
            for at in range(seen, ids.shape[1]):
                begun = time.perf_counter()
                forward(model, ids[:, at : at + 1], restored, at)
                steps_s.append(time.perf_counter() - begun)
        yield {
            "throttle": factor, "service_s": service_s, "local_s": local_s, "restore_s": restore_s, "first_step_s": steps_s[0],
            "step_s": float(pd.Series(steps_s).median()), "state_bytes": float(sent),
        }  # fmt: skip


def measured(context: Context, table: pd.DataFrame) -> Iterator[Metric]:
    """Of every factor: what it came to, time to first token alone and from the service's state, time per token, and the smallest link."""
    plain = table[table["throttle"] == 1].set_index("prompt")
    for factor, rows in table[table["throttle"] > 1].groupby("throttle"):
        own, case = rows.set_index("prompt"), _case(factor)
        split_s = own["service_s"] + own["restore_s"] + own["first_step_s"]
        found: dict[str, tuple[pd.Series[float], str]] = {
            "throttle_prefill": (own["local_s"] / plain["local_s"], ""),
            "throttle_step": (own["step_s"] / plain["step_s"], ""),
            "ttft_local_s": (own["local_s"], "s"),
            "ttft_edge_without_wire_s": (split_s, "s"),
            "tpot_s": (own["step_s"], "s"),
            "state_bytes": (own["state_bytes"], "bytes"),
        }
        spare_s = own["local_s"] - split_s
        if (spare_s > 0).all():
            found["smallest_link_bps"] = (8 * own["state_bytes"] / spare_s, "bit/s")
        for metric, (values, unit) in found.items():
            at = Estimate.of(values.to_list())
            yield context.metric(case, metric, at.value, unit, "measured", interval=(at.low, at.high), n=at.n)


def _case(factor: Any) -> str:
    return f"decode side {float(factor):g} times slower"


def sentence(table: pd.DataFrame, factor: float) -> str:
    """From which link on the service's state comes before the decode side's own, at that throttle."""
    case = _case(factor)
    reached, alone = (value(table, metric, case) for metric in ("throttle_prefill", "ttft_local_s"))
    split = value(table, "ttft_edge_without_wire_s", case)
    said = (
        f" With a decode side throttled to {reached:.1f} times its time, the first token takes {alone:.3g} s there alone and {split:.3g} s "
        "from the service's state without the wire"
    )
    if not ((table["case"] == case) & (table["metric"] == "smallest_link_bps")).any():
        return said + ", so no link is wide enough."
    return said + f", so that the split is first from {value(table, 'smallest_link_bps', case) / 1e6:.3g} Mbps on."


def draw(axis: Axes, record: Record) -> None:
    """TTFT on the decode side alone and from the service's state, over what the throttle came to."""
    table = record.table("throttled")
    table = table.assign(split_s=table["service_s"] + table["restore_s"] + table["first_step_s"])
    means = table.groupby("throttle")[["local_s", "split_s"]].mean()
    came_to = means["local_s"] / means["local_s"].loc[1.0]
    for (column, name), (colour, marker, dash) in zip(
        (("local_s", "decode side alone"), ("split_s", "service's state, no wire")), style.SERIES, strict=False
    ):
        axis.plot(came_to, means[column], color=colour, marker=marker, linestyle=dash, label=name)
    axis.set(
        xscale="log", yscale="log", xlabel="decode side slower by (×)", ylabel="TTFT (s)", title="Throttled decode side"
    )
    axis.set_xticks(came_to.to_list(), [f"{each:.1f}" for each in came_to])
    axis.minorticks_off()
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.legend(fontsize=7)
