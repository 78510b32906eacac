"""How instances of this machine are started: those that may be forks from one warm process per side, made anew where it was killed."""

from __future__ import annotations

import os
import signal
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import psutil
import pytest

from repro.engine.torch_engine import EngineSpec
from repro.link import LinkSpec, Side, open_link
from repro.models import spec as models
from repro.processes import Child
from repro.serving.fleet import ENVIRONMENT, LocalLauncher, Place
from repro.serving.torch_instance import TorchInstanceConfig
from repro.transport import TransportSpec

PROGRAM = """
    import os
    def warm(config):
        pass
    def work(parent, config):
        parent.send("ready")
        parent.read()
"""
MODEL = models.load("kimi_linear", "tiny")


@dataclass(frozen=True)
class Config:
    MODULE: ClassVar = "launched_program"
    forks: ClassVar = True
    name: str


def test_instances_of_a_side_are_forks_of_one_process_and_the_next_start_makes_another_where_it_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "launched_program.py").write_text(textwrap.dedent(PROGRAM))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with open_link(LinkSpec(rate_bps=None, backend="none"), run="launcher-test") as link:
        launcher = LocalLauncher(link, tmp_path / "logs")

        def start(index: int, side: Side) -> Child:
            place = Place("pd0", index, side)
            return launcher.start(place, Config(place.name), lambda message: None, lambda ended: None)

        def parent(child: Child) -> int:
            return psutil.Process(child.pid).ppid()

        places = {place: Config(place.name) for place in (Place("pd0", 0, "decode"), Place("prfaas0", 0, "prefill"))}
        launcher.prepare(places)
        one, two, across = start(0, "decode"), start(1, "decode"), start(2, "prefill")
        assert parent(one) == parent(two) != parent(across)
        assert psutil.Process(one.pid).environ().items() >= ENVIRONMENT.items()
        warm = parent(one)
        os.kill(warm, signal.SIGKILL)
        assert (one.wait(20), two.wait(20)) == (-signal.SIGKILL, -signal.SIGKILL)
        again = start(0, "decode")
        assert parent(again) not in (warm, parent(across))
        for child in (again, across):
            child.end()
            assert child.returncode == 0
        launcher.close()
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before


@pytest.mark.parametrize(
    ("devices", "forks"), [(("cpu",), True), (("cpu", "cuda:1"), False), (("cuda:0",), False)], ids=str
)
def test_an_instance_on_a_gpu_is_no_fork(devices: tuple[str, ...], forks: bool) -> None:
    engine = EngineSpec(replace(MODEL, parameters=float(MODEL.parameters)), device=devices[0], more_devices=devices[1:])
    assert TorchInstanceConfig("pd0.0", engine, TransportSpec(), None, 512, 1, 1).forks is forks
