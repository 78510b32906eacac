"""One request on its way through the simulator, and the clock readings that it leaves behind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

NOT_YET = -1.0


class Job:
    """Mutable on purpose: one object per request, allocated once, never copied. Times in seconds of the virtual clock."""

    __slots__ = (
        "arrival_s",
        "cached_tokens",
        "chain",
        "decode_s",
        "decode_worker",
        "delivered_s",
        "fell_back",
        "finish_s",
        "first_token_s",
        "flow",
        "home",
        "id",
        "input_tokens",
        "kept_chain",
        "kv_bytes",
        "offloaded",
        "output_tokens",
        "parts",
        "prefill_end_s",
        "prefill_start_s",
        "prefill_worker",
        "site",
        "work_s",
        "work_tokens",
    )

    def __init__(self, id_: int, arrival_s: float, input_tokens: int, output_tokens: int, home: Any) -> None:
        self.id = id_
        self.arrival_s = arrival_s
        self.input_tokens = input_tokens
        self.output_tokens = output_tokens
        self.home = home
        self.cached_tokens = 0
        self.work_tokens = input_tokens
        self.chain: Sequence[int] | None = None
        self.kept_chain: Sequence[int] | None = None
        self.offloaded = False
        self.fell_back = False
        self.site: Any = None
        self.flow: Any = None
        self.parts = 0
        self.work_s = 0.0
        self.kv_bytes = 0.0
        self.prefill_worker = -1
        self.decode_worker = -1
        self.prefill_start_s = NOT_YET
        self.prefill_end_s = NOT_YET
        self.delivered_s = NOT_YET
        self.decode_s = NOT_YET
        self.first_token_s = NOT_YET
        self.finish_s = NOT_YET
