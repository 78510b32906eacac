"""A run's directory, and the rule when a run counts as done.

`results/<experiment>/<label>-<hash>/` is named by the hash of its configuration, so a sweep can be cut and called again: a finished run is
skipped, a failed or cut one is run again (a study goes on from its finished points). `DONE` is written last and atomically and holds the
digest of the code that ran; nothing else (no file's mere existence, no tracker's state) says that a run is finished.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import pandas as pd
import yaml

from repro.errors import UserError, writing
from repro.record import metrics, provenance, secrets
from repro.record.metrics import Metric
from repro.record.requests import validate

#: Records that are committed, and from which the figures are drawn.
REFERENCE = Path("results") / "reference"


#: A sweep reads and writes thousands of configurations; libyaml takes a tenth of the time.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_DUMPER: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def configuration_hash(configuration: Mapping[str, Any], inputs: Iterable[Path] = ()) -> str:
    """Twelve hex digits over the resolved configuration and the contents of the files that it names."""
    digest = hashlib.sha256(json.dumps(configuration, sort_keys=True).encode())
    for path in inputs:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]


class BusyError(UserError):
    """Another process is writing this run directory."""


@dataclass(frozen=True)
class Record:
    """A finished run, read-only: what figures, comparisons and reports are made from."""

    path: Path

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """metrics.csv."""
        return metrics.read(self.path / "metrics.csv")

    @cached_property
    def requests(self) -> pd.DataFrame:
        """requests.parquet, one row per request."""
        return pd.read_parquet(self.path / "requests.parquet")

    def table(self, name: str) -> pd.DataFrame:
        """A series that a figure draws, saved by the run as tables/<name>.csv."""
        return pd.read_csv(self.path / "tables" / f"{name}.csv")

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """provenance.json."""
        return dict(json.loads((self.path / "provenance.json").read_text()))

    @cached_property
    def configuration(self) -> dict[str, Any]:
        """config.yaml."""
        return dict(yaml.load((self.path / "config.yaml").read_text(), Loader=_LOADER))


class RunDirectory:
    """The directory of one run while it is being written; hold it with `begin`, end it with `complete` or `fail`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None

    def finished(self) -> bool:
        """Whether this configuration has run to its end with the code as it is now."""
        try:
            done = json.loads((self.path / "DONE").read_text())
        except (OSError, ValueError):
            return False
        return isinstance(done, dict) and bool(done.get("source_digest") == provenance.source_digest())

    def begin(self, configuration: Mapping[str, Any], command: list[str], seeds: dict[str, int]) -> None:
        """Take the directory, clear what a failed or cut run left, and write what is known before the run.

        Raises:
            BusyError: if another process is running the same configuration.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._take()
        (self.path / "DONE").unlink(missing_ok=True)  # first: a removal that is cut must not leave it among ruins
        if self.path.exists():
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True)
        with writing(self.path):
            written = yaml.dump(secrets.redacted(dict(configuration)), Dumper=_DUMPER, sort_keys=False)
            (self.path / "config.yaml").write_text(written)
        self._write_json(
            "provenance.json", provenance.collect(command, seeds), durable=False
        )  # written anew before DONE

    def write_metrics(self, rows: Iterable[Metric]) -> None:
        """metrics.csv."""
        with writing(self.path):
            metrics.frame(rows).to_csv(self.path / "metrics.csv", index=False, float_format="%.10g")

    def write_requests(self, requests: pd.DataFrame) -> None:
        """requests.parquet. Raises ValueError where the table does not fit the schema."""
        validate(requests)
        with writing(self.path):
            requests.to_parquet(self.path / "requests.parquet", index=False)

    def write_table(self, name: str, table: pd.DataFrame) -> None:
        """tables/<name>.csv."""
        folder = self.path / "tables"
        with writing(self.path):
            folder.mkdir(exist_ok=True)
            table.to_csv(folder / f"{name}.csv", index=False, float_format="%.10g")

    def add_provenance(self, extra: Mapping[str, Any]) -> None:
        """What is known only after the run: its end, and what it measured of its surroundings."""
        known = json.loads((self.path / "provenance.json").read_text())
        self._write_json("provenance.json", {**known, **extra, "end": provenance.now()})

    def complete(self) -> Record:
        """Close the record: `DONE` is written last."""
        self._write_json("DONE", {"source_digest": provenance.source_digest(), "end": provenance.now()})
        self._release()
        return Record(self.path)

    def fail(self, error: BaseException, detail: Mapping[str, Any] | None = None) -> None:
        """Say what went wrong in FAILED.json; the next call with this configuration runs it again."""
        if self._lock is not None and self.path.exists():
            failure = {"type": type(error).__name__, "message": str(error), "end": provenance.now(), **(detail or {})}
            with contextlib.suppress(UserError, OSError):  # a disk that is full takes no more of this either
                self._write_json("FAILED.json", failure)
        self._release()

    def _write_json(self, name: str, value: Mapping[str, Any], *, durable: bool = True) -> None:
        partial = self.path / f".{name}.partial"
        try:
            with writing(self.path), partial.open("w") as file:
                json.dump(secrets.redacted(value), file, indent=1)
                file.write("\n")
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            partial.replace(self.path / name)
        finally:
            partial.unlink(missing_ok=True)

    @property
    def _lock_path(self) -> Path:
        return self.path.parent / f".{self.path.name}.lock"

    def _take(self) -> None:
        lock = self._lock_path.open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held it may have removed the file between our open and our lock: then it guards nothing.
            if not self._lock_path.exists() or not os.path.samestat(os.fstat(lock.fileno()), self._lock_path.stat()):
                raise BlockingIOError
        except BlockingIOError as error:
            lock.close()
            raise BusyError(
                f"{self.path}: another process is running this configuration; wait for it or stop it"
            ) from error
        self._lock = lock

    def _release(self) -> None:
        if self._lock is not None:
            self._lock_path.unlink(missing_ok=True)  # while it is held: a later one would be another's
            self._lock.close()
            self._lock = None
