"""Work on many values in several processes: each result as it comes, the first failure ends them all, and none outlives this process."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

from repro.processes.kernel import die_with_parent

T = TypeVar("T")
R = TypeVar("R")


def each_in_parallel(work: Callable[[str, T], R], values: Mapping[str, T], processes: int) -> Iterator[tuple[str, R]]:
    """`work(name, value)` of every value, in so many processes; names and results in the order in which they are done.

    Raises:
        Whatever `work` raises first; what has not begun by then is not begun, and what runs is killed.
    """
    # A forked worker has everything imported, where a spawned one takes longer to start than many studies take; a fork is safe
    # as long as no other thread could hold a lock at that moment.
    context = multiprocessing.get_context("fork" if threading.active_count() == 1 else "spawn")
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_begin, initargs=(os.getpid(),))
    try:
        waiting = {pool.submit(work, name, value): name for name, value in values.items()}
        for future in as_completed(waiting):
            yield waiting[future], future.result()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in set(multiprocessing.active_children()) - before:
            child.kill()
        raise
    pool.shutdown()


def _begin(parent: int) -> None:
    """A worker ends with the process that started it, also where that is killed before the worker can say so."""
    die_with_parent()
    if os.getppid() != parent:
        os._exit(1)
