"""Which model, at which size: the `model` group of the configuration (Table 1, and the model of §4.1).

One file in conf/model holds one architecture at three sizes. `full` is the public configuration and is only ever built
without weights; `single_gpu` keeps the layers' widths and fits one 141 GB GPU; `tiny` runs on two cores and keeps
kinds, order and ratio of the layers. Nothing here needs torch: the analytic tiers read these files too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final

from repro.configuration import build
from repro.errors import UserError
from repro.models.layout import ITEMSIZE
from repro.presets import choices, preset

SIZES: Final = ("full", "single_gpu", "tiny")
_LAYER_LETTERS: Final = {"F": "full_attention", "L": "linear_attention", "S": "sliding_attention"}


@dataclass(frozen=True)
class ModelSpec:
    """A model by its transformers configuration.

    `config` holds fields common to all sizes and `sizes` those of each; every other field keeps the default of its
    transformers class. The field `layers`, a word like "LLLF*6 LLF", stands for `layer_types`. With `pretrained` (a hub
    id or a folder) the checkpoint's own configuration is used. `parameters` is what the publisher states.
    """

    name: str
    model_type: str = ""
    size: str = "tiny"
    title: str = ""
    linear: str = "-"
    full: str = "-"
    parameters: float = 0.0
    baseline: str | None = None
    dtype: str = "bfloat16"
    seed: int = 0
    pretrained: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.dtype not in ITEMSIZE:
            raise UserError(f"model.dtype: {self.dtype!r} is not one of {', '.join(ITEMSIZE)}")
        if self.sizes and self.size not in self.sizes:
            raise UserError(f"model.size: {self.size!r} is not one of {', '.join(self.sizes)} (model {self.name})")
        if not self.model_type:
            raise UserError(f"model.model_type: missing for model {self.name}; a transformers model type, or auto")

    def values(self) -> dict[str, Any]:
        """The configuration fields of this size, `layers` written out."""
        values = {**self.config, **self.sizes.get(self.size, {})}
        if (word := values.pop("layers", None)) is not None:
            values["layer_types"] = layer_types(word)
            values["num_hidden_layers"] = len(values["layer_types"])
        return values


def layer_types(word: str) -> list[str]:
    """Layer types of a word: F full, L linear, S sliding; "LLLF*6 LLF" is six times LLLF, then LLF.

    Raises:
        UserError: for any other letter or form.
    """
    letters = ""
    for part in word.split():
        match = re.fullmatch(r"([FLS]+)(?:\*(\d+))?", part)
        if match is None:
            raise UserError(f"layers: {part!r} is not letters of F, L, S with an optional *count")
        letters += match[1] * int(match[2] or 1)
    return [_LAYER_LETTERS[letter] for letter in letters]


@cache
def names() -> list[str]:
    """The architectures that have a file in conf/model and sizes of their own."""
    return [name for name in choices("model") if "sizes" in preset("model", name)]


def load(name: str, size: str = "tiny") -> ModelSpec:
    """The specification in conf/model of that name, at that size. Raises UserError naming what is accepted."""
    return build(ModelSpec, {**preset("model", name), "size": size}, "model")
