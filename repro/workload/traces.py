"""Public request traces from files: Mooncake's JSON lines with prefix blocks, and Azure's CSV without.

The kit ships no trace. Mooncake's are in the repository kvcache-ai/Mooncake under FAST25-release/traces, Azure's in
Azure/AzurePublicDataset under data; a path is given by whoever has one, and its format is recognised by its first line.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd

from repro.errors import UserError
from repro.workload.stream import Chains, Recorded, RequestBatch

#: Tokens of one block key in Mooncake's traces.
MOONCAKE_BLOCK_TOKENS = 512

_WHERE = (
    "accepted: Mooncake JSON lines (timestamp, input_length, output_length, hash_ids; from kvcache-ai/Mooncake, FAST25-release/traces) or "
    "Azure CSV (TIMESTAMP,ContextTokens,GeneratedTokens; from Azure/AzurePublicDataset, data)"
)


def read_trace(path: Path, speed: float = 1.0) -> Recorded:
    """All requests of a trace; `speed` 2 makes them arrive twice as fast.

    Raises:
        UserError: for a file that is missing, of neither format, or has a bad line.
    """
    if not speed > 0:
        raise UserError(f"workload.trace_speed: {speed} is not positive")
    try:
        with path.open(encoding="utf-8") as file:
            first = file.readline()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"workload.trace: cannot read {path} ({error}); {_WHERE}") from error
    if first.startswith("{"):
        return Recorded(_mooncake(path, speed))
    if first.strip() == "TIMESTAMP,ContextTokens,GeneratedTokens":
        return Recorded(_azure(path, speed))
    raise UserError(f"workload.trace: {path} is of no known format; {_WHERE}")


def _mooncake(path: Path, speed: float) -> RequestBatch:
    arrival, inputs, outputs = [], [], []
    chains: list[Chains] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            arrival.append(float(row["timestamp"]) / 1000 / speed)
            inputs.append(int(row["input_length"]))
            outputs.append(max(int(row["output_length"]), 1))
            chains.append((tuple(int(key) for key in row["hash_ids"]), ()))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"workload.trace: {path}, line {number}: {error!r}; {_WHERE}") from error
    return _ordered(
        path, RequestBatch(np.array(arrival), np.array(inputs, np.int64), np.array(outputs, np.int64), chains)
    )


def _azure(path: Path, speed: float) -> RequestBatch:
    try:
        table = pd.read_csv(path)
        times = pd.to_datetime(table["TIMESTAMP"])
        inputs = table["ContextTokens"].to_numpy(np.int64)
        outputs = np.maximum(table["GeneratedTokens"].to_numpy(np.int64), 1)
    except (ValueError, KeyError) as error:
        raise UserError(f"workload.trace: {path}: {error}; {_WHERE}") from error
    seconds = (times - times.iloc[0]).dt.total_seconds().to_numpy(np.float64)
    return _ordered(path, RequestBatch(np.asarray(seconds / speed, np.float64), inputs, outputs))


def _ordered(path: Path, batch: RequestBatch) -> RequestBatch:
    if not len(batch.arrival_s):
        raise UserError(f"workload.trace: {path} holds no request; {_WHERE}")
    if batch.input_tokens.min() < 1:
        raise UserError(f"workload.trace: {path} has a request without input tokens; {_WHERE}")
    if np.all(np.diff(batch.arrival_s) >= 0):
        return batch
    order = np.argsort(batch.arrival_s, kind="stable")
    chains = [batch.chains[i] for i in order] if batch.chains is not None else None
    return RequestBatch(batch.arrival_s[order], batch.input_tokens[order], batch.output_tokens[order], chains)


def write_mooncake(path: Path, batch: RequestBatch) -> None:
    """The stream in Mooncake's format (whole milliseconds), for other tools and for tests."""
    lines = []
    for i in range(len(batch.arrival_s)):
        row = {
            "timestamp": round(1000 * float(batch.arrival_s[i])),
            "input_length": int(batch.input_tokens[i]),
            "output_length": int(batch.output_tokens[i]),
            "hash_ids": list(batch.chains[i][0]) if batch.chains else [],
        }
        lines.append(json.dumps(row))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
