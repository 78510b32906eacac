"""Weights & Biases: a mirror of the record, never a part of it.

Everything W&B writes stays under the run directory, offline by default. It runs in a process of its own, which loads while the experiment
runs and gets a bounded time at the end: whatever goes wrong with the tracker, a hang or a crash included, is one line on stderr,
because the record is complete without it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from repro.errors import UserError
from repro.processes import Child, ChildEndedError
from repro.record.directory import Record


@dataclass(frozen=True)
class TrackingSpec:
    """Whether and where a run is mirrored: `offline` writes files that `wandb sync` can upload later.

    `init_timeout_s` bounds the wait for the service, `timeout_s` the whole mirroring at the end of a run.
    """

    mode: Literal["offline", "online", "disabled"] = "offline"
    project: str = "prfaas-repro"
    entity: str | None = None
    init_timeout_s: float = 20.0
    timeout_s: float = 120.0

    def __post_init__(self) -> None:
        for key in ("init_timeout_s", "timeout_s"):
            if not getattr(self, key) > 0:
                raise UserError(f"tracking.{key}: {getattr(self, key)} is not positive")


class Mirror:
    """The tracker's process, from the start of a run to its end; use it as a context, and `log` once.

    Nothing is left of it when the run is killed.
    """

    def __init__(self, spec: TrackingSpec, folder: Path) -> None:
        self._spec = spec
        self._folder = folder
        self._tracker: Child | None = None

    def load(self) -> None:
        """Start loading W&B beside the run. Not where times are measured: there it waits until `log`."""
        if self._tracker is not None or self._spec.mode == "disabled":
            return
        data = (self._folder / "wandb").resolve()
        # W&B takes its folders from the environment only; without these, artifacts are staged in the user's home.
        places = {"WANDB_DATA_DIR": data, "WANDB_CACHE_DIR": data / "cache", "WANDB_CONFIG_DIR": data / "config"}
        environment = {name: str(path) for name, path in places.items()} | {
            "WANDB_SILENT": "true",
            "WANDB_CONSOLE": "off",
        }
        self._tracker = Child(
            "tracker",
            [sys.executable, "-m", "repro.record.mirroring"],
            environment=environment,
            stderr="inherited",
        )

    def log(self, record: Record, configuration: dict[str, Any], figures: Sequence[Path]) -> None:
        """Hand over a finished run and wait until it is mirrored, or until that takes too long."""
        self.load()
        if self._tracker is None:
            return
        try:
            self._tracker.ask(
                "log",
                self._spec.timeout_s,
                record=str(record.path),
                configuration=configuration,
                figures=[str(path) for path in figures],
                spec=asdict(self._spec),
            )
        except ChildEndedError as error:
            _complain(self._spec.mode, str(error))
        except UserError:
            _complain(self._spec.mode, f"gave up after {self._spec.timeout_s:g} s")

    def __enter__(self) -> Mirror:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tracker is not None:
            self._tracker.kill()


def _complain(mode: str, reason: str) -> None:
    print(f"tracking={mode}: {reason}; the record is complete without it", file=sys.stderr)
