"""The split run through outages, resets and hostile peers: tokens stay those of the unsplit run, or the run says what failed."""

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from warm_workers import WarmWorkers

from repro.engine.base import Handover, Request
from repro.engine.spans import SpanLog
from repro.engine.torch_engine import EngineSpec, TorchEngine
from repro.errors import UserError
from repro.kvcache.codecs import CodecSpec
from repro.kvcache.frames import CodecId, DType, Manifest, Piece, StateKind
from repro.link import Link, LinkChange, LinkSpec, open_link
from repro.models import spec as models
from repro.serving.system import RequestFailedError, System
from repro.transport import TransportSpec, open_sender
from repro.transport.certificates import make_certificates

MODEL = replace(models.load("qwen3_5_397b", "tiny"))
ENGINE = EngineSpec(replace(MODEL, parameters=float(MODEL.parameters)), chunk_tokens=64)
TRANSPORT = TransportSpec(connections=4, secret="of this test", segment_bytes=256 << 10, stall_s=0.6, heartbeat_s=0.2)
#: Three requests of 260 kB each: a second and a half on the slow links below.
REQUESTS = [
    Request(number, tuple(np.random.default_rng(number).integers(3, 512, 300).tolist()), 3) for number in range(3)
]
SLOW_BPS = 4e6
OUTAGE_S = 1.5
HOP = Path(__file__).with_name("resetting_hop.py")


@pytest.fixture(scope="module")
def expected(warm: WarmWorkers, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, ...]]:
    """The tokens of the unsplit run."""
    logs = tmp_path_factory.mktemp("logs")
    with (
        open_link(LinkSpec(backend="none"), run="test-faults") as link,
        System(ENGINE, TRANSPORT, warm.on(link), logs) as system,
    ):
        return system.serve(REQUESTS, "unsplit").tokens


def opened(spec: LinkSpec) -> Link:
    try:
        return open_link(spec, run="test-faults")
    except UserError as error:
        pytest.skip(f"the {spec.backend} link is not available here: {error}")


def begin_outage_in_transfer(link: Link, carried_bytes: int) -> threading.Thread:
    """Start the link's schedule as soon as it has carried so much of what follows."""
    before = link.signals().forward.forwarded_bytes

    def watch() -> None:
        while link.signals().forward.forwarded_bytes < before + carried_bytes:
            time.sleep(0.005)
        began.append(link.start())

    began: list[float] = []
    thread = threading.Thread(target=watch, daemon=True)
    thread.began = began  # type: ignore[attr-defined]
    thread.start()
    return thread


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "mode", "stall_s"),
    [("relay", "layerwise", 5.0), ("relay", "bulk", 0.6), ("tbf", "layerwise", 0.6), ("packet", "layerwise", 0.6)],
)
def test_tokens_survive_an_outage_in_the_middle_of_a_transfer(
    backend: str, mode: str, stall_s: float, expected: list[tuple[int, ...]], warm: WarmWorkers, tmp_path: Path
) -> None:
    outage = LinkChange(at_s=0.0, for_s=OUTAGE_S, rate_bps=0.0)
    rtt_s = 0.0 if backend == "tbf" else 0.01
    spec = LinkSpec(backend=backend, rate_bps=SLOW_BPS, rtt_s=rtt_s, schedule=(outage,))
    with opened(spec) as link, System(ENGINE, replace(TRANSPORT, stall_s=stall_s), warm.on(link), tmp_path) as system:
        watch = begin_outage_in_transfer(link, carried_bytes=200_000)
        run = system.serve(REQUESTS, mode, in_flight=3)
        watch.join()
        (began_s,) = watch.began  # type: ignore[attr-defined]
    assert run.tokens == expected
    arrived = sorted(span.end_s for span in run.timeline.of("decode", "receive"))
    assert arrived[0] < began_s
    assert arrived[-1] > began_s + OUTAGE_S
    # Pieces come every few hundredths of a second, but not while the link is down; what had crossed by then may still have to be read.
    gap_s, next_s = max((later_s - at_s, later_s) for at_s, later_s in pairwise(arrived))
    assert gap_s > 0.5 * OUTAGE_S
    assert next_s > began_s + 0.9 * OUTAGE_S
    resent_bytes = sum(served.resent_bytes for served in run.served)
    # Connections that stall are given up and their bytes sent again; within `stall_s`, and where nothing is lost, TCP waits.
    assert (resent_bytes > 0) == (stall_s < OUTAGE_S)


