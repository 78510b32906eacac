"""The model's own `generate` as the reference of every other way to compute it, and how near to it a run must come.

Tokens are a poor witness: two logits may be equal but for rounding (a tie), and a state that was lost may leave the greatest logit where
it was. So logits are compared, step by step until the first token that differs, in units of their standard deviation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from transformers import GenerationConfig

from repro.errors import UserError
from repro.models.prefill import chunked_prefill, greedy_decode

#: Greatest difference of a logit that the order of sums explains, in standard deviations of the logits. On CPU the greatest seen over
#: the families of docs/models.md and the models of conf/model is a fifth of it or less.
TOLERANCE: Final[Mapping[torch.dtype, float]] = {torch.float32: 2e-5, torch.float16: 0.03, torch.bfloat16: 0.1}
#: Kernels of accelerators multiply float32 with 10 bits of mantissa (TF32) unless told otherwise, as float16 has.
_TOLERANCE_TF32: Final = 0.03


def tolerance_of(model: torch.nn.Module) -> float:
    """The tolerance of a model's dtype and device."""
    parameter = next(model.parameters())
    tolerance = TOLERANCE.get(parameter.dtype, TOLERANCE[torch.bfloat16])
    return tolerance if parameter.device.type == "cpu" else max(tolerance, _TOLERANCE_TF32)


@dataclass(frozen=True)
class Reference:
    """What `generate` answered to a prompt: tokens, and the logits [steps, vocabulary] that chose them, float32 on the host."""

    tokens: tuple[int, ...]
    logits: torch.Tensor


@torch.no_grad()
def generate(model: torch.nn.Module, ids: torch.Tensor, steps: int) -> Reference:
    """`steps` greedy tokens of the model's own `generate` after `ids` [1, n], whatever token ends a text.

    Raises UserError for a model that has no `generate`, or whose `generate` fails.
    """
    generator = cast(Any, model)
    if not getattr(generator, "can_generate", lambda: False)():
        raise UserError(f"model {type(model).__name__}: has no generate to compare with")
    asked = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=steps,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    # A checkpoint's own settings (penalties, sampling, tokens that end a text) would be filled in: they are not greedy decoding.
    own = generator.generation_config
    generator.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        found = generator.generate(ids, attention_mask=torch.ones_like(ids), generation_config=asked)
    except (ValueError, TypeError, NotImplementedError, AttributeError, RuntimeError, IndexError, KeyError) as error:
        raise UserError(f"model {type(model).__name__}: its generate fails: {_first_line(error)}") from error
    finally:
        generator.generation_config = own
    logits = torch.cat([step[:1].float().cpu() for step in found.logits])
    return Reference(tuple(found.sequences[0, ids.shape[1] :].tolist()), logits)


def answer(model: torch.nn.Module, ids: torch.Tensor, steps: int, chunk_tokens: int) -> Reference:
    """`steps` greedy tokens after `ids` [1, n] as the kit computes them in one process: prefill in chunks, then one token at a time.

    Every sum has the order that it has in a split run, so on a CPU both give the same bits.
    """
    cache, _ = chunked_prefill(model, ids[:, :-1], chunk_tokens)
    tokens, logits = greedy_decode(model, cache, ids[:, -1], steps, ids.shape[1] - 1)
    return Reference(tuple(tokens[0].tolist()), logits[0].float().cpu())


@dataclass(frozen=True)
class Agreement:
    """How a run's answer compares with the reference's, up to the first token that differs.

    `logits_error` is the greatest difference of a logit in standard deviations of the reference's; `tolerance` what the precision
    explains of it. `ties` is 1 where the token that differs was as good within the tolerance: what follows it is another text.
    `unsplit_error` is the same difference from an unsplit run of equal chunks, in which every sum has the same order: it may be
    `unsplit_tolerance`, 0 on a CPU, and shows a lost state that a low precision would hide. None where there is no such run.
    """

    logits_error: float
    tolerance: float
    compared_steps: int
    same_tokens: bool
    ties: int
    unsplit_error: float | None = None
    unsplit_tolerance: float = 0.0

    @property
    def matches(self) -> bool:
        """Whether the run computed what the model computes."""
        is_unsplits = self.unsplit_error is None or self.unsplit_error <= self.unsplit_tolerance
        return is_unsplits and self.logits_error <= self.tolerance  # a NaN never is


def compare(reference: Reference, tokens: Sequence[int], logits: Sequence[torch.Tensor], tolerance: float) -> Agreement:
    """Hold the tokens and logits [vocabulary] of a run's steps against the reference's; of a run ended early, as far as it came."""
    worst, compared, same = 0.0, 0, True
    for expected, token, row, found in zip(reference.tokens, tokens, reference.logits, logits, strict=False):
        worst = _greater(worst, logits_error(row, found))
        compared += 1
        if token != expected:
            same = False
            break
    return Agreement(worst, tolerance, compared, same, int(not same and worst <= tolerance))


def logits_error(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Greatest difference of two tensors in standard deviations of the first; infinite where shapes differ, NaN where a value is."""
    if expected.shape != found.shape:
        return float("inf")
    difference = (found.detach().float().cpu() - expected.float()).abs().max()
    return float(difference / expected.float().std().clamp_min(1e-30))


def _greater(one: float, other: float) -> float:
    """The greater of two errors; NaN is greater than all."""
    return one if one >= other or one != one else other


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
