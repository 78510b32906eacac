"""From words of the command line to the settings of one run, with the keys that somebody set.

Hydra composes `conf/`; this is the one place that turns the result into frozen settings. Beside them stand the keys that were *asked*:
those of the command line, and those that the experiment's file sets. What is asked must be read by the experiment
(`repro.experiments.base`), so that no key is ever ignored.
"""

from __future__ import annotations

import contextlib
import math
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from repro.configuration import build, plain, rebuilt
from repro.errors import UserError
from repro.presets import CONF, choice_of, groups
from repro.settings import Settings

_SCHEMA = "settings_schema"
#: Groups that choose what runs and fill no node of their own.
_CHOOSERS = ("experiment", "sweep", "bench", "tier")

#: Nodes whose keys are the user's own: any may be set.
_OPEN_NODES = ("cost.usd_per_gpu_hour",)


@dataclass(frozen=True)
class Composition:
    """The settings of one run, the keys that were set for it (dotted; a group's name for a choice of it), and the words that did it."""

    settings: Settings
    asked: tuple[str, ...]
    words: tuple[str, ...] = ()


def register() -> None:
    """Put the schema of the whole configuration into Hydra's ConfigStore."""
    from hydra.core.config_store import ConfigStore

    from repro.configuration import twin

    ConfigStore.instance().store(name=_SCHEMA, node=twin(Settings))


def forced(word: str) -> str:
    """The override in the form that Hydra takes for a key that no file names, a name with blanks included.

    An experiment's own options may be set whether its file names them or leaves them at their defaults: the schema knows them all,
    Hydra only the file.
    """
    if word.startswith("options."):
        return f"++{word}"
    key, _, value = word.partition("=")
    for node in _OPEN_NODES:
        if key.startswith(f"{node}."):
            name = "".join(
                f"\\{letter}" if letter in "\\()[]{}:=, \t" else letter for letter in key.removeprefix(f"{node}.")
            )
            return f"++{node}={{{name}:{value}}}"
    return word


def compose(words: Sequence[str]) -> Composition:
    """The run that these words ask for, composed in this process; a part of a composite, or a test.

    Raises:
        UserError: naming the key that is wrong.
    """
    from hydra import compose as composed_by_hydra
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    register()
    words = list(map(forced, words))
    try:
        if GlobalHydra.instance().is_initialized():
            return of(composed_by_hydra("config", overrides=words), words)
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return of(composed_by_hydra("config", overrides=words), words)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error)) from error


@dataclass
class _Chosen:
    """What a set of choices composes to: as Hydra has it, as plain values, and as a run, where it is one without further values.

    `accepted` are keys with the types of value that OmegaConf takes for them as they are.
    """

    pickled: bytes
    values: Mapping[str, Any]
    base: Composition | None
    accepted: set[tuple[str, type]] = field(default_factory=set)

    def composed(self, own: Sequence[str]) -> Any:
        """Hydra's configuration with these values of the command line."""
        from hydra._internal.config_loader_impl import ConfigLoaderImpl

        composed = pickle.loads(self.pickled)  # a third of the time of a deep copy
        ConfigLoaderImpl._apply_overrides_to_config([_parsed(word) for word in own], composed)
        return composed

    def learn(self, own: Sequence[str], settings: Settings) -> None:
        """Note which values came out as they went in, but for whole numbers that became numbers."""
        values = plain(settings)
        for word in own:
            key, value = _assignment(word)
            if key is not None and (type(value), type(_at(values, key))) in _UNCHANGED:
                self.accepted.add((key, type(value)))

    def quick(self, own: Sequence[str], words: Sequence[str]) -> Composition | None:
        """The run with these values, where OmegaConf has accepted such ones before; only nodes that they change are built anew."""
        if self.base is None:
            return None
        values = dict(self.values)
        for word in own:
            key, value = _assignment(word)
            if key is None or (key, type(value)) not in self.accepted:
                return None
            _refuse_infinite(value, key)
            values = _with(values, key.split("."), value)
        touched = {name: value for name, value in values.items() if value is not self.values.get(name)}
        settings = rebuilt(self.base.settings, touched)
        asked = dict.fromkeys([*_asked_by_words(words), *self.base.asked])
        return Composition(settings, tuple(key for key in asked if key.split(".")[0] not in _CHOOSERS), tuple(words))


