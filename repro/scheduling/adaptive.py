"""A slow loop that adapts, beside the paper's (long_term.py): estimates that forget, and a search over all splits with the cost of moving.

Every estimate has a stated memory and is right from its first value on: sums that decay with `memory_s` are divided by weights that decay
alike, so that nothing seen hours ago is still counted, and nothing has to be waited for.

A split is worth the requests per second that get their first token in time over `hold_s`, the time for which today's estimates are taken
to hold, with the queues that wait now. Moving there costs what is lost until the nodes serve again: meanwhile neither their old role nor
the new one has them. A move that gains less than `gain` is not made; nothing else holds one back, so that an overload never does. One
that takes back what was done within `hold_s` must gain twice as much for each time that happened, which bounds oscillation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from repro.errors import UserError
from repro.scheduling.load import Balance, Costs, balance
from repro.scheduling.long_term import DecodeView, decode_load
from repro.scheduling.short_term import Observation, capacity_of

#: Reversals that make a move dearer: 2⁴ times `gain` is the most that one must bring.
_MOST_REVERSALS = 4.0


@dataclass(frozen=True)
class AdaptiveSpec:
    """Times of the loop, which looks every `period_s`. `headroom` is the growth of the load that a split is chosen for.

    `memory_s` is that of the arrival rate, the link's capacity and the output length; input lengths are those of the last
    `policy.short_term.window_requests`. `patience_s` is the target for TTFT, `gain` a share of the requests; `restart_s` is what a drained
    node needs to serve its new role.
    """

    enabled: bool = False
    period_s: float = 5.0
    memory_s: float = 180.0
    warmup_s: float = 60.0
    hold_s: float = 1200.0
    patience_s: float = 10.0
    headroom: float = 0.05
    gain: float = 0.02
    restart_s: float = 10.0

    def __post_init__(self) -> None:
        for key in ("period_s", "memory_s", "hold_s", "patience_s"):
            if not getattr(self, key) > 0:
                raise UserError(f"policy.adaptive.{key}: {getattr(self, key)} is not positive; accepted: seconds")
        for key in ("warmup_s", "headroom", "gain", "restart_s"):
            if not getattr(self, key) >= 0:
                raise UserError(f"policy.adaptive.{key}: {getattr(self, key)} is negative; accepted: 0 or more")


class Decaying:
    """A ratio of two sums whose past counts less and less: by a factor e after `memory_s`."""

    __slots__ = ("_at_s", "_memory_s", "_value", "_weight")

    def __init__(self, memory_s: float) -> None:
        self._memory_s = memory_s
        self._value = self._weight = self._at_s = 0.0

    def add(self, now_s: float, value: float, weight: float) -> None:
        """Count what has come since the last time."""
        kept = math.exp(-(now_s - self._at_s) / self._memory_s)
        self._at_s = now_s
        self._value = self._value * kept + value
        self._weight = self._weight * kept + weight

    @property
    def ratio(self) -> float:
        """The mean of values per weight; nan before the first weight."""
        return self._value / self._weight if self._weight > 0 else math.nan

    @property
    def weight(self) -> float:
        """What the ratio stands on."""
        return self._weight


class Split(NamedTuple):
    """Instances of a PD cluster that prefill and decode."""

    n_p: int
    n_d: int


class Situation(NamedTuple):
    """What a plan is made from: an observation with slow estimates; the decode stage, with the seconds of work that wait there for each of
    its instances and the seconds that an output takes; what serves, and what will once the conversions under way are done, of which
    `turning` go to prefill (below 0: to decode).
    """

    seen: Observation
    decode: DecodeView
    decode_waiting_s: float
    output_s: float
    serving: Split
    coming: Split
    turning: int
    threshold_tokens: float


class Plan(NamedTuple):
    """The split to go for, and the share of requests in time that going there and staying bring."""

    split: Split
    worth: float
    stay: float


class History:
    """Which way nodes went, how often that was taken back lately, and how long a node took to come back from decode."""

    __slots__ = ("_at_s", "_began_s", "_hold_s", "_reversals", "_way", "from_decode_s")

    def __init__(self, hold_s: float) -> None:
        self._hold_s = hold_s
        self._way = 0
        self._reversals = self._at_s = 0.0
        self._began_s: dict[int, float] = {}
        self.from_decode_s = 0.0

    def _recent(self, now_s: float) -> float:
        return self._reversals * math.exp(-(now_s - self._at_s) / self._hold_s)

    def needed(self, now_s: float, way: int, gain: float) -> float:
        """The least gain for which a node goes that way now."""
        recent = self._recent(now_s)
        if self._way and way != self._way:
            recent += math.exp(-(now_s - self._at_s) / self._hold_s)
        return float(gain * 2 ** min(recent, _MOST_REVERSALS))

    def came(self, now_s: float, instance: int, to: str) -> None:
        """A node serves its new role; what the last one from decode took is what the next is expected to take."""
        began_s = self._began_s.pop(instance, now_s)
        if to == "prefill":
            self.from_decode_s = now_s - began_s

    def moved(self, now_s: float, way: int, instance: int) -> None:
        """A node has begun to go that way."""
        self._began_s[instance] = now_s
        turned = 1.0 if self._way and way != self._way else 0.0
        # Moves one way belong together: only a turn begins the time anew.
        if turned or not self._way:
            self._reversals, self._at_s = self._recent(now_s) + turned, now_s
        self._way = way


def in_time(spec: AdaptiveSpec, at: Situation, costs: Costs, split: Split, horizon_s: float) -> float:
    """The share of requests that get their first token in time over `horizon_s` at that split, with the best threshold there."""
    if split.n_d < 1:
        return 0.0
    seen = at.seen
    rate = seen.rate_per_s * (1 + spec.headroom)
    best = _balance(spec, seen, costs, split.n_p, at.serving.n_p, rate, horizon_s, 0.0).worth
    load = decode_load(rate, at.decode, split.n_d)
    queue_s = at.decode_waiting_s * max(at.serving.n_d, 1) / split.n_d
    # Work of λh outputs (coefficient of variation 1) strays by √(2λh) of one, which is so many seconds of the stage.
    stray_s = math.sqrt(2 * horizon_s * at.decode.output_tokens / (at.decode.tokens_per_s * split.n_d))
    grown = (queue_s + horizon_s * (load - 1)) / stray_s
    wait_s = (queue_s + stray_s * (grown if grown > 50 else math.log1p(math.exp(grown)))) / 2
    return best * (1 - math.exp(-spec.patience_s / max(wait_s, 1e-9)))


def _balance(
    spec: AdaptiveSpec,
    seen: Observation,
    costs: Costs,
    n_p: int,
    serving: int,
    rate: float,
    horizon_s: float,
    held: float,
) -> Balance:
    waiting_s = seen.pd.waiting_s * serving / n_p if n_p else 0.0
    capacity = capacity_of(seen)._replace(n_p=n_p, waiting_pd_s=waiting_s)
    return balance(seen.lengths, rate, costs, capacity, horizon_s, spec.patience_s, held)


def threshold(spec: AdaptiveSpec, at: Situation, costs: Costs) -> float:
    """The threshold for what serves now, searched anew; the one in force unless another is clearly better."""
    rate = at.seen.rate_per_s * (1 + spec.headroom)
    n_p = at.serving.n_p
    found = _balance(spec, at.seen, costs, n_p, n_p, rate, spec.hold_s, at.threshold_tokens)
    clearly = found.worth - found.held_worth > spec.gain * max(found.held_worth, 0.1)
    return found.threshold_tokens if clearly else at.threshold_tokens


def plan(spec: AdaptiveSpec, at: Situation, costs: Costs, from_decode_s: float = 0.0) -> Plan:
    """The split with the most requests in time over `hold_s`, the way there included; `from_decode_s` is what a node took last time."""
    seen, here = at.seen, at.coming
    nodes = here.n_p + here.n_d
    stay = in_time(spec, at, costs, here, spec.hold_s)
    best = Plan(here, stay, stay)
    if stay > 1 - spec.gain:
        return best  # no split can gain enough
    for n_p in range(nodes):
        target = Split(n_p, nodes - n_p)
        if n_p == here.n_p:
            continue
        # A batch is drained with its longest output, at least twice the mean; a prefill instance with its queue.
        drain_s = 2 * at.output_s if n_p > here.n_p else seen.pd.waiting_s
        gone_s = drain_s + spec.restart_s
        if n_p > here.n_p:
            gone_s = max(gone_s, from_decode_s)
        gone_s = min(gone_s, spec.hold_s)
        both = Split(min(n_p, here.n_p), min(target.n_d, here.n_d))
        lost = in_time(spec, at, costs, both, gone_s) if gone_s > 0 else 0.0
        there = in_time(spec, at, costs, target, spec.hold_s)
        worth = (gone_s * lost + (spec.hold_s - gone_s) * there) / spec.hold_s
        if worth > best.worth:
            best = Plan(target, worth, stay)
    return best


def step(spec: AdaptiveSpec, at: Situation, costs: Costs, now_s: float, history: History) -> int:
    """Nodes to convert from decode to prefill now: 1, 0, or −1 for the other way; no node turns while others go the other way."""
    found = plan(spec, at, costs, history.from_decode_s)
    way = (found.split.n_p > at.coming.n_p) - (found.split.n_p < at.coming.n_p)
    if not way or way * at.turning < 0:
        return 0
    return way if found.worth - found.stay > history.needed(now_s, way, spec.gain) else 0
