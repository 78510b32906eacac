"""Loss and jitter as seeded random processes, without a clock.

Loss is drawn as *distances*: how many segments pass until the next one is lost. That costs one draw per loss instead
of one per segment, and makes random and bursty loss the same interface. It counts segments, not the 64 KB
super-packets in which the kernel hands them
over: dropping those whole would make 0.1 % behave like a far larger burst.
"""

from __future__ import annotations

import math
import random

from repro.link.spec import LinkSpec

NEVER = 1 << 62
#: Between two draws of jitter, in standard deviations: a normal one then falls faster than time in 3 of 10,000 moments.
JITTER_STEP = 2 * math.pi


class Loss:
    """Gilbert–Elliott loss; with a mean burst of one segment it is Bernoulli loss."""

    def __init__(self, loss: float, burst_segments: float, loss_in_burst: float, seed: int) -> None:
        self._random = random.Random(seed)
        self._burst_segments = burst_segments
        self._in_burst = loss_in_burst
        self.set(loss)

    def set(self, loss: float) -> None:
        """Change the mean loss. The next loss is drawn anew, and a burst that was going on is over."""
        self._loss = loss
        self._left_in_burst = 0
        self._next = self._distance()

    def lost(self, segments: int) -> list[int]:
        """Which of the next `segments` are lost, by index."""
        if self._next >= segments:
            self._next -= segments
            return []
        found, at = [], 0
        while at + self._next < segments:
            at += self._next
            found.append(at)
            at += 1
            self._next = self._distance()
        self._next -= segments - at
        return found

    def _distance(self) -> int:
        """Segments that pass before the next loss."""
        if self._loss <= 0:
            return NEVER
        if self._burst_segments <= 1:
            return self._geometric(self._loss)
        # Mean share of segments inside bursts = loss ÷ loss_in_burst; it fixes how far apart bursts start.
        share = min(self._loss / self._in_burst, 0.999)
        enter = share / (1 - share) / self._burst_segments
        passed = 0
        while True:
            while self._left_in_burst:
                self._left_in_burst -= 1
                if self._random.random() < self._in_burst:
                    return passed
                passed += 1
            # A good stretch has at least one segment: bursts that touch would be one burst, and the stationary share
            # would be off.
            passed += 1 + self._geometric(min(enter, 1.0))
            self._left_in_burst = 1 + self._geometric(1 / self._burst_segments)

    def _geometric(self, probability: float) -> int:
        """Failures before the first success."""
        if probability >= 1:
            return 0
        return int(math.log(1.0 - self._random.random()) / math.log1p(-probability))


class Jitter:
    """Random addition to the one-way delay with the given standard deviation, a smooth function of time.

    A link keeps packets in order, as a queue does, so its delay can fall no faster than time passes. Were it drawn anew for
    every packet, each would wait for the slowest before it, and the more packets there are the longer the RTT would be: 34
    for 30 ms at 500 packets per second and a deviation of 4 ms. So it is drawn at moments that lie a few deviations apart
    and turns from one to the next; between the moments it keeps the asked distribution. Draws are correlated over time.

    The mean is 0 whatever the shape, so the asked RTT stays the mean one; where the sum would be negative, the delay
    is 0.
    """

    def __init__(self, deviation_s: float, distribution: str, correlation_s: float, seed: int) -> None:
        self._random = random.Random(seed)
        self._deviation_s = deviation_s
        self._distribution = distribution
        self._correlation_s = correlation_s
        self._step_s = JITTER_STEP * deviation_s
        self._drawn_s: float | None = None  # when the first of the two draws was, between which it is now
        self._draws = (0.0, 0.0)

    def __bool__(self) -> bool:
        return self._deviation_s > 0

    def sample(self, now_s: float) -> float:
        """What is added to the delay of a packet at `now_s`, seconds; later calls are of later moments."""
        if not self._deviation_s:
            return 0.0
        angle = 0.5 * math.pi * self._advance(now_s)
        first, second = self._draws
        normal = math.cos(angle) * first + math.sin(angle) * second
        normal /= math.sqrt(1 + self._kept(self._step_s) * math.sin(2 * angle))
        if self._distribution == "normal":
            return self._deviation_s * normal
        # Through the normal's own distribution, so that one correlated process serves every shape.
        rank = min(max(0.5 * math.erfc(-normal / math.sqrt(2)), 1e-12), 1 - 1e-12)
        if self._distribution == "uniform":
            return self._deviation_s * math.sqrt(12) * (rank - 0.5)
        return self._deviation_s * (-math.log(1 - rank) - 1)

    def _advance(self, now_s: float) -> float:
        """Draw what is needed at `now_s`; how far between the two draws that is, from 0 to 1."""
        if self._drawn_s is None:
            first = self._random.gauss(0, 1)
            self._drawn_s, self._draws = now_s, (first, self._after(first, self._step_s))
        steps = int((now_s - self._drawn_s) / self._step_s)
        if steps > 0:
            first = self._draws[1]
            if steps > 1:
                first = self._after(first, (steps - 1) * self._step_s)
            self._drawn_s += steps * self._step_s
            self._draws = first, self._after(first, self._step_s)
        return min(max((now_s - self._drawn_s) / self._step_s, 0.0), 1.0)

    def _after(self, draw: float, passed_s: float) -> float:
        kept = self._kept(passed_s)
        return kept * draw + math.sqrt(1 - kept * kept) * self._random.gauss(0, 1)

    def _kept(self, passed_s: float) -> float:
        return math.exp(-passed_s / self._correlation_s) if self._correlation_s > 0 else 0.0


def loss_of(spec: LinkSpec, seed: int) -> Loss:
    """The loss process that a spec asks for."""
    return Loss(spec.loss, spec.loss_burst_segments, spec.loss_in_burst, seed)


def jitter_of(spec: LinkSpec, seed: int) -> Jitter:
    """The jitter that a spec asks for."""
    return Jitter(spec.jitter_s, spec.jitter_distribution, spec.jitter_correlation_s, seed)
