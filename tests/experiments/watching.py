"""Settings that note which of their keys are read."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

#: Reads that are no use of a value: copying, comparing, showing and checking a frozen dataclass.
_NO_USE = ("replace", "__post_init__", "__init__", "__eq__", "__hash__", "__repr__")


class Watch:
    """Collects the dotted keys that are read from what `of` returns."""

    def __init__(self) -> None:
        self.read: set[str] = set()

    def of(self, value: Any, key: str = "") -> Any:
        """The same value, watched."""
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            watched = object.__new__(self._class(type(value), key))
            for item in dataclasses.fields(value):
                inner = self.of(getattr(value, item.name), f"{key}.{item.name}" if key else item.name)
                object.__setattr__(watched, item.name, inner)
            return watched
        if isinstance(value, Mapping) and any(dataclasses.is_dataclass(item) for item in value.values()):
            return {name: self.of(item, f"{key}.{name}") for name, item in value.items()}
        return value

    def _class(self, spec: type, key: str) -> type:
        names = {item.name for item in dataclasses.fields(spec)}
        read = self.read

        def __getattribute__(self: Any, name: str) -> Any:  # noqa: N807
            value = object.__getattribute__(self, name)
            if name in names and not dataclasses.is_dataclass(value) and sys._getframe(1).f_code.co_name not in _NO_USE:
                read.add(f"{key}.{name}" if key else name)
            return value

        def __reduce__(self: Any) -> Any:  # noqa: N807
            # Sent to another process: whoever gets it may read all of it.
            return spec, tuple(getattr(self, item.name) for item in dataclasses.fields(spec))

        members = {"__getattribute__": __getattribute__, "__reduce__": __reduce__}
        return type(spec.__name__, (spec,), members)
