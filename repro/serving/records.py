"""A run's requests as rows of requests.parquet, the form that every tier shares."""

from __future__ import annotations

from typing import Any

import pandas as pd

from repro.serving.system import Run, Served

_ROUTES = {"unsplit": "pd", "bulk": "prfaas", "layerwise": "prfaas"}


def requests_frame(run: Run, origin_s: float, **labels: Any) -> pd.DataFrame:
    """One row per request; moments count from `origin_s` (CLOCK_MONOTONIC). `labels` become columns of their own."""
    return pd.DataFrame([{**labels, **_row(served, origin_s)} for served in run.served])


def _row(served: Served, origin_s: float) -> dict[str, Any]:
    split = served.mode != "unsplit"
    return {
        "id": served.request.request_id,
        "mode": served.mode,
        "arrival_s": served.arrival_s - origin_s,
        "input_tokens": len(served.request.prompt),
        "cached_tokens": served.cached_tokens,
        "held_tokens": served.held_tokens,
        "output_tokens": len(served.tokens),
        "route": _ROUTES[served.mode],
        "queue_s": served.queue_s,
        "prefill_s": served.prefill_s,
        "first_piece_s": served.first_piece_s - served.prefill_start_s,
        "transfer_s": served.transfer_s,
        "transfer_exposed_s": served.transfer_exposed_s,
        "kv_bytes": served.total_kv_bytes,
        "encoded_bytes": served.encoded_bytes,
        "resent_bytes": served.resent_bytes,
        "pieces": served.pieces,
        "decode_queue_s": served.joined_s - served.complete_s,
        "ttft_s": served.ttft_s,
        "tpot_s": served.tpot_s if len(served.tokens) > 1 else 0.0,
        "finish_s": served.token_times_s[-1] - origin_s,
        "outcome": "ok",
        "prefill_worker": "prefill" if split else "decode",
        "decode_worker": "decode",
    }
