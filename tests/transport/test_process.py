import os
import queue
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from typing import Any, cast

import psutil
import pytest
from transport_rig import assert_same, eventually, make_request, send_all

from repro.errors import UserError
from repro.processes import Message
from repro.transport import TransferFailed, TransportSpec, open_receiver, open_sender
from repro.transport.process_main import _forward


def test_what_arrives_through_two_further_processes_is_what_was_sent(spec: TransportSpec) -> None:
    with (
        open_receiver(spec, "127.0.0.1", own_process=True) as receiver,
        open_sender(spec, ("127.0.0.1", receiver.port), own_process=True) as sender,
    ):
        for request_id in range(10):
            pieces, manifest = make_request(request_id, [0, 5, 70_000, 1_000_000])
            send_all(sender, pieces, manifest)
            with receiver.receive(10) as received:
                assert_same(received, pieces)
                assert received.manifest == manifest
                assert received.first_byte_s <= received.last_byte_s <= received.completed_s <= time.monotonic()
            delivery = sender.wait(request_id, 10)
            assert [p.piece for p in delivery.pieces] == [0, 1, 2, 3]
        assert len(sender.signals()) == spec.connections
        assert eventually(lambda: receiver.stats()["arena_used_bytes"] == 0)
        assert sender.stats()["arena_used_bytes"] == 0
        assert receiver.failures() == []


def test_acknowledgements_are_told_many_at_a_time_and_before_the_end_of_their_request() -> None:
    events: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
    acked = [{"kind": "acked", "request": request, "piece": piece} for request, piece in ((1, 0), (1, 1), (2, 0))]
    for event in (*acked, {"kind": "delivered", "request": 1}, {"kind": "acked", "request": 2, "piece": 1}, None):
        events.put(event)
    told: list[Message] = []

    class Told:
        def send(self, kind: str, **values: object) -> None:
            told.append({"kind": kind, **values})

    _forward(cast(Any, Told()), events)
    assert told == [
        {"kind": "acked", "request": 1, "pieces": [0, 1]},
        {"kind": "acked", "request": 2, "pieces": [0]},
        {"kind": "delivered", "request": 1},
        {"kind": "acked", "request": 2, "pieces": [1]},
    ]


def test_the_payload_may_change_as_soon_as_send_returns(spec: TransportSpec) -> None:
    with (
        open_receiver(spec, "127.0.0.1") as receiver,
        open_sender(spec, ("127.0.0.1", receiver.port), own_process=True) as sender,
    ):
        pieces, manifest = make_request(1, [900_000])
        scratch = bytearray(pieces[0].payload)
        sender.begin(1)
        sender.send(replace(pieces[0], payload=memoryview(scratch)))
        scratch[:] = bytes(len(scratch))
        sender.finish(manifest)
        with receiver.receive(10) as received:
            assert_same(received, pieces)


def test_shared_memory_is_bounded_while_decode_takes_nothing(spec: TransportSpec) -> None:
    room = 1 << 20
    spec = replace(spec, max_in_flight_bytes=room, limits=replace(spec.limits, window_bytes=room))
    with (
        open_receiver(spec, "127.0.0.1") as receiver,
        open_sender(spec, ("127.0.0.1", receiver.port), own_process=True) as sender,
    ):
        feeder = threading.Thread(target=lambda: [send_all(sender, *make_request(n, [100_000])) for n in range(50)])
        feeder.start()
        assert eventually(lambda: receiver.stats()["held_bytes"] > room // 2)
        assert not eventually(lambda: not feeder.is_alive(), 0.3)
        assert sender.stats()["arena_used_bytes"] <= 1.2 * room
        for _ in range(50):
            receiver.receive(10).release()
        feeder.join(10)
        assert not feeder.is_alive()


def test_failures_reach_the_worker_and_free_its_memory(spec: TransportSpec) -> None:
    with (
        open_receiver(replace(spec, limits=replace(spec.limits, max_request_bytes=1000)), "127.0.0.1") as receiver,
        open_sender(spec, ("127.0.0.1", receiver.port), own_process=True) as sender,
    ):
        send_all(sender, *make_request(1, [5000]))
        with pytest.raises(TransferFailed) as failure:
            sender.wait(1, 10)
        assert failure.value.reason == "refused"
        sender.begin(2, deadline_s=0.2)
        with pytest.raises(TransferFailed) as failure:
            sender.wait(2, 10)
        assert failure.value.reason == "deadline"
        sender.begin(3)
        sender.cancel(3)
        with pytest.raises(TransferFailed) as failure:
            sender.wait(3, 10)
        assert failure.value.reason == "cancelled"
        assert sender.stats()["arena_used_bytes"] == 0


def test_a_killed_transport_process_fails_its_requests_at_once(spec: TransportSpec) -> None:
    with (
        open_receiver(spec, "127.0.0.1") as receiver,
        open_sender(spec, ("127.0.0.1", receiver.port), own_process=True) as sender,
    ):
        sender.begin(1)
        (child,) = [p for p in psutil.Process().children() if "repro.transport.process" in " ".join(p.cmdline())]
        child.kill()
        with pytest.raises(TransferFailed) as failure:
            sender.wait(1, 10)
        assert failure.value.reason == "closed"
        with pytest.raises(TransferFailed):
            sender.begin(2)


def test_the_transport_process_does_not_outlive_a_killed_worker(spec: TransportSpec) -> None:
    program = (
        "import time\n"
        "from repro.transport import TransportSpec, open_receiver\n"
        "receiver = open_receiver(TransportSpec(secret='x'), '127.0.0.1', own_process=True)\n"
        "print(receiver.port, flush=True)\n"
        "time.sleep(60)\n"
    )
    worker = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    worker.stdout.readline()
    (child,) = psutil.Process(worker.pid).children()
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
    assert eventually(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


def test_an_error_at_the_start_is_the_same_one_line(spec: TransportSpec) -> None:
    with pytest.raises(UserError, match="no connection to"):
        open_sender(replace(spec, connect_timeout_s=0.3), ("127.0.0.1", 1), own_process=True)
