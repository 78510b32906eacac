"""A child's end: the channel to its parent, its heartbeat, and its whole life from start to exit.

A child must not outlive its parent, whatever ends that: the kernel is asked to kill it with its parent, and EOF on the channel,
which also comes when a wrapper (`nsenter`, `setpriv`) stood between the two, ends it as well.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from repro.errors import UserError
from repro.processes.channel import Channel, Message, PeerGone
from repro.processes.kernel import die_with_parent

HEARTBEAT_S = 1.0


class Parent:
    """Messages to and from the process that started this one. Take it first thing: it claims stdin, which is the channel."""

    def __init__(self) -> None:
        self._channel = Channel(socket.socket(fileno=os.dup(0)))
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)

    def read(self) -> Message:
        """The next message. Raises PeerGone when the parent has gone."""
        return self._channel.receive()[0]

    def read_beside(self) -> tuple[Message, bytes]:
        """The next message with the bytes beside it. Raises PeerGone when the parent has gone."""
        return self._channel.receive()

    def read_within(self, timeout_s: float) -> Message | None:
        """The next message, None where there is none within `timeout_s`. Raises PeerGone when the parent has gone."""
        try:
            return self._channel.receive(timeout_s)[0]
        except TimeoutError:
            return None

    def send(self, kind: str, **fields: Any) -> None:
        """Tell the parent; waits while it does not read. Safe from any thread. Raises OSError when it has gone."""
        self._channel.send({"kind": kind, **fields})

    def send_text(self, text: bytes) -> None:
        """As `send`, of a message that is a JSON object with its `kind` already."""
        self._channel.send_text(text)

    def send_beside(self, kind: str, beside: bytes, **fields: Any) -> None:
        """As `send`, with bytes beside the message."""
        self._channel.send({"kind": kind, **fields}, beside)

    def reply(self, question: Message, **fields: Any) -> None:
        """Answer what `Child.ask` asked."""
        self._channel.send({"kind": "reply", "number": question["number"], **fields})

    def refuse(self, question: Message, error: str) -> None:
        """Answer what `Child.ask` asked with an error in one line, which is raised there."""
        self.reply(question, error=error)

    def deliver(self, receive: Callable[[Message], None]) -> None:
        """Hand every further message to `receive`, in a thread; EOF ends the process at once."""

        def pump() -> None:
            while True:
                try:
                    message = self.read()
                except PeerGone:
                    os._exit(1)
                receive(message)

        threading.Thread(target=pump, name="control", daemon=True).start()

    def beat(self) -> None:
        """Send a heartbeat every second from now on, in a thread: without one the parent takes this process for dead."""

        def run() -> None:
            try:
                while True:
                    self.send("heartbeat")
                    time.sleep(HEARTBEAT_S)
            except OSError:  # the parent has gone, and perhaps nobody reads the channel here
                os._exit(1)

        threading.Thread(target=run, name="heartbeat", daemon=True).start()


def run_worker(work: Callable[[Parent, Message], None], *, beat: bool = True) -> None:
    """The whole life of a child: read the first message, do `work`, report how it ended, exit.

    A child that fails, in whatever thread, says so in a message (`failed`, with the exception's text) before it goes, so its parent
    can tell its user more than an exit status, and nobody waits for what a dead thread would have said. It ends quietly with EOF,
    which means that its parent has gone. `os._exit` ends it, because threads that wait in sockets must not hold it back.

    Without `beat` the work calls `Parent.beat` itself, once it may have threads.
    """
    die_with_parent()
    # Ctrl-C is for the parent, which ends its children in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What is imported by now stays, and a collection that walked it would stop every thread meanwhile.
    gc.freeze()
    parent = Parent()

    def fail(error: BaseException | None) -> None:
        with contextlib.suppress(OSError):  # the disk of its log may be full
            if not isinstance(error, UserError):
                traceback.print_exception(error)
            sys.stderr.flush()
        with contextlib.suppress(OSError):  # the parent may have gone first
            parent.send(
                "failed", error=str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            )
        os._exit(1)

    threading.excepthook = lambda thrown: fail(thrown.exc_value)
    try:
        if beat:
            parent.beat()
        work(parent, parent.read())
    except PeerGone:
        os._exit(1)
    except BaseException as error:
        fail(error)
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    os._exit(0)
