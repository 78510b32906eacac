"""A model whose weights mean something, for studies that judge its answers: the configured checkpoint, else one trained once on bytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from repro.errors import UserError
from repro.experiments.base import Context
from repro.experiments.split_model import check_one
from repro.experiments.table3 import one_model
from repro.settings import Settings

if TYPE_CHECKING:
    import torch

    from repro.models.train import TrainSpec


def check_trained(settings: Settings, options: object) -> None:
    """One model that can be trained or loaded. Raises UserError naming the key."""
    check_one(settings, options)
    model = one_model(settings)
    if model.pretrained is None and model.values().get("vocab_size", 0) < 256:
        raise UserError(
            f"model: {model.name} has a vocabulary below 256; accepted: one to be trained on bytes, as bytes, or pretrained=<folder>"
        )


def trained_model(context: Context, training: TrainSpec) -> tuple[torch.nn.Module, torch.Tensor]:
    """The model, and the tokens that its training never saw, [tokens]. A checkpoint of the same training is found again."""
    from repro.models.build import build  # torch and transformers: two seconds that a figure does not need
    from repro.models.train import Corpus, checkpoint_of

    spec = one_model(context.settings)
    if spec.pretrained is None:
        folder = Path(context.settings.results) / "checkpoints"
        spec = replace(spec, pretrained=str(checkpoint_of(folder, training, spec.name, context.progress)))
    return build(spec), Corpus.of().held_out
