"""What the scheduler decides: where a request goes, which instance changes its role. Whoever asked carries it out."""

from __future__ import annotations

from typing import Literal, NamedTuple

#: `prefill` on an instance now; `fetch` a prefix over the link first, then ask `Scheduler.fetched`; `refuse`: admission turned it away;
#: `fail`: nobody is left to prefill it.
Action = Literal["prefill", "fetch", "refuse", "fail"]


class Decision(NamedTuple):
    """One request: at PrfaaS (`offload`) or in its PD cluster, on which instance, and what that costs.

    `prfaas` is the PrfaaS cluster that prefills or through whose link the prefix comes, −1 without one; `instance` is −1 until placed.
    `work_s` is T_prefill of the uncached tokens, with the time to load the others from a cache's lower tiers; `kv_bytes` goes to decode,
    `fetch_bytes` is the prefix that crosses first.
    `fell_back`: it is not prefilled where routing wanted it, or not for the first time.
    """

    action: Action
    offload: bool
    prfaas: int
    instance: int
    cached_tokens: int
    work_s: float
    kv_bytes: float
    fetch_bytes: float = 0.0
    fell_back: bool = False


class Conversion(NamedTuple):
    """A PD instance drains, restarts and serves as `to`; `Scheduler.converted` is told when it does. It gets no new work until then."""

    pd: int
    instance: int
    to: Literal["prefill", "decode"]
