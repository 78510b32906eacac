"""Whether what the kit does with a model is what the model itself does: every model goes through it once, when it is built.

The kit prefills in chunks, takes the state away layer by layer, puts it together elsewhere and goes on there. A family that counts
positions for itself, that uses earlier state for single tokens only, or that keeps state outside its cache would answer something
else without an error. So short prompts are computed in this way, in one chunk and in many with a last chunk of 1 and of 2 tokens,
and logits and state are held against the model's own `generate` and one whole forward pass. What is exact in one chunk only is
served in one; what is not even that is refused, with the reason.

A model that is small enough is checked in a float32 copy, where rounding hides nothing; a large one as it is.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, cast

import torch

from repro.engine.reference import Reference, generate, logits_error, tolerance_of
from repro.errors import UserError
from repro.kvcache.capture import LayerwiseCapture
from repro.kvcache.prefix import grows
from repro.kvcache.state import State, extract, restore
from repro.models.prefill import chunked_prefill, forward, new_cache

_CHUNK: Final = 8
#: Greatest model, in float32, of which a copy is made to check it in.
_COPY_BYTES: Final = 512 << 20
#: Greatest window that a prompt is made long enough for.
_WINDOW: Final = 256
_FAILURES: Final = (ValueError, TypeError, NotImplementedError, AttributeError, RuntimeError, IndexError, KeyError)


@dataclass(frozen=True)
class Admission:
    """A model that is served exactly, and how: in chunks, or each prompt in one, then for `reason`.

    `logits_error` is the greatest difference from `generate`'s logits in the way that it is served, in their standard deviations;
    `state_error` that of the state from one whole pass's, in units of its greatest element. Both were found in `dtype`, and are
    within `tolerance`.
    """

    chunked: bool
    reason: str
    logits_error: float
    state_error: float
    tolerance: float
    dtype: str

    def record(self) -> dict[str, Any]:
        """Plain values for a run's record."""
        return asdict(self)


class _Errors:
    """The greatest errors seen."""

    def __init__(self) -> None:
        self.logits, self.state = 0.0, 0.0

    def add(self, logits: float = 0.0, state: float = 0.0) -> None:
        """Take what one comparison found; NaN is greater than all."""
        self.logits, self.state = _worst([self.logits, logits]), _worst([self.state, state])

    def within(self, tolerance: float) -> bool:
        """Whether all of it is."""
        return self.logits <= tolerance and self.state <= tolerance


def admit(model: torch.nn.Module) -> Admission:
    """Check a model. Raises UserError with the reason where it cannot be split exactly."""
    name = type(model).__name__
    with seen_clearly(model) as checked, torch.no_grad(), _reported(name):
        tolerance, dtype = tolerance_of(checked), str(next(checked.parameters()).dtype).removeprefix("torch.")
        trial = _Trial(checked)
        whole = trial.in_one_chunk()
        if not trial.causality_error() <= tolerance:
            raise UserError("is not causal: the state of earlier tokens changes with those that come later")
        if not whole.within(tolerance):
            raise UserError(trial.why_not(tolerance))
        try:
            parts = trial.in_chunks()
        except (UserError, *_FAILURES) as error:
            reason = f"does not run in chunks: {_first_line(error)}"
            return Admission(False, reason, whole.logits, whole.state, tolerance, dtype)
    if not parts.within(tolerance):
        reason = "uses earlier state rightly for single tokens only: a prompt in chunks gives other logits and state"
        return Admission(False, reason, whole.logits, whole.state, tolerance, dtype)
    parts.add(whole.logits, whole.state)
    return Admission(True, "", parts.logits, parts.state, tolerance, dtype)


def _worst(errors: Sequence[float]) -> float:
    return math.nan if any(math.isnan(error) for error in errors) else max(errors)