_SCALARS = (type(None), bool, int, float, str)
_UNCHANGED = {*((kind, kind) for kind in _SCALARS), (int, float)}
#: Keys on which others depend.
_ENTANGLED = (*_CHOOSERS, "name", "model", "size", "pretrained")


def _assignment(word: str) -> tuple[str | None, Any]:
    """The key and value of a word that does nothing but give a key below a node a number, a text or null; else no key."""
    override = _parsed(word)
    key = str(override.key_or_group)
    if override.is_delete() or not re.fullmatch(r"\w+(\.\w+)*", key) or key.split(".")[0] in _ENTANGLED:
        return None, None
    value = override.value()
    return (key, value) if type(value) in _SCALARS else (None, None)


def _at(values: Any, key: str) -> Any:
    for name in key.split("."):
        values = values.get(name) if isinstance(values, Mapping) else None
    return values


def _with(values: Mapping[str, Any], names: Sequence[str], value: Any) -> dict[str, Any]:
    first, *rest = names
    return {**values, first: _with(values.get(first) or {}, rest, value) if rest else value}


@contextlib.contextmanager
def composer() -> Iterator[Callable[[Sequence[str]], Composition]]:
    """A `compose` for many runs that differ in values: within, files are read once for each set of choices.

    Hydra applies the values of the command line last, to what the files gave; so what the files gave can serve every run that chooses
    the same files. Values like those that were accepted before are put in without asking OmegaConf again, which takes most of the time of
    a run without a clock. A test holds it against `compose`.
    """
    from hydra import compose as composed_by_hydra
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    register()
    chosen: dict[tuple[str, ...], _Chosen] = {}

    def one(words: Sequence[str]) -> Composition:
        words = list(map(forced, words))
        try:
            choosing = tuple(word for word in words if _chooses(word))
            own = [word for word in words if word not in choosing]
            if choosing not in chosen:
                composed = composed_by_hydra("config", overrides=list(choosing))
                values: Any = OmegaConf.to_container(composed, resolve=True)
                base = None
                with contextlib.suppress(UserError):  # values may be needed before it is a run
                    base = of(composed, choosing)
                chosen[choosing] = _Chosen(pickle.dumps(composed), values, base)
            known = chosen[choosing]
            if (found := known.quick(own, words)) is not None:
                return found
            found = of(known.composed(own), words)
            known.learn(own, found.settings)
            return found
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(explain(error)) from error

    with contextlib.ExitStack() as stack:
        if not GlobalHydra.instance().is_initialized():
            stack.enter_context(initialize_config_dir(str(CONF), version_base="1.3"))
        yield one


@cache
def _parsed(word: str) -> Any:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create().parse_override(word)


def _chooses(word: str) -> bool:
    """Whether a word chooses a file, or is more than a value."""
    override = _parsed(word)
    key = override.key_or_group
    return key in groups() or "/" in key or "@" in word or override.is_delete() or key.startswith("hydra.")


