"""An instance of a cluster: `python -m repro.serving.instance`, a process that prefills, decodes, or does both, by replaying a profile.

What it computes is replayed; all else is real. KVCache of the profile's size leaves layer by layer through the transport, the decode side
takes it whole or not at all, and everything is reported to the router as it happens. Time runs `time_scale` times as fast and bytes are
divided by `byte_scale`, so that every ratio (load, use of the link, transfer ÷ prefill) stays what it was.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import numpy as np

from repro import configuration
from repro.engine.replay import Joined, ReplayDecode, ReplayPrefill
from repro.errors import UserError
from repro.kvcache.frames import DType, FrameHeader, Manifest, Piece
from repro.models.layout import StateKind
from repro.processes import Message, Parent, background, run_worker
from repro.profiles.base import PhaseProfile
from repro.serving import messages as say
from repro.serving.clocks import telling_time
from repro.serving.clockwork import Clockwork
from repro.serving.dialling import Dialling
from repro.serving.messages import ATTEMPTS
from repro.transport import Delivery, Receiver, Sender, TransferFailed, TransportSpec

#: Pieces are cut from one block of random bytes, so that nothing on the way can compress them; none may be larger.
MAX_PIECE_BYTES = 32 << 20


@dataclass(frozen=True)
class InstanceConfig:
    """What an instance is started with. It receives KVCache on `host`; null where it only prefills. `pieces` are sent per request.

    One that `copies` sends prefixes to the other cluster, whatever it does beside that.
    """

    MODULE: ClassVar = "repro.serving.instance"
    forks: ClassVar = False
    name: str
    profile: PhaseProfile
    transport: TransportSpec
    host: str | None
    time_scale: float = 1.0
    byte_scale: float = 1.0
    pieces: int = 8
    seed: int = 0
    copies: bool = False

    def __post_init__(self) -> None:
        if not (self.time_scale > 0 and self.byte_scale > 0 and self.pieces >= 1):
            raise UserError("instance: time_scale and byte_scale must be positive, and pieces 1 or more")


@dataclass
class _Task:
    """A prefill that is queued or under way, or a prefix to be sent."""

    asked: say.Prefill | say.Copy
    size_bytes: int
    start_s: float = 0.0
    headers: list[FrameHeader] = field(default_factory=list)


class Instance:
    """The instance itself; every method runs in the clockwork's thread."""

    def __init__(self, config: InstanceConfig, parent: Parent, clock: Clockwork, receiver: Receiver | None) -> None:
        self._config = config
        self._parent = parent
        self._clock = clock
        self._receiver = receiver
        self._prefill = ReplayPrefill()
        self._decode = ReplayDecode(config.profile, 1 / config.time_scale)
        self._tasks: dict[int, _Task] = {}
        self._joined_s: dict[int, float] = {}
        self._senders: dict[str, Sender] = {}
        self._dialling = Dialling(
            partial(Sender, config.transport, observer=partial(self._clock.ask, self._on_transfer)),
            partial(self._clock.ask, self._connected),
        )
        self._sent_to: dict[int, str] = {}
        self._full = False
        self._armed_s = dict[str, float]()
        self._bytes = memoryview(
            np.random.default_rng(config.seed).bytes(MAX_PIECE_BYTES if receiver is None or config.copies else 1)
        )

    def hear(self, message: Message) -> None:
        """Do what the router says."""
        if message["kind"] == "stop":
            self._clock.stop()
            return
        match told := say.to_instance(message):
            case say.Prefill():
                self._begin(told)
            case say.Copy():
                self._copy(told)
            case say.Decode():
                self._ready(told.request * ATTEMPTS + told.attempt, told.input_tokens, told.output_tokens)
            case say.Forget():
                self._forget(told.request * ATTEMPTS + told.attempt)
            case say.Connect():
                self._dialling.to(told)
            case say.Slow():
                self._prefill.slow = self._decode.slow = told.factor
            case say.Memory():
                self._full = told.full
            case say.Report():
                self._report()

    def _tell(self, said: say.FromInstance) -> None:
        self._parent.send_text(say.encoded(said))

    # Prefill.

    def _begin(self, asked: say.Prefill) -> None:
        key, config = asked.request * ATTEMPTS + asked.attempt, self._config
        tokens = asked.input_tokens - asked.cached_tokens
        work_s = float(config.profile.prefill_s(tokens)) / config.time_scale
        pieces = config.pieces if asked.to is not None else 1
        size_bytes = max(round(asked.kv_bytes / config.byte_scale), pieces) if asked.to is not None else 0
        self._tasks[key] = _Task(asked, size_bytes)
        self._prefill.assign(time.monotonic(), key, work_s, pieces)
        self._arm_prefill()

    def _copy(self, asked: say.Copy) -> None:
        pieces = self._config.pieces
        task = _Task(asked, max(round(asked.kv_bytes / self._config.byte_scale), pieces))
        for piece in range(pieces):
            self._emit(asked.request * ATTEMPTS + asked.attempt, task, piece, piece == pieces - 1)

    def _arm_prefill(self) -> None:
        due = self._prefill.due()
        if due is not None and self._armed_s.get("prefill") != due.at_s:
            self._armed_s["prefill"] = due.at_s
            self._clock.at(due.at_s, self._on_prefill)

    def _on_prefill(self) -> None:
        while (due := self._prefill.due()) is not None and due.at_s <= time.monotonic():
            started_s = self._prefill.started_s()
            due, ended = self._prefill.take()
            task = self._tasks[due.key]
            task.start_s = started_s
            if ended:  # told before the last piece is sent, or a busy machine lets the answer's end be heard first
                del self._tasks[due.key]
                asked = task.asked
                self._tell(say.Prefilled(asked.request, asked.attempt, task.start_s, due.at_s))
            if task.asked.to is not None:
                self._emit(due.key, task, due.piece, ended)
        self._arm_prefill()

    def _emit(self, key: int, task: _Task, piece: int, last: bool) -> None:
        """Send a piece of state; the last one closes the request."""
        asked, pieces = task.asked, self._config.pieces
        sender = self._senders.get(asked.to or "")
        if sender is None:
            if last:
                self._tell(say.Undelivered(asked.request, asked.attempt, f"no connection to {asked.to}"))
            return
        low, high = (task.size_bytes * part // pieces for part in (piece, piece + 1))
        try:
            if piece == 0:
                sender.begin(key)
                self._sent_to[key] = asked.to or ""
            framed = Piece.seal(
                self._payload(high - low), request_id=key, piece=piece, layer=piece, kind=StateKind.AUXILIARY, dtype=DType.UINT8,
                shape=(high - low,), tokens=(0, asked.input_tokens),
            )  # fmt: skip
            task.headers.append(framed.header)
            sender.send(framed)
            if last:
                # What nobody decodes from is a copy.
                output_tokens = asked.output_tokens if isinstance(asked, say.Prefill) else 0
                meta = {"input_tokens": asked.input_tokens, "output_tokens": output_tokens}
                sender.finish(Manifest.of(key, task.headers, meta))
        except TransferFailed:
            pass  # the observer has heard of it

    def _payload(self, size_bytes: int) -> memoryview:
        if size_bytes > len(self._bytes):
            raise UserError(
                f"instance {self._config.name}: a piece of {size_bytes} bytes; accepted: up to {MAX_PIECE_BYTES}, by a larger "
                "byte_scale or more pieces"
            )
        return self._bytes[:size_bytes]

    def _connected(self, name: str, sender: Sender) -> None:
        if (before := self._senders.get(name)) is not None:
            background(before.close, name=f"close {name}")  # it may take a while, and this thread keeps time
        self._senders[name] = sender
        self._tell(say.Connected(name))

    def _on_transfer(self, news: tuple[int, int] | Delivery | TransferFailed) -> None:
        """What a sender has to say: an acknowledged piece, a delivery or its failure."""
        if isinstance(news, tuple):
            return
        name = self._sent_to.pop(news.request_id, None)
        if name is None:
            return
        sender = self._senders[name]
        with contextlib.suppress(TransferFailed, TimeoutError, ValueError):
            sender.wait(news.request_id, 0)  # the outcome is kept until somebody has asked for it
        if isinstance(news, TransferFailed):
            number, attempt = divmod(news.request_id, ATTEMPTS)
            self._tell(say.Undelivered(number, attempt, str(news)))

    # Decode.

    def arrived(self, key: int, at_s: float, payload_bytes: int, meta: Mapping[str, object]) -> None:
        """A request's KVCache is here, whole, or the prefix that its prefill goes on from."""
        number, attempt = divmod(key, ATTEMPTS)
        input_tokens, output_tokens = (int(str(meta[name])) for name in ("input_tokens", "output_tokens"))
        if not output_tokens:
            self._tell(say.Copied(number, attempt, payload_bytes))
            return
        if not self._full:
            self._tell(say.Delivered(number, attempt, at_s, payload_bytes))
        self._ready(key, input_tokens, output_tokens)

    def _ready(self, key: int, input_tokens: int, output_tokens: int) -> None:
        if self._full:
            number, attempt = divmod(key, ATTEMPTS)
            self._tell(say.Undelivered(number, attempt, "no memory for its KVCache", full=True))
            return
        self._note(self._decode.join(time.monotonic(), key, input_tokens, output_tokens))
        self._arm_decode()

    def _note(self, joined: list[Joined]) -> None:
        for key, at_s in joined:
            self._joined_s[key] = at_s

    def _arm_decode(self) -> None:
        due_s = self._decode.due_s()
        if due_s < float("inf") and self._armed_s.get("decode") != due_s:
            self._armed_s["decode"] = due_s
            self._clock.at(due_s, self._on_decode)

    def _on_decode(self) -> None:
        while self._decode.due_s() <= time.monotonic():
            events, joined = self._decode.take()
            # The moment of the very step, not of the timer that covered many: how late that was is told by `Lateness`.
            for at_s, key, last in events:
                number, attempt = divmod(key, ATTEMPTS)
                if last:
                    self._tell(say.Finished(number, attempt, at_s))
                else:
                    self._tell(say.Decoding(number, attempt, self._joined_s.pop(key), at_s))
            self._note(list(joined))
        self._arm_decode()

    def _forget(self, key: int) -> None:
        self._prefill.forget(key)
        self._decode.forget(key)
        self._tasks.pop(key, None)
        self._joined_s.pop(key, None)
        if (name := self._sent_to.get(key)) is not None:
            self._senders[name].cancel(key)
        self._arm_prefill()
        self._arm_decode()

    def _report(self) -> None:
        stats = [sender.stats() for sender in self._senders.values()]
        rtts = [one.tcp.rtt_s for sender in self._senders.values() for one in sender.signals()]
        self._tell(
            say.Sending(
                time.monotonic(),
                sum(one["acked_bytes"] for one in stats),
                sum(one["resent_bytes"] for one in stats),
                sum(one["unacked_bytes"] for one in stats),
                sum(one["wire_bytes"] for one in stats),
                min(rtts, default=0.0),
            )
        )
        late_s, cpu = np.asarray(self._clock.late_s or [0.0]), os.times()
        count = len(self._clock.late_s)
        self._clock.late_s.clear()
        self._tell(say.Lateness(count, float(late_s.mean()), float(np.quantile(late_s, 0.99)), cpu.user + cpu.system))


def work(parent: Parent, config: Message) -> None:
    """Listen where KVCache is received, then serve until told to stop."""
    spec = configuration.build(InstanceConfig, {key: value for key, value in config.items() if key != "kind"})
    clock = Clockwork()
    receiver = Receiver(spec.transport, spec.host) if spec.host is not None else None
    instance = Instance(spec, parent, clock, receiver)

    def receive(source: Receiver) -> None:
        while True:
            with source.receive() as received:
                size = sum(piece.header.payload_bytes for piece in received.pieces)
                clock.ask(
                    instance.arrived, received.request_id, received.completed_s, size, dict(received.manifest.meta)
                )

    if receiver is not None:
        threading.Thread(target=receive, args=(receiver,), name="receive", daemon=True).start()
    parent.deliver(telling_time(parent, lambda message: clock.ask(instance.hear, message)))
    parent.send_text(say.encoded(say.Ready(receiver.port if receiver is not None else 0)))
    clock.run()


if __name__ == "__main__":
    run_worker(work)
