"""A worker's end of the pipes to its supervisor: JSON lines in on stdin, JSON lines out on stdout.

Only control passes here: configuration, requests, events. JSON and not pickle, so that a message can do nothing but
be read. A worker must not outlive its supervisor, whatever ends that: the kernel is asked to kill it with its parent,
and the end of stdin, which also comes when a wrapper (`nsenter`, `setpriv`) stood between the two, ends it as well.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

Message = dict[str, Any]

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask the kernel to kill this process with its parent's thread (Linux; elsewhere stdin's end must do)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


class Channel:
    """Messages to and from the supervisor. Take it first thing in the process: it claims stdin and stdout."""

    def __init__(self) -> None:
        # Libraries print to stdout now and then, and that must not be read as a message: they get stderr instead.
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self._in = os.fdopen(os.dup(0), "r", encoding="utf-8")
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        self._lock = threading.Lock()

    def read(self) -> Message:
        """The next message; raises EOFError when the supervisor has gone."""
        line = self._in.readline()
        if not line:
            raise EOFError("the supervisor closed the pipe")
        message: Message = json.loads(line)
        return message

    def send(self, kind: str, **fields: Any) -> None:
        """Tell the supervisor. Safe from any thread."""
        line = json.dumps({"kind": kind, **fields}, separators=(",", ":"))
        with self._lock:
            self._out.write(line + "\n")
            self._out.flush()

    def deliver(self, receive: Callable[[Message], None]) -> None:
        """Hand every further message to `receive`, in a thread; when the pipe ends, end the process at once."""

        def pump() -> None:
            while True:
                try:
                    message = self.read()
                except (EOFError, OSError, ValueError):
                    os._exit(1)
                receive(message)

        threading.Thread(target=pump, name="control", daemon=True).start()


def run_worker(work: Callable[[Channel, Message], None]) -> None:
    """The whole life of a worker process: read the configuration, do `work`, report how it ended, exit.

    A worker that fails, in whatever thread, says so in a message (`failed`, with the exception's text) before it goes, so
    the supervisor can tell its user more than an exit status, and nobody waits for what a dead thread would have said.
    `os._exit` ends it, because threads that wait in sockets must not hold it back.
    """
    die_with_parent()
    # What is imported by now stays, and a collection that walked it would stop every thread meanwhile.
    gc.freeze()
    channel = Channel()

    def fail(error: BaseException | None) -> None:
        traceback.print_exception(error)
        sys.stderr.flush()
        with contextlib.suppress(OSError):  # the supervisor may have gone first
            channel.send("failed", error=f"{type(error).__name__}: {error}")
        os._exit(1)

    threading.excepthook = lambda thrown: fail(thrown.exc_value)
    try:
        work(channel, channel.read())
    except BaseException as error:
        fail(error)
    sys.stderr.flush()
    os._exit(0)
