"""What the experiments on vLLM ask of their options alike: instances that the kit starts or that run already, and checkpoints for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from repro.engine.openai import base_url
from repro.engine.vllm_pair import two_cores
from repro.engine.vllm_server import interpreter
from repro.errors import UserError
from repro.models.checkpoint import check_checkpoint
from repro.models.served import SERVED, write_served
from repro.settings import Settings

#: Bytes that the engine counts may be off its layout by so much.
BYTES_WITHIN: Final = 0.02


@dataclass(frozen=True)
class Endpoints:
    """Addresses of instances that run already; both lists empty means that the kit starts its own."""

    prefill: tuple[str, ...] = ()
    decode: tuple[str, ...] = ()


@dataclass(frozen=True)
class VllmOptions:
    """`checkpoints` are written by the kit (hybrid, dense) or folders; `environment` is a folder made by scripts/engines."""

    environment: str = ".engines"
    endpoints: Endpoints = field(default_factory=Endpoints)
    api_key_variable: str | None = None
    checkpoints: tuple[str, ...] = ("hybrid", "dense")
    input_tokens: tuple[int, ...] = (500, 2000)
    output_tokens: int = 8
    start_timeout_s: float = 300.0
    timeout_s: float = 120.0

    def __post_init__(self) -> None:
        if bool(self.endpoints.prefill) != bool(self.endpoints.decode):
            raise UserError("options.endpoints: prefill and decode; accepted: addresses of both, or of neither")
        if not self.checkpoints or not self.input_tokens or min(self.input_tokens) < 2:
            raise UserError("options.checkpoints, options.input_tokens; accepted: one checkpoint, 2 tokens or more")
        if self.output_tokens < 1:
            raise UserError(f"options.output_tokens: {self.output_tokens}; accepted: 1 or more")
        for key in ("start_timeout_s", "timeout_s"):
            if not getattr(self, key) > 0:
                raise UserError(f"options.{key}: {getattr(self, key)} is not positive")

    @property
    def running(self) -> bool:
        """Whether the instances run already."""
        return bool(self.endpoints.prefill)


def check_instances(settings: Settings, options: VllmOptions) -> None:
    """Hold these options, and the link between the instances, against what there is. Raises UserError naming the key."""
    for checkpoint in options.checkpoints:
        if checkpoint not in SERVED:
            if not Path(checkpoint).is_dir():
                raise UserError(f"options.checkpoints: {checkpoint!r}; accepted: {', '.join(SERVED)}, or a folder")
            check_checkpoint(checkpoint)
    backend = settings.link.backend
    if backend == "relay":
        raise UserError(
            "link.backend: relay carries no connection that NIXL opens; accepted: auto, packet, netem, none"
        )
    if not options.running:
        interpreter(Path(options.environment), "options.environment")
        two_cores()
        if options.api_key_variable is not None:
            raise UserError("options.api_key_variable: only of options.endpoints")
        return
    for side in ("prefill", "decode"):
        for url in getattr(options.endpoints, side):
            base_url(url, f"options.endpoints.{side}")
    if backend != "none":
        raise UserError(
            f"link.backend: {backend}; instances of options.endpoints have a network of their own; accepted: none"
        )
    if len(options.checkpoints) != 1:
        raise UserError("options.checkpoints: of running instances; accepted: the one checkpoint that they serve")


def written(checkpoints: Sequence[str], scratch: Path) -> Iterator[tuple[str, Path]]:
    """Each checkpoint's name and folder; those that the kit can write are written into `scratch`."""
    for checkpoint in checkpoints:
        if checkpoint in SERVED:
            yield checkpoint, write_served(checkpoint, scratch)
        else:
            folder = Path(checkpoint).absolute()
            yield folder.name, folder
