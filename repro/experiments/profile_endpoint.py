"""The profile of an engine that already runs: vLLM, SGLang, TensorRT-LLM, llama.cpp, the kit's own, behind an OpenAI-compatible address.

    python -m repro experiment=profile options.endpoint=http://127.0.0.1:8000 pretrained=<the checkpoint that it serves>

A server shows times, not the size of its KVCache: S_kv(l) is computed from the model that is named, which is compared with the name
that the server gives. Where the engine counts its own prefill times (`/metrics`), they stand beside the client's.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from repro.engine.openai import OpenAIServer, base_url
from repro.errors import UserError
from repro.experiments.base import Context, Outcome
from repro.experiments.split_model import model_layout, vocabulary_of
from repro.experiments.table3 import one_model
from repro.models.checkpoint import check_checkpoint
from repro.models.layout import StateLayout
from repro.models.spec import ModelSpec
from repro.profiles.base import PhaseProfile
from repro.profiles.endpoint import EndpointMeasurement, measure_endpoint
from repro.profiles.measured import ProfileSpec, fitted
from repro.profiles.presets import save_profile
from repro.record.metrics import Metric
from repro.settings import Settings

_DEFAULT_TIMEOUT_S = 60.0
#: For the list of models, before anything else is known of a server.
_LIST_WITHIN_S = 5.0


def check_endpoint(settings: Settings, options: ProfileSpec, endpoint: str) -> None:
    """An address, and a model whose state's size is known. Raises UserError naming the key."""
    base_url(endpoint, "options.endpoint")
    model = one_model(settings)
    if model.pretrained is not None:
        check_checkpoint(model.pretrained)
    elif model.size == "tiny" and not _is_served_there(model, options, endpoint):
        raise UserError(
            f"pretrained: null; a server does not show whose KVCache it holds, and it is hardly the tiny {model.name}; accepted: "
            "pretrained=<the checkpoint that it serves>, a folder or a hub id, model=<name> size=full, or the kit's own serve at that size"
        )


def _is_served_there(model: ModelSpec, options: ProfileSpec, endpoint: str) -> bool:
    """Whether the server says itself that it serves that model at that size, as `python -m repro serve` does."""
    try:
        with OpenAIServer(
            endpoint,
            vocabulary_of(model),
            model=options.served_model,
            key_variable=options.api_key_variable,
            timeout_s=_LIST_WITHIN_S,
        ) as server:
            return server.root == f"{model.name}_{model.size}"
    except UserError:
        return False


def profile_endpoint(context: Context, model: ModelSpec, options: ProfileSpec, endpoint: str) -> Outcome:
    """Measure what answers there, save it under `results/profiles`, and keep every timing in the record."""
    states, nonce = model_layout(model), int.from_bytes(os.urandom(8), "big")
    with OpenAIServer(
        endpoint,
        vocabulary_of(model),
        model=options.served_model,
        key_variable=options.api_key_variable,
        timeout_s=options.timeout_s or _DEFAULT_TIMEOUT_S,
    ) as server:
        how = server.prepare()
        context.progress(f"{server.model} at {server.url}: prompts as {how}")
        measurement = measure_endpoint(server, options, context.progress, nonce)
        served, root = server.model, server.root
    source = Path(model.pretrained).name if model.pretrained else f"{model.name}_{model.size}"
    flags = list(measurement.flags)
    if model.pretrained and Path(model.pretrained).name not in (Path(served).name, Path(root).name):
        flags.append(f"the server says that it serves {served} from {root}; S_kv(l) is that of {model.pretrained}")
        context.progress(f"flagged: {flags[-1]}")
    name = f"{source}_{_slug(options.accelerator or 'endpoint')}"
    profile = _profile(name, model.name, options, measurement, states, served, flags)
    path = Path(context.settings.results) / "profiles" / f"{name}.yaml"
    save_profile(profile, path)
    context.progress(f"profile saved: use it as profile={name}")
    table = _timings(measurement, states)
    return Outcome(_metrics(context, name, measurement, table, flags), {"timings": table}, provenance={
        "profile": str(path), "served_model": served, "served_from": root, "prompts": how, "nonce": nonce,
        "prefix_cache": measurement.prefix_cache, "fixed": asdict(measurement.fixed), "stopped": measurement.stopped, "flags": flags,
        "outside_by": measurement.outside_by, "engine's own": _own_words(measurement),
    })  # fmt: skip


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_").lower() or "endpoint"


