"""The files of `conf/`: where they are, which choices a group has, and one choice read alone.

Everything that needs a value of `conf/` outside a composed experiment (a model's layers by name, a link for the `link` tool) reads it
here, through Hydra, so that a file means the same wherever it is read: numbers, defaults lists and the folders of `--config-dir`.
"""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

from repro.errors import UserError

#: In a checkout `conf/` stands at the top; a wheel carries it as `repro/conf`.
CONF = next(
    folder
    for folder in (Path(__file__).resolve().parents[1] / "conf", Path(__file__).resolve().parent / "conf")
    if (folder / "config.yaml").is_file()
)

#: Groups whose files change the whole configuration; the others fill the node of their name.
GLOBAL_GROUPS = ("experiment", "sweep", "bench", "tier")


#: Benchmarks are experiments of a group of their own: `bench=link` runs what is called `bench_link`.
_BENCH = "bench_"


def choice_of(name: str) -> tuple[str, str]:
    """The group and the choice in `conf/` that run the experiment of that name."""
    return ("bench", name.removeprefix(_BENCH)) if name.startswith(_BENCH) else ("experiment", name)


def typed(name: str) -> str:
    """The word of the command line that chooses the experiment of that name."""
    return "=".join(choice_of(name))


def runs() -> list[str]:
    """The names of all experiments and benchmarks."""
    return [*choices("experiment"), *(f"{_BENCH}{choice}" for choice in choices("bench"))]


@cache
def groups() -> list[str]:
    """The groups of `conf/`, without Hydra's own."""
    return sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name != "hydra")


@cache
def choices(group: str) -> dict[str, str]:
    """Every choice of a group and the line that says what it is, from the comments at the head of its file."""
    found = {}
    for path in sorted((CONF / group).glob("*.yaml")):
        comments = [
            line[1:].strip() for line in path.read_text(encoding="utf-8").splitlines()[:4] if line.startswith("#")
        ]
        found[path.stem] = next((line for line in comments if not line.startswith("@package")), "")
    return found


def preset(group: str, choice: str) -> dict[str, Any]:
    """The values of one choice of a group as plain dictionaries, lists and numbers; read once.

    Raises:
        UserError: naming the choices that exist.
    """
    return copy.deepcopy(_read(group, choice))


@cache
def _read(group: str, choice: str) -> dict[str, Any]:
    """One choice's file.

    Raises:
        UserError: naming the choices that exist.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import MissingConfigException
    from omegaconf import OmegaConf

    try:
        if GlobalHydra.instance().is_initialized():
            composed = compose(f"{group}/{choice}")
        else:
            with initialize_config_dir(str(CONF), version_base="1.3"):
                composed = compose(f"{group}/{choice}")
    except MissingConfigException as error:
        raise UserError(f"{group}: {choice!r} does not exist; accepted: {', '.join(choices(group))}") from error
    values: Any = OmegaConf.to_container(composed, resolve=False)
    for name in (
        (group, choice) if group == "model" else (group,)
    ):  # the node that the file's package puts its values in
        values = values[name]
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}
