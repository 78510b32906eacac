"""vLLM as prefill and as decode engine: how an instance is started, how the KVCache is handed over, and how many bytes that is.

The state moves by vLLM's own connector (NIXL): prefill answers one token and parameters of the transfer, which go into the decode
request; the decode instance then reads the state from the prefill instance's memory. The kit decides who gets which request and reads
the engines' counters. A decode instance that gets no parameters, or cannot use them, prefills by itself without a word: that no byte
crossed is therefore an error here.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from repro.errors import UserError
from repro.models.layout import StateKind, StateLayout
from repro.processes import tied
from repro.profiles.answers import Answer

NIXL_BYTES: Final = "vllm:nixl_bytes_transferred_sum"
NIXL_SECONDS: Final = "vllm:nixl_xfer_time_seconds_sum"
#: What the engine says of its own cache: the tokens of a block, and in what its states are kept.
CACHE_INFO: Final = "vllm:cache_config_info"
#: A hybrid's `block_size` is the smaller of attention's and of the states', which is as long as the longest request.
_ATTENTION_BLOCK: Final = "effective_attention_block_size"
#: Counters are written after the answer; so long they may take.
_COUNTED_WITHIN_S: Final = 3.0
#: What a prefill request asks for: that its state be kept for somebody who will read it.
_KEEP_STATE: Final = {
    "do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None, "remote_block_ids": None, "remote_host": None,
    "remote_port": None,
}  # fmt: skip
_PER_TOKEN: Final = (StateKind.KEY, StateKind.VALUE, StateKind.LATENT, StateKind.LATENT_ROPE)
_FIXED: Final = (StateKind.RECURRENT, StateKind.CONVOLUTION)
_ITEMSIZE: Final = {"auto": 2, "bfloat16": 2, "float16": 2, "float32": 4}


class Instance(Protocol):
    """A running engine behind an OpenAI-compatible address."""

    def complete(self, prompt: Any, output_tokens: int, **extra: Any) -> dict[str, Any]:
        """The whole answer at once."""

    def answer(self, prompt: Any, output_tokens: int, **extra: Any) -> Answer:
        """The streamed answer."""

    def counters(self) -> Mapping[str, float]:
        """The engine's own counters."""


@dataclass(frozen=True)
class HandedOver:
    """One request through both instances. `ttft_s` is from its arrival to the decode side's first token.

    `kv_bytes` and `transfer_s` are what the decode instance's connector counted, `state_tokens` the tokens of the state that prefill
    offered, None where it does not say.
    """

    prefill_s: float
    answer: Answer
    kv_bytes: float
    transfer_s: float = math.nan
    state_tokens: int | None = None

    @property
    def ttft_s(self) -> float:
        """Prefill, then the decode request up to its first token."""
        return self.prefill_s + self.answer.ttft_s


def offered(prefill: Instance, prompt: Any) -> dict[str, Any]:
    """Let an instance prefill a prompt and keep its state; returns where the state is, for the decode request.

    Raises:
        UserError: where it hands nothing over.
    """
    found = prefill.complete(prompt, 1, kv_transfer_params=_KEEP_STATE).get("kv_transfer_params")
    if not found:
        raise UserError(
            "engines: the prefill instance hands nothing over: its answer holds no kv_transfer_params; accepted: vLLM with a kv_connector"
        )
    return dict(found)


def serve_split(
    prefill: Instance,
    decode: Instance,
    prompt: Any,
    output_tokens: int,
    clock: Callable[[], float],
    sleep: Callable[[float], object] = time.sleep,
) -> HandedOver:
    """Prefill on one instance, decode on the other, one request at a time: bytes are what decode's counter grew by meanwhile.

    Raises:
        UserError: where prefill hands nothing over, or the decode instance's connector counts no byte.
    """
    before, start_s = decode.counters(), clock()
    parameters = offered(prefill, prompt)
    prefill_s = clock() - start_s
    answer = decode.answer(prompt, output_tokens, kv_transfer_params=parameters)
    kv_bytes = counted_bytes(decode, before, sleep)
    after = decode.counters()
    if kv_bytes <= 0:
        raise UserError(
            f"engines: {NIXL_BYTES} of the decode instance did not grow: it has decoded alone, and nothing crossed the link"
        )
    transfer_s = after.get(NIXL_SECONDS, math.nan) - before.get(NIXL_SECONDS, 0.0)
    state_tokens = parameters.get("remote_num_tokens")
    return HandedOver(prefill_s, answer, kv_bytes, transfer_s, int(state_tokens) if state_tokens else None)


