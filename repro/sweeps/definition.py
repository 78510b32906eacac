"""What a sweep is: its axes, and one set of words of the command line for each of its points.

The words are Hydra's: `link.rate_bps=1e9,2e9` or `seed=range(4)` is an axis, anything else holds for all points, and a named sweep is a
file of conf/sweep whose `hydra.sweeper.params` are such words. What the user says of a key stands in place of what the file says.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repro.composition import explain, forced, register
from repro.errors import UserError
from repro.presets import CONF
from repro.settings import PRESENTATION
from repro.sweeps import launcher_nodes


@dataclass(frozen=True)
class Axis:
    """A key and the values that it takes, as they were written."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Sweep:
    """Every combination of the axes' values, the last axis fastest; `words` hold for all points.

    `how` are the words that say how it is run, `launcher` is Hydra's node of that name.
    """

    name: str | None
    axes: tuple[Axis, ...]
    words: tuple[str, ...]
    how: tuple[str, ...]
    launcher: Mapping[str, Any]
    folder: Path

    @property
    def points(self) -> list[tuple[str, ...]]:
        """The words of each point, its own after the common ones."""
        varied = [[f"{axis.key}={value}" for value in axis.values] for axis in self.axes]
        return [(*self.words, *self.how, *own) for own in itertools.product(*varied)]

    def corners(self) -> list[tuple[str, ...]]:
        """Points in which every value of every axis stands at least once; the whole grid could be thousands."""
        longest = max((len(axis.values) for axis in self.axes), default=1)
        return [
            (
                *self.words,
                *self.how,
                *(f"{axis.key}={axis.values[min(index, len(axis.values) - 1)]}" for axis in self.axes),
            )
            for index in range(longest)
        ]

    def record(self) -> dict[str, Any]:
        """Plain values for the sweep's own record."""
        return {
            "kind": "sweep",
            "sweep": self.name,
            "axes": {plain_key(axis.key): list(axis.values) for axis in self.axes},
            "words": list(self.words),
            "points": len(self.points),
        }


def plain_key(key: str) -> str:
    """An axis's key without Hydra's signs."""
    return key.lstrip("+")


def read(words: Sequence[str]) -> Sweep:
    """The sweep that these words of the command line describe, all of them overrides.

    Raises:
        UserError: naming the word that is wrong.
    """
    from hydra import compose, initialize_config_dir
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    name = _name(words)
    running = [word for word in words if word.startswith("hydra")]
    chosen = [f"sweep={name}"] if name else []
    register()
    launcher_nodes.register()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            hydra: Any = compose("config", overrides=[*chosen, *running], return_hydra_config=True).hydra
            sweeper: Any = OmegaConf.to_container(hydra.sweeper, resolve=True)
            launcher: Any = OmegaConf.to_container(hydra.launcher, resolve=True)
        parser = OverridesParser.create()
        given = [word for word in words if not word.startswith("hydra")]
        all_words = [*(f"{key}={value}" for key, value in (sweeper["params"] or {}).items()), *map(_readable, given)]
        # Through Hydra's own sweeper, so that a word means here what it means there.
        parsed = parser.parse_overrides(all_words)
        overriding = {override.get_key_element().lstrip("+"): override for override in parsed}
        first: dict[str, Any] = {}
        for override in parsed:
            key = override.get_key_element().lstrip("+")
            first.setdefault(key, overriding[key])
        axes, fixed = [], []
        for override in first.values():
            (jobs,) = BasicSweeper.split_arguments([override], None)
            if override.is_sweep_override():
                values = tuple(job[0].partition("=")[2] for job in jobs)
                axes.append(Axis(override.get_key_element(), values))
            else:
                fixed.append(jobs[0][0] if not override.is_delete() else str(override.input_line))
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error)) from error
    for axis in axes:
        if plain_key(axis.key).split(".")[0] in PRESENTATION:
            raise UserError(f"{plain_key(axis.key)}: several values make no difference; accepted: one value")
    # How a sweep is run and shown names no other sweep.
    how = tuple(word for word in fixed if re.split(r"[.=]", word.lstrip("+"))[0] in PRESENTATION)
    words = tuple(word for word in fixed if word not in how)
    return Sweep(name, tuple(axes), words, how, launcher, _folder(name, axes, words, fixed, running))


def _readable(word: str) -> str:
    """A word that Hydra's parser takes: a key with blanks only in its forced form, which holds no axis."""
    return word if re.fullmatch(r"[\w.+~@/:-]+", word.partition("=")[0]) else forced(word)


def _name(words: Sequence[str]) -> str | None:
    names = [word.partition("=")[2] for word in words if word.startswith("sweep=")]
    if not names or names[-1] in ("null", ""):
        return None
    if "," in names[-1]:
        raise UserError(f"sweep: {names[-1]} are several sweeps; accepted: one")
    return names[-1]


def _folder(
    name: str | None, axes: Sequence[Axis], words: Sequence[str], fixed: Sequence[str], running: Sequence[str]
) -> Path:
    """A sweep's folder is named by what it runs, so that the same words find it again."""
    given = dict(word.split("=", 1) for word in [*fixed, *running] if "=" in word)
    if "hydra.sweep.dir" in given:
        return Path(given["hydra.sweep.dir"].strip("'\""))
    digest = hashlib.sha256(
        json.dumps([[[axis.key, axis.values] for axis in axes], sorted(map(str, words))]).encode()
    ).hexdigest()[:12]
    experiments = [word.partition("=")[2] for word in words if word.startswith("experiment=")]
    title = name or (experiments[0] if experiments else "sweep")
    return Path(given.get("results", "results").strip("'\""), "sweeps", f"{title}-{digest}")
