"""Time and bytes of an emulated deployment: time runs α times as fast, bytes are divided by β, and every ratio stays what it was.

A link of B bit/s becomes one of B·α/β, an RTT becomes RTT/α. Load, use of the link and transfer ÷ prefill are unchanged, so results are
reported unscaled. What is not scaled is this machine: its timers come late by some fraction of a millisecond, which counts α times.
"""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass

import numpy as np

from repro.errors import UserError

#: α that are tried, fastest first.
_FACTORS = (25.0, 20.0, 15.0, 10.0, 7.5, 5.0, 3.0, 2.0, 1.0)


@dataclass(frozen=True)
class Scale:
    """α and β. `virtual_s` turns a moment of this machine into the deployment's time since `origin_s`."""

    time: float = 1.0
    bytes: float = 1.0
    origin_s: float = 0.0

    def __post_init__(self) -> None:
        if not (self.time > 0 and self.bytes > 0):
            raise UserError(f"scale: time {self.time} and bytes {self.bytes}; accepted: positive numbers")

    def virtual_s(self, at_s: float) -> float:
        """The deployment's time at a moment of CLOCK_MONOTONIC."""
        return (at_s - self.origin_s) * self.time

    def wall_s(self, virtual_s: float) -> float:
        """The moment of CLOCK_MONOTONIC at which the deployment's time is that."""
        return self.origin_s + virtual_s / self.time


@dataclass(frozen=True)
class Calibration:
    """What this machine's timers hold while both its cores are asked for: how late they come, in seconds of this machine."""

    mean_s: float
    p99_s: float
    timers: int


def calibrate(timers_per_s: float = 400.0, for_s: float = 1.5, threads: int = 4) -> Calibration:
    """Measure how late timers come, in several threads at once that wake as often as a deployment's instances do."""
    late: list[float] = []
    each_s = threads / timers_per_s

    def wake() -> None:
        own = []
        due = time.monotonic() + each_s
        end = due + for_s
        event = threading.Event()
        while due < end:
            event.wait(max(due - time.monotonic(), 0.0))
            own.append(max(time.monotonic() - due, 0.0))
            due += each_s
        late.extend(own)

    workers = [threading.Thread(target=wake) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    found = np.asarray(late)
    return Calibration(float(found.mean()), float(np.quantile(found, 0.99)), len(found))


def choose(
    calibration: Calibration, link_bps: float | None, *, tolerated_s: float, most_bps: float, hops: int = 6
) -> Scale:
    """The fastest scale that keeps a request's lateness within `tolerated_s` (unscaled) and the link within `most_bps`.

    A request waits for some `hops` timers and messages one after the other, each late by the mean that was measured.

    Raises:
        UserError: where even real time is too fast for this machine.
    """
    for factor in _FACTORS:
        if hops * calibration.mean_s * factor <= tolerated_s:
            scaled_bps = (link_bps or math.inf) * factor
            byte_scale = max(1.0, scaled_bps / most_bps) if math.isfinite(scaled_bps) else 1000.0 * factor
            return Scale(factor, byte_scale)
    raise UserError(
        f"options.time_scale: this machine's timers come {1e3 * calibration.mean_s:.2f} ms late, which no time scale keeps within "
        f"{tolerated_s:g} s per request; accepted: a number, to run all the same"
    )
