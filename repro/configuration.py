"""From YAML to frozen values: the one boundary between Hydra and the library.

Every component keeps a frozen dataclass beside itself. Hydra needs mutable schemas, so a mutable twin is derived from each and
registered in the ConfigStore; nobody writes a schema twice. What Hydra composed is converted once, by `build`, into the frozen values
that the library uses, and nothing behind it knows of OmegaConf.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import re
import types
import typing
from collections.abc import Mapping
from functools import cache, partial
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from repro.errors import UserError

T = TypeVar("T")


@cache
def _hints(spec: Any) -> dict[str, Any]:
    """A spec's types by field, resolved once."""
    return get_type_hints(spec)


class Value:
    """A frozen dataclass that keeps cached properties: only its fields are pickled, and the rest is derived anew where it arrives."""

    def __getstate__(self) -> dict[str, Any]:
        return {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}  # type: ignore[arg-type]


@cache
def twin(spec: type) -> type:
    """A mutable dataclass with the fields of the frozen one, for Hydra's ConfigStore; nested specs become twins as well."""
    hints = _hints(spec)
    fields: list[tuple[str, Any, Any]] = []
    for item in dataclasses.fields(spec):
        value: Any
        if item.default is not dataclasses.MISSING:
            value = _mutable(item.default)
        elif item.default_factory is not dataclasses.MISSING:
            value = _mutable(item.default_factory())
        else:
            value = "???"  # OmegaConf's mark of a mandatory value
        fields.append(
            (item.name, _twin_type(hints[item.name]), dataclasses.field(default_factory=partial(copy.deepcopy, value)))
        )
    # A parallel launcher pickles the ConfigStore: by this name a worker finds the twin through `__getattr__` below.
    place = {"__module__": __name__, "__qualname__": f"{spec.__module__}:{spec.__name__}".replace(".", "/")}
    return dataclasses.make_dataclass(spec.__name__, fields, namespace=place)


def __getattr__(name: str) -> Any:
    module, separator, spec = name.rpartition(":")
    if not separator:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return twin(getattr(importlib.import_module(module.replace("/", ".")), spec))


def _mutable(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return twin(type(value))(**{f.name: _mutable(getattr(value, f.name)) for f in dataclasses.fields(value)})
    if isinstance(value, tuple):
        return [_mutable(item) for item in value]
    return value


def _twin_type(hint: Any) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        return twin(typing.cast(type, hint))
    if origin is typing.Literal:
        return str
    if origin in (Union, types.UnionType):
        inner = [argument for argument in arguments if argument is not type(None)]
        return typing.Optional[_twin_type(inner[0])]  # noqa: UP045 - built at run time
    if origin is tuple:
        return typing.List[_twin_type(arguments[0])]  # type: ignore[misc] # noqa: UP006
    if origin in (dict, Mapping):
        return typing.Dict[str, _twin_type(arguments[1])]  # type: ignore[misc] # noqa: UP006
    return hint


def build(spec: type[T], values: Mapping[str, Any], key: str = "") -> T:
    """The frozen `spec` from plain YAML values.

    Raises:
        UserError: naming the full key, for a key that does not exist, a missing value or a wrong type, or from the spec's own checks.
            A spec that fills several nodes says with `NODE` which of them its own checks name, in place of which `key` is named.
    """
    assert dataclasses.is_dataclass(spec)
    hints = _hints(spec)
    known = {item.name: item for item in dataclasses.fields(spec)}
    unknown = [name for name in values if name not in known]
    if unknown:
        raise UserError(f"{_join(key, unknown[0])}: no such key; accepted: {', '.join(sorted(known))}")
    arguments: dict[str, Any] = {}
    for name, item in known.items():
        where = _join(key, name)
        if name in values:
            arguments[name] = _convert(hints[name], values[name], where)
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            raise UserError(f"{where}: no value given; accepted: {_describe(hints[name])}")
    try:
        return typing.cast(T, spec(**arguments))
    except UserError as error:
        usual = getattr(spec, "NODE", None)
        if usual is None or not str(error).startswith(f"{usual}."):
            raise
        raise UserError(key + str(error).removeprefix(usual)) from error


def rebuilt(value: T, changes: Mapping[str, Any]) -> T:
    """The frozen value with some of its fields built anew from plain YAML values.

    Raises:
        UserError: as `build`.
    """
    hints = _hints(typing.cast(Any, type(value)))
    fields = {name: _convert(hints[name], change, name) for name, change in changes.items()}
    return typing.cast(T, dataclasses.replace(typing.cast(Any, value), **fields))


def plain(value: Any) -> Any:
    """The inverse of `build`: nested dictionaries and lists of plain values, as they go to YAML and JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def accepted(spec: type, key: str) -> str:
    """What the dotted `key` below `spec` may hold, in words."""
    hint: Any = spec
    for name in re.findall(r"[^.\[\]]+", key):
        if get_origin(hint) in (Union, types.UnionType):
            hint = next(argument for argument in get_args(hint) if argument is not type(None))
        if dataclasses.is_dataclass(hint):
            hint = _hints(typing.cast(Any, hint)).get(name, Any)
        elif get_args(hint):
            hint = get_args(hint)[0 if get_origin(hint) is tuple else -1]
    return _describe(hint)


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _describe(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is typing.Literal:
        return ", ".join(map(repr, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join("null" if argument is type(None) else _describe(argument) for argument in arguments)
    if origin is tuple:
        return f"a list of {_describe(arguments[0])}"
    if dataclasses.is_dataclass(hint):
        return f"keys {', '.join(item.name for item in dataclasses.fields(hint))}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text", Any: "any value"}.get(
        hint, str(hint)
    )


def _convert(hint: Any, value: Any, key: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    wrong = UserError(f"{key}: {value!r} does not fit; accepted: {_describe(hint)}")
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise wrong
        return build(typing.cast(type, hint), value, key)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        for argument in arguments:
            if argument is type(None):
                continue
            try:
                return _convert(argument, value, key)
            except UserError:
                if len(arguments) == 2:  # Optional: the inner message says more
                    raise
        raise wrong
    if origin is typing.Literal:
        if value not in arguments:
            raise wrong
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise wrong
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_convert(arguments[0], item, f"{key}[{i}]") for i, item in enumerate(value))
        if len(value) != len(arguments):
            raise wrong
        return tuple(
            _convert(argument, item, f"{key}[{i}]")
            for i, (argument, item) in enumerate(zip(arguments, value, strict=True))
        )
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise wrong
        return {str(name): _convert(arguments[1], item, f"{key}.{name}") for name, item in value.items()}
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if hint in (int, str, bool) and type(value) is hint:
        return value
    raise wrong
