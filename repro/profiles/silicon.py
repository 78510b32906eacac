"""`profile=silicon:<model>@<system>`: profiles from kernel times that somebody measured, by the points that are committed beside this file.

`silicon_source` derives the points and says what they are; here they are read and put together as a profile. A name may
go on with a framework, a placement of the experts and a quantisation, in any order:
`silicon:kimi_k3@b200/sglang/expert_ep`. Where it leaves one open, prefill takes the case that is fastest at 32K and
decode the one that completes most tokens per second within the service level: two pools choose for themselves.

Not in these times: scheduling, sampling, tokenisation, launch gaps that no kernel shows. `experiment=silicon` finds
what they amount to.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
from scipy.optimize import nnls

from repro.errors import UserError
from repro.models.architectures import layout_of
from repro.models.layout import StateLayout
from repro.paper import text
from repro.profiles.base import DecodeRows, DecodeStep, PhaseProfile, PrefillCurve
from repro.profiles.silicon_source import PACKAGE, TENSOR_PARALLEL, VERSION, per_gpu_bytes
from repro.profiles.sizes import kv_size

PREFIX: Final = "silicon:"
FOLDER: Final = Path(__file__).parent / "silicon_points"
FILES: Final = {name: FOLDER / f"{name}.csv" for name in ("points", "memory", "missing")}
CASE: Final = ("model", "system", "backend", "placement", "quantisation")
#: Context of a request in decode, on average, under the paper's workload: a mean input of 27K and half of the output.
CONTEXT_TOKENS: Final = 27_512.0
_COMPARED_AT: Final = 32_768


@cache
def committed(name: str) -> pd.DataFrame:
    """One of the committed tables: points, memory or missing."""
    return pd.read_csv(FILES[name])


@cache
def full_layout(model: str) -> StateLayout:
    """The state layout of a model at full size."""
    return layout_of(model, "full")


@dataclass(frozen=True)
class Case:
    """One configuration of a model on a system, with its points: prefill and decode over their grids, and the room for KVCache."""

    key: tuple[str, ...]
    prefill: pd.DataFrame
    decode: pd.DataFrame
    memory: dict[str, Any]

    @property
    def words(self) -> str:
        """Framework, placement and quantisation."""
        return ", ".join(self.key[2:])

    def prefill_s(self, tokens: int) -> float:
        """T_prefill at a length of the grid."""
        return float(self.prefill.loc[self.prefill["tokens"] == tokens, "seconds"].iloc[0])

    def step(self, slo_tokens_per_s: float, context_tokens: float) -> tuple[DecodeStep, float]:
        """T_decode fitted to the points near the service level, with BS_max, and the fit's largest relative error.

        BS_max is what fits both the time of a step and a GPU's memory at this context. It is 1 where even one request does not:
        `meets` says so.
        """
        near = self.decode[
            self.decode["seconds"] <= max(3 / slo_tokens_per_s, self.decode["seconds"].nsmallest(6).max())
        ]
        batch, context, seconds = (near[name].to_numpy(np.float64) for name in ("batch", "tokens", "seconds"))
        design = np.stack([np.ones_like(batch), batch, batch * context], axis=1)
        (base, per_sequence, per_context), _ = nnls(design / seconds[:, None], np.ones_like(seconds))
        error = float(np.max(np.abs(design @ np.array([base, per_sequence, per_context]) / seconds - 1)))
        by_time = (1 / slo_tokens_per_s - base) / (per_sequence + per_context * context_tokens)
        by_memory = self.memory["kv_room_bytes"] / per_gpu_bytes(
            full_layout(self.key[0]), int(context_tokens), self.key[0]
        )
        return DecodeStep(
            float(base), float(per_sequence), float(per_context), max(int(min(by_time, by_memory)), 1)
        ), error


def cases(model: str, system: str, *wanted: str) -> list[Case]:
    """The committed cases of a model on a system whose framework, placement and quantisation are among `wanted`, where it says any."""
    points, memory = committed("points"), committed("memory")
    points = points[(points["model"] == model) & (points["system"] == system)]
    found = []
    for key, group in points.groupby(list(CASE), sort=True):
        if not set(wanted) <= set(key):
            continue
        room = memory[(memory[list(CASE)] == list(key)).all(axis=1)].iloc[0]
        prefill, decode = (group[group["phase"] == phase] for phase in ("prefill", "decode"))
        found.append(Case(tuple(map(str, key)), prefill, decode, dict(room)))
    return found


def meets(step: DecodeStep, slo_tokens_per_s: float, context_tokens: float) -> bool:
    """Whether a step at BS_max keeps the service level."""
    return step(step.batch_max, step.batch_max * context_tokens) <= (1 + 1e-9) / slo_tokens_per_s


def silicon_profile(
    name: str,
    key: str = "profile",
    slo_tokens_per_s: float = text.SLO_TOKENS_PER_S,
    context_tokens: float = CONTEXT_TOKENS,
) -> PhaseProfile:
    """The profile of that name.

    Raises:
        UserError: for another form of name, or a model and system without points, naming those that have some.
    """
    model, at, rest = name.removeprefix(PREFIX).partition("@")
    system, *wanted = rest.split("/")
    found = cases(model, system, *wanted) if at else []
    if not found:
        raise UserError(f"{key}: {name!r} has no points; accepted: {', '.join(names())}{_why(model, system)}")
    prefill = min(found, key=lambda case: case.prefill_s(_COMPARED_AT))
    steps = {case.key: case.step(slo_tokens_per_s, context_tokens) for case in found}

    def rate(case: Case) -> tuple[bool, float]:
        step = steps[case.key][0]
        kept = meets(step, slo_tokens_per_s, context_tokens)
        return kept, step.batch_max / step(step.batch_max, step.batch_max * context_tokens)

    decode = max(found, key=rate)
    step, error = steps[decode.key]
    rows = decode.decode
    beyond = prefill.prefill.loc[prefill.prefill["beyond_tables"], "tokens"]
    return PhaseProfile(
        name=name, model=model, accelerator=system.upper(), gpus_per_instance=TENSOR_PARALLEL,
        prefill=PrefillCurve(tokens=tuple(prefill.prefill["tokens"].astype(float)), seconds=tuple(prefill.prefill["seconds"])),
        kv=kv_size(full_layout(model)), decode=step,
        prefill_source="silicon", kv_source="computed", decode_source="silicon",
        notes=f"An instance is one of {prefill.memory['stages']} pipeline stages of {TENSOR_PARALLEL} GPUs, which hold a request each.",
        provenance={
            "package": f"{PACKAGE} {VERSION}", "prefill": f"{prefill.words}, version {prefill.memory['version']}",
            "decode": f"{decode.words}, version {decode.memory['version']}", "parallelism": f"TP {TENSOR_PARALLEL}",
            "prefill stages": str(prefill.memory["stages"]), "decode stages": str(decode.memory["stages"]),
            "share of prefill time from tables": f"{prefill.prefill['table_share'].min():.2f} or more",
            "extrapolated": f"prefill of {', '.join(map(str, beyond))} tokens" if len(beyond) else "nothing",
            "decode fit, largest error": f"{error:.0%}",
            "service level": f"{slo_tokens_per_s:g} tokens/s {'kept' if rate(decode)[0] else 'missed even by one request'}",
        },
        decode_rows=DecodeRows(tuple(map(int, rows["batch"])), tuple(map(float, rows["tokens"])), tuple(map(float, rows["seconds"]))),
    )  # fmt: skip


def names() -> list[str]:
    """Every model and system with points, as a profile is named."""
    points = committed("points")
    return [
        f"{PREFIX}{model}@{system}"
        for model, system in sorted(set(zip(points["model"], points["system"], strict=True)))
    ]


def _why(model: str, system: str) -> str:
    missing = committed("missing")
    reasons = missing[(missing["model"] == model) & (missing["system"] == system)]["reason"]
    return f" ({reasons.iloc[0]})" if len(reasons) else ""
