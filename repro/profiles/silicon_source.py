"""Points of silicon profiles from aiconfigurator-core's kernel times: what `python -m repro silicon` writes and checks.

The package (NVIDIA, Apache-2.0, optional extra `silicon`, no GPU needed) holds times of single kernels, measured per
accelerator, framework and version, and adds them up to a step of a whole model. Here its own interface is asked for
T_prefill over the length, T_decode over batch and context, and what a GPU's memory holds beside the KVCache. What comes
out is committed (`repro/profiles/silicon_points/`), so that using it needs nothing.

Two marks keep a point honest: the share of its time that comes from measured tables (the rest is a formula:
memory-bound operations, mixed sources), and the longest prompt that the tables of every kernel involved reach. Beyond
it the package extrapolates, still calling it silicon.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata, util
from pathlib import Path
from typing import Any, Final

import pandas as pd

from repro.errors import UserError
from repro.models import spec
from repro.models.architectures import layout_of
from repro.models.layout import StateKind, StateLayout

PACKAGE: Final = "aiconfigurator-core"
#: The version whose data the committed points come from; the extra pins it.
VERSION: Final = "0.12.0"

LENGTHS: Final = (512, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072)
BATCHES: Final = (1, 4, 16, 64, 256)
CONTEXTS: Final = (4096, 32_768, 131_072)
#: GPUs that share every layer; more stages of a pipeline are added until weights and one request of the longest length fit.
TENSOR_PARALLEL: Final = 8
STAGES: Final = (1, 2, 4, 8)
#: Of a GPU's memory, what a server hands to weights, activations and KVCache.
MEMORY_FRACTION: Final = 0.9


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint and, where it is not run as published, the quantisation asked of the package."""

    model: str
    path: str
    quantisation: str = "published"
    gemm: str | None = None
    moe: str | None = None


CHECKPOINTS: Final = (
    Checkpoint("kimi_k3", "moonshotai/Kimi-K3"),
    Checkpoint("kimi_k3", "moonshotai/Kimi-K3", "w4a8_mxfp8", moe="w4a8_mxfp4_mxfp8"),
    Checkpoint("qwen3_5_397b", "Qwen/Qwen3.5-397B-A17B"),
    Checkpoint("qwen3_5_397b", "Qwen/Qwen3.5-397B-A17B", "fp8_block", gemm="fp8_block", moe="fp8_block"),
    Checkpoint("minimax_m2_5", "MiniMaxAI/MiniMax-M2.5"),
    Checkpoint("qwen3_235b", "Qwen/Qwen3-235B-A22B"),
    Checkpoint("qwen3_235b", "Qwen/Qwen3-235B-A22B-FP8", "fp8_block"),
    Checkpoint("mimo_v2_flash", "XiaomiMiMo/MiMo-V2-Flash"),
)
#: Of the case study on public hardware; the other models are derived where Table 3 was measured.
EVERYWHERE: Final = ("kimi_k3", "qwen3_5_397b", "minimax_m2_5")
SYSTEMS: Final = {
    "h200": "h200_sxm", "h100": "h100_sxm", "b200": "b200_sxm", "gb200": "gb200", "l40s": "l40s", "a100": "a100_sxm",
}  # fmt: skip
BACKENDS: Final = ("sglang", "vllm")
PLACEMENTS: Final = {
    "expert_tp": {"moe_tp_size": 8, "moe_ep_size": 1},
    "expert_ep": {"moe_tp_size": 1, "moe_ep_size": 8},
}
#: Kernel families and the column that counts the tokens of one pass, by what a model's layers are made of.
_ROWS: Final = {
    "mla": ("mla", "context_mla_perf", "isl"), "gqa": ("attention", "context_attention_perf", "isl"),
    "kda": ("kda", "kda_perf", "num_tokens"),
    "gdn": ("linear_attention", "gdn_perf", "num_tokens"), "moe": ("moe", "moe_perf", "num_tokens"), "gemm": ("gemm", "gemm_perf", "m"),
}  # fmt: skip
_FAMILIES: Final = {
    "kimi_k3": ("mla", "kda", "moe", "gemm"), "qwen3_5_397b": ("gqa", "gdn", "moe", "gemm"), "minimax_m2_5": ("gqa", "moe", "gemm"),
    "qwen3_235b": ("gqa", "moe", "gemm"), "mimo_v2_flash": ("gqa", "moe", "gemm"),
}  # fmt: skip


