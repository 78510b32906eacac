"""Children from start to end: started together, watched always, and gone when the run is over.

A disaggregated run has one failure that a single process has not: half of it dies and the other half waits for ever.
So the supervisor turns the death of any child (SIGKILL and out-of-memory included) into one exception within
milliseconds, a silent one into the same within 10 s, ends the others by process group, and leaves no orphan whatever way
it is left itself: by return, by exception, or by being killed.
"""

from __future__ import annotations

import contextlib
import queue
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from repro.errors import UserError
from repro.processes.channel import Message
from repro.processes.child import DIED, Child, ChildEndedError, Ended

#: So long after a first complaint others may still turn out to be its cause.
_CAUSE_S = 0.4


class SilenceError(UserError):
    """Nobody reported within the time allowed."""


@dataclass(frozen=True)
class Event:
    """What a worker said. `message["kind"]` tells which event it is."""

    worker: str
    message: Message


class Supervisor:
    """Starts workers and brings their events; use it as a context manager."""

    def __init__(self, log_directory: Path) -> None:
        self._log_directory = log_directory
        self._workers: dict[str, Child] = {}
        self._watched: list[Child] = []
        self._events: queue.SimpleQueue[Event | Ended] = queue.SimpleQueue()

    def start(
        self,
        name: str,
        command: Sequence[str],
        config: Mapping[str, Any],
        environment: Mapping[str, str] | None = None,
        cores: Collection[int] | None = None,
    ) -> Child:
        """Start `command` as worker `name`; `config` is its first message. What it prints goes to `<name>.log`."""
        worker = Child(
            f"worker {name}",
            command,
            hear=partial(self._hear, name),
            environment=environment,
            stderr=self._log_directory / f"{name}.log",
            cores=cores,
        )
        self._workers[name] = worker
        self.watch(worker)
        worker.send("config", **config)
        return worker

    def watch(self, child: Child) -> None:
        """Take the end of a child that somebody else owns for the end of the run as well."""
        self._watched.append(child)
        child.on_end(self._events.put)

    def events(self, timeout_s: float) -> Iterator[Event]:
        """Events of all workers as they come, without end. Raises as `next_event` does."""
        while True:
            yield self.next_event(timeout_s)

    def next_event(self, timeout_s: float) -> Event:
        """The next event. Raises ChildEndedError when a child has ended or is silent, SilenceError after `timeout_s`."""
        event = self.poll(timeout_s)
        if event is None:
            silence = SilenceError(
                f"no worker reported for {timeout_s:g} s; alive: {', '.join(self._alive()) or 'none'}"
            )
            raise self.cause(silence)
        return event

    def poll(self, timeout_s: float) -> Event | None:
        """Like `next_event`, but that nobody reports is no error: None."""
        try:
            event = self._events.get(timeout=max(timeout_s, 0.0))
        except queue.Empty:
            return None
        if isinstance(event, Ended):
            raise self.cause(ChildEndedError(event))
        return event

    def cause(self, complaint: UserError) -> UserError:
        """The error to raise for `complaint`: the end or the silence of a child that explains it, else itself.

        A lost link or worker makes others complain, so that whoever complains first may not be at fault.
        """
        found = [complaint.ended] if isinstance(complaint, ChildEndedError) else []
        if found and found[0].rank == DIED:
            return complaint
        time.sleep(_CAUSE_S)
        found += [suspected for child in self._watched if (suspected := child.suspected()) is not None]
        return ChildEndedError(min(found, key=lambda ended: ended.rank)) if found else complaint

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
        import psutil  # the link's helpers come by this module too, and need an interpreter without packages only

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
            worker.ask_to_stop()
        deadline = time.monotonic() + grace_s
        for worker in self._workers.values():
            worker.wait(max(deadline - time.monotonic(), 0.0))
        self.kill()

    def kill(self) -> None:
        """End every worker's process group now, and reap."""
        for worker in self._workers.values():
            worker.kill()

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.stop()
        else:
            self.kill()

    def _alive(self) -> list[str]:
        return [name for name, worker in self._workers.items() if worker.wait(0) is None]

    def _hear(self, name: str, message: Message, _beside: bytes) -> None:
        self._events.put(Event(name, message))
