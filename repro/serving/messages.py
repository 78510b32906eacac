"""What router and instances say to each other: small typed messages. They carry token counts and names, never state.

On the channel a message is a JSON object whose `kind` names its type; one of another form is refused by name. Times are CLOCK_MONOTONIC in
seconds, which all processes of a machine share; of another machine's the fleet corrects them (`clocks`). A request that is tried again has
another `attempt`, so that what an earlier one still says can be told from it. A prompt that a client sent goes once
per attempt, to the instance that prefills it; other prompts are drawn there.
"""

from __future__ import annotations

from typing import Any, get_args

import msgspec

from repro.processes import Message

#: A request's number on the wire is number × this + attempt.
ATTEMPTS = 64


class Said(msgspec.Struct, frozen=True, tag_field="kind", tag=str.lower):
    """Any of them."""


# To an instance.


class Connect(Said, frozen=True):
    """Instance `name` receives there, across the link or within the cluster."""

    name: str
    host: str
    port: int


class Prefill(Said, frozen=True):
    """Prefill a request, and send its KVCache of `kv_bytes` to decode instance `to`; with none it stays in the cluster, whose own network
    is no bottleneck (equation 4). `prompt` holds the token ids where a client sent them; without one the instance has the prompt from
    the request's number.
    """

    request: int
    attempt: int
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    kv_bytes: float
    to: str | None
    prompt: list[int] | None = None


class Copy(Said, frozen=True):
    """Send a prompt's first `input_tokens` tokens, `kv_bytes` of KVCache that this cluster holds, to an instance of the other cluster.

    `blocks` name them to an instance that has real state.
    """

    request: int
    attempt: int
    input_tokens: int
    kv_bytes: float
    to: str
    blocks: list[str] = []


class Decode(Said, frozen=True):
    """Decode a request whose KVCache is in this cluster already."""

    request: int
    attempt: int
    input_tokens: int
    output_tokens: int


class Forget(Said, frozen=True):
    """Give a request up; nothing more is said of it."""

    request: int
    attempt: int


class Slow(Said, frozen=True):
    """From now on everything takes `factor` times as long: a fault."""

    factor: float


class Memory(Said, frozen=True):
    """Whether its memory for KVCache is `full` from now on, so that it takes in no further request: a fault."""

    full: bool


# From an instance.


class Ready(Said, frozen=True):
    """It serves; `port` is where a decode instance receives, 0 at a PrfaaS instance."""

    port: int


class Connected(Said, frozen=True):
    """Its connections to instance `name` are open."""

    name: str


class Prefilled(Said, frozen=True):
    """A prefill began and ended; `cached_tokens` were found in the instance's own cache, where it has one."""

    request: int
    attempt: int
    start_s: float
    end_s: float
    cached_tokens: int | None = None


class Cached(Said, frozen=True):
    """What an instance's prefix cache serves and did not, or no longer serves: names of blocks and of checkpoints."""

    added: list[str]
    removed: list[str]
    added_checkpoints: list[str]
    removed_checkpoints: list[str]


class Delivered(Said, frozen=True):
    """A request's KVCache of `payload_bytes` on the link is there whole; it waits for the batch or has joined it."""

    request: int
    attempt: int
    at_s: float
    payload_bytes: int


class Copied(Said, frozen=True):
    """The prefix that a request waits for has come, `payload_bytes` of it on the link."""

    request: int
    attempt: int
    payload_bytes: int


class Undelivered(Said, frozen=True):
    """A transfer that failed, or a request that the decode instance could not take in; `full`: for want of memory."""

    request: int
    attempt: int
    why: str
    full: bool = False


class Decoding(Said, frozen=True):
    """A request joined the batch at `joined_s` and its first token came."""

    request: int
    attempt: int
    joined_s: float
    first_s: float


class Stepped(Said, frozen=True):
    """A decode step of an instance that streams: (request, attempt, index of the token in the answer, token) for each of its batch."""

    at_s: float
    tokens: list[tuple[int, int, int, int]]


class Finished(Said, frozen=True):
    """A request's last token; all of them, from an engine that computes some."""

    request: int
    attempt: int
    at_s: float
    tokens: list[int] | None = None


class Sending(Said, frozen=True):
    """A prefill instance's egress since its start: bytes acknowledged and waiting, TCP's smoothed RTT (0 without a connection)."""

    at_s: float
    acked_bytes: int
    resent_bytes: int
    waiting_bytes: int
    wire_bytes: int
    rtt_s: float


class Lateness(Said, frozen=True):
    """By how much timers came late since the last report: their number, mean and 99th percentile; and all CPU seconds that were used."""

    timers: int
    mean_s: float
    p99_s: float
    cpu_s: float


class Report(Said, frozen=True):
    """Ask for `Sending` and `Lateness`."""


class AskTime(Said, frozen=True):
    """Ask for `Time`; `asked_s` is when, on the head's clock."""

    asked_s: float


class Time(Said, frozen=True):
    """The answer: the question came at `heard_s` and this went at `said_s`, on the instance's clock."""

    asked_s: float
    heard_s: float
    said_s: float


ToInstance = Connect | Prefill | Copy | Decode | Forget | Slow | Memory | Report | AskTime
FromInstance = (
    Ready
    | Connected
    | Prefilled
    | Cached
    | Delivered
    | Copied
    | Undelivered
    | Decoding
    | Stepped
    | Finished
    | Sending
    | Lateness
    | Time
)

_ENCODER = msgspec.json.Encoder()
#: By `kind`: of one class msgspec knows the form already, of a union it works it out in every call, which takes thirty times as long.
_TO, _FROM = (
    dict[Any, Any]({one.__struct_config__.tag: one for one in get_args(union)}) for union in (ToInstance, FromInstance)
)


def encoded(said: Said) -> bytes:
    """The message as it goes over a channel: a JSON object with its `kind`."""
    return _ENCODER.encode(said)


def to_instance(message: Message) -> ToInstance:
    """Read what an instance is told. Raises ValueError (msgspec.ValidationError) for anything else."""
    found: ToInstance = msgspec.convert(message, _TO.get(message["kind"], ToInstance))
    return found


def from_instance(message: Message) -> FromInstance:
    """Read what an instance said. Raises ValueError (msgspec.ValidationError) for anything else."""
    found: FromInstance = msgspec.convert(message, _FROM.get(message["kind"], FromInstance))
    return found


def name_of(key: int) -> str:
    """A block's key as it goes over a channel, which carries no whole numbers of 128 bits."""
    return f"{key:x}"


def named(name: str) -> int:
    """The key of that name."""
    return int(name, 16)
