"""A fork of this process that does one thing until it is killed: for what shares memory and sockets with its parent.

The parent must have a single thread. It watches by asking, so that it needs no thread for it either.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Collection

from repro.processes.child import exit_in_words
from repro.processes.kernel import die_with_parent


class Forked:
    """A forked child in its parent's process group."""

    def __init__(self, role: str, work: Callable[[], None], cores: Collection[int] | None = None) -> None:
        """Fork, and do `work` in the fork, on `cores` only where they are given."""
        self.role = role
        self._status: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                die_with_parent()
                if cores:
                    os.sched_setaffinity(0, cores)
                work()
                status = 0
            except BaseException as error:
                traceback.print_exception(error)
            finally:
                os._exit(status)

    def ended(self) -> str | None:
        """How it ended, in words; None while it runs."""
        if self._status is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            if found:
                self._status = os.waitstatus_to_exitcode(status)
        return None if self._status is None else exit_in_words(self._status)

    def wait(self) -> None:
        """Wait for its end."""
        if self._status is None:
            self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def kill(self) -> None:
        """Kill it and wait for its end."""
        if self._status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self.wait()


def apart(work: Callable[[], bytes]) -> bytes:
    """What `work` gives, done in a fork, so that this process stays as it is; nothing where it failed, and then stderr says why."""
    source, sink = os.pipe()

    def tell() -> None:
        with os.fdopen(sink, "wb") as pipe:
            pipe.write(work())

    fork = Forked("a fork", tell)
    os.close(sink)
    with os.fdopen(source, "rb") as pipe:
        found = pipe.read()
    fork.wait()
    return found
