"""The near end of a warm process: one that has imported a program once, and is forked for every child that runs it.

To import torch and transformers takes seconds of processor time, a fork of a process that has done so takes hundredths. A fork is a child
of the warm process, so it dies with it, and through it with this process; its number stays its own until `Fork.wait` has asked for its
exit status. To its user it is a `Child` as any other.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from repro.errors import UserError
from repro.processes.starter import started, with_package

#: Of one order or its answer.
PACKET_BYTES = 128 << 10
#: How long imports may take before the first fork, and a warm process over a question.
_START_TIMEOUT_S, _ANSWER_TIMEOUT_S = 120.0, 10.0


class Warm:
    """One warm process. Its methods are safe from any thread; once it has `ended`, so have its forks."""

    def __init__(
        self, role: str, argv: Sequence[str], config: Mapping[str, Any], environment: Mapping[str, str], log: Path
    ) -> None:
        """Start it: `argv` ends in `program(module)`, `config` is what the module's `warm` is called with.

        `environment` is added to this process's own, and is that of every fork.

        Raises:
            UserError: where it cannot be started.
        """
        self._role, self._log = role, log
        self._lock = threading.Lock()
        self._orders, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        log.parent.mkdir(parents=True, exist_ok=True)
        try:
            with log.open("wb") as errors:
                self._process = started(
                    argv, stdin=far, stdout=errors, stderr=errors, env=with_package({**os.environ, **environment}),
                    start_new_session=True,
                )  # fmt: skip
            self._orders.send(json.dumps(config).encode())
        except OSError as error:
            self._orders.close()
            raise UserError(f"{role}: {argv[0]} cannot be started ({error.strerror})") from None
        finally:
            far.close()
        self.pid = self._process.pid

    @staticmethod
    def program(module: str) -> list[str]:
        """The command of a warm process for the children that run `module`: what it has are the functions `work` and `warm`."""
        return [sys.executable, "-m", "repro.processes.forking", module]

    @property
    def ended(self) -> bool:
        """Whether nothing can be forked of it any more."""
        return self._process.poll() is not None

    def fork(self, channel: socket.socket, errors: IO[bytes] | None, cores: Collection[int] | None) -> Fork:
        """A fork that runs `work` as its whole life, once all is imported; stdout and stderr go to `errors`, else to the log here.

        It leads a process group of its own and runs on `cores`, by default those of the calling thread.

        Raises:
            UserError: where the warm process ends instead, or cannot be forked.
        """
        descriptors = [channel.fileno(), *([errors.fileno()] if errors is not None else [])]
        order = {"cores": sorted(cores or os.sched_getaffinity(0))}
        answer = self._ask(order, descriptors, _START_TIMEOUT_S)
        if answer is None:
            raise UserError(f"{self._role} has ended (pid {self.pid}); its log: {self._log}")
        if "error" in answer:
            raise UserError(f"{self._role} cannot be forked (pid {self.pid}): {answer['error']}")
        return Fork(answer["pid"], self)

    def status(self, pid: int) -> int:
        """The exit status of a fork that has ended, as `subprocess` gives it; of one that ended with this process that of SIGKILL."""
        answer = self._ask({"reap": pid}, [], _ANSWER_TIMEOUT_S)
        return int(answer["status"]) if answer is not None else -signal.SIGKILL

    def close(self) -> None:
        """End it, and what was forked of it."""
        with self._lock:
            self._kill()
            self._orders.close()

    def _ask(self, order: Mapping[str, Any], descriptors: list[int], timeout_s: float) -> Any:
        """Its answer to an order; None where it has ended, or does not answer in time and is ended for it."""
        with self._lock:
            with contextlib.suppress(OSError):
                self._orders.settimeout(timeout_s)
                socket.send_fds(self._orders, [json.dumps(order).encode()], descriptors)
                if answer := self._orders.recv(PACKET_BYTES):
                    return json.loads(answer)
            self._kill()
        return None

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_ANSWER_TIMEOUT_S)


@dataclass(frozen=True)
class Fork:
    """A process that was forked of a warm one: its number, which is its own until it was waited for."""

    pid: int
    warm: Warm

    def wait(self) -> int:
        """The exit status; it has ended already."""
        return self.warm.status(self.pid)
