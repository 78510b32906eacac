"""The published architectures as state layouts, without torch: what Tables 3 and 5 need of a model.

A layout is read from the same YAML that builds the model (conf/model), so the analytic tiers and the executed ones
cannot disagree. It takes milliseconds, where importing transformers takes two seconds.
"""

from __future__ import annotations

from repro.models import spec
from repro.models.layout import StateLayout, layout_from_config


def layout_of(name: str, size: str = "full") -> StateLayout:
    """The state layout of a model of conf/model. Raises UserError naming the models that are known."""
    model = spec.load(name, size)
    return layout_from_config(model.model_type, model.values(), model.dtype)
