"""One request on its way through the simulator, and the clock readings that it leaves behind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from repro.workload.stream import Turn

NOT_YET = -1.0


class Job:
    """Mutable on purpose: one object per request. Times in seconds of the virtual clock.

    What most requests never set stands in the class, so that making a job costs five assignments.
    """

    cached_tokens: int = 0
    chain: Sequence[int] | None = None
    kept_chain: Sequence[int] | None = None
    turn: Turn | None = None
    offloaded: bool = False
    fell_back: bool = False
    prfaas: Any = None
    decision: Any = None
    flow: Any = None
    parts: int = 0
    work_s: float = 0.0
    kv_bytes: float = 0.0
    prefill_worker: int = -1
    decode_worker: int = -1
    prefill_start_s: float = NOT_YET
    prefill_end_s: float = NOT_YET
    delivered_s: float = NOT_YET
    decode_s: float = NOT_YET
    first_token_s: float = NOT_YET
    finish_s: float = NOT_YET

    def __init__(self, id_: int, arrival_s: float, input_tokens: int, output_tokens: int, pd: Any) -> None:
        self.id = id_
        self.arrival_s = arrival_s
        self.input_tokens = input_tokens
        self.output_tokens = output_tokens
        self.pd = pd

    @property
    def work_tokens(self) -> int:
        """What has to be computed of the prompt."""
        return self.input_tokens - self.cached_tokens
