"""A model that is slower than this machine: after every forward pass it rests, as a smaller device of the same make would still compute.

A duty cycle: arithmetic and memory slow down alike. So one machine can stand for devices of several speeds, and for more of them than it
has cores, since those that rest leave the cores to the others.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@contextlib.contextmanager
def throttled(
    model: torch.nn.Module,
    factor: float,
    clock: Callable[[], float] = time.perf_counter,
    rest: Callable[[float], None] = time.sleep,
    busy: Callable[[], float] | None = None,
) -> Iterator[None]:
    """Within, every forward pass of the model takes `factor` times as long: after it, it rests.

    What is multiplied is the pass's time by the clock, or, with `busy`, by that one. Where `busy` counts the processor's time alone, a pass
    that had to wait for a core rests so much the less, and takes what it takes on a machine of its own.
    """
    began_s, began_busy_s = 0.0, 0.0

    def begin(*_: Any) -> None:
        nonlocal began_s, began_busy_s
        began_s = clock()
        began_busy_s = began_s if busy is None else busy()

    def end(*_: Any) -> None:
        if factor > 1:
            now_s = clock()
            worked_s = (now_s if busy is None else busy()) - began_busy_s
            if (left_s := factor * worked_s - (now_s - began_s)) > 0:
                rest(left_s)

    hooks = (model.register_forward_pre_hook(begin), model.register_forward_hook(end))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
