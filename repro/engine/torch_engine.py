"""The engine that computes: a transformers model on one device, greedy, with state leaving layer by layer.

Requests of a batch keep caches of their own and are stepped one after another. Batching them into one forward pass
would be faster on a GPU, but padding changes the shapes of the sums, and with them the last bits and in the end the
tokens. Here the tokens of a split run must equal those of an unsplit one exactly, so the simple form is the right
one.

A model goes through `repro.engine.gate` before it serves: one that is exact in one chunk only is prefilled in one, whatever
`chunk_tokens` says.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from typing import Any, cast

import torch
from transformers import PreTrainedConfig

from repro.engine.base import Emit, Handover, Prefilled, Request
from repro.engine.gate import Admission, admit
from repro.engine.pace import throttled
from repro.engine.reference import Agreement, Reference, answer, compare, generate, tolerance_of
from repro.engine.spans import Span, SpanLog, now_s
from repro.engine.staging import HostCopies, Staging, Straight, copies_over
from repro.errors import UserError
from repro.kvcache.capture import LayerwiseCapture, decoder_layers
from repro.kvcache.frames import Piece
from repro.kvcache.prefix import Prefix, PrefixCache, PrefixCacheSpec, grows
from repro.kvcache.state import Cache, Outline, State, layout, restore, seal
from repro.kvcache.tensors import tensor_of
from repro.models.build import build, build_over
from repro.models.prefill import chunked_prefill, forward, new_cache
from repro.models.spec import ModelSpec
from repro.processes import apart


@dataclass(frozen=True)
class EngineSpec:
    """Which model, where, and how it prefills. Both sides build the model from this, so their weights are equal.

    `chunk_tokens` bounds prefill's memory and is the grain in which attention state leaves; `threads` is per worker.
    The model's layers are spread over `device` and `more_devices`; random weights are drawn on the device `weights_drawn_on`.
    `staging_bytes` of host memory, page-locked where there is a GPU, hold what is on its way to the link. Every forward pass takes
    `slowdown` times as long as here, so that one machine stands for devices of several speeds.
    """

    model: ModelSpec
    chunk_tokens: int = 256
    threads: int = 1
    device: str = "cpu"
    more_devices: tuple[str, ...] = ()
    weights_drawn_on: str | None = None
    staging_bytes: int = 256 << 20
    prefix_cache: PrefixCacheSpec = field(default_factory=PrefixCacheSpec)
    slowdown: float = 1.0

    @property
    def devices(self) -> tuple[str, ...]:
        """All devices that the model lies on."""
        return (self.device, *self.more_devices)

    @property
    def identity(self) -> str:
        """All that states depend on beside the tokens: prefixes are shared only where it is equal."""
        return json.dumps([asdict(self.model), self.chunk_tokens], sort_keys=True)

    def __post_init__(self) -> None:
        for name in ("chunk_tokens", "threads", "staging_bytes"):
            if getattr(self, name) < 1:
                raise UserError(f"engine.{name}: {getattr(self, name)}; a whole number of at least 1 is accepted")
        if not 1 <= self.slowdown < math.inf:
            raise UserError(f"engine.slowdown: {self.slowdown}; accepted: 1 or more")
        if self.prefix_cache.capacity_bytes and self.prefix_cache.block_tokens % self.chunk_tokens:
            raise UserError(
                f"prefix_cache.block_tokens: {self.prefix_cache.block_tokens}; accepted: multiples of "
                f"chunk_tokens {self.chunk_tokens}, so that a block ends where a chunk of prefill ends"
            )


_MAX_RESERVED = 1024


@dataclass
class _Decoding:
    cache: Any
    token: int
    seen_tokens: int
    prefix: Prefix
    tokens: list[int] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)


#: Seeded weights are the same in every engine of a process, and so is what the gate finds.
_ADMITTED: dict[str, Admission] = {}


def _admission(spec: EngineSpec, model: torch.nn.Module) -> Admission:
    if spec.model.pretrained is not None:  # a folder may hold something else the next time
        return admit(model)
    identity = _weights(spec)
    if identity not in _ADMITTED:
        _ADMITTED[identity] = admit(model)
    return _ADMITTED[identity]


def _weights(spec: EngineSpec) -> str:
    return json.dumps([asdict(spec.model), spec.device, spec.more_devices], sort_keys=True)


def foresee(spec: EngineSpec) -> None:
    """Import what an engine of that model needs and learn what the gate finds: once, in a process that is then forked into engines.

    Nothing is computed in this process, or its forks could miss threads that torch had started: the gate is asked in a fork of its own.
    """
    build(spec.model, "meta")
    if spec.model.pretrained is not None:
        return

    def ask() -> bytes:
        torch.set_num_threads(spec.threads)
        return json.dumps(admit(build_over(spec.model, spec.devices, spec.weights_drawn_on)).record()).encode()

    if found := apart(ask):
        _ADMITTED[_weights(spec)] = Admission(**json.loads(found))


def paced(model: torch.nn.Module, spec: EngineSpec) -> AbstractContextManager[None]:
    """Within, the model is as slow as the engine is to be.

    One thread's own processor time is multiplied, so that a pass that waits for a core is not slower for it; of several threads, or on an
    accelerator, nobody counts that time, and the clock's is.
    """
    alone = spec.threads == 1 and set(spec.devices) == {"cpu"}
    return throttled(model, spec.slowdown, busy=time.thread_time if alone else None)


class TorchEngine:
    """Prefill and decode engine in one; a worker uses the half that it stands for."""

    def __init__(self, spec: EngineSpec) -> None:
        if spec.device.startswith("cuda") and not torch.cuda.is_available():
            raise UserError(f"engine.device: {spec.device} asked for, but torch sees no GPU; cpu is accepted")
        torch.set_num_threads(spec.threads)
        self._spec = spec
        self._model = build_over(spec.model, spec.devices, spec.weights_drawn_on)
        self.admission = _admission(spec, self._model)
        if spec.prefix_cache.capacity_bytes and not self.admission.chunked:
            raise UserError(
                f"prefix_cache.capacity_bytes: {spec.prefix_cache.capacity_bytes}; model {spec.model.name} cannot go on from a "
                f"prefix's state: {self.admission.reason}; accepted: 0"
            )
        self._chunk_tokens = spec.chunk_tokens if self.admission.chunked else sys.maxsize
        self._references: dict[int, Reference] = {}
        self._unsplit: dict[int, Reference] = {}
        self._agreements: dict[int, Agreement] = {}
        self._config = cast(PreTrainedConfig, self._model.config)
        self._device_of = [_device_of(layer, spec.device) for layer in decoder_layers(self._model)]
        self._copies = copies_over(dict.fromkeys(self._device_of))
        self._batch: dict[int, _Decoding] = {}
        self._reserved: dict[int, Prefix] = {}
        self._paced = ExitStack()  # as long as the engine lives
        self._paced.enter_context(paced(self._model, spec))

    @cached_property
    def _outline(self) -> Outline:
        return Outline(self._model)

    @cached_property
    def _staging(self) -> Staging:
        return Staging(self._copies, self._spec.staging_bytes)

    @cached_property
    def prefixes(self) -> PrefixCache | None:
        """The prefix cache of this engine's prefills, where it has one."""
        return self._prefix_cache(blocks_only=False)

    @cached_property
    def held(self) -> PrefixCache | None:
        """What this engine keeps of the requests that were handed over to it, where it keeps anything."""
        return self._prefix_cache(blocks_only=True) if self._spec.prefix_cache.increments else None

    def _prefix_cache(self, *, blocks_only: bool) -> PrefixCache | None:
        spec = self._spec.prefix_cache
        if not spec.capacity_bytes:
            return None
        return PrefixCache(spec, layout(self._model), self._config, self._spec.identity, blocks_only=blocks_only)

    def prefill(
        self, request: Request, emit: Emit, log: SpanLog, held_tokens: int = 0, *, emit_copies: bool = False
    ) -> Prefilled:
        """Compute the state of the first l − 1 tokens, as far as no earlier prompt left it; `emit` gets each layer's pieces.

        What was cached leaves before anything is computed. `emit` is called from a thread of its own, and may wait: the
        computation goes on until the staging memory is full. What it raises ends the prefill. If it copies each piece before it
        returns (`emit_copies`), state that lies on the host goes to it straight from the forward pass: a second thread would
        make the pass wait for Python's lock at every piece, which costs more than the copy.
        """
        tokens = request.prompt[: request.state_tokens]
        prefix = self.prefixes.open(tokens, request.cache_salt) if self.prefixes else Prefix()
        try:
            handover = Handover.of(request, held_tokens, prefix.key(held_tokens))
            cache, end_s = self._prefill(request, prefix, emit, log, held_tokens, emit_copies)
        except BaseException:
            prefix.close()
            raise
        keep = partial(prefix.keep, cache, request.state_tokens)
        return Prefilled(end_s, prefix.cached_tokens, handover, keep, prefix.close)

    def _prefill(
        self, request: Request, prefix: Prefix, emit: Emit, log: SpanLog, held_tokens: int, emit_copies: bool
    ) -> tuple[Cache, float]:
        request_id, tokens, cached = request.request_id, request.state_tokens, prefix.cached_tokens
        pieces = itertools.count()

        def is_sent(state: State) -> bool:
            # Blocks end where chunks end, so a piece lies on one side of what the decode side holds.
            return state.end > held_tokens if grows(state.kind) else state.end == tokens

        def is_noted(state: State) -> bool:
            return not grows(state.kind) and state.end in prefix.checkpoints

        def hand_on(state: State) -> None:
            if is_noted(state):
                prefix.note(state)
            if is_sent(state):
                emit(seal(state, request_id, next(pieces)))

        def deliver(state: State, put_s: float, copied_s: float) -> None:
            log.add(Span("copy", request_id, put_s, copied_s, layer=state.layer, kv_bytes=state.nbytes))
            hand_on(state)

        def deliver_at_once(state: State, put_s: float) -> None:
            hand_on(state)
            log.add(Span("copy", request_id, put_s, now_s(), layer=state.layer, kv_bytes=state.nbytes))

        straight = emit_copies and isinstance(self._copies, HostCopies)
        with Straight(deliver_at_once) if straight else self._staging.lane(deliver) as lane:
            for state in prefix.states:
                if is_sent(state):
                    lane.put(state, settled=True)

            def take(state: State) -> None:
                if is_sent(state) or is_noted(state):
                    lane.put(state)

            cache = None
            if cached < tokens:
                cache = restore(prefix.states, self._config, cached, dict(enumerate(self._device_of)))
                # The clock's hooks come first, so that a layer's time is over before its state is put.
                with (
                    _LayerClock(self._model, request, self._chunk_tokens, log) as clock,
                    LayerwiseCapture(self._model, cache, take, prefix.checkpoints) as capture,
                ):

                    @contextmanager
                    def chunk(start: int, end: int, is_last: bool) -> Iterator[None]:
                        with clock.chunk(start), capture.chunk(start, end, is_last):
                            yield

                    ids = self._ids(request)
                    chunked_prefill(self._model, ids, self._chunk_tokens, cache, cached, on_chunk=chunk)
            self._copies.computed()
            end_s = now_s()
        return cache, end_s

    def prefill_and_join(self, request: Request, log: SpanLog) -> None:
        """Prefill a request into this process's own batch: the unsplit run, and T_prefill where nothing is captured."""
        cache = new_cache(self._model)
        with _LayerClock(self._model, request, self._chunk_tokens, log) as clock:
            ids, chunk_tokens = self._ids(request), self._chunk_tokens
            chunked_prefill(self._model, ids, chunk_tokens, cache, on_chunk=lambda start, *_: clock.chunk(start))
        self._copies.computed()
        self._batch[request.request_id] = _Decoding(cache, request.prompt[-1], request.state_tokens, Prefix())

    def reference(self, request: Request) -> None:
        """Let the model's own `generate` answer, for later answers to a request of that id to be held against.

        It answers here in chunks as well, unsplit: of the same order of sums as what comes split or from another process.
        """
        ids = torch.tensor([request.prompt], device=self._spec.device)
        self._references[request.request_id] = generate(self._model, ids, request.output_tokens)
        self._unsplit[request.request_id] = answer(self._model, ids, request.output_tokens, self._chunk_tokens)

    def agreement(self, request_id: int) -> Agreement | None:
        """How the answer to a request that has left compares with its reference; None where it has none."""
        return self._agreements.pop(request_id, None)

    def _compared(self, request_id: int, decoding: _Decoding) -> Agreement:
        tolerance = tolerance_of(self._model)
        found = compare(self._references[request_id], decoding.tokens, decoding.logits, tolerance)
        # The kernels of an accelerator may choose another order of sums in another process.
        exact = next(self._model.parameters()).device.type == "cpu"
        split = compare(self._unsplit[request_id], decoding.tokens, decoding.logits, 0.0 if exact else tolerance)
        return replace(found, unsplit_error=split.logits_error, unsplit_tolerance=split.tolerance)

    def reserve(self, request: Request) -> int:
        """Tokens whose growing state is here, and stays until the request has left; 0 where nothing is kept."""
        if self.held is None:
            return 0
        if len(self._reserved) >= _MAX_RESERVED:  # requests that never came
            self._reserved.pop(next(iter(self._reserved))).close()
        if (before := self._reserved.pop(request.request_id, None)) is not None:
            before.close()
        prefix = self.held.open(request.prompt[: request.state_tokens], request.cache_salt)
        self._reserved[request.request_id] = prefix
        return prefix.cached_tokens

    def lock(self, memory: memoryview) -> None:
        """Page-lock memory that received pieces will lie in, where there is a GPU to copy them to."""
        self._copies.lock(memory)

    def fetch(self, pieces: Sequence[Piece]) -> list[State]:
        """Copies of the pieces as states on the device, made beside the batch's steps where this is another thread."""
        tensors = self._copies.to_device([tensor_of(piece) for piece in pieces])
        return [
            State(
                layer=piece.header.layer,
                kind=piece.header.kind,
                slot=piece.header.slot,
                start=piece.header.token_start,
                end=piece.header.token_end,
                tensor=tensor,
            )
            for piece, tensor in zip(pieces, tensors, strict=True)
        ]

    def join(self, handover: Handover, states: Sequence[State]) -> None:
        """Put a request's cache together, of what was fetched, and take it into the batch.

        Raises UserError where state is missing, that included which the sender believed to be here, or another model's.
        """
        self._outline.check(states)
        words = self._config.get_text_config(decoder=True).vocab_size
        if not 0 <= handover.last_token < words:
            raise UserError(
                f"last_token: {handover.last_token} of request {handover.request_id}; accepted: 0 to {words - 1}"
            )
        prefix = self._reserved.pop(handover.request_id, None) or Prefix()
        try:
            cache = self._restored(handover, states, prefix)
        except BaseException:
            prefix.close()
            raise
        seen_tokens = handover.input_tokens - 1
        self._batch[handover.request_id] = _Decoding(cache, handover.last_token, seen_tokens, prefix)

    def _restored(self, handover: Handover, states: Sequence[State], prefix: Prefix) -> Cache:
        held: list[State] = []
        if handover.held_tokens:
            if handover.held_tokens != prefix.cached_tokens or handover.held_key != prefix.key(prefix.cached_tokens):
                raise UserError(
                    f"held_tokens: request {handover.request_id} came without its first {handover.held_tokens} tokens, "
                    f"and {prefix.cached_tokens} are reserved here"
                )
            on_device = self._copies.to_device([state.tensor for state in prefix.states])
            held = [replace(state, tensor=tensor) for state, tensor in zip(prefix.states, on_device, strict=True)]
        return restore([*held, *states], self._config, handover.input_tokens - 1, dict(enumerate(self._device_of)))

    def step(self) -> list[tuple[int, int]]:
        """One greedy token for every request of the batch: (request id, token)."""
        for request_id, decoding in self._batch.items():
            self._advance(decoding, keep=request_id in self._references)
        return [(request_id, decoding.token) for request_id, decoding in self._batch.items()]

    @torch.no_grad()
    def _advance(self, decoding: _Decoding, *, keep: bool) -> None:
        """One greedy token; `keep` it with its logits."""
        ids = torch.tensor([[decoding.token]], device=self._spec.device)
        logits = forward(self._model, ids, decoding.cache, decoding.seen_tokens)[0]
        decoding.token = int(logits.argmax())
        decoding.seen_tokens += 1
        if keep:
            decoding.tokens.append(decoding.token)
            decoding.logits.append(logits)

    def leave(self, request_id: int) -> None:
        """Drop a request and its cache, of which the prefix cache may keep its prompt's blocks."""
        decoding = self._batch.pop(request_id)
        if request_id in self._references:
            self._agreements[request_id] = self._compared(request_id, decoding)
        decoding.prefix.keep(decoding.cache, decoding.seen_tokens)
        decoding.prefix.close()

    def _ids(self, request: Request) -> torch.Tensor:
        return torch.tensor([request.prompt[:-1]], device=self._spec.device)


def _device_of(layer: torch.nn.Module, otherwise: str) -> torch.device:
    """Where a decoder layer computes, and its state grows."""
    parameter = next(layer.parameters(), None)
    return torch.device(otherwise) if parameter is None else parameter.device


class _LayerClock:
    """Records a `compute` span per decoder layer and chunk.

    On an accelerator kernels run behind the host's clock: there the spans show when work was launched, and only the
    whole prefill's span is a measurement.
    """

    def __init__(self, model: torch.nn.Module, request: Request, chunk_tokens: int, log: SpanLog) -> None:
        self._layers = decoder_layers(model)
        self._request_id = request.request_id
        self._chunk_tokens = chunk_tokens
        self._log = log
        self._chunk = 0
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
    def chunk(self, start: int) -> Iterator[None]:
        """The forward pass inside computes the chunk that begins at token `start`."""
        self._chunk = start // self._chunk_tokens
        yield

    def _begin(self, *_: object) -> None:
        self._began_s = now_s()

    def _end(self, layer: int) -> Any:
        def record(*_: object) -> None:
            self._log.add(Span("compute", self._request_id, self._began_s, now_s(), layer=layer, chunk=self._chunk))

        return record
