"""An instance that is a vLLM server: `python -m repro.serving.vllm_instance`, an adapter beside an engine that moves its own KVCache.

It speaks the messages that `repro.serving.instance` does, so the same router drives it. A prefill becomes a completion of one token whose
state the engine keeps; where that is (`kv_transfer_params`) goes to the adapter of the decode instance that the router named, over the
link as any order would, and from there with the prompt into a completion whose tokens are streamed. The state itself goes from engine to
engine by its connector (NIXL). What crossed is what the decode engine's own counters say; a request that was decoded from no state is
undelivered, and a pair of instances between which nothing crosses does not begin to serve.

The server is this process's child and ends with it; when the server ends, so does the instance. One that runs already (`url`) is neither
started nor ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from repro import configuration
from repro.engine.openai import OpenAIServer
from repro.engine.vllm import NIXL_BYTES, counted_bytes, offered
from repro.engine.vllm_server import EngineRefusedError, VllmServer, VllmSpec
from repro.errors import UserError
from repro.link.namespaces import HOST_END
from repro.processes import Message, Parent, run_worker
from repro.profiles.answers import BrokenAnswerError, RefusedError
from repro.serving import messages as say
from repro.serving.clocks import telling_time
from repro.serving.given_up import GivenUp
from repro.serving.messages import ATTEMPTS

#: The order by which two instances find out whether anything crosses between them, and the tokens of its prompt.
_TRIAL, _TRIAL_TOKENS = -1, 32


@dataclass(frozen=True)
class VllmInstanceConfig:
    """What the adapter is started with. Its server is `server`, on that Unix socket and with that log, or runs at `url` already.

    Orders are received on `host`, where vLLM's connector listens on `side_port`; `batch_max` requests decode at once.
    """

    MODULE: ClassVar = "repro.serving.vllm_instance"
    forks: ClassVar = False
    name: str
    host: str
    vocabulary: int
    batch_max: int
    server: VllmSpec | None = None
    socket: str = ""
    log: str = ""
    side_port: int = 0
    url: str | None = None
    api_key_variable: str | None = None
    start_timeout_s: float = 300.0
    answer_timeout_s: float = 120.0

    def __post_init__(self) -> None:
        if (self.server is None) == (self.url is None):
            raise UserError(f"instance {self.name}: accepted: a server to start or the url of one that runs")


class _GoneError(Exception):
    """The request was given up while its tokens came."""


class _Peer:
    """A connection between two adapters: lines of JSON, orders one way and what became of them the other."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._file = connection.makefile("rwb")
        self._lock = threading.Lock()

    def say(self, **words: Any) -> bool:
        """Send a line; False where nobody is there any more."""
        try:
            with self._lock:
                self._file.write(json.dumps(words).encode() + b"\n")
                self._file.flush()
        except (OSError, ValueError):
            return False
        return True

    def hear(self, take: Callable[[dict[str, Any]], None]) -> None:
        """Hand on every line that comes until the other side has gone, in a thread."""

        def read() -> None:
            with contextlib.suppress(OSError):
                for line in self._file:
                    if line.endswith(b"\n"):
                        take(json.loads(line))

        threading.Thread(target=read, name="peer", daemon=True).start()


@dataclass
class _Taken:
    """A request that decodes here: when its first token came, and whether its state was found to have crossed."""

    key: int
    first_s: float = 0.0
    told_s: float = field(default_factory=time.monotonic)
    problem: str = ""
    begun: threading.Event = field(default_factory=threading.Event)
    counted: threading.Event = field(default_factory=threading.Event)


