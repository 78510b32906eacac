"""The requests table, `requests.parquet`: one row per request, the same columns whatever tier it ran on.

A tier may add columns of its own; it may leave none of these out. Moments are seconds from the run's origin; durations and moments that
never came are nan.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import pandas as pd

#: Where a request was prefilled: in the PD cluster, or in the PrfaaS cluster with its KVCache sent over the link.
ROUTES = ("pd", "prfaas")
#: `fell_back`: prefilled in the PD cluster after its offloaded prefill or transfer was given up; it was answered all the same.
#: `refused`: admission turned it away on arrival. `cancelled`: who asked went away before the last token.
OUTCOMES = ("ok", "failed", "timed_out", "fell_back", "refused", "cancelled")
#: Outcomes of requests that were answered in full.
ANSWERED = ("ok", "fell_back")

#: Column → its kind and what it means.
COLUMNS: Mapping[str, tuple[str, str]] = MappingProxyType({
    "id": ("integer", "the request"),
    "arrival_s": ("number", "at the router"),
    "input_tokens": ("integer", "prompt length"),
    "cached_tokens": ("integer", "of the prompt, found in the prefix cache where it was prefilled"),
    "output_tokens": ("integer", "tokens generated, or asked for where it was not answered"),
    "route": ("text", "pd or prfaas"),
    "queue_s": ("number", "arrival to the start of prefill"),
    "prefill_s": ("number", "start to end of prefill"),
    "transfer_s": ("number", "start of prefill to the last byte at the decode side; 0 for pd"),
    "transfer_exposed_s": ("number", "end of prefill to the last byte at the decode side"),
    "kv_bytes": ("number", "KVCache that was sent or handed over"),
    "decode_queue_s": ("number", "last byte to joining the running batch"),
    "ttft_s": ("number", "arrival to the first token"),
    "tpot_s": ("number", "mean time per output token after the first; 0 where there was one"),
    "finish_s": ("number", "last token"),
    "outcome": ("text", "ok, failed, timed_out, fell_back, refused or cancelled"),
    "prefill_worker": ("text", "instance that prefilled it; empty where none did"),
    "decode_worker": ("text", "instance that decoded it; empty where none did"),
})  # fmt: skip


def validate(requests: pd.DataFrame) -> None:
    """Hold a table against the schema.

    Raises:
        ValueError: naming the column and what is wrong with it.
    """
    for name, (kind, _) in COLUMNS.items():
        if name not in requests:
            raise ValueError(f"requests: column {name} is missing")
        column = requests[name]
        fits = {
            "integer": pd.api.types.is_integer_dtype(column),
            "number": pd.api.types.is_numeric_dtype(column),
            "text": pd.api.types.is_string_dtype(column) or len(column) == 0,
        }[kind]
        if not fits:
            raise ValueError(f"requests: column {name} holds {column.dtype}, not {kind}")
    for name, accepted in (("route", ROUTES), ("outcome", OUTCOMES)):
        unknown = set(requests[name]) - set(accepted)
        if unknown:
            raise ValueError(f"requests: {name} {unknown.pop()!r}; accepted: {', '.join(accepted)}")