def of(composed: Any, words: Iterable[str]) -> Composition:
    """From what Hydra composed, while Hydra is initialised, and the words that were given.

    Raises:
        UserError: naming the key that is wrong.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        values = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(_one_line(error)) from error
    assert isinstance(values, dict)
    words = tuple(words)
    asked = _asked_by_words(words)
    if "bench" in asked and "experiment" in asked and not _chosen(words, "bench") == "null":
        raise UserError(
            f"bench: {_chosen(words, 'bench')!r} beside experiment={_chosen(words, 'experiment')}; accepted: one of the two"
        )
    plain = {str(key): value for key, value in values.items()}
    _refuse_infinite(plain)
    plain["model"] = _models(plain, asked)
    settings = build(Settings, plain)
    everything = dict.fromkeys([*asked, *_asked_by_file(words, settings.name)])
    return Composition(settings, tuple(key for key in everything if key.split(".")[0] not in _CHOOSERS), words)


def _refuse_infinite(value: Any, key: str = "") -> None:
    """No quantity of the configuration may be infinite or no number: null is what stands for no limit.

    Raises:
        UserError: naming the key.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(
            f"{key}: {value} is no finite number; accepted: a finite number, or null where the key takes it"
        )
    if isinstance(value, Mapping):
        for name, item in value.items():
            _refuse_infinite(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _refuse_infinite(item, f"{key}[{index}]")


def _models(values: Mapping[str, Any], asked: Sequence[str]) -> dict[str, Any]:
    """The `model` node with `size` and `pretrained` in each model; a checkpoint without a `model=` beside it stands alone."""
    models: dict[str, Any] = dict(values.get("model") or {})
    size, pretrained = values.get("size", "tiny"), values.get("pretrained")
    if pretrained is not None and "model" not in asked:
        name = Path(str(pretrained)).name or str(pretrained)
        models = {name: {"name": name, "model_type": "auto"}}
    if pretrained is not None and len(models) != 1:
        raise UserError(
            f"pretrained: {pretrained!r} is one checkpoint, and model={list(models)} are {len(models)} models; "
            "accepted: one model, or none, which takes the checkpoint's own"
        )
    for name, model in models.items():
        given = {"size": size, "pretrained": pretrained}
        models[name] = {**model, **{key: value for key, value in given.items() if f"model.{name}.{key}" not in asked}}
    return models


def _asked_by_words(words: Iterable[str]) -> list[str]:
    found = []
    for word in words:
        override = _parsed(word)
        key = str(override.key_or_group).replace("/", ".")
        value = override.value()
        if key in _OPEN_NODES and isinstance(value, dict):
            found += [f"{key}.{name}" for name in value]
        elif not key.startswith("hydra"):
            found.append(key)
    return found


def _asked_by_file(words: Iterable[str], name: str) -> list[str]:
    """Keys that the experiment's file sets, and groups that it chooses, as they stand in the file."""
    own, choice = choice_of(name)
    return _set_by_file(own, _chosen(words, own) or choice)


@cache
def _set_by_file(group: str, choice: str) -> list[str]:
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import DictConfig

    loader: Any = GlobalHydra.instance().config_loader()
    file = loader.repository.load_config(f"{group}/{choice}")
    if file is None:
        return []
    found = [key for key in _leaves(file.config) if key != "name"] if isinstance(file.config, DictConfig) else []
    for default in file.defaults_list or []:
        if other := getattr(default, "group", None):
            found.append(str(other).strip("/"))
    return [key for key in found if not key.startswith("hydra")]


def _chosen(words: Iterable[str], group: str) -> str | None:
    """The choice of a group that the words make, the last one where there are several."""
    found = [word.partition("=")[2] for word in words if word.lstrip("+").startswith(f"{group}=")]
    return found[-1] if found else None


def _leaves(node: Any, key: str = "") -> list[str]:
    from omegaconf import DictConfig

    if isinstance(node, DictConfig) and len(node):
        return [
            leaf for name in map(str, node) for leaf in _leaves(node._get_node(name), f"{key}.{name}" if key else name)
        ]
    return [key]


def explain(error: BaseException) -> str:
    """Hydra's and OmegaConf's messages in one line that names the key, the value and what is accepted."""
    from hydra.errors import MissingConfigException, OverrideParseException
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError

    from repro.configuration import accepted

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MissingConfigException) and cause.missing_cfg_file and cause.options:
            group, _, choice = str(cause.missing_cfg_file).rpartition("/")
            return f"{group}: {choice!r} does not exist; accepted: {', '.join(cause.options)}"
        if isinstance(cause, OverrideParseException):
            return f"{cause.override}: cannot be read as key=value ({_one_line(cause).split(' See https')[0]})"
        if isinstance(cause, OmegaConfBaseException) and cause.full_key:
            key = str(cause.full_key)
            if isinstance(cause, (ConfigAttributeError, ConfigKeyError)):
                return f"{key}: no such key; accepted: {', '.join(_siblings(cause))}"
            if isinstance(cause, ValidationError):
                return f"{key}: {str(cause).splitlines()[0]}; accepted: {accepted(Settings, key)}"
        cause = cause.__cause__
    return _one_line(error)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _siblings(error: Any) -> list[str]:
    from omegaconf import DictConfig

    parent = error.parent_node
    return sorted(map(str, parent.keys())) if isinstance(parent, DictConfig) else [*groups(), "see --cfg job"]
