"""Upload what was mirrored offline to W&B; what is there already is left alone: sync [<folder> …]."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from repro.arguments import Parser
from repro.errors import UserError


def main(argv: list[str]) -> int:
    """Sync every offline run below the folders; the exit code is 1 where one could not be uploaded."""
    parser = Parser(prog="sync", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folders", type=Path, nargs="*", metavar="FOLDER", default=[Path("results")])
    parser.add_argument(
        "--again", action="store_true", help="runs that were uploaded before, too; their ids stay the same"
    )
    options: argparse.Namespace = parser.parse_args(argv)
    found = sorted({path for folder in options.folders for path in offline(folder)})
    if not found:
        names = ", ".join(map(str, options.folders))
        raise UserError(f"{names}: holds no offline run; accepted: a folder below which runs ran with tracking=offline")
    failed = 0
    for path in found:
        if uploaded(path) and not options.again:
            print(f"{path}: is there already", file=sys.stderr)
            continue
        failed += not _sync(path)
    print(f"{len(found) - failed} of {len(found)} runs are at W&B", file=sys.stderr)
    return 1 if failed else 0


def offline(folder: Path) -> list[Path]:
    """W&B's logs of offline runs in or below a folder."""
    return sorted(folder.rglob("offline-run-*/run-*.wandb"))


def uploaded(path: Path) -> bool:
    """Whether W&B marked a log as uploaded."""
    return path.with_name(path.name + ".synced").is_file()


def _sync(path: Path) -> bool:
    data = path.parents[1]
    places = {
        "WANDB_DIR": data, "WANDB_DATA_DIR": data, "WANDB_CACHE_DIR": data / "cache", "WANDB_CONFIG_DIR": data / "config",
    }  # fmt: skip
    environment = os.environ | {name: str(place.resolve()) for name, place in places.items()}
    command = [sys.executable, "-m", "wandb", "sync", "--include-synced", str(path.parent)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode or not uploaded(path):
        words = " ".join((done.stderr or done.stdout).split())
        print(f"{path}: not uploaded: {words[-300:]}", file=sys.stderr)
        return False
    print(f"{path}: uploaded", file=sys.stderr)
    return True