def _profile(
    name: str,
    model: str,
    options: ProfileSpec,
    measurement: EndpointMeasurement,
    states: StateLayout,
    served: str,
    flags: list[str],
) -> PhaseProfile:
    fixed = measurement.fixed
    return fitted(
        name, model, options.accelerator or "unknown", options, measurement.prefill, measurement.decode, states,
        notes=(
            "Of a running engine, one request at a time. T_prefill is the time to the first token less what is no prefill, "
            f"{measurement.outside.value:.4g} s by the smallest request less {measurement.outside_by}. "
            f"Its fixed part is {fixed.fixed_s:.4g} s. {_own_words(measurement)} "
            f"Prefix caching {measurement.prefix_cache}. Lengths ended by {measurement.stopped}."
            + "".join(f" Flagged: {flag}." for flag in flags)
        ),
        provenance={"served model": served, "prefix caching": measurement.prefix_cache, "flags": str(len(flags))},
    )  # fmt: skip


def _own_words(measurement: EndpointMeasurement) -> str:
    """How T_prefill stands to the engine's own times, in a sentence."""
    if not measurement.engine:
        return "The engine shows no prefill times of its own to hold it against."
    ratios = [timing.ratio.value for timing in measurement.engine]
    return f"It is {min(ratios):.3g} to {max(ratios):.3g} of the engine's own metric of the same requests."


def _timings(measurement: EndpointMeasurement, states: StateLayout) -> pd.DataFrame:
    rows = []
    own = {timing.tokens: timing for timing in measurement.engine}
    ttft_s = {timing.tokens: at_s for timing, at_s in zip(measurement.prefill, measurement.ttft_s, strict=True)}
    for phase, measured in (("prefill", measurement.prefill), ("decode", measurement.decode)):
        for timing in measured:
            row: dict[str, Any] = {"phase": phase, **asdict(timing), "tokens_per_s": timing.batch / timing.seconds}
            if phase == "prefill":
                row["tokens_per_s"] = timing.tokens / timing.seconds
                row["phi_kv_bps"] = 8 * states.kv_bytes(timing.tokens) / timing.seconds
                engine = own.get(timing.tokens)
                row["ttft_s"] = ttft_s[timing.tokens]
                row["engine_prefill_s"] = None if engine is None else engine.prefill_s
                row["engine_ttft_s"] = None if engine is None else engine.ttft_s
            rows.append(row)
    return pd.DataFrame(rows)


def _metrics(
    context: Context, name: str, measurement: EndpointMeasurement, table: pd.DataFrame, flags: list[str]
) -> list[Metric]:
    outside = measurement.outside
    known = {"on": 1.0, "off": 0.0}.get(measurement.prefix_cache, float("nan"))
    metrics = [
        context.metric(name, "prefill_fixed_s", measurement.fixed.fixed_s, "s", "measured"),
        context.metric(
            name, "outside_s", outside.value, "s", "measured", interval=(outside.low, outside.high), n=outside.n
        ),
        context.metric(name, "prefix_cache", known, "", "measured"),
        context.metric(name, "repeated_prompt_ratio", measurement.repeated_ratio, "", "measured"),
        context.metric(name, "flags", len(flags), "", "measured"),
    ]
    rows: list[dict[Any, Any]] = table.to_dict("records")
    for row in rows:
        prefill, n, span = row["phase"] == "prefill", row["repeats"], (row["low_s"], row["high_s"])
        case = f"{name}.{row['phase']}.{row['tokens']}" + ("" if prefill else f"x{row['batch']}")
        named = "prefill_s" if prefill else "decode_step_s"
        metrics.append(context.metric(case, named, row["seconds"], "s", "measured", interval=span, n=n))
        metrics.append(context.metric(case, "tokens_per_s", row["tokens_per_s"], "tokens/s", "measured", n=n))
        if prefill:
            metrics.append(context.metric(case, "ttft_s", row["ttft_s"], "s", "measured", n=n))
            metrics.append(context.metric(case, "phi_kv_bps", row["phi_kv_bps"], "bit/s", "measured", n=n))
    for timing in measurement.engine:
        case = f"{name}.prefill.{timing.tokens}"
        ratio = timing.ratio
        metrics.append(context.metric(case, "engine_prefill_s", timing.prefill_s, "s", "measured", n=ratio.n))
        if math.isfinite(timing.ttft_s):
            metrics.append(context.metric(case, "engine_ttft_s", timing.ttft_s, "s", "measured", n=ratio.n))
        metrics.append(
            context.metric(
                case,
                "prefill_to_engine_ratio",
                ratio.value,
                "",
                "measured",
                interval=(ratio.low, ratio.high),
                n=ratio.n,
            )
        )
    return metrics
