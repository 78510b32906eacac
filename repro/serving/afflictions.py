"""What a fault does to a process from outside, wherever that process stands: signals, and limits of the kernel."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
from typing import Literal

Affliction = Literal["kill", "stop", "continue", "fill_disk", "free_disk"]
_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "continue": signal.SIGCONT}


def afflict(pid: int, what: Affliction) -> None:
    """Do it to a process of this machine; one that has ended feels nothing.

    With its disk full no file of it may grow: writes fail with EFBIG in place of ENOSPC. Raises PermissionError where that is not allowed.
    """
    with contextlib.suppress(ProcessLookupError):
        if what in _SIGNALS:
            os.kill(pid, _SIGNALS[what])
            return
        _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0 if what == "fill_disk" else hard, hard))
