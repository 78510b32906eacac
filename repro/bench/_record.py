"""Where a benchmark's result is kept: a run directory like any other, with the machine and the code that it was measured on."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path

from repro.record.directory import RunDirectory


@contextlib.contextmanager
def recorded(
    bench: str, name: str, arguments: argparse.Namespace, argv: list[str], seeds: dict[str, int]
) -> Iterator[RunDirectory]:
    """`<results>/bench_<bench>/<name>` while the benchmark runs: complete at the end, failed on any error; prints its path last."""
    directory = RunDirectory(Path(arguments.results) / f"bench_{bench}" / name)
    directory.begin({**vars(arguments), "results": str(arguments.results)}, ["bench", bench, *argv], seeds)
    try:
        yield directory
    except BaseException as error:
        directory.fail(error)
        raise
    directory.complete()
    print(directory.path)
