"""The live prefill worker with a prefix cache: what an earlier prompt left is sent and not computed again, and tokens stay the same."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from warm_workers import WarmWorkers

from repro.engine.base import Request
from repro.engine.torch_engine import EngineSpec
from repro.errors import UserError
from repro.experiments.split import SplitOptions
from repro.experiments.split_model import prompts
from repro.kvcache.prefix import PrefixCacheSpec
from repro.link import Link, LinkSpec, open_link
from repro.models import spec as models
from repro.models.architectures import layout_of
from repro.serving.records import requests_frame
from repro.serving.system import System
from repro.transport import TransportSpec

TRANSPORT = TransportSpec(connections=4, secret="of this test")
RELAY = LinkSpec(name="relay", backend="relay", rate_bps=40e6, rtt_s=0.01)
CACHE = PrefixCacheSpec(capacity_bytes=64e6, block_tokens=64, checkpoint_blocks=1)


@pytest.fixture(scope="module")
def link() -> Iterator[Link]:
    with open_link(RELAY, run="test-prefix") as link:
        yield link


def conversation(seed: int, turns: tuple[int, ...], salt: str = "") -> list[Request]:
    """Prompts of which each begins with the one before."""
    said = tuple(np.random.default_rng(seed).integers(3, 512, turns[-1]).tolist())
    return [Request(100 * seed + number, said[:length], 4, salt) for number, length in enumerate(turns)]


def engine_spec(name: str) -> EngineSpec:
    model = models.load(name, "tiny")
    return EngineSpec(replace(model, parameters=float(model.parameters)), chunk_tokens=64, prefix_cache=CACHE)


@pytest.mark.parametrize("name", ["kimi_linear", "mimo_v2_flash"])
def test_each_turn_of_a_conversation_computes_only_what_is_new(
    name: str, link: Link, warm: WarmWorkers, tmp_path: Path
) -> None:
    requests = conversation(1, (130, 210, 290, 290))
    with System(engine_spec(name), TRANSPORT, warm.on(link), tmp_path) as system:
        expected = system.serve(requests, "unsplit").tokens
        run = system.serve(requests, "layerwise")
        together = system.serve(conversation(1, (130, 210, 290, 290), "other"), "bulk", in_flight=2)
    assert run.tokens == together.tokens == expected
    assert [served.cached_tokens for served in run.served] == [0, 128, 192, 256]
    assert list(requests_frame(run, 0.0)["cached_tokens"]) == [0, 128, 192, 256]
    chunks = [{span.chunk for span in run.timeline.of("prefill", "compute", r.request_id)} for r in requests]
    assert chunks == [{0, 1, 2}, {2, 3}, {3, 4}, {4}]
    layout = layout_of(name, "tiny")
    assert [served.total_kv_bytes for served in run.served] == [layout.kv_bytes(r.state_tokens) for r in requests]


def test_only_the_increment_crosses_the_link_where_decode_holds_the_prefix(
    link: Link, warm: WarmWorkers, tmp_path: Path
) -> None:
    requests = conversation(3, (130, 210, 290, 257, 257))
    for name in ("kimi_linear", "qwen3_235b"):
        spec = engine_spec(name)
        spec = replace(spec, prefix_cache=replace(spec.prefix_cache, increments=True))
        layout = layout_of(name, "tiny")
        with System(spec, TRANSPORT, warm.on(link), tmp_path) as system:
            expected = system.serve(requests, "unsplit").tokens
            run = system.serve(requests, "layerwise")
        assert run.tokens == expected
        assert [served.held_tokens for served in run.served] == [0, 128, 192, 256, 256]
        sent = [layout.kv_bytes(s.request.state_tokens) - layout.bytes_per_token * s.held_tokens for s in run.served]
        assert [served.total_kv_bytes for served in run.served] == sent
        if name == "qwen3_235b":
            assert sent[-1] == 0  # the whole prompt is held: nothing but the manifest crosses


def test_shared_prefixes_of_the_split_experiment_are_the_same_in_all_prompts_and_the_rest_is_not() -> None:
    plain, shared = ([r for repeat in prompts((20, 30), 2, 4, 512, 0, n) for r in repeat] for n in (0, 12))
    assert len({request.prompt[:12] for request in shared}) == 1
    assert [request.prompt[12:] for request in shared] == [request.prompt[12:] for request in plain]
    with pytest.raises(UserError, match=r"options\.shared_prefix_tokens: 21; accepted: 0 to the shortest"):
        SplitOptions(input_tokens=(20, 30), shared_prefix_tokens=21)