def installed() -> str | None:
    """Why the points cannot be derived here, or None where the package is there in the version that they come from."""
    if util.find_spec("aiconfigurator_core") is None:
        return f"{PACKAGE} is not installed; pip install 'prfaas-repro[silicon]'"
    found = metadata.version(PACKAGE)
    return None if found == VERSION else f"{PACKAGE} is {found}, the points come from {VERSION}"


@dataclass(frozen=True)
class Derived:
    """Everything that is committed: points, memory, and what there is no data for."""

    points: pd.DataFrame
    memory: pd.DataFrame
    missing: pd.DataFrame


def derive(progress: Callable[[str], None], models: tuple[str, ...] = (), systems: tuple[str, ...] = ()) -> Derived:
    """All points, or those of some models and systems.

    Raises:
        UserError: without the package, or with another version of it.
    """
    if (reason := installed()) is not None:
        raise UserError(f"silicon: {reason}")
    logging.disable(logging.WARNING)  # it warns on every query that a table is missing
    points, memory, missing = [], [], []
    for checkpoint, system, backend, placement in _cases():
        if (models and checkpoint.model not in models) or (systems and system not in systems):
            continue
        case = {
            "model": checkpoint.model, "system": system, "backend": backend, "placement": placement,
            "quantisation": checkpoint.quantisation,
        }  # fmt: skip
        progress(" ".join(case.values()))
        # S_kv is that of a KVCache in bf16; where no kernel was timed with one, the package's own choice for the checkpoint is taken.
        for kvcache in ("bfloat16", None):
            try:
                found, room = _one_case(checkpoint, SYSTEMS[system], backend, placement, kvcache)
            except Exception as error:  # whatever the package raises for data that it lacks
                reason = _reason(error)
                continue
            points += [{**case, **row} for row in found]
            memory.append({**case, **room, "kvcache": kvcache or "of the checkpoint"})
            break
        else:
            missing.append({**case, "reason": reason})
    return Derived(pd.DataFrame(points), pd.DataFrame(memory), pd.DataFrame(missing))


def _cases() -> Iterator[tuple[Checkpoint, str, str, str]]:
    for checkpoint in CHECKPOINTS:
        for system in SYSTEMS if checkpoint.model in EVERYWHERE else ("h200",):
            for backend in BACKENDS:
                for placement in PLACEMENTS:
                    yield checkpoint, system, backend, placement