@contextmanager
def seen_clearly(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """A float32 copy where that is affordable, else the model itself."""
    parameter = next(model.parameters())
    is_plain = not getattr(model, "hf_device_map", None) and not getattr(model, "is_quantized", False)
    nbytes = 4 * sum(one.numel() for one in model.parameters())
    if parameter.dtype is torch.float32 or not is_plain or nbytes > _COPY_BYTES:
        yield model
    else:
        yield copy.deepcopy(model).float()


class _Trial:
    """A model, a prompt and what `generate` answers to it; the ways to compute the same.

    The prompt of n + 1 tokens is answered with three. State of n tokens must give all three, and state of n + 1 the second and third:
    one reference serves a last chunk of 1 and of 2 tokens. A prompt of 2 tokens, whose state is that of one, comes beside it.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model, self._config = model, cast(Any, model.config)
        self._chunk = _chunk_of(model)
        self._tokens = 2 * self._chunk + 1
        self._short, self._ids = _prompt(model, 2), _prompt(model, self._tokens + 1)
        self._short_reference, self._reference = generate(model, self._short, 2), generate(model, self._ids, 3)
        self._whole: dict[int, list[State]] = {}

    def in_one_chunk(self) -> _Errors:
        """One whole pass whose state goes through capture and restore, then single tokens."""
        errors = _Errors()
        short = self._restored(self._short[:, :1], 1)
        errors.add(self._decoded(short, self._short, self._short_reference))
        for tokens in (self._tokens, self._tokens + 1):
            there = self._restored(self._ids[:, :tokens], tokens)
            self._whole[tokens] = _copied(extract(there, self._config, tokens))
            errors.add(self._decoded_from(there, tokens))
        return errors

    def causality_error(self) -> float:
        """How far the state of the first n tokens differs where one more was computed with them."""
        before, after = (
            [state for state in self._whole[tokens] if grows(state.kind)] for tokens in (self._tokens, self._tokens + 1)
        )
        return _state_error(before, [_cut(state, self._tokens) for state in after])

    def in_chunks(self) -> _Errors:
        """As `in_one_chunk`, in three chunks, the last of 1 and of 2 tokens; the state against that of one pass."""
        errors = _Errors()
        for tokens in (self._tokens, self._tokens + 1):
            there = self._restored(self._ids[:, :tokens], self._chunk)
            errors.add(state=_state_error(self._whole[tokens], extract(there, self._config, tokens)))
            errors.add(self._decoded_from(there, tokens))
        return errors

    def why_not(self, tolerance: float) -> str:
        """Why a model is not exact in one chunk: it is another computation from the start, or its state is lost on the way."""
        for ids, reference in ((self._short, self._short_reference), (self._ids, self._reference)):
            cache, _ = chunked_prefill(self._model, ids[:, :-1], ids.shape[1])
            error = self._decoded(cache, ids, reference)
            if not error <= tolerance:
                return (
                    f"a pass with a cache and positions is not what its generate computes: after {ids.shape[1] - 1} tokens logits "
                    f"differ by {error:.2g} standard deviations (tolerance {tolerance:g})"
                )
        return f"keeps state outside its cache: with that of the cache alone logits differ by more than {tolerance:g}"

    def _restored(self, ids: torch.Tensor, chunk_tokens: int) -> Any:
        cache, states, tokens = new_cache(self._model), list[State](), ids.shape[1]
        # Views of memory that the next chunk may overwrite: copied, as an engine does.
        with LayerwiseCapture(self._model, cache, lambda state: states.extend(_copied([state]))) as capture:
            chunked_prefill(self._model, ids, chunk_tokens, cache, on_chunk=capture.chunk)
        extract(cache, self._config, tokens)  # raises where a layer keeps its state elsewhere
        return restore(states, self._config, tokens, ids.device)

    def _decoded_from(self, cache: Any, tokens: int) -> float:
        """Of state of all the prompt the first step has been taken already: the token that it gave is the last of the prompt."""
        if tokens < self._ids.shape[1]:
            return self._decoded(cache, self._ids, self._reference)
        first = torch.tensor([[self._reference.tokens[0]]], device=self._ids.device)
        rest = Reference(self._reference.tokens[1:], self._reference.logits[1:])
        return self._decoded(cache, torch.cat([self._ids, first], dim=1), rest)

    def _decoded(self, cache: Any, ids: torch.Tensor, reference: Reference) -> float:
        """Greatest difference of the logits after the last token of `ids` and after those that the reference chose."""
        fed, errors = [int(ids[0, -1]), *reference.tokens[:-1]], []
        for at, (token, expected) in enumerate(zip(fed, reference.logits, strict=True)):
            step = torch.tensor([[token]], device=ids.device)
            errors.append(logits_error(expected, forward(self._model, step, cache, ids.shape[1] - 1 + at)[0]))
        return _worst(errors)


def _chunk_of(model: torch.nn.Module) -> int:
    """Chunks of which two reach beyond the model's windows, where these are short enough."""
    layers = getattr(new_cache(model), "layers", ())
    windows = [int(layer.sliding_window) for layer in layers if getattr(layer, "sliding_window", None)]
    return max(_CHUNK, max([window for window in windows if window <= _WINDOW], default=0) // 2 + 1)


def _prompt(model: torch.nn.Module, tokens: int) -> torch.Tensor:
    vocabulary = int(cast(Any, model).get_input_embeddings().num_embeddings)
    ids = torch.randint(vocabulary // 8, vocabulary, (1, tokens), generator=torch.Generator().manual_seed(tokens))
    return ids.to(next(model.parameters()).device)


def _cut(state: State, tokens: int) -> State:
    axis = state.kind.token_axis
    return state if axis is None else replace(state, tensor=state.tensor.narrow(axis, 0, tokens))


def _copied(states: Iterable[State]) -> list[State]:
    return [replace(state, tensor=state.tensor.clone()) for state in states]


def _state_error(expected: list[State], found: list[State]) -> float:
    """Greatest difference of two lists of states, each in units of its greatest element; infinite where their shapes differ."""
    errors = [0.0]
    for one, other in zip(expected, found, strict=False):
        same = (one.layer, one.kind, one.slot, one.tensor.shape) == (
            other.layer,
            other.kind,
            other.slot,
            other.tensor.shape,
        )
        if not same or len(expected) != len(found):
            return math.inf
        if one.tensor.numel():
            scale = one.tensor.float().abs().max().clamp_min(1e-30)
            errors.append(float((one.tensor.float() - other.tensor.float()).abs().max() / scale))
    return _worst(errors)


@contextmanager
def _reported(name: str) -> Iterator[None]:
    """Whatever is wrong with a model as one line that names it."""
    try:
        yield
    except UserError as error:
        text = str(error)
        raise UserError(text if text.startswith("model ") else f"model {name}: {text}") from None
    except _FAILURES as error:
        raise UserError(f"model {name}: does not run with transformers' DynamicCache: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
