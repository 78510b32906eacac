"""A child process from its start to its end: started, spoken to, watched, and ended by process group.

One thread per child reads its channel and waits for its end (pidfd), so that a death is known within milliseconds. A child of this
kit beats once a second; one that neither beats nor uses its processor is silent, and named as such. A stopped parent or a starved
machine silences nobody: time in which the watching thread itself did not run is not counted.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import select
import signal
import socket
import subprocess
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from repro.errors import UserError
from repro.processes.channel import Channel, Message, PeerGone
from repro.processes.proc import usage
from repro.processes.starter import started, with_package
from repro.processes.warm import Fork, Warm

#: A stopped child is named after this time without a heartbeat, one that waits for nobody knows what after this, any other after that.
STOPPED_AFTER_S, SILENT_AFTER_S, UNHEARD_AFTER_S = 3.0, 8.0, 60.0
#: From when on a child without a heartbeat may be the reason for what others complain of.
SUSPECT_AFTER_S = 3.0
_TICK_S = 0.5
_SEND_TIMEOUT_S = 10.0
_LOG_TAIL_BYTES = 2000

Where = Path | Literal["inherited", "kept", "dropped"]


@dataclass(frozen=True)
class Ended:
    """How a child came to its end, or to be of no more use. `rank` orders causes: an exit explains a complaint, not the reverse."""

    role: str
    pid: int
    how: str
    rank: int
    last_words: str = ""

    def __str__(self) -> str:
        words = f"; the end of its log: {self.last_words}" if self.last_words else ""
        return f"{self.role} {self.how} (pid {self.pid}){words}"


DIED, SILENT, FAILED = range(3)


class ChildEndedError(UserError):
    """A child died, failed or fell silent before its work was done. The message names it, how, and the last that it said."""

    def __init__(self, ended: Ended) -> None:
        self.ended = ended
        super().__init__(str(ended))


class Child:
    """One process and its channel. Every method is safe from any thread, but not from `hear` or `on_end`."""

    def __init__(
        self,
        role: str,
        program: Sequence[str] | Warm,
        *,
        hear: Callable[[Message, bytes], None] | None = None,
        environment: Mapping[str, str] | None = None,
        stderr: Where = "kept",
        channel: bool = True,
        own_group: bool = True,
        pass_fds: Sequence[int] = (),
        cores: Collection[int] | None = None,
        cwd: Path | None = None,
    ) -> None:
        """Start the command `program`, which ends in one that calls `run_worker`, or, without `channel`, any; or fork a warm process.

        `role` names it in messages. `hear` gets each message that answers no question, in the watching thread. `environment` is
        added to this process's own. A child leads a process group of its own and is ended with all of it; one without `own_group`
        stays in this process's, to be ended with this one. stdout goes where
        `stderr` goes, and is dropped where that is inherited. A fork has the environment, the folder and the open files of its
        warm process, and always a channel and a group.

        Raises:
            UserError: where the program cannot be started.
        """
        self.role = role
        self._hear = hear
        self._group = own_group
        self._log, self._errors = _opened(stderr)
        near, far = socket.socketpair() if channel else (None, None)
        self._process: subprocess.Popen[bytes] | Fork
        try:
            if isinstance(program, Warm):
                if far is None or not own_group or environment or pass_fds or cwd:
                    raise ValueError(f"{role}: a fork has a channel, a group, and all else of its warm process")
                self._process = program.fork(far, self._errors, cores)
            else:
                self._process = started(
                    program,
                    cores,
                    stdin=far if far is not None else subprocess.DEVNULL,
                    stdout=self._errors if self._errors is not None else subprocess.DEVNULL,
                    stderr=self._errors,
                    env=with_package({**os.environ, **(environment or {})}),
                    start_new_session=own_group,
                    pass_fds=pass_fds,
                    cwd=cwd,
                )
            self.pid = self._process.pid
            self._pidfd = os.pidfd_open(self.pid)
        except (OSError, UserError) as error:
            if near is not None:
                near.close()
            self._close_log()
            if isinstance(error, UserError):
                raise
            what = "a fork" if isinstance(program, Warm) else program[0]
            raise UserError(f"{role}: {what} cannot be started ({error.strerror})") from None
        finally:
            if far is not None:
                far.close()
        self.returncode: int | None = None
        self._channel = Channel(near, _SEND_TIMEOUT_S) if near is not None else None
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._ended: Ended | None = None
        self._observers: list[Callable[[Ended], None]] = []
        self._replies: dict[int, queue.SimpleQueue[Message | None]] = {}
        self._numbers = itertools.count()
        self._heard_s = self._worked_s = self._looked_s = time.monotonic()
        self._has_beaten, self._cpu_s = False, 0.0
        self._watcher = threading.Thread(target=self._watch, name=f"{role} watcher", daemon=True)
        self._watcher.start()

    @property
    def ended(self) -> Ended | None:
        """How it came to its end, None while all is well."""
        return self._ended

    def on_end(self, observer: Callable[[Ended], None]) -> None:
        """Call `observer` once when it has died, failed or fallen silent, or at once where that is past."""
        with self._lock:
            if self._ended is None:
                self._observers.append(observer)
                return
        observer(self._ended)

    def send(self, kind: str, *, beside: bytes = b"", **fields: Any) -> None:
        """Give it a message. That it does not read any more is for the watcher to explain."""
        assert self._channel is not None
        with contextlib.suppress(OSError):
            self._channel.send({"kind": kind, **fields}, beside)

    def send_text(self, text: bytes) -> None:
        """As `send`, of a message that is a JSON object with its `kind` already."""
        assert self._channel is not None
        with contextlib.suppress(OSError):
            self._channel.send_text(text)

    def ask(self, kind: str, timeout_s: float = 10.0, **fields: Any) -> Message:
        """A question and its answer.

        Raises:
            ChildEndedError: if it has ended, or ends instead of answering.
            UserError: if it refuses, or does not answer in time.
        """
        number, answer = next(self._numbers), queue.SimpleQueue[Message | None]()
        with self._lock:
            if self._ended is not None:
                raise ChildEndedError(self._ended)
            self._replies[number] = answer
        self.send(kind, number=number, **fields)
        try:
            found = answer.get(timeout=timeout_s)
        except queue.Empty:
            raise UserError(f"{self.role} did not answer within {timeout_s:g} s (pid {self.pid})") from None
        finally:
            self._replies.pop(number, None)
        if found is None:
            assert self._ended is not None
            raise ChildEndedError(self._ended)
        if "error" in found:
            raise UserError(str(found["error"]))
        return found

    def suspected(self) -> Ended | None:
        """What is the matter with it as far as one can tell before it is named: it has ended, is stopped, or misses heartbeats."""
        if self._ended is not None:
            return self._ended
        quiet_s = time.monotonic() - self._heard_s
        state, _ = usage(self.pid)
        if state in "Tt" and self._channel is not None:
            return self._outcome(SILENT, "is stopped")
        if self._has_beaten and quiet_s > SUSPECT_AFTER_S and state == "S":
            return self._outcome(SILENT, f"has sent no heartbeat for {quiet_s:.1f} s")
        return None

    def wait(self, timeout_s: float | None = None) -> int | None:
        """Wait for its exit: the status, negative for a signal; None after `timeout_s`."""
        return self.returncode if self._over.wait(timeout_s) else None

    def end(self, grace_s: float = 3.0) -> None:
        """Tell it to stop, wait `grace_s` for it, then kill what is left of its group. It is reaped when this returns."""
        self.ask_to_stop()
        deadline = time.monotonic() + grace_s
        while not self._over.wait(0.1) and time.monotonic() < deadline and usage(self.pid)[0] not in "Tt":
            pass
        self.kill()

    def ask_to_stop(self) -> None:
        """The order to stop, without waiting: a message `stop`, or SIGTERM where there is no channel."""
        if self._channel is not None:
            self.send("stop")
        elif not self._over.is_set():
            self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kill its process group now; it is reaped when this returns."""
        self._signal(signal.SIGKILL)
        self._watcher.join()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.end() if kind is None else self.kill()

    def last_words(self) -> str:
        """The last line that it wrote to stderr, where that was kept."""
        if self._log is not None:
            with contextlib.suppress(OSError):
                return _last_line(self._log.read_bytes())
        elif self._errors is not None and not self._errors.closed:
            size = os.fstat(self._errors.fileno()).st_size
            return _last_line(os.pread(self._errors.fileno(), _LOG_TAIL_BYTES, max(0, size - _LOG_TAIL_BYTES)))
        return ""

    def _signal(self, number: signal.Signals) -> None:
        # Its number is its own until it is reaped, which happens under the lock.
        with self._lock, contextlib.suppress(ProcessLookupError, PermissionError):
            if not self._over.is_set():
                (os.killpg if self._group else os.kill)(self.pid, number)

    def _watch(self) -> None:
        poller = select.poll()
        poller.register(self._pidfd, select.POLLIN)
        if self._channel is not None:
            poller.register(self._channel.fileno(), select.POLLIN)
        try:
            while True:
                ready = {descriptor for descriptor, _ in poller.poll(1000 * _TICK_S)}
                if self._channel is not None and ready - {self._pidfd} and not self._listen():
                    poller.unregister(self._channel.fileno())
                if self._pidfd in ready:
                    break
                self._look()
            # What it managed to say comes before the news of its end.
            while self._channel is not None and self._listen(until_empty=True):
                pass
        except Exception as error:  # of `hear`: whoever waits for this child must not wait for ever
            traceback.print_exception(error)
            self._conclude(self._outcome(FAILED, f"said what cannot be understood: {error}"))
            self._signal(signal.SIGKILL)
            select.select([self._pidfd], [], [])
        self._reap()

    def _listen(self, *, until_empty: bool = False) -> bool:
        """Take what has come; False at EOF, or, `until_empty`, once there is nothing left."""
        assert self._channel is not None
        try:
            frames = self._channel.drain()
        except PeerGone:
            return False
        if frames is None:
            return not until_empty
        for message, beside in frames:
            self._heard_s = time.monotonic()
            match message.get("kind"):
                case "heartbeat":
                    self._has_beaten = True
                case "reply":
                    with self._lock:
                        if (waiting := self._replies.get(message.get("number", -1))) is not None:
                            waiting.put(message)
                case "failed":
                    self._conclude(self._failed(message))
                case _ if self._hear is not None:
                    self._hear(message, beside)
        return True

    def _failed(self, message: Message) -> Ended:
        """The child's own failure, or, with a role in the message, that of a process which it watches."""
        if "role" in message:
            return Ended(
                message["role"], message["pid"], message["how"], message["rank"], message.get("last_words", "")
            )
        return Ended(self.role, self.pid, f"failed: {message['error']}", FAILED)

    def _look(self) -> None:
        """Judge silence, by the time in which this thread ran."""
        now_s = time.monotonic()
        if (missed_s := now_s - self._looked_s - 2 * _TICK_S) > 0:
            self._heard_s, self._worked_s = self._heard_s + missed_s, self._worked_s + missed_s
        self._looked_s = now_s
        if self._channel is None or self._ended is not None:
            return
        quiet_s = now_s - self._heard_s
        if quiet_s < STOPPED_AFTER_S:
            return
        state, cpu_s = usage(self.pid)
        if state in "Tt":
            self._conclude(self._outcome(SILENT, f"is stopped: no heartbeat for {quiet_s:.0f} s"))
            return
        if cpu_s != self._cpu_s or state in "DR":
            self._cpu_s, self._worked_s = cpu_s, now_s
        idle_s = now_s - max(self._worked_s, self._heard_s)
        if self._has_beaten and (idle_s > SILENT_AFTER_S or quiet_s > UNHEARD_AFTER_S):
            self._conclude(self._outcome(SILENT, f"is silent: no heartbeat for {quiet_s:.0f} s"))

    def _reap(self) -> None:
        # Whatever else is in its group goes first, while the number of the group is still taken.
        if self._group:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
        with self._lock:
            self.returncode = self._process.wait()
            self._over.set()
        self._conclude(self._outcome(DIED, exit_in_words(self.returncode)))
        os.close(self._pidfd)
        if self._channel is not None:
            self._channel.close()
        self._close_log()

    def _outcome(self, rank: int, how: str) -> Ended:
        return Ended(self.role, self.pid, how, rank, self.last_words())

    def _conclude(self, ended: Ended) -> None:
        with self._lock:
            if self._ended is not None:
                return
            self._ended = ended
            observers, self._observers = self._observers, []
            waiting = list(self._replies.values())
        for answer in waiting:
            answer.put(None)
        for observer in observers:
            observer(ended)

    def _close_log(self) -> None:
        if self._errors is not None:
            self._errors.close()


def exit_in_words(status: int) -> str:
    """How a process ended, from its status as `subprocess` gives it."""
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"exited with status {status} before the run was over"


def _opened(stderr: Where) -> tuple[Path | None, IO[bytes] | None]:
    if isinstance(stderr, Path):
        stderr.parent.mkdir(parents=True, exist_ok=True)
        return stderr, stderr.open("wb")
    if stderr == "kept":
        return None, tempfile.TemporaryFile()
    # Opened to be read as well: its last words are asked for as any other's, and there are none.
    return None, None if stderr == "inherited" else Path(os.devnull).open("r+b", buffering=0)


def _last_line(tail: bytes) -> str:
    lines = tail[-_LOG_TAIL_BYTES:].decode(errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else ""