def _one_case(
    checkpoint: Checkpoint, system: str, backend: str, placement: str, kvcache: str | None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    from aiconfigurator_core.sdk import EngineHandle
    from aiconfigurator_core.sdk.perf_database import get_latest_database_version

    version = get_latest_database_version(system=system, backend=backend)
    options = {
        "tp_size": TENSOR_PARALLEL, "kvcache_quant_mode": kvcache, "gemm_quant_mode": checkpoint.gemm,
        "moe_quant_mode": checkpoint.moe, **PLACEMENTS[placement],
    }  # fmt: skip
    room = _memory(checkpoint, system, backend, version, options)
    engine = EngineHandle.compile(
        checkpoint.path, system, backend, backend_version=version, pp_size=room["stages"], **options
    )
    last = measured_tokens(checkpoint.model, system, backend)
    rows = []
    for tokens in LENGTHS:
        operations, _ = engine.run_static_per_op(batch_size=1, isl=tokens, osl=2, mode="static_ctx")
        rows.append(
            {"phase": "prefill", "tokens": tokens, "batch": 1, **_summed(operations), "beyond_tables": tokens > last}
        )
    for context in CONTEXTS:
        for batch in BATCHES:
            _, operations = engine.run_static_per_op(batch_size=batch, isl=context, osl=2, mode="static_gen")
            beyond = batch * context > BATCHES[-1] * CONTEXTS[1]
            rows.append(
                {"phase": "decode", "tokens": context, "batch": batch, **_summed(operations), "beyond_tables": beyond}
            )
    return rows, {**room, "version": version, "tables_end_tokens": last}


def _summed(operations: Any) -> dict[str, float]:
    """Seconds of a step, and the share of them that comes from measured tables."""
    total = sum(milliseconds for _, milliseconds, *_ in operations)
    if not total > 0:
        raise UserError("no operation has a time")
    measured = sum(milliseconds for _, milliseconds, _, source in operations if source == "silicon")
    return {"seconds": _short(total / 1e3), "table_share": round(measured / total, 3)}


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def _memory(checkpoint: Checkpoint, system: str, backend: str, version: str, options: dict[str, Any]) -> dict[str, Any]:
    """The fewest stages at which a GPU holds its share of the model and one request of the longest length, and what is left then."""
    from aiconfigurator_core.sdk.memory import KVCacheEstimator

    layout = layout_of(checkpoint.model, "full")
    for stages in STAGES:
        found = KVCacheEstimator.from_request(
            checkpoint.path,
            system,
            backend,
            version,
            max_num_tokens=LENGTHS[4],
            max_batch_size=1,
            pp_size=stages,
            **options,
        ).breakdown
        capacity, other = found["gpu_memory_capacity_bytes"], found["non_kv_bytes"]
        left = MEMORY_FRACTION * capacity - other
        if left > per_gpu_bytes(layout, LENGTHS[-1], checkpoint.model):
            return {
                "stages": stages,
                "capacity_bytes": int(capacity),
                "weights_bytes": int(found["weights_bytes"]),
                "kv_room_bytes": int(left),
            }
    raise UserError(f"does not fit the memory of {STAGES[-1]} × {TENSOR_PARALLEL} GPUs")


def per_gpu_bytes(layout: StateLayout, tokens: int, model: str) -> float:
    """What one request keeps on one of the GPUs that share its layers: heads are split, MLA's latent is the same on all.

    A pipeline of s stages has s requests in flight, each with 1/s of its layers here, so stages do not appear.
    """
    share = {
        StateKind.LATENT: 1, StateKind.LATENT_ROPE: 1, StateKind.RECURRENT: TENSOR_PARALLEL, StateKind.CONVOLUTION: TENSOR_PARALLEL,
    }  # fmt: skip
    heads = min(TENSOR_PARALLEL, kv_heads(model))
    return float(sum(size / share.get(kind, heads) for kind, size in layout.by_kind(tokens).items()))


@cache
def kv_heads(model: str) -> int:
    """KV heads of a model's attention, which are what tensor parallelism can split."""
    return int(spec.load(model, "full").values().get("num_key_value_heads", TENSOR_PARALLEL))


def measured_tokens(model: str, system: str, backend: str) -> int:
    """The longest prompt in one pass that the tables of every kernel of this model reach; 0 where a table is missing."""
    import aiconfigurator_core

    root = Path(str(aiconfigurator_core.__file__)).parent / "systems" / "data" / system
    ends = []
    for family in _FAMILIES[model]:
        folder, file, column = _ROWS[family]
        tables = sorted((root / folder / backend).glob(f"*/{file}.parquet"))
        ends.append(max((int(pd.read_parquet(table, columns=[column])[column].max()) for table in tables), default=0))
    return min(ends)


def _reason(error: Exception) -> str:
    """The package's message without the machine's paths and the query's numbers."""
    text = " ".join(str(error).split()).replace("perf database error: ", "")
    return text.split(" at /")[0].split("(first:")[0].split(" {")[0].strip()[:140]
