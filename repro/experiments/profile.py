"""Measure the configured model's profile on a device, or that of a running engine, and save it by name for every tier (§4.1).

`experiment=table6 profile=<name>` then feeds it into the equations in place of the paper's. Beside the times stand the
tokens per second, the peak memory and the share that they are of the device's own ceilings, with the kernels that ran.
`options.endpoint` measures what answers at an address instead (`repro.experiments.profile_endpoint`).
"""

from __future__ import annotations

import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure

from repro.experiments.base import MODEL, Context, Experiment, Outcome
from repro.experiments.profile_endpoint import check_endpoint, profile_endpoint
from repro.experiments.split_model import check_one
from repro.experiments.table3 import one_model
from repro.kvcache.state import layout
from repro.models.build import build
from repro.models.layout import StateLayout
from repro.profiles.measured import Measurement, ProfileSpec, measure, profile_of
from repro.profiles.presets import save_profile
from repro.record.directory import Record
from repro.record.metrics import Metric
from repro.report import style
from repro.serving.devices import one_device
from repro.settings import Settings


def run(context: Context) -> Outcome:
    """Measure, fit, save under `results/profiles`, and keep every timing in the record."""
    options, spec = context.options, one_model(context.settings)
    assert isinstance(options, ProfileSpec)
    if options.endpoint is not None:
        return profile_endpoint(context, spec, options, options.endpoint)
    device = torch.device(one_device("options.device", options.device or "cpu"))
    bare = build(spec, "meta")
    states = layout(build(spec, "meta"))
    measurement = measure(build(spec, device), bare, options, context.progress)
    source = Path(spec.pretrained).name if spec.pretrained else f"{spec.name}_{spec.size}"
    name = f"{source}_{device.type}"
    profile = profile_of(name, spec.name, accelerator_of(device), measurement, states, options)
    path = Path(context.settings.results) / "profiles" / f"{name}.yaml"
    save_profile(profile, path)
    context.progress(f"profile saved: use it as profile={name}")
    table = timings(measurement, states)
    return Outcome(_metrics(context, name, table), {"timings": table}, provenance={
        "profile": str(path), "kernels": dict(measurement.kernels), "stopped": measurement.stopped,
        "ceilings": asdict(measurement.ceilings), "threads": torch.get_num_threads(),
    })  # fmt: skip


def check(settings: Settings, options: ProfileSpec) -> None:
    """One model that can be built, or whose state's size is known. Raises UserError naming the key."""
    if options.endpoint is None:
        check_one(settings, options)
    else:
        check_endpoint(settings, options, options.endpoint)


def accelerator_of(device: torch.device) -> str:
    """The accelerator's name as the driver, or the processor's as the platform, gives it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"


def timings(measurement: Measurement, states: StateLayout) -> pd.DataFrame:
    """A row per timing, with what it is of the ceilings."""
    rows = []
    active_bytes = measurement.flops_per_token / 2 * 2  # weights that one token touches, two bytes each
    for phase, measured in (("prefill", measurement.prefill), ("decode", measurement.decode)):
        for timing in measured:
            row: dict[str, Any] = {"phase": phase, **asdict(timing)}
            state_bytes = states.kv_bytes(timing.tokens)
            if phase == "prefill":
                row["tokens_per_s"] = timing.tokens / timing.seconds
                row["phi_kv_bps"] = 8 * state_bytes / timing.seconds
                achieved = measurement.prefill_flops(timing.tokens) / timing.seconds
                row["ceiling_fraction"] = achieved / measurement.ceilings.matmul_flops
            else:
                row["tokens_per_s"] = timing.batch / timing.seconds
                moved = active_bytes + timing.batch * state_bytes
                row["ceiling_fraction"] = moved / timing.seconds / measurement.ceilings.copy_bytes_per_s
            rows.append(row)
    return pd.DataFrame(rows)


def _metrics(context: Context, name: str, table: pd.DataFrame) -> list[Metric]:
    metrics = []
    rows: list[dict[Any, Any]] = table.to_dict("records")
    for row in rows:
        prefill, n = row["phase"] == "prefill", row["repeats"]
        case = f"{name}.{row['phase']}.{row['tokens']}" + ("" if prefill else f"x{row['batch']}")
        named, span = "prefill_s" if prefill else "decode_step_s", (row["low_s"], row["high_s"])
        metrics.append(context.metric(case, named, row["seconds"], "s", "measured", interval=span, n=n))
        metrics.append(context.metric(case, "tokens_per_s", row["tokens_per_s"], "tokens/s", "measured", n=n))
        metrics.append(context.metric(case, "ceiling_fraction", row["ceiling_fraction"], "", "measured", n=n))
        metrics.append(context.metric(case, "peak_bytes", row["peak_bytes"], "bytes", "measured"))
        if prefill:
            metrics.append(context.metric(case, "phi_kv_bps", row["phi_kv_bps"], "bit/s", "measured", n=n))
    return metrics


def draw(record: Record) -> Figure:
    """T_prefill over the length, and the decode step over the batch, with intervals."""
    table = record.table("timings")
    figure, (left, right) = style.panels(2, height_in=3.2)
    prefill, decode = (table[table["phase"] == phase] for phase in ("prefill", "decode"))
    errors = [prefill["seconds"] - prefill["low_s"], prefill["high_s"] - prefill["seconds"]]
    left.errorbar(prefill["tokens"], prefill["seconds"], yerr=errors, color=style.BLUE, marker="o")
    left.set(xscale="log", yscale="log", xlabel="input length (tokens)", ylabel="T_prefill (s)", title="Prefill")
    for (context, series), (colour, marker, dash) in zip(decode.groupby("tokens"), style.SERIES, strict=False):
        step_ms = 1e3 * series["seconds"]
        right.plot(series["batch"], step_ms, color=colour, marker=marker, linestyle=dash, label=f"context {context}")
    right.set(xlabel="batch", ylabel="decode step (ms)", title="Decode", ylim=(0, None))
    right.legend()
    return figure


EXPERIMENT = Experiment(
    name="profile",
    reads={"execute": (*MODEL, "options")},
    run=run,
    figures={"profile": draw},
    options=ProfileSpec,
    check=check,
)
