"""What a live deployment is told to start where its engine is vLLM: servers of its own, or adapters to servers that run already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Final

from repro.engine.vllm_server import VllmSpec
from repro.errors import UserError
from repro.processes.cores import usable
from repro.serving.fleet import Config
from repro.serving.vllm_instance import VllmInstanceConfig
from repro.transport import TransportSpec

_FIRST_SIDE_PORT: Final = 5700


@dataclass
class VllmComputing:
    """Makes instances of vLLM, each on the next core of this machine, with sockets in `sockets` and the servers' logs in `logs`.

    Where `endpoints` names addresses by cluster ("prfaas0", "pd0"), an instance is an adapter to the one of its index there.
    """

    environment: Path
    checkpoint: Path
    vocabulary: int
    most_tokens: int
    sockets: Path
    logs: Path
    start_timeout_s: float
    answer_timeout_s: float
    endpoints: Mapping[str, Sequence[str]] = field(default_factory=dict)
    api_key_variable: str | None = None
    listens: bool = True
    _numbers: count[int] = field(default_factory=count)

    def config(self, name: str, transport: TransportSpec, host: str | None, batch_max: int, seed: int) -> Config:
        """What an instance of that name is started with; state moves by the engine's connector, not by `transport`."""
        del transport, seed
        assert host is not None
        number, (cluster, _, index) = next(self._numbers), name.partition(".")
        if self.endpoints:
            return VllmInstanceConfig(
                name, host, self.vocabulary, batch_max, url=self.endpoints[cluster][int(index)],
                api_key_variable=self.api_key_variable, answer_timeout_s=self.answer_timeout_s,
            )  # fmt: skip
        cores = usable()
        if len(cores) < 2:
            raise UserError("engines: prefill and decode need a core each, and this machine has one to give")
        core = cores[number % len(cores)].processors[0]
        server = VllmSpec(str(self.environment), str(self.checkpoint), self.most_tokens, self.vocabulary, core)
        return VllmInstanceConfig(
            name, host, self.vocabulary, batch_max, server, str(self.sockets / name), str(self.logs / f"vllm-{name}.log"),
            _FIRST_SIDE_PORT + number, start_timeout_s=self.start_timeout_s, answer_timeout_s=self.answer_timeout_s,
        )  # fmt: skip
