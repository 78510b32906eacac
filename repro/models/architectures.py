"""The published architectures as state layouts, without torch: what Tables 3 and 5 need of a model.

A layout is read from the same YAML that builds the model (conf/model), so the analytic tiers and the executed ones
cannot disagree. It takes milliseconds, where importing transformers takes two seconds.
"""

from __future__ import annotations

from dataclasses import replace

from repro.models import spec
from repro.models.layout import StateLayout, layout_from_config
from repro.models.spec import ModelSpec


def layout_of(model: str | ModelSpec, size: str = "full") -> StateLayout:
    """The state layout of a model of conf/model, or of a specification, at that size. Raises UserError naming the models that are known."""
    found = spec.load(model, size) if isinstance(model, str) else replace(model, size=size)
    return layout_from_config(found.model_type, found.values(), found.dtype, found.kv_dtype)
