"""Which kernels ran, by what was called: a package that could be imported may still not be what a model used."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final

#: Packages of kernels, and where transformers keeps what it falls back to.
_PACKAGES: Final = ("fla", "flash_attn", "causal_conv1d", "mamba_ssm", "kernels", "xformers", "transformers.integrations",
                    "transformers.models")  # fmt: skip
_WORDS: Final = (
    "attention",
    "attn",
    "delta",
    "conv",
    "scan",
    "recurrent",
    "lightning",
    "kda",
    "gla",
    "ssd",
    "experts",
    "mm",
)


@contextmanager
def kernels_called() -> Iterator[set[str]]:
    """The functions of attention, linear attention, convolution and experts that this thread calls inside, as `module.function`.

    It slows Python down: for a pass that is not timed.
    """
    found: set[str] = set()

    def look(frame: FrameType, event: str, _: Any) -> None:
        if event != "call" or "." in frame.f_code.co_qualname:  # methods call the functions that are meant
            return
        module, name = str(frame.f_globals.get("__name__", "")), frame.f_code.co_name
        in_packages = any(module == package or module.startswith(f"{package}.") for package in _PACKAGES)
        if in_packages and any(word in name for word in _WORDS) and "mask" not in name:
            found.add(f"{module}.{name}")

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        yield found
    finally:
        sys.setprofile(before)
