"""The engine that computes: a transformers model on one device, greedy, with state leaving layer by layer.

Requests of a batch keep caches of their own and are stepped one after another. Batching them into one forward pass
would be faster on a GPU, but padding changes the shapes of the sums, and with them the last bits and in the end the
tokens. Here the tokens of a split run must equal those of an unsplit one exactly, so the simple form is the right
one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import DynamicCache, PreTrainedConfig

from repro.engine.base import Emit, Handover, Request
from repro.engine.spans import Span, SpanLog, now_s
from repro.errors import UserError
from repro.kvcache.capture import LayerwiseCapture, decoder_layers
from repro.kvcache.frames import Piece
from repro.kvcache.state import State, restore, seal
from repro.kvcache.tensors import tensor_of
from repro.models.build import build
from repro.models.prefill import chunked_prefill
from repro.models.spec import ModelSpec


@dataclass(frozen=True)
class EngineSpec:
    """Which model, where, and how it prefills. Both sides build the model from this, so their weights are equal.

    `chunk_tokens` bounds prefill's memory and is the grain in which attention state leaves; `threads` is per worker.
    """

    model: ModelSpec
    chunk_tokens: int = 256
    threads: int = 1
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("chunk_tokens", "threads"):
            if getattr(self, name) < 1:
                raise UserError(f"engine.{name}: {getattr(self, name)}; a whole number of at least 1 is accepted")


@dataclass
class _Decoding:
    cache: Any
    token: int


class TorchEngine:
    """Prefill and decode engine in one; a worker uses the half that it stands for."""

    def __init__(self, spec: EngineSpec) -> None:
        if spec.device.startswith("cuda") and not torch.cuda.is_available():
            raise UserError(f"engine.device: {spec.device} asked for, but torch sees no GPU; cpu is accepted")
        torch.set_num_threads(spec.threads)
        self._spec = spec
        self._model = build(spec.model, spec.device)
        self._config = cast(PreTrainedConfig, self._model.config)
        self._batch: dict[int, _Decoding] = {}

    def prefill(self, request: Request, emit: Emit, log: SpanLog) -> None:
        """Compute the state of the first l − 1 tokens; `emit` gets each layer's pieces as soon as they are final."""
        pieces = 0

        def ship(state: State) -> None:
            nonlocal pieces
            with log.span("copy", request.request_id, layer=state.layer, kv_bytes=state.nbytes):
                piece = seal(_own(state), request.request_id, pieces)
            pieces += 1
            emit(piece)

        cache = DynamicCache(config=self._config)
        # The clock's hooks come first, so that a layer's time is over before its state is emitted.
        with _LayerClock(self._model, request, log) as clock, LayerwiseCapture(self._model, cache, ship) as capture:

            @contextmanager
            def chunk(start: int, end: int, is_last: bool) -> Iterator[None]:
                with clock.chunk(), capture.chunk(start, end, is_last):
                    yield

            chunked_prefill(self._model, self._ids(request), self._spec.chunk_tokens, cache, on_chunk=chunk)

    def prefill_and_join(self, request: Request, log: SpanLog) -> None:
        """Prefill a request into this process's own batch: the unsplit run."""
        cache = DynamicCache(config=self._config)
        with _LayerClock(self._model, request, log) as clock:
            ids, chunk_tokens = self._ids(request), self._spec.chunk_tokens
            chunked_prefill(self._model, ids, chunk_tokens, cache, on_chunk=lambda *_: clock.chunk())
        self._batch[request.request_id] = _Decoding(cache, request.prompt[-1])

    def join(self, handover: Handover, pieces: Sequence[Piece]) -> None:
        """Put a request's cache together and take it into the batch. The pieces' memory is free afterwards."""
        states = [
            State(
                layer=piece.header.layer,
                kind=piece.header.kind,
                slot=piece.header.slot,
                start=piece.header.token_start,
                end=piece.header.token_end,
                tensor=tensor_of(piece).to(self._spec.device, copy=True),
            )
            for piece in pieces
        ]
        cache = restore(states, self._config, handover.input_tokens - 1, self._spec.device)
        self._batch[handover.request_id] = _Decoding(cache, handover.last_token)

    @torch.no_grad()
    def step(self) -> list[tuple[int, int]]:
        """One greedy token for every request of the batch: (request id, token)."""
        stepped = []
        for request_id, decoding in self._batch.items():
            ids = torch.tensor([[decoding.token]], device=self._spec.device)
            logits = self._model(input_ids=ids, past_key_values=decoding.cache, use_cache=True).logits
            decoding.token = int(logits[0, -1].argmax())
            stepped.append((request_id, decoding.token))
        return stepped

    def leave(self, request_id: int) -> None:
        """Drop a request and its cache."""
        del self._batch[request_id]

    def _ids(self, request: Request) -> torch.Tensor:
        return torch.tensor([request.prompt[:-1]], device=self._spec.device)


def _own(state: State) -> State:
    """The state in memory of its own. A view would keep the whole cache of its chunk alive until it is acknowledged."""
    if state.tensor.untyped_storage().nbytes() == state.nbytes:
        return state
    tensor = state.tensor.clone(memory_format=torch.contiguous_format)
    return State(state.layer, state.kind, state.slot, state.start, state.end, tensor)


class _LayerClock:
    """Records a `compute` span per decoder layer and chunk.

    On an accelerator kernels run behind the host's clock: there the spans show when work was launched, and only the
    whole prefill's span is a measurement.
    """

    def __init__(self, model: torch.nn.Module, request: Request, log: SpanLog) -> None:
        self._layers = decoder_layers(model)
        self._request_id = request.request_id
        self._log = log
        self._chunk = -1
        self._began_s = 0.0
        self._handles: list[Any] = []

    def __enter__(self) -> _LayerClock:
        for index, layer in enumerate(self._layers):
            self._handles.append(layer.register_forward_pre_hook(self._begin))
            self._handles.append(layer.register_forward_hook(self._end(index)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def chunk(self) -> Iterator[None]:
        """The forward pass inside computes the next chunk."""
        self._chunk += 1
        yield

    def _begin(self, *_: object) -> None:
        self._began_s = now_s()

    def _end(self, layer: int) -> Any:
        def record(*_: object) -> None:
            self._log.add(Span("compute", self._request_id, self._began_s, now_s(), layer=layer, chunk=self._chunk))

        return record
