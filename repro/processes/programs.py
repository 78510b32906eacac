"""Programs that are not ours, run to their end: captured, or in the foreground of the terminal. They die with this process."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import IO

from repro.processes.starter import started


def run(
    argv: Sequence[str],
    *,
    timeout_s: float | None = None,
    environment: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    output: IO[str] | None = None,
    cores: Collection[int] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a program with no input to its end and return what it said, unless `output` is a file that takes both streams.

    `environment` replaces this process's own. Put `tied` around the innermost program, inside of wrappers such as `nsenter`.

    Raises:
        subprocess.TimeoutExpired: after `timeout_s`; its process group is then gone.
    """
    process = started(
        argv,
        cores,
        stdin=subprocess.DEVNULL,
        stdout=output or subprocess.PIPE,
        stderr=subprocess.STDOUT if output else subprocess.PIPE,
        env=dict(environment) if environment is not None else None,
        cwd=cwd,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout_s)
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    return subprocess.CompletedProcess(
        argv, process.returncode, (out or b"").decode(errors="replace"), (err or b"").decode(errors="replace")
    )


def foreground(argv: Sequence[str]) -> int:
    """Run a program on this process's terminal, Ctrl-C included, and return its status."""
    process = started(argv)
    try:
        return process.wait()
    except BaseException:
        process.kill()
        process.wait()
        raise