@pytest.mark.slow
def test_an_outage_beyond_the_deadline_fails_the_request_and_not_the_workers(
    expected: list[tuple[int, ...]], warm: WarmWorkers, tmp_path: Path
) -> None:
    spec = LinkSpec(backend="relay", rate_bps=SLOW_BPS, schedule=(LinkChange(at_s=0.0, for_s=3.5, rate_bps=0.0),))
    with opened(spec) as link, System(ENGINE, TRANSPORT, warm.on(link), tmp_path, request_timeout_s=3.0) as system:
        watch = begin_outage_in_transfer(link, carried_bytes=50_000)
        with pytest.raises(RequestFailedError, match=r"request 0 failed: .*deadline.* pieces acknowledged"):
            system.serve(REQUESTS[:1], "layerwise")
        watch.join()
        assert system.serve(REQUESTS[1:], "layerwise").tokens == expected[1:]


class ThroughHop:
    """A link with a resetting hop on its prefill side."""

    def __init__(self, link: Any, bare: Link, period_s: float) -> None:
        self._link, self._bare, self._period_s = link, bare, period_s

    def __getattr__(self, name: str) -> Any:
        return getattr(self._link, name)

    def dial(self, port: int, side: str = "prefill") -> tuple[str, int]:
        target, far_port = self._link.dial(port, side)
        argv = [sys.executable, str(HOP), target, str(far_port), str(self._period_s)]
        self._hop = subprocess.Popen(
            self._bare.command("prefill", argv), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._hop.stdout
        return "127.0.0.1", int(self._hop.stdout.readline())

    def seen(self) -> dict[str, Any]:
        assert self._hop.stdin
        assert self._hop.stdout
        self._hop.stdin.write("\n")
        self._hop.stdin.flush()
        found: dict[str, Any] = json.loads(self._hop.stdout.readline())
        return found

    def close_hop(self) -> None:
        self._hop.kill()
        self._hop.communicate()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "mode", "tls"),
    [("relay", "layerwise", False), ("packet", "bulk", False), ("packet", "layerwise", True)],
)
def test_tokens_survive_one_connection_reset_every_second(
    backend: str, mode: str, tls: bool, expected: list[tuple[int, ...]], warm: WarmWorkers, tmp_path: Path
) -> None:
    transport = TRANSPORT
    if tls:
        make_certificates(tmp_path / "certificates")
        transport = replace(TRANSPORT, secret=None, tls=str(tmp_path / "certificates"))
    with opened(LinkSpec(backend=backend, rate_bps=SLOW_BPS / 2, rtt_s=0.01)) as bare:
        link = ThroughHop(warm.on(bare), bare, period_s=1.0)
        with contextlib.ExitStack() as stack:
            system = System(ENGINE, transport, link, tmp_path)
            stack.enter_context(system)
            stack.callback(link.close_hop)
            before = link.seen()
            run = system.serve(REQUESTS, mode, in_flight=3)
            after = link.seen()
    assert run.tokens == expected
    resets = after["resets"] - before["resets"]
    assert resets >= 2
    assert after["opened"] - before["opened"] >= resets - 1  # the last may not have come back yet
    assert sum(served.resent_bytes for served in run.served) > 0
    assert run.wire_bytes > sum(served.total_kv_bytes for served in run.served)  # those on lost connections included
    # The hop stands outside of TLS, where a handshake record is 16 hex; in the clear every connection begins with PRFAAS.
    assert after["first_bytes"].split() == (["16"] if tls else ["50"])


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["fp8", "int8"])
def test_a_lossy_codec_ships_half_the_bytes_and_still_answers(codec: str, warm: WarmWorkers, tmp_path: Path) -> None:
    assert not CodecSpec(codec).lossless
    assert not CodecSpec("none", {"recurrent": codec}).lossless
    assert CodecSpec("zstd", {"recurrent": "lz4"}).lossless
    with (
        opened(LinkSpec(backend="none")) as link,
        System(ENGINE, TRANSPORT, warm.on(link), tmp_path, codec=CodecSpec(codec)) as system,
    ):
        run = system.serve(REQUESTS[:1], "layerwise")
    (served,) = run.served
    assert len(served.tokens) == 3
    assert 0.2 < served.encoded_bytes / served.total_kv_bytes < 0.6
    assert run.wire_bytes < 0.7 * served.total_kv_bytes
    expanded = sum(span.kv_bytes or 0 for span in run.timeline.of("decode", "restore", 0))
    assert expanded == served.total_kv_bytes
    assert run.timeline.of("prefill", "encode", 0)
    assert run.timeline.of("decode", "expand", 0)


