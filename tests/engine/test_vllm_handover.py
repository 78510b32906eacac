"""Hand-over between two instances of a production engine: what is passed on, what is counted, and what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import pytest

from repro.engine.vllm import NIXL_BYTES, serve_split
from repro.errors import UserError
from repro.profiles.answers import Answer

PARAMETERS = {"do_remote_prefill": True, "remote_engine_id": "a", "remote_block_ids": [1]}


class Fake:
    def __init__(self, parameters: Mapping[str, Any] | None = PARAMETERS, moves: float = 4096.0) -> None:
        self.parameters, self.moves, self.bytes, self.asked = parameters, moves, 100.0, list[dict[str, Any]]()

    def complete(self, prompt: Any, output_tokens: int, **extra: Any) -> dict[str, Any]:
        self.asked.append({"prompt": prompt, "output_tokens": output_tokens, **extra})
        return {"choices": [], "kv_transfer_params": self.parameters}

    def answer(self, prompt: Any, output_tokens: int, **extra: Any) -> Answer:
        self.asked.append({"prompt": prompt, "output_tokens": output_tokens, **extra})
        self.bytes += self.moves
        return Answer(0.0, (0.5, 0.6), (1, 1), len(prompt), output_tokens)

    def counters(self) -> Mapping[str, float]:
        return {NIXL_BYTES: self.bytes}


def clock() -> Any:
    return itertools.count(0.0, 0.25).__next__


def test_prefills_parameters_go_into_the_decode_request_and_bytes_are_the_engines_own() -> None:
    prefill, decode = Fake(), Fake()
    found = serve_split(prefill, decode, [1, 2, 3], 2, clock())
    assert prefill.asked[0]["output_tokens"] == 1
    assert prefill.asked[0]["kv_transfer_params"]["do_remote_decode"] is True
    assert decode.asked[0]["kv_transfer_params"] == PARAMETERS
    assert (found.kv_bytes, found.prefill_s, found.ttft_s) == (4096.0, 0.25, 0.75)


def test_a_deployment_that_decodes_alone_is_refused() -> None:
    with pytest.raises(UserError, match="it has decoded alone"):
        serve_split(Fake(), Fake(moves=0.0), [1, 2, 3], 2, clock(), sleep=lambda s: None)


@pytest.mark.parametrize("parameters", [None, {}])
def test_a_prefill_instance_that_hands_nothing_over_is_refused(parameters: Any) -> None:
    with pytest.raises(UserError, match="hands nothing over"):
        serve_split(Fake(parameters), Fake(), [1, 2, 3], 2, clock())
