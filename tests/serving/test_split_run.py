"""Two real processes and a link between them: tokens equal the unsplit run's, bytes the layout's, and a death ends the run."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from warm_workers import WarmWorkers

from repro.engine.base import Request
from repro.engine.torch_engine import EngineSpec
from repro.errors import UserError
from repro.link import Link, LinkSpec, open_link
from repro.models import spec as models
from repro.models.architectures import layout_of
from repro.processes import ChildEndedError, hand_out
from repro.serving.bound import ttft_bound_s
from repro.serving.records import requests_frame
from repro.serving.system import SIDES, Run, System
from repro.serving.timeline import Timeline, chrome_trace, merged, write_trace
from repro.transport import TransportSpec

TRANSPORT = TransportSpec(connections=4, secret="of this test")
RELAY = LinkSpec(name="relay", backend="relay", rate_bps=40e6, rtt_s=0.01)
LENGTHS = (200, 70, 333)


def engine_spec(name: str) -> EngineSpec:
    model = models.load(name, "tiny")
    return EngineSpec(replace(model, parameters=float(model.parameters)), chunk_tokens=64)


def requests(lengths: tuple[int, ...] = LENGTHS, output_tokens: int = 5) -> list[Request]:
    rng = np.random.default_rng(7)
    return [
        Request(number, tuple(rng.integers(3, 512, length).tolist()), output_tokens)
        for number, length in enumerate(lengths)
    ]


@pytest.fixture(scope="module")
def link() -> Iterator[Link]:
    with open_link(RELAY, run="test-split") as link:
        yield link


@pytest.fixture(scope="module")
def system(link: Link, warm: WarmWorkers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    with System(engine_spec("kimi_linear"), TRANSPORT, warm.on(link), tmp_path_factory.mktemp("logs")) as system:
        yield system


@pytest.fixture(scope="module")
def unsplit(system: System) -> Run:
    return system.serve(requests(), "unsplit")


@pytest.fixture(scope="module")
def layerwise(system: System) -> Run:
    return system.serve(requests(), "layerwise")


def test_layerwise_tokens_equal_the_unsplit_runs(layerwise: Run, unsplit: Run) -> None:
    assert layerwise.tokens == unsplit.tokens
    assert all(len(found) == 5 for found in unsplit.tokens)


def test_bulk_tokens_equal_the_unsplit_runs(system: System, unsplit: Run) -> None:
    assert system.serve(requests(), "bulk").tokens == unsplit.tokens


def test_requests_that_decode_together_get_the_tokens_that_they_get_alone(system: System, unsplit: Run) -> None:
    assert system.serve(requests(), "layerwise", in_flight=3).tokens == unsplit.tokens


def test_everything_that_an_unsplit_run_needs_stays_in_its_process(system: System, link: Link) -> None:
    before = link.signals().forward.forwarded_bytes
    run = system.serve(requests(), "unsplit")
    idle_bytes = link.signals().forward.forwarded_bytes - before
    assert idle_bytes < 10_000  # heartbeats; the state of these requests is 600 kB
    assert all(served.total_kv_bytes == 0 for served in run.served)


def test_the_unsplit_run_is_the_prefill_worker_s(unsplit: Run) -> None:
    for served in unsplit.served:
        number = served.request.request_id
        assert unsplit.timeline.of("prefill", "prefill", number)
        assert unsplit.timeline.of("prefill", "decode", number)
    assert "decode" not in {worker for worker, spans in unsplit.timeline.spans.items() if spans}


def test_each_worker_names_the_kernels_that_it_called(system: System) -> None:
    system.observe(requests((70,))[0])
    prefill, decode = ({name.rpartition(".")[2] for name in system.seen[side]["kernels"]} for side in SIDES)
    assert "chunk_kimi_delta_attention" in prefill
    assert decode
    assert "chunk_kimi_delta_attention" not in decode
    assert {system.seen[side]["freed_memory"] for side in SIDES} == {"kept"}


def test_shipped_bytes_equal_the_layouts_and_the_wire_carries_little_more(layerwise: Run) -> None:
    layout = layout_of("kimi_linear", "tiny")
    for served in layerwise.served:
        expected = {kind.name.lower(): n for kind, n in layout.by_kind(served.request.state_tokens).items()}
        assert served.kv_bytes == expected
    shipped = sum(served.total_kv_bytes for served in layerwise.served)
    assert all(served.encoded_bytes == served.total_kv_bytes for served in layerwise.served)
    assert shipped < layerwise.wire_bytes < 1.06 * shipped  # short prompts: frame headers weigh more than in earnest


def test_moments_of_a_request_come_in_their_order(layerwise: Run) -> None:
    for served in layerwise.served:
        moments = [
            served.arrival_s, served.prefill_start_s, served.first_piece_s, served.prefill_end_s, served.complete_s,
            served.joined_s, *served.token_times_s,
        ]  # fmt: skip
        assert moments == sorted(moments)


def test_the_timeline_shows_every_step_of_every_request(layerwise: Run) -> None:
    for served in layerwise.served:
        number = served.request.request_id
        for worker, what in (
            ("router", "queue"), ("prefill", "prefill"), ("prefill", "compute"), ("prefill", "copy"), ("prefill", "send"),
            ("decode", "receive"), ("decode", "restore"), ("decode", "first_token"), ("decode", "decode"),
        ):  # fmt: skip
            assert layerwise.timeline.of(worker, what, number), f"{worker} {what} of request {number}"
        sent, received = (layerwise.timeline.of(*key, number) for key in (("prefill", "send"), ("decode", "receive")))
        assert sum(s.kv_bytes or 0 for s in sent) == sum(s.kv_bytes or 0 for s in received) == served.total_kv_bytes
        (restore,) = layerwise.timeline.of("decode", "restore", number)
        assert max(span.end_s for span in received) <= restore.start_s


def test_the_trace_is_a_valid_chrome_trace_without_overlap_in_a_row(layerwise: Run, tmp_path: Path) -> None:
    write_trace(tmp_path / "trace.json", merged({"kimi": layerwise.timeline}))
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert "CLOCK_MONOTONIC" in trace["otherData"]["clock"]
    names = {event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "process_name"}
    assert names == {"kimi prefill", "kimi decode", "kimi router"}
    rows: dict[tuple[int, int], float] = {}
    spans = sorted((event for event in trace["traceEvents"] if event["ph"] == "X"), key=lambda event: event["ts"])
    assert min(event["ts"] for event in spans) == 0
    for event in spans:
        row = (event["pid"], event["tid"])
        assert event["ts"] >= rows.get(row, 0.0) - 1e-3
        rows[row] = event["ts"] + event["dur"]


def test_a_timeline_without_spans_is_an_empty_trace() -> None:
    assert chrome_trace(Timeline({}))["traceEvents"] == []


def test_requests_become_rows_of_the_shared_form(layerwise: Run) -> None:
    frame = requests_frame(layerwise, layerwise.served[0].arrival_s, model="kimi_linear")
    assert list(frame["id"]) == [0, 1, 2]
    assert (frame["outcome"] == "ok").all()
    assert (frame["encoded_bytes"] == frame["kv_bytes"]).all()
    assert (frame["ttft_s"] > frame["prefill_s"]).all()
    assert (frame["transfer_exposed_s"] < frame["transfer_s"]).all()
    assert (frame["finish_s"] > frame["arrival_s"] + frame["ttft_s"]).all()


@pytest.mark.parametrize(("mode", "in_flight", "message"), [("eager", 1, "mode: 'eager'"), ("bulk", 0, "in_flight: 0")])
def test_what_cannot_be_served_is_refused(system: System, mode: str, in_flight: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        system.serve(requests(), mode, in_flight)


def test_sigkill_of_decode_in_the_middle_of_a_transfer_ends_the_run_and_leaves_no_process(tmp_path: Path) -> None:
    slow = LinkSpec(name="slow", backend="relay", rate_bps=200e3)  # 200 kB take 8 s
    with open_link(slow, run="test-kill") as link:
        pids: list[int] = []

        def serve() -> None:
            with System(engine_spec("kimi_linear"), TRANSPORT, link, tmp_path) as system:
                pids.extend((system.pid("prefill"), system.pid("decode")))
                killer = threading.Thread(target=kill_in_transfer, args=(link, pids[1]))
                killer.start()
                try:
                    system.serve(requests((400,)), "layerwise")
                finally:
                    killer.join()

        with pytest.raises(ChildEndedError, match="worker decode was killed by SIGKILL"):
            serve()
    assert not [pid for pid in pids if psutil.pid_exists(pid)]


def kill_in_transfer(link: Link, pid: int) -> None:
    deadline = time.monotonic() + 60
    while link.signals().forward.forwarded_bytes < 20_000 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
def test_tokens_equal_the_unsplit_runs_with_the_transport_in_processes_of_its_own(
    link: Link, unsplit: Run, tmp_path: Path
) -> None:
    with System(engine_spec("kimi_linear"), TRANSPORT, link, tmp_path, transport_process=True) as system:
        assert system.serve(requests(), "layerwise", in_flight=3).tokens == unsplit.tokens
        children = [child.pid for child in psutil.Process(system.pid("prefill")).children()]
        assert children
    assert not [pid for pid in children if psutil.pid_exists(pid)]


@pytest.mark.parametrize(
    ("goodput_bps", "expected_s"),
    [(8e9, 0.1 + 2.0 + 0.01 + 0.05), (8e5, 0.1 + (0.5 + 10.0) + 0.01 + 0.05)],
    ids=["prefill is the slower", "the link is the slower"],
)
def test_the_bound_waits_for_the_slower_of_prefill_and_link(goodput_bps: float, expected_s: float) -> None:
    bound_s = ttft_bound_s(
        queue_s=0.1, prefill_s=2.0, first_piece_s=0.5, kv_bytes=1e6, goodput_bps=goodput_bps, rtt_s=0.02, step_s=0.05
    )
    assert bound_s == pytest.approx(expected_s)


@pytest.mark.slow
def test_on_the_computing_cores_there_is_the_computing_thread_and_no_other(link: Link, tmp_path: Path) -> None:
    cores = hand_out({"prefill": 1, "decode": 1})
    if not cores.others:
        pytest.skip("two cores are needed")
    with System(engine_spec("kimi_linear"), TRANSPORT, link, tmp_path, cores=cores) as system:
        alone_s = system.prefill_alone(requests())
        run = system.serve(requests(), "layerwise")
        placed_on = {
            side: [os.sched_getaffinity(thread.id) for thread in psutil.Process(system.pid(side)).threads()]
            for side in SIDES
        }
    assert set(alone_s) == {served.request.request_id for served in run.served}
    assert min(alone_s.values()) > 0
    for side, found in placed_on.items():
        computing = set(cores.computing[side])
        assert [cores_of for cores_of in found if cores_of & computing] == [computing], side
