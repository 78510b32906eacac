"""The far end of a warm process: `python -m repro.processes.forking <module>` imports the module, then forks itself on every order.

It computes nothing and keeps a single thread, so that a fork finds every lock free and every library as it was imported. Of the module it
calls `warm(config)` once, which brings in what a child will need, and in each fork `work`, as `run_worker` does in a process of its own.
Orders come on stdin, with the fork's channel and log beside them; EOF there, or the end of whoever started it, ends it and its forks.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from repro.processes.channel import Message
from repro.processes.cores import begin_on
from repro.processes.kernel import die_with_parent
from repro.processes.warm import PACKET_BYTES
from repro.processes.worker import Parent, run_worker

_Work = Callable[[Parent, Message], None]


def main() -> NoReturn:
    """Import, warm, then obey until EOF."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    orders = socket.socket(fileno=os.dup(0))
    module = importlib.import_module(sys.argv[1])
    config = orders.recv(PACKET_BYTES)
    if not config:
        os._exit(1)
    try:
        module.warm(json.loads(config))
    except Exception as error:  # whatever is wrong with it, a child says so in its own words
        traceback.print_exception(error)
    gc.collect()
    gc.freeze()
    while True:
        text, descriptors, _, _ = socket.recv_fds(orders, PACKET_BYTES, 2)
        if not text:
            os._exit(0)
        order = json.loads(text)
        answer = (
            _reaped(order["reap"]) if "reap" in order else _forked(module.work, order["cores"], descriptors, orders)
        )
        for descriptor in descriptors:
            os.close(descriptor)
        with contextlib.suppress(OSError):  # EOF comes next
            orders.send(json.dumps(answer).encode())


def _reaped(pid: int) -> dict[str, Any]:
    return {"status": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}


def _forked(work: _Work, cores: list[int], descriptors: list[int], orders: socket.socket) -> dict[str, Any]:
    if (threads := len(list(Path("/proc/self/task").iterdir()))) > 1:
        return {"error": f"it has {threads} threads, one of which may hold a lock"}
    sys.stdout.flush()
    sys.stderr.flush()
    own = os.getpid()
    try:
        pid = os.fork()
    except OSError as error:
        return {"error": error.strerror}
    if pid == 0:
        try:
            _be_child(own, cores, descriptors, orders)
            run_worker(work)
        except BaseException as error:
            traceback.print_exception(error)
        finally:
            os._exit(1)
    return {"pid": pid}


def _be_child(parent: int, cores: list[int], descriptors: list[int], orders: socket.socket) -> None:
    """What `subprocess` and the kernel do for a program that is started: a group, cores and streams of its own, and a tie to its parent."""
    os.setsid()
    die_with_parent()
    if os.getppid() != parent:  # which ended before the tie held
        os._exit(1)
    begin_on(cores)
    orders.close()
    channel, *errors = descriptors
    os.dup2(channel, 0)
    for log in errors:
        os.dup2(log, 1)
        os.dup2(log, 2)
    for descriptor in descriptors:
        os.close(descriptor)


if __name__ == "__main__":
    main()
