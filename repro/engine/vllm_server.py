"""One vLLM server as a child of this process: found, started with its connector, waited for, and gone with whoever started it."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from repro.engine.openai import answers_at
from repro.engine.vllm import confined, instance_command, instance_environment
from repro.errors import UserError
from repro.link.namespaces import HOST_END
from repro.processes import Child, run, tied
from repro.transport import remote_memory

_LOOK_S: Final = 0.3
#: The longest path of a Unix socket, its end not counted; what a temporary folder's name has after its prefix.
_SOCKET_PATH_BYTES: Final = 107
_RANDOM_CHARACTERS: Final = 8
#: In the environment of whatever a server starts: its socket.
_MARK: Final = "REPRO_ENGINE"
#: A line of Python's that names an error, whatever the engine's log puts before it.
_ERROR_LINE: Final = re.compile(r"\b(\w+(?:Error|Exception|NotImplemented)\w*: .+)$")
#: What a parent process says when a child has failed, which is no reason.
_NO_REASON: Final = (
    "Engine core initialization failed",
    "EngineDeadError",
    "WorkerProc initialization failed",
    "cancelled",
)


class EngineRefusedError(Exception):
    """The engine does not serve that model or connector here; the text is its reason."""


@dataclass(frozen=True)
class VllmSpec:
    """What a server serves and how: the folder of its environment and of its checkpoint, and the longest request.

    It says up to `most_logprobs` log-probabilities of a step, and computes on processor `core`.
    """

    environment: str
    checkpoint: str
    most_tokens: int
    most_logprobs: int
    core: int


def interpreter(environment: Path, key: str) -> Path:
    """The Python of an environment that `scripts/engines` made. Raises UserError where it is none."""
    python = environment / "bin" / "python"
    missing = [
        name for name in ("vllm", "nixl") if not any(environment.glob(f"lib/python3*/site-packages/{name}/__init__.py"))
    ]
    if not os.access(python, os.X_OK) or missing:
        what = f"has no {' and no '.join(missing)}" if python.exists() else "holds no environment"
        raise UserError(f"{key}: {environment} {what}; accepted: a folder made by scripts/engines <folder>")
    return python.absolute()


def socket_folder(folder: Path, longest_name: str) -> tempfile.TemporaryDirectory[str]:
    """A folder for servers' sockets, whose names are at most as long as that one.

    It is in `folder`, where nothing stays elsewhere after SIGKILL, unless that path would be too long for a socket's.
    """
    within, prefix = folder.absolute(), "sockets-"
    path = within / f"{prefix}{'x' * _RANDOM_CHARACTERS}" / longest_name
    fits = len(os.fsencode(path)) <= _SOCKET_PATH_BYTES
    return tempfile.TemporaryDirectory(prefix=prefix, dir=within if fits else None)


class VllmServer:
    """A server with NIXL that listens on a Unix socket. Whoever made it closes it, after which nothing that it has started is left.

    `within` puts a command into the network that it runs in, which is `namespaced` where it is a side of a link.
    """

    def __init__(
        self,
        role: str,
        spec: VllmSpec,
        socket: Path,
        log: Path,
        *,
        host: str,
        side_port: int,
        namespaced: bool,
        cores: Collection[int],
        within: Callable[[list[str]], list[str]] = list,
    ) -> None:
        self.socket, self._log = socket, log
        python = interpreter(Path(spec.environment), "options.environment")
        argv = instance_command(python, Path(spec.checkpoint), socket, spec.most_tokens, spec.most_logprobs)
        tried = run(within(confined(["true"], namespaced=namespaced)), timeout_s=20)
        #: Why it has no process namespace of its own, so that the engine is trusted to end what it has started; empty where it has.
        self.unconfined = "" if tried.returncode == 0 else " ".join(tried.stderr.split())
        argv = (
            remote_memory.started("nixl", tied(argv), namespaced=namespaced)
            if self.unconfined
            else confined(argv, namespaced=namespaced)
        )
        device = HOST_END if namespaced else None
        self.child = Child(
            role,
            within(argv),
            environment={**instance_environment(host, side_port, spec.core, device), _MARK: str(socket)},
            stderr=log,
            channel=False,
            # Any core: the engine binds its computing thread itself.
            cores=cores,
        )

    def wait(self, deadline_s: float, timeout_s: float) -> None:
        """Wait until it answers, up to a moment of CLOCK_MONOTONIC, which is `timeout_s` after its start.

        Raises:
            EngineRefusedError: where it ends instead.
            UserError: where it does not answer in time.
        """
        while not answers_at(self.socket):
            if (reason := self.refusal()) is not None:
                raise EngineRefusedError(reason)
            if time.monotonic() > deadline_s:
                raise UserError(
                    f"engines: {self.child.role} does not answer within {timeout_s:g} s; its log is {self._log}"
                )
            time.sleep(_LOOK_S)

    def refusal(self) -> str | None:
        """Why it has ended, in its own words; None while it runs."""
        if self.child.ended is None:
            return None
        log = self._log.read_text(errors="replace")
        return f"{self.child.role} {self.child.ended.how}: {reason_of(log) or 'its log says nothing'}"

    def close(self) -> None:
        """End it and all that it started."""
        self.child.kill()


def reason_of(log: str) -> str:
    """The line of an engine's log that says why it ended: the first error named in it that is a reason, else its last line."""
    errors = [match[1] for line in log.splitlines() if (match := _ERROR_LINE.search(line))]
    reasons = [line for line in errors if not any(part in line for part in _NO_REASON)]
    if reasons:
        return reasons[-1].strip()[:300]
    lines = log.strip().splitlines()
    return lines[-1].strip()[:300] if lines else ""


def processes_of(folder: Path) -> int:
    """Processes that live of servers whose sockets are in that folder, whatever they call themselves."""
    mark, found = f"{_MARK}={folder}/".encode(), 0
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            found += any(entry.startswith(mark) for entry in environment.read_bytes().split(b"\0"))
    return found
