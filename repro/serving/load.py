"""The load generator: open-loop arrivals of any workload on the real clock.

It never waits for an answer, and its own lateness is measured.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from itertools import repeat

import numpy as np
from numpy.typing import NDArray

from repro.serving.scale import Scale
from repro.workload.stream import Chains, RequestBatch

#: (number, due in the deployment's seconds, input tokens, output tokens, keys of its blocks where prefixes are shared).
Submit = Callable[[int, float, int, int, Chains | None], None]


class LoadGenerator:
    """Submits every request of the batches when it is due; `join` waits until all are out."""

    def __init__(self, batches: Iterable[RequestBatch], scale: Scale, submit: Submit, first_number: int = 0) -> None:
        self.batches = list(batches)
        self._scale = scale
        self._submit = submit
        self._number = first_number
        self._late_s: list[float] = []
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)

    @property
    def count(self) -> int:
        """Requests in all."""
        return sum(len(batch.arrival_s) for batch in self.batches)

    def start(self) -> None:
        """Begin; the scale's origin is the first moment of the stream."""
        self._thread.start()

    def stop(self) -> None:
        """Submit no more."""
        self._stopped.set()

    def join(self, timeout_s: float | None = None) -> bool:
        """Whether all requests are out by then."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    @property
    def late_s(self) -> NDArray[np.float64]:
        """By how much each request came late, in seconds of this machine."""
        return np.asarray(self._late_s)

    def _run(self) -> None:
        number = self._number
        for batch in self.batches:
            for arrival_s, tokens, output, chains in zip(
                batch.arrival_s.tolist(), batch.input_tokens.tolist(), batch.output_tokens.tolist(),
                batch.chains or repeat(None, len(batch.arrival_s)), strict=True,
            ):  # fmt: skip
                due_s = self._scale.wall_s(arrival_s)
                # Even with a wait of nothing the event is looked at, so that stopping takes effect in an overload.
                if self._stopped.wait(max(due_s - time.monotonic(), 0.0)):
                    return
                self._late_s.append(max(time.monotonic() - due_s, 0.0))
                self._submit(number, arrival_s, tokens, output, chains)
                number += 1