class Overheard:
    """A link that remembers where the decode side listens."""

    def __init__(self, link: Any) -> None:
        self._link = link

    def __getattr__(self, name: str) -> Any:
        return getattr(self._link, name)

    def dial(self, port: int, side: str = "prefill") -> tuple[str, int]:
        self.address: tuple[str, int] = self._link.dial(port, side)
        return self.address


def hostile_requests() -> Iterator[tuple[list[Piece], Manifest]]:
    """Whole requests, every checksum right, that no decode worker can restore."""

    def request(number: int, payload: bytes, meta: Any, **fields: Any) -> tuple[list[Piece], Manifest]:
        values = {"kind": StateKind.KEY, "dtype": DType.BFLOAT16, "shape": (1, 2, 8, 16), "tokens": (0, 8), "layer": 3}
        piece = Piece.seal(payload, request_id=number, piece=0, **{**values, **fields})
        return [piece], Manifest.of(number, [piece.header], meta)

    def handover(number: int, **fields: int) -> Any:
        return Handover(number, 1, 9, 3).as_meta() | fields

    raw = bytes(1 * 2 * 8 * 16 * 2)
    yield request(900, raw, handover(900))  # one layer of many
    yield request(901, raw, {})  # no hand-over
    yield request(902, raw, handover(902, request_id=0))  # another's
    yield request(903, b"zstandard it is not", handover(903), codec=CodecId.ZSTD)
    yield request(904, b"nor lz4", handover(904), codec=CodecId.LZ4)
    yield request(905, raw, handover(905), layer=999)
    yield request(906, raw[:16], handover(906), shape=(1, 1, 8, 1))  # of another model
    yield request(907, b"", handover(907), kind=StateKind.RECURRENT, shape=(0,))
    yield prefilled(908, output_tokens=0)
    yield prefilled(909, output_tokens=-1)
    yield prefilled(910, last_token=1 << 30)
    pieces, manifest = prefilled(911)
    narrow = [halved(piece) if piece.header.kind is StateKind.KEY else piece for piece in pieces]
    yield narrow, Manifest.of(911, [piece.header for piece in narrow], manifest.meta)


def halved(piece: Piece) -> Piece:
    """Keys as of a model with half the head dimension."""
    head = piece.header
    return Piece.seal(
        bytes(piece.payload[: head.payload_bytes // 2]),
        request_id=head.request_id,
        piece=head.piece,
        layer=head.layer,
        kind=head.kind,
        dtype=head.dtype,
        shape=(*head.shape[:-1], head.shape[-1] // 2),
        tokens=(head.token_start, head.token_end),
    )


def prefilled(number: int, **meta: int) -> tuple[list[Piece], Manifest]:
    """State that can be restored, with a hand-over that makes no sense."""
    pieces: list[Piece] = []
    request = Request(number, tuple(range(3, 20)), 3)
    TorchEngine(ENGINE).prefill(request, lambda piece: pieces.append(copied(piece)), SpanLog())
    return pieces, Manifest.of(number, [piece.header for piece in pieces], Handover.of(request).as_meta() | meta)


def copied(piece: Piece) -> Piece:
    return Piece(piece.header, memoryview(bytes(piece.payload)))


@pytest.mark.slow
def test_requests_that_cannot_be_restored_end_neither_the_decode_worker_nor_the_run(
    expected: list[tuple[int, ...]], warm: WarmWorkers, tmp_path: Path
) -> None:
    with opened(LinkSpec(backend="none")) as bare:
        link = Overheard(warm.on(bare))
        with System(ENGINE, TRANSPORT, link, tmp_path) as system, open_sender(TRANSPORT, link.address) as hostile:
            for pieces, manifest in hostile_requests():
                hostile.begin(manifest.request_id)
                for piece in pieces:
                    hostile.send(piece)
                hostile.finish(manifest)
                hostile.wait(manifest.request_id, 10)
            assert system.serve(REQUESTS, "layerwise", in_flight=3).tokens == expected
