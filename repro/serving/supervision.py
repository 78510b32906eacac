"""Worker processes from start to end: started together, watched always, and gone when the run is over.

A disaggregated run has one failure that a single process has not: half of it dies and the other half waits for ever.
So the supervisor turns the death of any worker (SIGKILL and out-of-memory included) into one exception within
milliseconds, ends the others by process group, and leaves no orphan whatever way it is left itself: by return, by
exception, or by being killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

import psutil

from repro.errors import UserError
from repro.serving.channel import Message

_LOG_TAIL_BYTES = 2000


class WorkerDiedError(UserError):
    """A worker process ended before its work did. The message names it, how it ended, and the last it said."""

    def __init__(self, worker: str, how: str, last_words: str = "") -> None:
        self.worker = worker
        super().__init__(f"worker {worker} {how}" + (f"; the end of its log: {last_words}" if last_words else ""))


class WorkerSilentError(UserError):
    """No worker reported within the time allowed."""


@dataclass(frozen=True)
class Event:
    """What a worker said. `message["kind"]` tells which event it is."""

    worker: str
    message: Message


@dataclass(frozen=True)
class _Exit:
    worker: str
    status: int


@dataclass
class Worker:
    """One process under supervision."""

    name: str
    process: subprocess.Popen[str]
    log: Path

    @property
    def pid(self) -> int:
        """The operating system's number of the process that was started."""
        return self.process.pid

    def send(self, kind: str, **fields: Any) -> None:
        """Give the worker a message. A pipe that is already broken is left for the watcher to explain."""
        pipe = cast(IO[str], self.process.stdin)
        with contextlib.suppress(BrokenPipeError):
            pipe.write(json.dumps({"kind": kind, **fields}, separators=(",", ":")) + "\n")
            pipe.flush()

    def last_words(self) -> str:
        """The last line of the worker's log, for a message of one line."""
        if not self.log.exists():
            return ""
        tail = self.log.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace").strip().splitlines()
        return tail[-1].strip() if tail else ""


class Supervisor:
    """Starts workers and brings their events; use it as a context manager, from one thread.

    The thread matters: Linux ties "kill me with my parent" to the *thread* that started the child, so the one that
    calls `start` must live as long as the run.
    """

    def __init__(self, log_directory: Path) -> None:
        self._log_directory = log_directory
        self._workers: dict[str, Worker] = {}
        self._events: queue.SimpleQueue[Event | _Exit] = queue.SimpleQueue()

    def start(
        self,
        name: str,
        command: Sequence[str],
        config: Mapping[str, Any],
        environment: Mapping[str, str] | None = None,
    ) -> Worker:
        """Start `command` as worker `name`; `config` is its first message. Its stderr goes to `<name>.log`."""
        self._log_directory.mkdir(parents=True, exist_ok=True)
        log = self._log_directory / f"{name}.log"
        with log.open("wb") as stderr:
            process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                encoding="utf-8",
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )
        worker = Worker(name, process, log)
        self._workers[name] = worker
        reader = threading.Thread(target=self._read, args=(worker,), name=f"{name} reader", daemon=True)
        reader.start()
        threading.Thread(target=self._watch, args=(worker, reader), name=f"{name} watcher", daemon=True).start()
        worker.send("config", **config)
        return worker

    def events(self, timeout_s: float) -> Iterator[Event]:
        """Events of all workers as they come, without end. Raises as `next_event` does."""
        while True:
            yield self.next_event(timeout_s)

    def next_event(self, timeout_s: float) -> Event:
        """The next event. Raises WorkerDiedError when a worker has ended, WorkerSilentError after `timeout_s`."""
        event = self.poll(timeout_s)
        if event is None:
            alive = ", ".join(self._alive()) or "none"
            raise WorkerSilentError(f"no worker reported for {timeout_s:g} s; alive: {alive}")
        return event

    def poll(self, timeout_s: float) -> Event | None:
        """Like `next_event`, but silence is no error: None."""
        try:
            event = self._events.get(timeout=max(timeout_s, 0.0))
        except queue.Empty:
            return None
        if isinstance(event, _Exit):
            raise WorkerDiedError(event.worker, _how(event.status), self._workers[event.worker].last_words())
        if event.message["kind"] == "failed":
            raise WorkerDiedError(event.worker, f"failed: {event.message['error']}")
        return event

    def expect(self, kind: str, count: int, timeout_s: float) -> list[Event]:
        """Wait for `count` events of one kind and return them; any other event is an error of this program."""
        deadline = time.monotonic() + timeout_s
        events = []
        for _ in range(count):
            event = self.next_event(max(deadline - time.monotonic(), 0.0))
            if event.message["kind"] != kind:
                raise RuntimeError(f"{event.worker} said {event.message['kind']!r} where {kind!r} was expected")
            events.append(event)
        return events

    def memory_bytes(self) -> int:
        """Resident memory of all workers and their children now."""
        total = 0
        for worker in self._workers.values():
            # A child may end between being listed and being asked.
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(worker.pid)
                for one in (process, *process.children(recursive=True)):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        total += one.memory_info().rss
        return total

    def stop(self, grace_s: float = 3.0) -> None:
        """Ask all workers to stop, wait `grace_s` for them, kill what is left with its whole process group."""
        for worker in self._workers.values():
            worker.send("stop")
        deadline = time.monotonic() + grace_s
        for worker in self._workers.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(max(deadline - time.monotonic(), 0.0))
        self.kill()

    def kill(self) -> None:
        """End every worker's process group now, and reap."""
        for worker in self._workers.values():
            # Also when the worker itself is gone: its group may hold a helper process of the transport.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(worker.pid, signal.SIGKILL)
            worker.process.wait()

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.stop()
        else:
            self.kill()

    def _alive(self) -> list[str]:
        return [name for name, worker in self._workers.items() if worker.process.poll() is None]

    def _read(self, worker: Worker) -> None:
        for line in cast(IO[str], worker.process.stdout):
            self._events.put(Event(worker.name, json.loads(line)))

    def _watch(self, worker: Worker, reader: threading.Thread) -> None:
        status = worker.process.wait()
        # What it managed to say comes before the news of its end; a grandchild that holds the pipe must not
        # delay that news.
        reader.join(timeout=0.2)
        self._events.put(_Exit(worker.name, status))


def _how(status: int) -> str:
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"exited with status {status} before the run was over"
