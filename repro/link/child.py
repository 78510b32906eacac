"""A helper process of a link, spoken to in JSON lines; it lives no longer than the pipe to its owner.

The pipe is the leash: whatever ends the owner, SIGKILL included, closes it, and the helper reads the end of its input
and leaves. (A parent-death signal would not do here: Linux ties it to the *thread* that started the child.)
"""

from __future__ import annotations

import contextlib
import json
import selectors
import subprocess
import sys
import tempfile
import threading
from typing import IO, Any, cast

from repro.errors import UserError
from repro.link.leftovers import marked

_GRACE_S = 3.0


class Child:
    """`python -m module`, started and spoken to. Safe to use from several threads; each question has one answer."""

    def __init__(self, module: str, run: str, first: dict[str, Any], timeout_s: float = 20.0) -> None:
        """Start it, send `first`, and keep its answer as `hello`.

        Raises:
            UserError: with the helper's last line if it ends instead of answering.
        """
        self._name = module.rpartition(".")[2]
        self._lock = threading.Lock()
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=marked(run),
            start_new_session=True,  # Ctrl-C belongs to the owner, who closes the link in order
        )
        try:
            self.hello = self.ask(first, timeout_s)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """The helper's process number."""
        return self._process.pid

    def ask(self, question: dict[str, Any], timeout_s: float = 10.0) -> dict[str, Any]:
        """One question, one answer. Raises UserError if the helper is gone, refuses, or takes too long."""
        with self._lock:
            try:
                stdin = cast(IO[str], self._process.stdin)
                stdin.write(json.dumps(question) + "\n")
                stdin.flush()
                line = self._line(timeout_s)
            except (BrokenPipeError, ValueError):
                line = ""
        if not line:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(1.0)
            raise UserError(f"link: its {self._name} process ended ({self._last_words() or self._process.returncode})")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise UserError(str(answer["error"]))
        return answer

    def close(self) -> None:
        """End the helper and everything that it holds; done when it is reaped."""
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                cast(IO[str], pipe).close()
        try:
            self._process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def _line(self, timeout_s: float) -> str:
        stdout = cast(IO[str], self._process.stdout)
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            if not selector.select(timeout_s):
                raise UserError(f"link: its {self._name} process did not answer within {timeout_s:g} s")
        return stdout.readline()

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""
