"""What a process asks of the kernel about itself, where Python 3.11 has no function for it: prctl and real-time scheduling."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import sys
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1
_PR_SET_TIMERSLACK = 29


def die_with_parent() -> None:
    """Be killed by SIGKILL when the thread that started this process ends (Linux; elsewhere EOF on stdin must do).

    The kernel forgets it where a program changes its user namespace, so a child calls this itself, after every wrapper.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def wake_precisely() -> None:
    """Let timers fire when they are due: the kernel's default slack is 50 µs, a tenth of the error that a link may have."""
    _prctl(_PR_SET_TIMERSLACK, 1)


def run_first() -> bool:
    """Be scheduled before ordinary processes where that is permitted; whether it is.

    What emulates or measures a link mostly sleeps, but must run when its moment comes: on a machine whose cores are
    full of prefill, a packet would otherwise wait for a time slice, which is many times the delay that the link is
    meant to have.
    """
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(os.sched_get_priority_min(os.SCHED_RR)))
    except PermissionError:
        return False
    return True


def tied(argv: Sequence[str]) -> list[str]:
    """`argv` of a program that is not ours, started so that SIGKILL of its parent kills it too, where util-linux is installed."""
    return ["setpriv", "--pdeathsig", "KILL", *argv] if shutil.which("setpriv") else list(argv)


def _prctl(option: int, value: int) -> None:
    if sys.platform != "linux":
        return
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
