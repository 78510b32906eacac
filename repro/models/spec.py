"""Which model, at which size: the `model` group of the configuration (Table 1, and the model of §4.1).

One file in conf/model holds one architecture at three sizes. `full` is the public configuration and is only ever built
without weights; `single_gpu` keeps the layers' widths and fits one 141 GB GPU; `tiny` runs on two cores and keeps
kinds, order and ratio of the layers. Nothing here needs torch: the analytic tiers read these files too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final

from repro.configuration import build
from repro.errors import UserError
from repro.models.layout import ITEMSIZE, KV_ITEMSIZE
from repro.presets import choices, preset

SIZES: Final = ("full", "single_gpu", "tiny")
#: Letters of a layer word: full, linear and sliding attention, sparse by an indexer (I, D); of Nemotron-H, Mamba-2, attention, experts; of
#: DeepSeek-V4, compressed (C) and heavily compressed (H).
_LAYER_LETTERS: Final = {
    "F": "full_attention", "L": "linear_attention", "S": "sliding_attention", "I": "minimax_m3_sparse",
    "D": "indexed_attention", "M": "mamba", "A": "attention", "E": "moe",
    "C": "compressed_sparse_attention", "H": "heavily_compressed_attention",
}  # fmt: skip
_INDEXER_LETTERS: Final = {"F": "full", "S": "shared"}


@dataclass(frozen=True)
class ModelSpec:
    """A model by its transformers configuration.

    `config` holds fields common to all sizes and `sizes` those of each; every other field keeps the default of its
    transformers class. The field `layers`, a word like "LLLF*6 LLF", stands for `layer_types`, and `indexers` in the same
    way for `indexer_types`. With `pretrained` (a hub
    id or a folder) the checkpoint's own configuration is used. `parameters` is what the publisher states, `published` the month
    of a model that is younger than the paper. `kv_dtype` is a quantised KVCache's, which only sizes are computed of.
    A `layout_only` model has no class in transformers, or one whose cache the kit does not ship: its state is known, it is not built.
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
    kv_dtype: str | None = None
    published: str = ""
    layout_only: bool = False
    seed: int = 0
    pretrained: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.dtype not in ITEMSIZE:
            raise UserError(f"model.dtype: {self.dtype!r} is not one of {', '.join(ITEMSIZE)}")
        if self.kv_dtype is not None and self.kv_dtype not in KV_ITEMSIZE:
            raise UserError(f"model.kv_dtype: {self.kv_dtype!r} is not one of {', '.join(KV_ITEMSIZE)}, or null")
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
        if (word := values.pop("indexers", None)) is not None:
            values["indexer_types"] = written_out(word, _INDEXER_LETTERS, "indexers")
        return values


def layer_types(word: str) -> list[str]:
    """Layer types of a word: F full, L linear, S sliding, …; "LLLF*6 LLF" is six times LLLF, then LLF.

    Raises:
        UserError: for any other letter or form.
    """
    return written_out(word, _LAYER_LETTERS, "layers")


def written_out(word: str, letters: Mapping[str, str], key: str) -> list[str]:
    """The names behind the letters of a word whose parts may have a count: "LLLF*6 LLF".

    Raises:
        UserError: naming the key, for any other letter or form.
    """
    found = ""
    for part in word.split():
        match = re.fullmatch(rf"([{''.join(letters)}]+)(?:\*(\d+))?", part)
        if match is None:
            raise UserError(f"{key}: {part!r} is not letters of {', '.join(letters)} with an optional *count")
        found += match[1] * int(match[2] or 1)
    return [letters[letter] for letter in found]


@cache
def names() -> list[str]:
    """The architectures of the paper: those of conf/model that have sizes of their own and are not younger than it."""
    return [name for name in _sized() if not preset("model", name).get("published")]


@cache
def names_of_today() -> list[str]:
    """The models of conf/model that were published since the paper, or that it does not name."""
    return [name for name in _sized() if preset("model", name).get("published")]


def _sized() -> list[str]:
    return [name for name in choices("model") if "sizes" in preset("model", name)]


def load(name: str, size: str = "tiny") -> ModelSpec:
    """The specification in conf/model of that name, at that size. Raises UserError naming what is accepted."""
    return build(ModelSpec, {**preset("model", name), "size": size}, "model")
