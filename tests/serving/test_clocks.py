"""Instances whose clocks differ: the difference is measured, within a bound that holds, and taken out of what they say."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import get_args

import numpy as np
import pytest
from test_live_router import SPEC, WIRE, stream

from repro.experiments.live import Deployment
from repro.link import LinkSpec, Side
from repro.link.link import DirectLink
from repro.serving import messages as say
from repro.serving.clocks import EXCHANGES, MOMENTS, Clocks, Exchange

#: Of every PrfaaS instance; far more than any run takes.
AHEAD_S = 5000


@pytest.mark.parametrize("there_s", [0.0, 0.003, 0.2])
@pytest.mark.parametrize("back_s", [0.0, 0.05])
@pytest.mark.parametrize("ahead_s", [-3.0, 0.0, 1e6])
def test_the_true_offset_lies_within_the_uncertainty_however_unequal_the_ways(
    there_s: float, back_s: float, ahead_s: float
) -> None:
    heard_s = 100.0 + there_s
    exchange = Exchange(100.0, heard_s + ahead_s, heard_s + 0.01 + ahead_s, heard_s + 0.01 + back_s)
    assert abs(exchange.rtt_s - there_s - back_s) < 1e-9
    assert abs(exchange.offset_s - ahead_s) <= exchange.uncertainty_s(exchange.answered_s) + 1e-9


def test_the_quickest_exchange_counts_and_an_old_one_is_less_sure() -> None:
    quick, slow = Exchange(0.0, 7.001, 7.001, 0.002), Exchange(10.0, 17.4, 17.4, 10.5)
    assert quick.uncertainty_s(10.5) < slow.uncertainty_s(10.5)
    later = Exchange(9_999.0, 10_006.4, 10_006.4, 9_999.5)
    assert quick.uncertainty_s(10_000.0) > later.uncertainty_s(10_000.0)


def test_moments_are_corrected_where_the_clocks_differ_for_sure_and_nothing_else_is() -> None:
    clocks = Clocks()
    for name, ahead_s in (("far", 50.0), ("near", 0.0004)):
        for number in range(EXCHANGES):
            asked_s = clocks.question(name).asked_s
            assert not clocks.measured(name)
            trip_s = 0.001 * (number + 1)
            heard_s = asked_s + trip_s / 2 + ahead_s
            clocks.note(name, say.Time(asked_s, heard_s, heard_s), asked_s + trip_s)
        assert clocks.measured(name)
    said = say.Prefilled(3, 1, 60.0, 61.5)
    found = clocks.corrected("far", said)
    assert isinstance(found, say.Prefilled)
    assert (found.request, found.attempt) == (3, 1)
    assert abs(found.start_s - 10.0) < 0.001
    assert abs(found.end_s - 11.5) < 0.001
    # 0.4 ms within ± 0.5 ms: perhaps the same clock.
    assert clocks.corrected("near", said) is said
    late = say.Lateness(5, 0.1, 0.2, 3.0)
    assert clocks.corrected("far", late) is late
    record = clocks.record()
    assert record["far"]["clock_correction_s"] == record["far"]["clock_offset_s"] == pytest.approx(50.0, abs=0.001)
    assert record["near"]["clock_correction_s"] == 0.0
    clocks.forget("far")
    assert not clocks.measured("far")
    assert clocks.corrected("far", said) is said


def test_every_moment_that_an_instance_tells_is_known_as_one() -> None:
    durations = {say.Sending: {"rtt_s"}, say.Lateness: {"mean_s", "p99_s", "cpu_s"}}
    for kind in set(get_args(say.FromInstance)) - {say.Time}:
        seconds = {name for name in kind.__struct_fields__ if name.endswith("_s")}
        assert set(MOMENTS.get(kind, ())) == seconds - durations.get(kind, set()), kind


class Shifted(DirectLink):
    """Programs of the prefill side run in a time namespace: their CLOCK_MONOTONIC is another one, as on another machine."""

    def command(self, side: Side, argv: Sequence[str]) -> list[str]:
        return [*ahead(), *argv] if side == "prefill" else list(argv)


def ahead() -> list[str]:
    rootless = ["--user", "--map-root-user"] if os.geteuid() else []
    return ["unshare", *rootless, "--time", "--monotonic", str(AHEAD_S)]


@pytest.fixture(scope="module")
def shifted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    clock = [*ahead(), sys.executable, "-c", "import time; print(time.clock_gettime(time.CLOCK_MONOTONIC))"]
    try:
        told = subprocess.run(clock, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no time namespaces here: {error}")
    if float(told) < AHEAD_S:
        pytest.skip("this kernel enters a time namespace only at a fork")
    link = Shifted(LinkSpec(rate_bps=None, backend="none"), "clocks-test", "none", [])
    with Deployment(SPEC, WIRE, link, tmp_path_factory.mktemp("clocks"), 0) as running:
        yield running


def test_a_clock_that_is_shifted_by_far_gives_the_same_timeline(shifted: Deployment) -> None:
    played = shifted.play(stream(16))
    unsure_s = 0.0
    for name, worker in played.workers.items():
        truth_s = AHEAD_S if name.startswith("prfaas") else 0
        assert abs(worker["clock_offset_s"] - truth_s) <= worker["clock_uncertainty_s"] < 0.5, name
        assert (worker["clock_correction_s"] != 0) == (truth_s != 0)
        unsure_s = max(unsure_s, worker["clock_uncertainty_s"])
    found = played.requests
    assert set(found["outcome"]) == {"ok"}
    assert set(found["route"]) == {"pd", "prfaas"}
    # Of the deployment's time: what is wrong with a moment, and what was measured apart from it.
    slack_s = 2 * unsure_s * WIRE.scale.time + 1e-6
    remote = found[found["route"] == "prfaas"]
    assert (found["queue_s"] >= -slack_s).all()
    assert (remote["transfer_s"] >= -slack_s).all()
    parts = found["queue_s"] + found["prefill_s"] + found["transfer_exposed_s"] + found["decode_queue_s"]
    assert (found["ttft_s"] >= parts - slack_s).all()
    assert found["ttft_s"].max() < 60
    np.testing.assert_allclose(
        remote["prefill_s"], SPEC.prfaas[0].profile.prefill_s(remote["input_tokens"].to_numpy()), rtol=1e-6, atol=1e-6
    )


def test_an_instance_that_comes_back_tells_the_time_anew(shifted: Deployment) -> None:
    before = shifted.fleet.clocks.record()["prfaas0.1"]
    shifted.fleet.replace("prfaas0.1", next(one for place, one in shifted.configs.items() if place.name == "prfaas0.1"))
    shifted.fleet.wait()
    after = shifted.fleet.clocks.record()["prfaas0.1"]
    assert after["clock_exchanges"] == EXCHANGES
    assert after["clock_offset_s"] != before["clock_offset_s"]
    assert abs(after["clock_offset_s"] - AHEAD_S) <= after["clock_uncertainty_s"]
