"""Workers that start in tenths of a second: forked from a process that has imported torch and every model once.

A worker of the kit spends five seconds on imports before it does anything, which no matrix of cases can afford. Here the
command that a `System` starts on a side of the link is a small process that hands its pipes and its namespaces to the
one that is warm already, which forks a worker into them. What runs there is the worker as it is, in a process of its own,
on its own side of the link; it ends with its command and with the warm process.

    with WarmWorkers(folder) as warm, open_link(spec, run="…") as link:
        with System(engine, transport, warm.on(link), logs) as system: …
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_ANY_NAMESPACE = 0


class WarmWorkers:
    """The process that is forked from; a context manager."""

    def __init__(self, folder: Path) -> None:
        self._address = folder / "warm"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen([sys.executable, __file__, "fork", self._address], env=environment)

    def on(self, link: Any) -> WarmLink:
        """The link, with warm workers on its sides."""
        while not self._address.exists():
            assert self._process.poll() is None, "the warm process ended at its start"
            time.sleep(0.05)
        return WarmLink(link, self._address)

    def __enter__(self) -> WarmWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


class WarmLink:
    """A link whose workers are forked instead of started. All else is the link's own."""

    def __init__(self, link: Any, address: Path) -> None:
        self._link = link
        self._address = address

    def __getattr__(self, name: str) -> Any:
        return getattr(self._link, name)

    def command(self, side: str, argv: Sequence[str]) -> list[str]:
        assert argv[-1] == f"repro.serving.{side}"
        return list(self._link.command(side, [sys.executable, "-S", __file__, "worker", str(self._address), side]))


def run_in_warm_process(address: str, side: str) -> None:
    """The command that stands for a worker: lends its pipes and namespaces, and ends with the worker."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        namespaces = [os.open(f"/proc/self/ns/{kind}", os.O_RDONLY) for kind in ("user", "net")]
        socket.send_fds(connection, [side.encode()], [0, 1, 2, *namespaces])
        connection.recv(1)


def fork_workers(address: str) -> None:
    """Warm up, then fork a worker for each connection, for ever."""
    from dataclasses import replace

    from repro.models import spec as models
    from repro.models.build import build
    from repro.processes import die_with_parent
    from repro.serving import decode, prefill

    die_with_parent()
    for name in models.names():
        model = models.load(name, "tiny")
        build(replace(model, parameters=float(model.parameters)), "cpu")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{address}.new")
        listener.listen()
        Path(f"{address}.new").rename(address)  # whoever sees it can connect
        while True:
            connection, _ = listener.accept()
            side, descriptors, _, _ = socket.recv_fds(connection, 64, 5)
            if os.fork() == 0:
                listener.close()
                _become({"prefill": prefill.work, "decode": decode.work}[side.decode()], connection, descriptors)
            for descriptor in descriptors:
                os.close(descriptor)
            connection.close()


def _become(work: Any, connection: socket.socket, descriptors: Sequence[int]) -> None:
    from repro.processes import run_worker

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number, descriptor in enumerate(descriptors[:3]):
        os.dup2(descriptor, number)
    libc = ctypes.CDLL(None, use_errno=True)
    for kind, namespace in zip(("user", "net"), descriptors[3:], strict=True):
        if os.fstat(namespace).st_ino != Path(f"/proc/self/ns/{kind}").stat().st_ino:
            assert libc.setns(namespace, _ANY_NAMESPACE) == 0, os.strerror(ctypes.get_errno())
    for descriptor in descriptors:
        os.close(descriptor)

    def end_with_the_command() -> None:
        connection.recv(1)
        os._exit(1)

    threading.Thread(target=end_with_the_command, daemon=True).start()
    run_worker(work)


if __name__ == "__main__":
    {"worker": run_in_warm_process, "fork": fork_workers}[sys.argv[1]](*sys.argv[2:])
