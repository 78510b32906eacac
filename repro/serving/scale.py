"""Time and bytes of an emulated deployment: time runs α times as fast, bytes are divided by β, and every ratio stays what it was.

A link of B bit/s becomes one of B·α/β, an RTT becomes RTT/α. Load, use of the link and transfer ÷ prefill are unchanged, so results are
reported unscaled. What is not scaled is this machine: its timers come late by some fraction of a millisecond, which counts α times.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from repro.errors import UserError

#: Timers and messages that a request waits for one after the other, each late by the mean that was measured.
_HOPS = 6
#: What an unlimited link counts as where bytes are scaled.
_UNLIMITED_BPS = 100e9
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


@dataclass(frozen=True)
class Scaling:
    """How an emulation is scaled.

    `time_scale` null lets a calibration choose the fastest at which late timers add at most `tolerated_s`, unscaled, to a request;
    `byte_scale` null makes the link `link_bps` on this machine. A request's KVCache crosses in `pieces`.
    """

    #: Where these keys stand in the configuration.
    NODE: ClassVar[str] = "options"
    time_scale: float | None = None
    byte_scale: float | None = None
    tolerated_s: float = 0.05
    link_bps: float = 1e9
    pieces: int = 8

    def __post_init__(self) -> None:
        for key in ("time_scale", "byte_scale"):
            if (value := getattr(self, key)) is not None and not value >= 1:
                raise UserError(f"{self.NODE}.{key}: {value}; accepted: 1 or more, or null")
        for key in ("tolerated_s", "link_bps"):
            if not getattr(self, key) > 0:
                raise UserError(f"{self.NODE}.{key}: {getattr(self, key)} is not positive")
        if not 1 <= self.pieces <= 1024:
            raise UserError(f"{self.NODE}.pieces: {self.pieces}; accepted: 1 to 1024")

    def scale(self, found: Calibration, link_bps: float | None) -> Scale:
        """The scale for a link of that rate, null an unlimited one, on a machine whose timers are `found` to be so late.

        Raises:
            UserError: where a scale is to be chosen and even real time is too fast for this machine.
        """
        factor = self.time_scale if self.time_scale is not None else self._fastest(found)
        if self.byte_scale is not None:
            return Scale(factor, self.byte_scale)
        return Scale(factor, max(1.0, (link_bps or _UNLIMITED_BPS) * factor / self.link_bps))

    def _fastest(self, found: Calibration) -> float:
        for factor in _FACTORS:
            if _HOPS * found.mean_s * factor <= self.tolerated_s:
                return factor
        raise UserError(
            f"{self.NODE}.time_scale: timers of this machine come {1e3 * found.mean_s:.2f} ms late, which adds more than "
            f"{self.NODE}.tolerated_s ({self.tolerated_s:g} s) to a request at any; accepted: a number, to run all the same"
        )
