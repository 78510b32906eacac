"""An instance that computes: `python -m repro.serving.torch_instance`, a real model where `repro.serving.instance` replays a profile.

It speaks the same messages, so the same router drives both. On the CPUs of this machine it is a fork of a process that has called `warm`.
One thread computes: a prefill to its end, layer by layer onto the wire, else a step of the running batch. KVCache goes to the decode
instance that the router named, from a PrfaaS instance over the link and from a PD instance within the cluster: state crosses sockets only,
never memory. A prompt comes with the request where a client sent it; otherwise the instance draws it from the request's number, as a real
one would read it from a store.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import numpy as np
import torch

from repro import configuration
from repro.engine.base import Handover, Request
from repro.engine.spans import SpanLog, now_s
from repro.engine.torch_engine import EngineSpec, TorchEngine, foresee
from repro.errors import UserError
from repro.kvcache.codecs import CodecSpec
from repro.kvcache.frames import Manifest
from repro.kvcache.state import State, seal
from repro.processes import Message, Parent, background, run_worker
from repro.serving import messages as say
from repro.serving.clocks import telling_time
from repro.serving.dialling import Dialling
from repro.serving.given_up import GivenUp
from repro.serving.messages import ATTEMPTS, name_of, named
from repro.serving.prefill import Outbox
from repro.serving.running_batch import Generation, RunningBatch
from repro.transport import Received, Receiver, Sender, TransferFailed, TransportSpec


@dataclass(frozen=True)
class TorchInstanceConfig:
    """What a computing instance is started with. Prompts that it draws have ids below `vocabulary`, and repeat after `prompts` requests.

    One that `streams` tells the tokens of every decode step as they come, not only all of them at the end.
    """

    MODULE: ClassVar = "repro.serving.torch_instance"
    name: str
    engine: EngineSpec
    transport: TransportSpec
    host: str | None
    vocabulary: int
    prompts: int
    batch_max: int
    seed: int = 0
    streams: bool = False

    @property
    def forks(self) -> bool:
        """On CPUs alone: a GPU is of no use to a fork of a process that has looked for it."""
        return all(device.partition(":")[0] == "cpu" for device in self.engine.devices)


def prompt_of(config: TorchInstanceConfig, number: int, tokens: int) -> tuple[int, ...]:
    """The prompt of a request by its number: the same in every instance."""
    rng = np.random.default_rng((config.seed, number % config.prompts, tokens))
    return tuple(int(token) for token in rng.integers(0, config.vocabulary, tokens))


@dataclass(frozen=True)
class _Arrived:
    """A request that came whole, its state on the device, or what is wrong with it."""

    key: int
    at_s: float
    payload_bytes: int
    handover: Handover | None
    states: list[State] | Exception


class TorchInstance:
    """The instance itself; its methods run in the thread that computes."""

    def __init__(self, config: TorchInstanceConfig, parent: Parent, receiver: Receiver | None) -> None:
        self._config = config
        self._parent = parent
        self._log = SpanLog()
        self._engine = TorchEngine(config.engine)
        if receiver is not None:
            self._engine.lock(receiver.memory)
        self._batch = RunningBatch(self._engine, self._log)
        self._waiting: list[_Arrived] = []
        self._joined = set[int]()
        self._inbox: queue.SimpleQueue[say.ToInstance | _Arrived | None] = queue.SimpleQueue()  # None: to stop
        self._senders: dict[str, Sender] = {}
        self._dialling = Dialling(partial(Sender, config.transport), self._connected)
        self._gone = GivenUp()
        self._telling = threading.Lock()
        if (prefixes := self._engine.prefixes) is not None:
            prefixes.changes()  # from here on they are noted
        self._slow = 1.0
        self._full = False
        self.put = self._inbox.put

    def hear(self, message: Message) -> None:
        """Take a message, in the thread that reads them. What waits for no computation is done at once; the rest has its turn.

        So what is given up is known before its turn comes, whoever comes is connected though prefills queue here, and what is said of the
        link is of now.
        """
        match told := None if message["kind"] == "stop" else say.to_instance(message):
            case say.Connect():
                self._dialling.to(told)
                return
            case say.Report():
                self._tell(self._sending())
                return
            case say.Forget():
                self._gone.add(told.request * ATTEMPTS + told.attempt)
        self.put(told)

    def run(self) -> None:
        """Serve until told to stop: prefill goes before decode steps, as in a server without chunked mixing."""
        while True:
            while not self._batch or not self._inbox.empty():
                item = self._inbox.get()
                if isinstance(item, _Arrived):
                    self._waiting.append(item)
                elif item is None:
                    return
                else:
                    self._hear(item)
                self._admit()
            began_s = now_s()
            finished = self._batch.step()
            self._linger(began_s)
            if self._config.streams:
                self._stream([*self._batch.running, *finished])
            for generation in finished:
                self._finish(generation)
            self._admit()

    def _linger(self, began_s: float) -> None:
        """Where it is to be slow, take as many times as long as it took."""
        if self._slow > 1:
            time.sleep((self._slow - 1) * (now_s() - began_s))

    def _tell(self, said: say.FromInstance) -> None:
        self._parent.send_text(say.encoded(said))

    def _hear(self, told: say.ToInstance) -> None:
        match told:
            case say.Prefill():
                self._prefill(told)
            case say.Copy():
                self._copy(told)
            case say.Forget():
                self._forget(told.request * ATTEMPTS + told.attempt)
            case say.Slow():
                self._slow = told.factor
            case say.Memory():
                self._full = told.full
            case _:
                raise UserError(f"instance {self._config.name}: a computing instance does not know {told}")

    def _sending(self) -> say.Sending:
        stats = [sender.stats() for sender in list(self._senders.values())]
        return say.Sending(
            now_s(),
            sum(one["acked_bytes"] for one in stats),
            sum(one["resent_bytes"] for one in stats),
            sum(one["unacked_bytes"] for one in stats),
            sum(one["wire_bytes"] for one in stats),
            0.0,
        )

    def _connected(self, name: str, sender: Sender) -> None:
        """In the thread that dialled: prefills that wait before it must not keep whoever has just come from serving."""
        if (before := self._senders.get(name)) is not None:
            background(before.close, name=f"close {name}")
        self._senders[name] = sender
        self._tell(say.Connected(name))

    # Prefill.

    def _prefill(self, asked: say.Prefill) -> None:
        key = asked.request * ATTEMPTS + asked.attempt
        if self._gone.take(key):
            return
        sender = self._senders.get(asked.to or "")
        if sender is None:
            self._tell(say.Undelivered(asked.request, asked.attempt, f"no connection to {asked.to}"))
            return
        prompt = tuple(asked.prompt or prompt_of(self._config, asked.request, asked.input_tokens))
        request = Request(key, prompt, asked.output_tokens)
        outbox = Outbox(sender, True, CodecSpec(), self._log)
        sender.begin(key)
        start_s = now_s()
        release: Callable[[], None] = _nothing
        try:
            prefilled = self._engine.prefill(request, outbox.emit, self._log)
            release = prefilled.release
            self._linger(start_s)
            # Told before the transfer is complete, or a busy machine lets the answer's end be heard first.
            self._tell(say.Prefilled(asked.request, asked.attempt, start_s, prefilled.end_s, prefilled.cached_tokens))
            sender.finish(Manifest.of(key, outbox.headers, prefilled.handover.as_meta()))
        except TransferFailed as error:
            release()
            self._tell(say.Undelivered(asked.request, asked.attempt, str(error)))
            return
        prefilled.keep()
        self._tell_cached()
        background(self._confirm, asked, sender, release, name=f"confirm {key}")
        self._log.take()

    def _copy(self, asked: say.Copy) -> None:
        """Send a prefix of this instance's cache to another instance, whose cache it goes into."""
        key, prefixes = asked.request * ATTEMPTS + asked.attempt, self._engine.prefixes
        if self._gone.take(key):
            return
        sender = self._senders.get(asked.to)
        states = prefixes.lend([named(name) for name in asked.blocks]) if prefixes is not None else None
        if sender is None or states is None:
            why = f"no connection to {asked.to}" if sender is None else "the prefix is not here any more"
            self._tell(say.Undelivered(asked.request, asked.attempt, why))
            return
        outbox = Outbox(sender, True, CodecSpec(), self._log)
        sender.begin(key)
        try:
            for index, state in enumerate(states):
                outbox.emit(seal(state, key, index))
            sender.finish(Manifest.of(key, outbox.headers, {"blocks": list(asked.blocks)}))
        except TransferFailed as error:
            self._tell(say.Undelivered(asked.request, asked.attempt, str(error)))
            return
        background(self._confirm, asked, sender, _nothing, name=f"confirm {key}")

    def _adopt(self, received: Received, blocks: Sequence[str]) -> None:
        """Keep a prefix that another instance has sent."""
        number, attempt = divmod(received.request_id, ATTEMPTS)
        try:
            prefixes = self._engine.prefixes
            if prefixes is None:
                raise UserError("this instance has no prefix cache")
            prefixes.adopt([named(name) for name in blocks], self._engine.fetch(received.pieces))
        except Exception as error:  # whatever is wrong with one prefix must not end the instance
            self._tell(say.Undelivered(number, attempt, f"the prefix was not taken in: {error}"))
            return
        self._tell_cached()
        size = sum(piece.header.payload_bytes for piece in received.pieces)
        self._tell(say.Copied(number, attempt, size))

    def _tell_cached(self) -> None:
        """Say what came into the prefix cache and what was evicted, in that order though two threads do."""
        if (prefixes := self._engine.prefixes) is None:
            return
        with self._telling:
            changes = prefixes.changes()
            if any(changes):
                self._tell(say.Cached(*([name_of(key) for key in keys] for keys in changes)))

    def _confirm(self, asked: say.Prefill | say.Copy, sender: Sender, release: Callable[[], None]) -> None:
        try:
            sender.wait(asked.request * ATTEMPTS + asked.attempt)
        except TransferFailed as error:
            self._tell(say.Undelivered(asked.request, asked.attempt, str(error)))
        finally:
            release()

    # Decode.

    def arrived(self, received: Received) -> None:
        """Bring a request's state to the device, in the receiving thread, beside the batch."""
        with received:
            if (blocks := received.manifest.meta.get("blocks")) is not None:
                self._adopt(received, [str(name) for name in cast(Sequence[Any], blocks)])
                return
            size = sum(piece.header.payload_bytes for piece in received.pieces)
            try:
                handover = Handover.from_meta(received.manifest.meta)
                states = self._engine.fetch(received.pieces)
            except Exception as error:
                self.put(_Arrived(received.request_id, received.completed_s, size, None, error))
                return
        self.put(_Arrived(received.request_id, received.completed_s, size, handover, states))

    def _admit(self) -> None:
        """Take into the batch who waits, up to BS_max."""
        while self._waiting and len(self._joined) < self._config.batch_max:
            arrived = self._waiting.pop(0)
            number, attempt = divmod(arrived.key, ATTEMPTS)
            if self._gone.take(arrived.key):
                continue
            try:
                if self._full:
                    raise MemoryError("no memory for its KVCache")
                if isinstance(arrived.states, Exception):
                    raise arrived.states
                assert arrived.handover is not None
                self._engine.join(arrived.handover, arrived.states)
            except Exception as error:  # whatever is wrong with one request must not end the others
                with contextlib.suppress(OSError):  # the disk of its log may be full
                    traceback.print_exception(error)
                full = isinstance(error, MemoryError | torch.OutOfMemoryError)
                self._tell(say.Undelivered(number, attempt, f"the decode side refused it: {error}", full))
                continue
            self._batch.admit(arrived.handover)
            self._joined.add(arrived.key)
            self._tell(say.Delivered(number, attempt, arrived.at_s, arrived.payload_bytes))

    def _forget(self, key: int) -> None:
        """Give up a request that decodes; one that has yet to come is given up when it does."""
        if key in self._joined:
            self._gone.take(key)
            self._joined.discard(key)
            self._batch.drop(key)
            self._log.take()

    def _stream(self, generations: list[Generation]) -> None:
        """Tell the step that has just ended: who took a first token, and every token of it."""
        tokens = []
        for generation in generations:
            number, attempt = divmod(generation.handover.request_id, ATTEMPTS)
            if len(generation.tokens) == 1:
                self._tell(say.Decoding(number, attempt, generation.joined_s, generation.times_s[0]))
            tokens.append((number, attempt, len(generation.tokens) - 1, generation.tokens[-1]))
        if tokens:
            self._tell(say.Stepped(now_s(), tokens))

    def _finish(self, generation: Generation) -> None:
        number, attempt = divmod(generation.handover.request_id, ATTEMPTS)
        self._joined.discard(generation.handover.request_id)
        self._log.take()
        if not self._config.streams:
            self._tell(say.Decoding(number, attempt, generation.joined_s, generation.times_s[0]))
        self._tell(say.Finished(number, attempt, generation.times_s[-1], generation.tokens))


def _nothing() -> None:
    """Where nothing has to be released."""


def warm(config: Message) -> None:
    """Bring in what instances of that model need, in the process that they are forked from."""
    foresee(configuration.build(TorchInstanceConfig, config).engine)


def work(parent: Parent, config: Message) -> None:
    """Listen, build the model, then serve until told to stop."""
    spec = configuration.build(TorchInstanceConfig, {key: value for key, value in config.items() if key != "kind"})
    receiver = Receiver(spec.transport, spec.host) if spec.host is not None else None
    instance = TorchInstance(spec, parent, receiver)

    def receive(source: Receiver) -> None:
        while True:
            instance.arrived(source.receive())

    if receiver is not None:
        threading.Thread(target=receive, args=(receiver,), name="receive", daemon=True).start()
    parent.deliver(telling_time(parent, instance.hear))
    parent.send_text(say.encoded(say.Ready(receiver.port if receiver is not None else 0)))
    instance.run()


if __name__ == "__main__":
    run_worker(work)
