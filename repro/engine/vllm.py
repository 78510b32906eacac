"""vLLM as prefill and as decode engine: how an instance is started on a side of a link, and how the KVCache is handed over.

The state moves by vLLM's own connector (NIXL): prefill answers one token and parameters of the transfer, which go into the decode
request; the decode instance then reads the state from the prefill instance's memory. The kit decides who gets which request and reads
the engines' counters. A decode instance that gets no parameters, or cannot use them, prefills by itself without a word: that no byte
crossed is therefore an error here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from repro.errors import UserError
from repro.profiles.endpoint import Answer

NIXL_BYTES: Final = "vllm:nixl_bytes_transferred_sum"
#: What a prefill request asks for: that its state be kept for somebody who will read it.
_KEEP_STATE: Final = {
    "do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None, "remote_block_ids": None, "remote_host": None,
    "remote_port": None,
}  # fmt: skip


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
    """One request through both instances. `ttft_s` is from its arrival to the decode side's first token."""

    prefill_s: float
    answer: Answer
    kv_bytes: float

    @property
    def ttft_s(self) -> float:
        """Prefill, then the decode request up to its first token."""
        return self.prefill_s + self.answer.ttft_s


def serve_split(prefill: Instance, decode: Instance, prompt: Any, output_tokens: int, clock: Any) -> HandedOver:
    """Prefill on one instance, decode on the other, one request at a time: bytes are what decode's counter grew by meanwhile.

    Raises:
        UserError: where prefill hands nothing over, or the decode instance's connector counts no byte.
    """
    before, start_s = decode.counters().get(NIXL_BYTES, 0.0), clock()
    first = prefill.complete(prompt, 1, kv_transfer_params=_KEEP_STATE)
    prefill_s = clock() - start_s
    parameters = first.get("kv_transfer_params")
    if not parameters:
        raise UserError(
            "engines: the prefill instance hands nothing over: its answer holds no kv_transfer_params; accepted: vLLM with a kv_connector"
        )
    answer = decode.answer(prompt, output_tokens, kv_transfer_params=parameters)
    kv_bytes = decode.counters().get(NIXL_BYTES, 0.0) - before
    if kv_bytes <= 0:
        raise UserError(
            f"engines: {NIXL_BYTES} of the decode instance did not grow: it has decoded alone, and nothing crossed the link"
        )
    return HandedOver(prefill_s, answer, kv_bytes)


def instance_command(python: Path, checkpoint: Path, host: str, port: int, most_tokens: int = 8192) -> list[str]:
    """The command of one instance with NIXL; it prefills and decodes. The `vllm` command itself does not start from a CPU wheel."""
    connector = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}
    return [
        str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint), "--enforce-eager",
        "--max-model-len", str(most_tokens), "--skip-tokenizer-init", "--no-enable-prefix-caching", "--host", host, "--port", str(port),
        "--kv-transfer-config", json.dumps(connector),
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