def counted_bytes(
    decode: Instance, before: Mapping[str, float], sleep: Callable[[float], object] = time.sleep
) -> float:
    """What its connector has moved since its counters were `before`; 0 where they do not grow in time."""
    waited_s = 0.0
    while (grown := decode.counters().get(NIXL_BYTES, 0.0) - before.get(NIXL_BYTES, 0.0)) <= 0:
        if waited_s >= _COUNTED_WITHIN_S:
            return 0.0
        sleep(0.1)
        waited_s += 0.1
    return grown


def state_tokens_of(layout: StateLayout, input_tokens: int) -> int:
    """Tokens whose state vLLM hands over: with recurrent states all but the last, which decode computes itself."""
    return input_tokens - any(state.kind in _FIXED for state in layout.states)


def handed_over_bytes(layout: StateLayout, state_tokens: int, cache: Mapping[str, str]) -> float:
    """What a transfer is by vLLM's own layout: whole blocks of attention, recurrent states in the type that it keeps them in.

    `layout` is the model's, in which recurrent states are float32; `cache` is CACHE_INFO. nan where a state of the model, or what the
    engine says, is not one of those that this counts.
    """
    try:
        block_tokens = int(cache[_ATTENTION_BLOCK if cache.get(_ATTENTION_BLOCK, "None") != "None" else "block_size"])
        recurrent_share = _ITEMSIZE[cache.get("mamba_ssm_cache_dtype", "auto")] / 4
        kv_share = 1 if cache.get("cache_dtype", "auto") in ("auto", "bfloat16", "float16") else 0.5
    except (KeyError, ValueError):
        return math.nan
    kept_tokens = math.ceil(state_tokens / block_tokens) * block_tokens
    total = 0.0
    for state in layout.states:
        if state.kind in _PER_TOKEN and state.window_tokens is None:
            total += state.bytes_per_token * kept_tokens * kv_share
        elif state.kind in _FIXED:
            total += state.bytes_fixed * (recurrent_share if state.kind is StateKind.RECURRENT else 1)
        else:
            return math.nan
    return total


def instance_command(python: Path, checkpoint: Path, socket: Path, most_tokens: int, most_logprobs: int) -> list[str]:
    """The command of one instance with NIXL, listening on a Unix socket; it prefills and decodes.

    A Unix socket leads into a network namespace past the link, as the kit's own control messages do. The `vllm` command itself does
    not start from a CPU wheel. Packages of this process's own path must not come before those of the engine's environment.
    """
    connector = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}
    return [
        "env", "-u", "PYTHONPATH", str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint), "--enforce-eager",
        "--max-model-len", str(most_tokens), "--max-logprobs", str(most_logprobs), "--skip-tokenizer-init", "--no-enable-prefix-caching",
        "--uds", str(socket), "--kv-transfer-config", json.dumps(connector),
    ]  # fmt: skip


def instance_environment(
    host: str, side_port: int, core: int, device: str | None, kvcache_gib: int = 1
) -> dict[str, str]:
    """Its environment. Without a core of its own two instances spin against each other; `device` is the link's, for UCX."""
    return {
        "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": str(kvcache_gib),
        "VLLM_CPU_OMP_THREADS_BIND": str(core), "VLLM_HOST_IP": host, "VLLM_NIXL_SIDE_CHANNEL_HOST": host,
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(side_port), "UCX_TLS": "tcp,self", "UCX_MODULES": "^ib",
        **({"UCX_NET_DEVICES": device} if device else {}),
    }  # fmt: skip


def confined(argv: list[str], *, namespaced: bool) -> list[str]:
    """`argv` in a process namespace of its own: whatever ends its first process, or this one, ends all that it has started.

    An engine starts processes of its own, in sessions of their own, and one that is killed leaves shared memory and sockets behind:
    these go into a /dev/shm of its own, which ends with it. On a side of a link it also gets a /sys of its own, in which UCX
    finds the devices of that network namespace (see `repro.transport.remote_memory`).
    """
    mounts = "mount -t proc proc /proc && mount -t tmpfs tmpfs /dev/shm && export TMPDIR=/dev/shm"
    mounts += " && mount -t sysfs sysfs /sys" if namespaced else ""
    user = [] if namespaced or os.geteuid() == 0 else ["unshare", "--user", "--map-root-user"]
    own = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", f'{mounts} && exec "$@"', "sh", *argv]
    return [*user, *tied(own)]
