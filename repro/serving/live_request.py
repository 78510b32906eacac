"""A request while a live router has it: where it is, what it has met so far, and its row of the requests table when it leaves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from repro.record.requests import ANSWERED, COLUMNS
from repro.scheduling.decisions import Decision
from repro.serving.messages import Finished
from repro.serving.scale import Scale

#: Of a live run's table.
LIVE_COLUMNS = (*COLUMNS, "attempts", "payload_bytes")


@dataclass(slots=True)
class LiveRequest:
    """A request in the system; moments are CLOCK_MONOTONIC in seconds, nan until they come.

    `chain` names the blocks of its prompt that a cache could serve, `kept_chain` those of prompt and answer; None where nothing is cached.
    """

    number: int
    arrival_s: float
    tokens: int
    output_tokens: int
    chain: Sequence[int] | None = None
    kept_chain: Sequence[int] | None = None
    attempt: int = 0
    decision: Decision | None = None
    prefill: str = ""
    decode: str = ""
    fell_back: bool = False
    start_s: float = math.nan
    end_s: float = math.nan
    delivered_s: float = math.nan
    joined_s: float = math.nan
    first_s: float = math.nan
    payload_bytes: int = 0
    found_tokens: int | None = None
    #: What its decode instance said at its end, while its prefill instance has yet to say that it prefilled it.
    ended: Finished | None = None

    def next_attempt(self) -> None:
        """Nothing of the attempt that failed counts."""
        self.start_s = self.end_s = self.delivered_s = self.joined_s = self.first_s = math.nan
        self.prefill = self.decode = ""
        self.payload_bytes = 0
        self.found_tokens = self.ended = None
        self.attempt += 1

    @property
    def phase(self) -> str:
        """Where it is, one of `listener.PHASES`."""
        if not math.isnan(self.first_s):
            return "decode"
        if not math.isnan(self.delivered_s):
            return "decode_queue"
        return "transfer" if not math.isnan(self.end_s) else "prefill"

    @property
    def cached_tokens(self) -> int:
        """Of its prompt, what prefill finds in a cache: as the instance said, else as was decided."""
        if self.found_tokens is not None:
            return self.found_tokens
        return self.decision.cached_tokens if self.decision is not None else 0

    @property
    def offloaded(self) -> bool:
        """Whether it is prefilled in the PrfaaS cluster."""
        return self.decision is not None and self.decision.offload

    def row(self, outcome: str, finish_s: float, scale: Scale) -> tuple[Any, ...]:
        """What `LIVE_COLUMNS` name, unscaled; times are nan where there was no answer."""
        decision, offload, per, nan = self.decision, self.offloaded, scale.time, math.nan
        arrival_s = scale.wall_s(self.arrival_s)
        if outcome in ANSWERED:
            steps = self.output_tokens - 1
            times = (
                (self.start_s - arrival_s) * per, (self.end_s - self.start_s) * per,
                (self.delivered_s - self.start_s) * per if offload else 0.0, (self.delivered_s - self.end_s) * per,
            )  # fmt: skip
            decode_queue_s, ttft_s = (self.joined_s - self.delivered_s) * per, (self.first_s - arrival_s) * per
            tpot_s, finish_s = (finish_s - self.first_s) * per / steps if steps else 0.0, scale.virtual_s(finish_s)
        else:
            times = (nan, nan, nan if offload else 0.0, nan)
            decode_queue_s = ttft_s = finish_s = nan
            tpot_s = nan if self.output_tokens > 1 else 0.0
        promised = decision.kv_bytes if decision is not None else 0.0
        kv_bytes = self.payload_bytes * scale.bytes if offload else promised
        return (
            self.number, self.arrival_s, self.tokens, self.cached_tokens, self.output_tokens,
            "prfaas" if offload else "pd", *times, kv_bytes, decode_queue_s, ttft_s, tpot_s, finish_s, outcome, self.prefill, self.decode,
            self.attempt + 1, self.payload_bytes,
        )  # fmt: skip
