"""The far end of a Ray placement without Ray: the actor is a plain class, and the program behind it a process as any other."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import psutil
import pytest

from repro.errors import UserError
from repro.serving.ray_bridge import of_side
from repro.serving.ray_host import TURN_S, Host

PROBE = "repro.link.probe"


def heard(host: Host, kind: str) -> dict[str, object]:
    """What it says, until a message of that kind."""
    until_s = time.monotonic() + 20
    while time.monotonic() < until_s:
        for message in json.loads(host.said()):
            if message["kind"] == kind:
                return dict(message)
    raise AssertionError(kind)


def test_a_question_is_answered_by_the_program_or_refused_and_its_end_is_told() -> None:
    host = Host(PROBE, "probe", {}, unasked_s=None)
    answer = json.loads(host.ask(json.dumps({"kind": "answer", "number": 7, "host": "127.0.0.1"})))
    assert answer.keys() == {"port"}
    began_s = time.monotonic()
    assert json.loads(host.said()) == []
    assert time.monotonic() - began_s < TURN_S + 1
    host.tell('{"kind": "stop"}')
    end = heard(host, "ended")
    assert (end["role"], end["how"]) == ("instance probe", "exited with status 0 before the run was over")
    refused = json.loads(host.ask(json.dumps({"kind": "answer", "number": 8, "host": "127.0.0.1"})))
    assert refused["error"].startswith("instance probe exited")


@pytest.mark.slow
def test_a_program_that_is_stopped_on_its_node_is_told_to_have_fallen_silent() -> None:
    host = Host(PROBE, "probe", {}, unasked_s=None)
    host.ask(json.dumps({"kind": "answer", "number": 0, "host": "127.0.0.1"}))
    host.afflict("stop")
    assert str(heard(host, "ended")["how"]).startswith("is stopped")
    host.afflict("continue")
    host.tell('{"kind": "stop"}')
    host._child.kill()


_UNASKED = """
import sys, time
from repro.serving.ray_host import Host
host = Host("repro.link.probe", "probe", {}, float(sys.argv[1]))
print(host._child.pid, flush=True)
for _ in range(3):
    host.said()
print("asked", flush=True)
time.sleep(60)
"""


def test_an_actor_that_nobody_asks_any_more_ends_and_takes_its_program_along() -> None:
    with subprocess.Popen([sys.executable, "-c", _UNASKED, "1.5"], stdout=subprocess.PIPE, text=True) as actor:
        assert actor.stdout is not None
        program = psutil.Process(int(actor.stdout.readline()))
        assert actor.stdout.readline() == "asked\n"  # for longer than it may be left alone
        assert actor.wait(20) == 1
    _, alive = psutil.wait_procs([program], timeout=5)
    assert not alive


def test_a_side_that_no_node_stands_on_is_refused_with_the_resource_that_is_missing() -> None:
    nodes = [{"id": "a", "host": "h", "resources": {"prefill": 2.0, "CPU": 1.0}}]
    assert of_side(nodes, "prefill", "h:6379") == nodes
    with pytest.raises(
        UserError, match=r"ray: no node of h:6379 has the resource 'decode'; accepted: nodes of `ray start"
    ):
        of_side(nodes, "decode", "h:6379")
