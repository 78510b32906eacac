"""PD instances that compute change roles under load, and the router is started anew: nothing is lost, and all tokens are right."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_router_faults import scripted
from test_serve_api import MODEL, PROFILE, SPEC, THRESHOLD, WIRE, WORDS

from repro.engine.torch_engine import EngineSpec
from repro.experiments.computed import Answers, Computing
from repro.experiments.live import Deployment, deployed
from repro.models.build import build
from repro.scheduling.decisions import Conversion
from repro.scheduling.long_term import LongTermSpec
from repro.scheduling.policies import Threshold
from repro.scheduling.short_term import ShortTermSpec
from repro.scheduling.spec import SchedulerSpec
from repro.serving.faults import LiveFault
from repro.serving.torch_instance import TorchInstanceConfig
from repro.simulate.spec import PdCluster
from repro.workload.stream import RequestBatch

COUNT = 60
COMPUTING = Computing(EngineSpec(MODEL, chunk_tokens=64), WORDS, 4)
#: The slow loop looks every half second; what it decides is scripted.
LOOPS = SchedulerSpec(
    Threshold(), threshold_tokens=THRESHOLD, short_term=ShortTermSpec(True, period_s=0.5),
    long_term=LongTermSpec(True, period_s=0.5, restart_s=0.5),
)  # fmt: skip
WAYS = (Conversion(0, 2, "prefill"), Conversion(0, 3, "prefill"), Conversion(0, 2, "decode"))


def direct(live: Deployment) -> None:
    """Script the slow loop of the run that begins now."""
    while (router := live._router) is None or not hasattr(router, "clock"):
        time.sleep(0.01)
    router.clock.ask(scripted, router, *WAYS)


@pytest.mark.slow
@pytest.mark.parametrize("restart", [False, True], ids=["alone", "with-a-router-restart"])
def test_instances_that_compute_change_roles_and_every_request_has_the_models_own_tokens(
    restart: bool, tmp_path: Path
) -> None:
    spec = replace(SPEC, pd=(PdCluster(PROFILE, 1, 3),), scheduler=LOOPS)
    tokens = np.where(np.arange(COUNT) % 2, 50, 200)
    batches = [RequestBatch(np.cumsum(np.full(COUNT, 0.25)), tokens, np.full(COUNT, 6))]
    faults = [LiveFault("router", 6.0, 1.0, "restart")] if restart else []
    with deployed(spec, WIRE, tmp_path, f"live-roles-{restart}", 0, COMPUTING) as live:
        director = threading.Thread(target=direct, args=(live,))
        director.start()
        played = live.play(batches, faults=faults)
        director.join()
    config = COMPUTING.config("reference", WIRE.transport, None, 1, 0)
    assert isinstance(config, TorchInstanceConfig)
    assert sorted(played.requests["id"]) == list(range(COUNT))
    assert set(played.requests["outcome"]) <= {"ok", "fell_back"}
    assert Answers(build(MODEL, "cpu"), config, 1).right(played) == (COUNT, COUNT)
    words = [words for _, words in played.events]
    assert "pd0.2 turns to prefill" in words
    if restart:
        assert any(one.startswith("the router serves again") for one in words)
        return
    # What an instance has it finishes before it turns.
    assert played.requests["attempts"].max() == 1
    for name, role in (("pd0.2", "prefill"), ("pd0.3", "prefill"), ("pd0.2", "decode")):
        assert words.index(f"{name} turns to {role}") < words.index(f"{name} serves as {role}")
    assert {"pd0.2", "pd0.3"} <= set(played.requests["prefill_worker"])
    assert {"pd0.1", "pd0.2"} <= set(played.requests["decode_worker"])
