"""Starts programs, all from one thread that lives as long as this process.

Linux ties "kill me with my parent" to the *thread* that started the child, and a child inherits the cores of that thread. With one
thread for all, a child dies with the process and with nothing less, and gets the cores that it was given and no others.
"""

from __future__ import annotations

import os
import queue
import subprocess
import threading
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

_PACKAGE = str(Path(__file__).resolve().parents[2])

_Order = tuple[Future[subprocess.Popen[bytes]], Sequence[str], Collection[int], dict[str, Any]]
_lock = threading.Lock()
_orders: queue.SimpleQueue[_Order] | None = None


def started(argv: Sequence[str], cores: Collection[int] | None = None, **options: Any) -> subprocess.Popen[bytes]:
    """As subprocess.Popen, on `cores`, by default those of the calling thread. Raises OSError where the program cannot be started."""
    order: Future[subprocess.Popen[bytes]] = Future()
    _queue().put((order, argv, cores or os.sched_getaffinity(0), options))
    return order.result()


def with_package(environment: dict[str, str]) -> dict[str, str]:
    """`environment` in which a Python child imports the same package as this process, wherever this one found it."""
    paths = [_PACKAGE, *filter(None, [environment.get("PYTHONPATH")])]
    return {**environment, "PYTHONPATH": os.pathsep.join(dict.fromkeys(os.pathsep.join(paths).split(os.pathsep)))}


def _queue() -> queue.SimpleQueue[_Order]:
    global _orders
    with _lock:
        if _orders is None:
            _orders = queue.SimpleQueue()
            threading.Thread(target=_run, args=(_orders,), name="starter", daemon=True).start()
        return _orders


def _run(orders: queue.SimpleQueue[_Order]) -> None:
    while True:
        order, argv, cores, options = orders.get()
        try:
            os.sched_setaffinity(0, cores)
            order.set_result(cast("subprocess.Popen[bytes]", subprocess.Popen(list(argv), **options)))
        except BaseException as error:
            order.set_exception(error)


def _forget_thread() -> None:
    global _lock, _orders
    _lock, _orders = threading.Lock(), None


# A fork has no thread but the one that forked.
os.register_at_fork(after_in_child=_forget_thread)
