"""Layer-wise prefill: each layer's state leaves as soon as the layer has computed the chunk (§3.3).

Hooks on the decoder layers do it, the model's code is untouched. After a layer has run on a chunk, what the chunk added
to its per-token states is final and is emitted at once; recurrent and convolution states and sliding windows change
with every chunk, so they follow with the last one, and at checkpoints that a prefix cache asks for (§3.2). The order is
that of the chunks, then of the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from repro.errors import UserError
from repro.kvcache.state import Cache, State, check_cache, config_values, extract_layer

Emit = Callable[[State], None]


class LayerwiseCapture:
    """Emits the states of one prefill. Use as a context manager, and give `chunk` to `chunked_prefill` as `on_chunk`.

    `emit` runs inside the forward pass and gets views: whoever needs a state after the next chunk copies it. States that
    change with every chunk are emitted at the end, and where a chunk ends at one of `checkpoints` (token counts).
    """

    def __init__(self, model: torch.nn.Module, cache: Cache, emit: Emit, checkpoints: Container[int] = ()) -> None:
        check_cache(cache)
        self._cache, self._emit, self._checkpoints = cache, emit, checkpoints
        self._config = config_values(model.config)  # type: ignore[arg-type]
        self._layers = decoder_layers(model)
        self._chunk: tuple[int, int, bool] | None = None
        self._handles: list[Any] = []

    def __enter__(self) -> LayerwiseCapture:
        for index, layer in enumerate(self._layers):
            self._handles.append(layer.register_forward_hook(self._hook(index)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def chunk(self, start: int, end: int, is_last: bool) -> Iterator[None]:
        """The forward pass inside computes tokens [start, end)."""
        self._chunk = (start, end, is_last)
        try:
            yield
        finally:
            self._chunk = None

    def _hook(self, index: int) -> Callable[..., None]:
        def emit_layer(_module: torch.nn.Module, _args: Any, _output: Any) -> None:
            if self._chunk is None:
                raise UserError("capture: a forward pass outside `chunk`; its token range is not known")
            start, end, is_last = self._chunk
            closing = is_last or end in self._checkpoints
            for state in extract_layer(self._cache, self._config, index, end, start, closing):
                self._emit(state)

        return emit_layer


def decoder_layers(model: torch.nn.Module) -> Sequence[torch.nn.Module]:
    """The decoder layers in order. Raises UserError where the model has no list of them that fits its configuration.

    Of the module lists of that length, the layers are the one with the most parameters: experts and adapters lie within
    layers, and whatever else is kept per layer is small.
    """
    config = model.config.get_text_config(decoder=True)  # type: ignore[operator,union-attr]
    count = config.num_hidden_layers
    lists: list[torch.nn.Module] = [
        found for found in model.modules() if isinstance(found, torch.nn.ModuleList) and len(found) == count
    ]
    if not lists:
        raise UserError(f"model: no list of {count} decoder layers found in {type(model).__name__}")
    return list(max(lists, key=_parameters).children())


def _parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
