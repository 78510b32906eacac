"""The split run under every pair of circumstances: model, connections, link, impairment, security, codec,
and whether the sockets live in a process of their own.

All combinations would be a thousand systems. Faults of such a system come from one circumstance or from two that meet, so
the cases are a covering array: every pair of values that can meet does so in one of them. Each case serves the same
requests in bulk and layer-wise, and must give the tokens of the model's unsplit run.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from warm_workers import WarmWorkers

from repro.engine.base import Request
from repro.engine.torch_engine import EngineSpec
from repro.errors import UserError
from repro.kvcache.codecs import CODECS, CodecSpec
from repro.link import LinkSpec, open_link
from repro.models import spec as models
from repro.models.architectures import layout_of
from repro.serving.system import System
from repro.transport import TransportSpec
from repro.transport.certificates import make_certificates

Case = tuple[str, ...]

BASE = LinkSpec(rate_bps=80e6, rtt_s=0.004)
IMPAIRED: Mapping[str, Mapping[str, Any]] = {"clean": {}, "loss": {"loss": 0.02}, "jitter": {"jitter_s": 0.001}}
#: What a backend can have: tbf has no delay and so no jitter, a relay loses nothing, plain loopback has neither.
LINKS = {
    ("none", "clean"): LinkSpec(backend="none"),
    **{("relay", kind): replace(BASE, backend="relay", **IMPAIRED[kind]) for kind in ("clean", "jitter")},
    **{("tbf", kind): replace(BASE, backend="tbf", rtt_s=0.0, **IMPAIRED[kind]) for kind in ("clean", "loss")},
    **{("packet", kind): replace(BASE, backend="packet", **IMPAIRED[kind]) for kind in IMPAIRED},
}
FACTORS: Mapping[str, tuple[str, ...]] = {
    "backend": ("none", "relay", "tbf", "packet"),
    "impairment": tuple(IMPAIRED),
    "model": tuple(name for name in models.names() if name not in ("pretrained", "bytes")),
    "connections": ("1", "4", "16"),
    "security": ("secret", "tls"),
    "sockets": ("in_worker", "own_process"),
    "codec": tuple(name for name, codec in CODECS.items() if codec.lossless),
}


def pairs_of(case: Case) -> set[tuple[tuple[int, str], ...]]:
    return set(itertools.combinations(enumerate(case), 2))


def covering_array() -> list[Case]:
    """Greedy: always the case that brings most new pairs, the first of equals. Sorted, so that links are made once."""
    possible = [case for case in itertools.product(*FACTORS.values()) if case[:2] in LINKS]
    open_pairs = set().union(*map(pairs_of, possible))
    cases: list[Case] = []
    while open_pairs:
        cases.append(max(possible, key=lambda case: len(pairs_of(case) & open_pairs)))
        open_pairs -= pairs_of(cases[-1])
    return sorted(cases)


CASES = covering_array()


def test_the_cases_cover_every_pair_that_can_meet_and_each_model_several_times() -> None:
    possible = [case for case in itertools.product(*FACTORS.values()) if case[:2] in LINKS]
    assert set().union(*map(pairs_of, possible)) == set().union(*map(pairs_of, CASES))
    assert all(sum(name in case for case in CASES) >= 3 for name in FACTORS["model"])
    assert len(CASES) <= 32


def requests() -> list[Request]:
    rng = np.random.default_rng(11)
    return [Request(number, tuple(rng.integers(3, 250, length).tolist()), 3) for number, length in enumerate((75, 34))]


def engine_spec(name: str) -> EngineSpec:
    model = models.load(name, "tiny")
    return EngineSpec(replace(model, parameters=float(model.parameters)), chunk_tokens=32)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    make_certificates(folder)
    return folder


@pytest.fixture(scope="module")
def unsplit() -> dict[str, list[tuple[int, ...]]]:
    """Tokens by model, of the first system that had it."""
    return {}


@pytest.fixture(scope="module")
def link(request: pytest.FixtureRequest, warm: WarmWorkers) -> Iterator[Any]:
    backend, impairment = request.param
    try:
        link = open_link(LINKS[backend, impairment], run=f"test-matrix-{backend}")
    except UserError as error:
        pytest.skip(f"the {backend} link is not available here: {error}")
    with link:
        yield warm.on(link)
        if impairment == "loss":
            assert link.signals().forward.lost_segments > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("link", "model", "connections", "security", "sockets", "codec"),
    [(case[:2], *case[2:]) for case in CASES],
    indirect=["link"],
    ids=["-".join(case) for case in CASES],
)
def test_tokens_equal_the_unsplit_runs(
    link: Any,
    model: str,
    connections: str,
    security: str,
    sockets: str,
    codec: str,
    unsplit: dict[str, list[tuple[int, ...]]],
    certificates: Path,
    tmp_path: Path,
) -> None:
    transport = TransportSpec(connections=int(connections), secret="of the matrix", stall_s=1.0)
    if security == "tls":
        transport = replace(transport, secret=None, tls=str(certificates))
    own_process = sockets == "own_process"
    with System(
        engine_spec(model), transport, link, tmp_path, codec=CodecSpec(codec), transport_process=own_process
    ) as system:
        if model not in unsplit:
            unsplit[model] = system.serve(requests(), "unsplit").tokens
        for mode in ("bulk", "layerwise"):
            run = system.serve(requests(), mode, in_flight=2)
            assert run.tokens == unsplit[model]
            for served in run.served:
                layout = layout_of(model, "tiny").by_kind(served.request.state_tokens)
                assert served.kv_bytes == {kind.name.lower(): size for kind, size in layout.items() if size}
                assert served.encoded_bytes <= served.total_kv_bytes
                assert (served.encoded_bytes < served.total_kv_bytes) == (codec != "none")
