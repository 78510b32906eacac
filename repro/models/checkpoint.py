"""A checkpoint of somebody's own as `pretrained=`: whether it is one, and which of its files decide what a run computes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from repro.errors import UserError
from repro.models.spec import ModelSpec

#: `owner/name` or `name`, as a model hub writes it.
_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


def check_checkpoint(source: str) -> None:
    """Refuse what cannot be a checkpoint: a path that is no folder with a config.json, or a text that no hub takes as an id.

    Raises:
        UserError: naming `pretrained`.
    """
    folder = Path(source).expanduser()
    accepted = "accepted: a folder with config.json and weights, or a model hub's id, owner/name"
    if folder.exists():
        if not (folder / "config.json").is_file():
            raise UserError(f"pretrained: {source} has no config.json; {accepted}")
    elif not _HUB_ID.fullmatch(source) or source.startswith((".", "~")):
        raise UserError(f"pretrained: {source} does not exist; {accepted}")


def checkpoint_files(models: Mapping[str, ModelSpec]) -> list[Path]:
    """The files of local checkpoints, whose contents belong to a run's hash: another file under the same name is another run."""
    folders = [Path(model.pretrained) for model in models.values() if model.pretrained]
    wanted = (".json", ".safetensors", ".bin")
    return [path for folder in folders if folder.is_dir() for path in sorted(folder.iterdir()) if path.suffix in wanted]