class VllmInstance:
    """The adapter; prefills go one after the other, and so does the taking in of state, that a counter's growth is one request's."""

    def __init__(self, config: VllmInstanceConfig, parent: Parent, server: OpenAIServer) -> None:
        self._config, self._parent, self._server = config, parent, server
        self._jobs: queue.SimpleQueue[say.Prefill | say.Connect] = queue.SimpleQueue()
        self._orders: queue.SimpleQueue[tuple[dict[str, Any], _Peer]] = queue.SimpleQueue()
        self._peers: dict[str, _Peer] = {}
        self._places = threading.Semaphore(config.batch_max)
        self._gone = GivenUp()
        self._slow, self._full = 1.0, False
        self._lock = threading.Lock()
        self._waiting_bytes: dict[int, int] = {}
        self._sent_bytes = 0
        #: What ends it: an error, or None for the order to stop.
        self.over: queue.SimpleQueue[UserError | None] = queue.SimpleQueue()
        self._ending = threading.Event()

    def start(self) -> int:
        """Begin to take orders; returns the port on which other adapters are heard."""
        listening = socket.create_server((self._config.host, 0))
        self._begin("prefill", self._prefill_all)
        self._begin("take", self._take_all)

        def accept() -> None:
            while True:
                peer = _Peer(listening.accept()[0])
                peer.hear(lambda order, peer=peer: self._orders.put((order, peer)))  # type: ignore[misc]

        threading.Thread(target=accept, name="accept", daemon=True).start()
        return int(listening.getsockname()[1])

    def wait(self) -> UserError | None:
        """Serve until it is over; what ended it. What its threads meet from then on, as all is closed, is no failure of theirs."""
        how = self.over.get()
        self._ending.set()
        return how

    def _begin(self, name: str, work: Callable[..., None], *arguments: object) -> None:
        def run() -> None:
            try:
                work(*arguments)
            except Exception:
                if not self._ending.is_set():
                    raise

        threading.Thread(target=run, name=name, daemon=True).start()

    def hear(self, message: Message) -> None:
        """Do what the router says, in the thread that reads it."""
        if message["kind"] == "stop":
            self.over.put(None)
            return
        match told := say.to_instance(message):
            case say.Prefill() | say.Connect():
                self._jobs.put(told)
            case say.Forget():
                key = told.request * ATTEMPTS + told.attempt
                with self._lock:
                    if self._waiting_bytes.pop(key, None) is None:
                        self._gone.add(key)
            case say.Slow():
                self._slow = told.factor
            case say.Memory():
                self._full = told.full
            case say.Report():
                with self._lock:
                    sent, waiting = self._sent_bytes, sum(self._waiting_bytes.values())
                self._tell(say.Sending(time.monotonic(), sent, 0, waiting, sent, 0.0))
            case _:
                raise UserError(f"instance {self._config.name}: an instance of vLLM does not know {told}")

    def _tell(self, said: say.FromInstance) -> None:
        self._parent.send_text(say.encoded(said))

    def _undelivered(self, key: int, why: str, *, full: bool = False) -> None:
        if key != _TRIAL:
            self._tell(say.Undelivered(*divmod(key, ATTEMPTS), why, full))

    def _linger(self, took_s: float) -> None:
        """Where it is to be slow, take as many times as long as it took."""
        if self._slow > 1:
            time.sleep((self._slow - 1) * took_s)

    def _check(self) -> None:
        """End where the server cannot be reached any more, which of one that was not started here nothing else tells."""
        try:
            self._server.reach()
        except BrokenAnswerError as error:
            self.over.put(UserError(f"the server of {self._config.name} cannot be reached: {error}"))

    # Prefill.

    def _prefill_all(self) -> None:
        while True:
            job = self._jobs.get()
            if isinstance(job, say.Connect):
                self._connect(job)
            else:
                self._prefill(job)

    def _connect(self, told: say.Connect) -> None:
        """Reach a decode instance, and have a short prompt's state cross to it: it serves once that was counted."""
        try:
            peer = _Peer(socket.create_connection((told.host, told.port)))
        except OSError:  # it has ended, and its successor will be told of
            return

        def took(answer: dict[str, Any]) -> None:
            key, size = int(answer["key"]), int(answer["bytes"])
            with self._lock:
                self._waiting_bytes.pop(key, None)
                self._sent_bytes += size
            if key != _TRIAL:
                return
            if size:
                self._tell(say.Connected(told.name))
            else:
                self.over.put(
                    UserError(f"engines: nothing crosses from {self._config.name} to {told.name}: {answer['why']}")
                )

        peer.hear(took)
        self._peers[told.name] = peer
        prompt = self._server.prompt(_TRIAL_TOKENS, np.random.default_rng())
        try:
            parameters = offered(self._server, prompt)
        except (BrokenAnswerError, RefusedError) as error:
            raise UserError(f"engines: {self._config.name} does not prefill: {error}") from error
        peer.say(key=_TRIAL, prompt=prompt, output_tokens=2, parameters=parameters)

    def _prefill(self, asked: say.Prefill) -> None:
        key = asked.request * ATTEMPTS + asked.attempt
        if asked.prompt is None:
            raise UserError(f"instance {self._config.name}: vLLM is sent its prompts; request {asked.request} has none")
        if self._gone.take(key):
            return
        if (peer := self._peers.get(asked.to or "")) is None:
            self._undelivered(key, f"no connection to {asked.to}")
            return
        start_s = time.monotonic()
        try:
            parameters = offered(self._server, asked.prompt)
        except (BrokenAnswerError, RefusedError) as error:
            self._undelivered(key, f"prefill: {error}")
            self._check()
            return
        self._linger(time.monotonic() - start_s)
        with self._lock:
            if self._gone.take(key):  # what the engine keeps of it goes when nobody has fetched it for a while
                return
            self._waiting_bytes[key] = round(asked.kv_bytes)
        self._tell(say.Prefilled(asked.request, asked.attempt, start_s, time.monotonic()))
        if not peer.say(
            key=key, prompt=asked.prompt, output_tokens=asked.output_tokens, parameters=parameters
        ):  # fmt: skip
            self._undelivered(key, f"no connection to {asked.to}")

    # Decode.

    def _take_all(self) -> None:
        while True:
            order, peer = self._orders.get()
            self._take(order, peer)

    def _take(self, order: dict[str, Any], peer: _Peer) -> None:
        """Let the engine fetch a request's state and begin to decode; over when that has been counted."""
        key = int(order["key"])
        if self._gone.take(key):
            return
        if self._full and key != _TRIAL:
            self._undelivered(key, "no memory for its KVCache", full=True)
            return
        self._places.acquire()
        before, taken = self._server.counters(), _Taken(key)
        self._begin(f"decode {key}", self._decode, order, taken)
        taken.begun.wait()
        size = 0
        if not taken.problem:
            size = int(counted_bytes(self._server, before))
            taken.problem = "" if size else f"{NIXL_BYTES} did not grow: it was decoded alone"
        if not taken.problem and key != _TRIAL:
            # The engine does not say when the state was there: with the first token at the latest.
            self._tell(say.Delivered(*divmod(key, ATTEMPTS), taken.first_s, size))
            self._tell(say.Decoding(*divmod(key, ATTEMPTS), taken.first_s, taken.first_s))
        peer.say(key=key, bytes=size, why=taken.problem)
        taken.counted.set()

    def _decode(self, order: dict[str, Any], taken: _Taken) -> None:
        """The answer from its first token to its last."""
        key = taken.key

        def heard(tokens: int) -> None:
            now_s = time.monotonic()
            if tokens and not taken.begun.is_set():
                taken.first_s = now_s
                taken.begun.set()
            if self._gone.take(key) or (taken.problem and taken.counted.is_set()):
                raise _GoneError
            self._linger(now_s - taken.told_s)
            taken.told_s = time.monotonic()

        try:
            answer = self._server.answer(
                order["prompt"], order["output_tokens"], heard, kv_transfer_params=order["parameters"]
            )
            end_s = time.monotonic()
            taken.counted.wait()
            if taken.problem:
                self._undelivered(key, taken.problem)
            elif key != _TRIAL and not self._gone.take(key):
                self._tell(say.Finished(*divmod(key, ATTEMPTS), end_s, list(answer.tokens)))
        except _GoneError:
            if taken.counted.is_set() and taken.problem:
                self._undelivered(key, taken.problem)
            taken.problem = taken.problem or "it was given up"
        except (BrokenAnswerError, RefusedError) as error:
            taken.problem = f"decode: {error}"
            self._undelivered(key, taken.problem)
            self._check()
        finally:
            taken.begun.set()
            self._places.release()


