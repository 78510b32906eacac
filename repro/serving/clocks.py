"""By how much the clocks of a deployment's instances differ from the router's, measured over the control channel and taken out.

Processes of one machine share CLOCK_MONOTONIC; of several machines each counts from its own start. As in NTP, the head asks for the time at
t0, the instance hears at t1 and answers at t2 on its own clock, and the answer is here at t3. However unequal the two ways are, its clock
is ahead by ((t1 − t0) + (t2 − t3)) / 2, give or take half of the round trip (t3 − t0) − (t2 − t1): so the quickest exchange counts, and an
old one counts less, as clocks drift. A clock whose interval holds zero may be the same one and is left alone: on one machine nothing
changes.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from repro.processes import Message, Parent
from repro.serving import messages as say

#: Exchanges before an instance serves.
EXCHANGES: Final = 8
#: Of a clock that is another one: how often it is asked again, in seconds.
_AGAIN_S = 5.0
#: So many seconds per second two clocks may drift apart between exchanges: quartz without any correction.
_DRIFT = 50e-6
_KEPT = 32

#: Which of a message's fields are moments of the sender's clock; the rest are durations, counts and names.
MOMENTS: Final[dict[type[say.Said], tuple[str, ...]]] = {
    say.Prefilled: ("start_s", "end_s"),
    say.Delivered: ("at_s",),
    say.Decoding: ("joined_s", "first_s"),
    say.Stepped: ("at_s",),
    say.Finished: ("at_s",),
    say.Sending: ("at_s",),
}


@dataclass(frozen=True)
class Exchange:
    """The four moments of a question and its answer: the first and the last of the head's clock, the others of the instance's."""

    asked_s: float
    heard_s: float
    said_s: float
    answered_s: float

    @property
    def offset_s(self) -> float:
        """How far the instance's clock is ahead."""
        return ((self.heard_s - self.asked_s) + (self.said_s - self.answered_s)) / 2

    @property
    def rtt_s(self) -> float:
        """The round trip, without the time that the instance took."""
        return (self.answered_s - self.asked_s) - (self.said_s - self.heard_s)

    def uncertainty_s(self, now_s: float) -> float:
        """By how much the offset may be wrong at `now_s`, either way."""
        return self.rtt_s / 2 + _DRIFT * max(now_s - self.answered_s, 0.0)


@dataclass(frozen=True)
class Offset:
    """An instance's clock against the head's: ahead by `offset_s` ± `uncertainty_s`; `correction_s` is taken off its moments."""

    offset_s: float
    uncertainty_s: float
    rtt_s: float
    exchanges: int

    @property
    def correction_s(self) -> float:
        """The offset, or 0 where the clocks may be one and the same."""
        return self.offset_s if abs(self.offset_s) > self.uncertainty_s else 0.0


class Clocks:
    """The clocks of all instances, by name. What concerns one instance comes from one thread."""

    def __init__(self) -> None:
        self._exchanges: defaultdict[str, deque[Exchange]] = defaultdict(lambda: deque(maxlen=_KEPT))
        self._counts: defaultdict[str, int] = defaultdict(int)
        self._corrections: dict[str, float] = {}
        self._asked_s: dict[str, float] = {}

    def forget(self, name: str) -> None:
        """An instance is started anew, perhaps elsewhere."""
        for kept in (self._exchanges, self._counts, self._corrections, self._asked_s):
            kept.pop(name, None)

    def question(self, name: str) -> say.AskTime:
        """What to ask an instance now."""
        self._asked_s[name] = time.monotonic()
        return say.AskTime(self._asked_s[name])

    def note(self, name: str, said: say.Time, answered_s: float) -> None:
        """An answer, which was here at `answered_s`."""
        self._exchanges[name].append(Exchange(said.asked_s, said.heard_s, said.said_s, answered_s))
        self._counts[name] += 1
        if self.measured(name):
            self._corrections[name] = self.offset(name).correction_s

    def measured(self, name: str) -> bool:
        """Whether there were enough exchanges."""
        return self._counts[name] >= EXCHANGES

    def is_due(self, name: str) -> bool:
        """Whether to ask again: a clock that is another one drifts."""
        return bool(self._corrections.get(name)) and time.monotonic() - self._asked_s[name] > _AGAIN_S

    def offset(self, name: str) -> Offset:
        """What is known of an instance's clock now, by the exchange that says most."""
        now_s, exchanges = time.monotonic(), list(self._exchanges[name])
        best = min(exchanges, key=lambda exchange: exchange.uncertainty_s(now_s))
        return Offset(best.offset_s, best.uncertainty_s(now_s), best.rtt_s, self._counts[name])

    def corrected(self, name: str, said: say.FromInstance) -> say.FromInstance:
        """A message with its moments on the head's clock."""
        ahead_s = self._corrections.get(name, 0.0)
        moments = MOMENTS.get(type(said), ()) if ahead_s else ()
        changes: dict[str, Any] = {field: getattr(said, field) - ahead_s for field in moments}
        return msgspec.structs.replace(said, **changes) if changes else said

    def record(self) -> dict[str, dict[str, float]]:
        """The workers table of a run's provenance: by instance its clock's offset, how sure that is, and what was taken off."""
        found = {name: self.offset(name) for name in sorted(self._exchanges) if self._exchanges[name]}
        return {
            name: {
                "clock_offset_s": one.offset_s, "clock_uncertainty_s": one.uncertainty_s, "clock_rtt_s": one.rtt_s,
                "clock_exchanges": one.exchanges, "clock_correction_s": one.correction_s,
            }
            for name, one in found.items()
        }  # fmt: skip


def telling_time(parent: Parent, hear: Callable[[Message], None]) -> Callable[[Message], None]:
    """At an instance: `hear`, but for questions for the time, which are answered at once, in the thread that reads them."""

    def receive(message: Message) -> None:
        heard_s = time.monotonic()
        if message["kind"] == "asktime":
            asked = say.to_instance(message)
            assert isinstance(asked, say.AskTime)
            parent.send_text(say.encoded(say.Time(asked.asked_s, heard_s, time.monotonic())))
        else:
            hear(message)

    return receive
