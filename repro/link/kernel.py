"""The few system calls that Python 3.11 does not wrap: namespaces, and dying with one's parent."""

from __future__ import annotations

import ctypes
import os
import signal

CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000
_PR_SET_PDEATHSIG = 1
_PR_SET_TIMERSLACK = 29

_libc = ctypes.CDLL(None, use_errno=True)


def unshare(flags: int) -> None:
    """Leave the namespaces named by `flags` for new ones. Raises OSError."""
    _check(_libc.unshare(flags))


def enter(namespace: int) -> None:
    """Enter the network namespace behind a file descriptor. Raises OSError."""
    _check(_libc.setns(namespace, CLONE_NEWNET))


def die_with_parent() -> None:
    """Be killed when the thread that made this process ends, however it ends."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))


def wake_precisely() -> None:
    """Let timers fire when they are due: the kernel's default slack is 50 µs, a tenth of the error that we allow."""
    _check(_libc.prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0))


def run_first() -> bool:
    """Be scheduled before ordinary processes where that is permitted; whether it is.

    What emulates or measures the link mostly sleeps, but must run when its moment comes: on a machine whose cores are
    full of prefill, a packet would otherwise wait for a time slice, which is many times the delay that the link is
    meant to have.
    """
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(os.sched_get_priority_min(os.SCHED_RR)))
    except PermissionError:
        return False
    return True


def _check(result: int) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