def work(parent: Parent, config: Message) -> None:
    """Start the server, or find the one that runs, then serve until told to stop or it has ended."""
    spec = configuration.build(VllmInstanceConfig, {key: value for key, value in config.items() if key != "kind"})
    with ExitStack() as closing:
        started = _started(spec, closing) if spec.server is not None else None
        server = closing.enter_context(
            OpenAIServer(
                spec.url or f"http://{spec.name}", spec.vocabulary, key_variable=spec.api_key_variable,
                timeout_s=spec.answer_timeout_s, key="options.endpoints" if spec.url else "engines",
                socket=None if spec.url else Path(spec.socket),
            )
        )  # fmt: skip
        if spec.url and server.prepare() != "token ids":
            raise UserError(f"options.endpoints: {spec.url} does not take and give token ids; accepted: vLLM")
        instance = VllmInstance(spec, parent, server)
        if started is not None:
            started.child.on_end(lambda how: instance.over.put(UserError(started.refusal() or str(how))))
        port = instance.start()
        parent.deliver(telling_time(parent, instance.hear))
        parent.send_text(say.encoded(say.Ready(port)))
        if (error := instance.wait()) is not None:
            raise error


def _started(spec: VllmInstanceConfig, closing: ExitStack) -> VllmServer:
    """A server of this instance's own, once it answers. Raises UserError, in the engine's own words, where it ends instead."""
    assert spec.server is not None
    Path(spec.socket).unlink(missing_ok=True)  # of one that was killed
    server = VllmServer(
        f"vLLM of {spec.name}", spec.server, Path(spec.socket), Path(spec.log), host=spec.host,
        side_port=spec.side_port, namespaced=any(name == HOST_END for _, name in socket.if_nameindex()),
        cores=os.sched_getaffinity(0),
    )  # fmt: skip
    closing.callback(server.close)
    try:
        server.wait(time.monotonic() + spec.start_timeout_s, spec.start_timeout_s)
    except EngineRefusedError as refusal:
        raise UserError(str(refusal)) from None
    return server


if __name__ == "__main__":
    run_worker(work)
