"""Instances that prefill in chunks between decode steps, step by step against a plain loop, and their capacity against a closed form."""

import numpy as np
import pytest
from tiny import Exponential, Lengths, TinyProfile, play

from repro.errors import UserError
from repro.scheduling.long_term import LongTermSpec
from repro.scheduling.policies import Homogeneous
from repro.scheduling.spec import SchedulerSpec
from repro.simulate.spec import Fault, PdCluster, SimulationSpec
from repro.workload.arrivals import Poisson
from repro.workload.outputs import FixedOutput, LogNormalOutput
from repro.workload.stream import Independent, RequestBatch


def colocated(profile: TinyProfile, instances: int, chunk_tokens: int, **kwargs: object) -> SimulationSpec:
    cluster = PdCluster(profile, instances, instances, colocated_chunk_tokens=chunk_tokens)
    return SimulationSpec((cluster,), scheduler=SchedulerSpec(Homogeneous()), **kwargs)  # type: ignore[arg-type]


def plainly(profile: TinyProfile, chunk_tokens: int, arrivals: list[tuple[float, int, int]]) -> np.ndarray:
    """One instance, one step after the other: start and end of prefill, first and last token of each request."""
    times = np.full((len(arrivals), 4), np.nan)
    waiting, queue, done, now = list(range(len(arrivals))), list[int](), 0, 0.0
    running: dict[int, list[int]] = {}
    while waiting or queue or running:
        if not queue and not running:
            now = max(now, arrivals[waiting[0]][0])
        while waiting and arrivals[waiting[0]][0] <= now + 1e-9:
            queue.append(waiting.pop(0))
        step_s, chunk = 0.0, 0
        if running:
            step_s = profile.decode_step_s(len(running), sum(context for context, _ in running.values()))
        if queue and len(running) < profile.batch_max:
            chunk = min(chunk_tokens, arrivals[queue[0]][1] - done)
            if np.isnan(times[queue[0], 0]):
                times[queue[0], 0] = now
            step_s += float(profile.prefill_s(done + chunk) - profile.prefill_s(done))
        now += step_s
        for one in list(running):
            running[one][0] += 1
            running[one][1] -= 1
            if np.isnan(times[one, 2]):
                times[one, 2] = now
            if not running[one][1]:
                times[one, 3] = now
                del running[one]
        if chunk:
            done += chunk
            if done == arrivals[queue[0]][1]:
                one, done = queue.pop(0), 0
                times[one, 1] = now
                running[one] = [arrivals[one][1], arrivals[one][2]]
    return times


@pytest.mark.parametrize(("growing", "chunk_tokens"), [(0.0, 300), (2e-6, 300), (2e-6, 100_000)])
def test_every_request_has_the_times_of_a_plain_loop(growing: float, chunk_tokens: int) -> None:
    profile = TinyProfile(s_per_token=1e-4, per_sequence_s=0.001, per_context_s=growing, batch_max=4)
    (batch,) = Independent(Poisson(4.0), Exponential(700), LogNormalOutput(20.0, 1.0, 200), 600, 2)
    rows = zip(batch.arrival_s.tolist(), batch.input_tokens.tolist(), batch.output_tokens.tolist(), strict=True)
    expected = plainly(profile, chunk_tokens, list(rows))
    table, summary = play(colocated(profile, 1, chunk_tokens), [batch])
    assert summary.completed == 600
    start_s = table["arrival_s"] + table["queue_s"]
    found = np.stack(
        [start_s, start_s + table["prefill_s"], table["arrival_s"] + table["ttft_s"], table["finish_s"]], 1
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert (table["queue_s"] > 0).mean() > 0.1


@pytest.mark.parametrize("chunk_tokens", [50, 100, 1000])
def test_capacity_is_where_prefill_and_decode_together_take_all_time(chunk_tokens: int) -> None:
    profile, tokens, output, instances, until_s = TinyProfile(batch_max=16), 100, 200, 2, 300.0
    spec = colocated(profile, instances, chunk_tokens, drain_s=0.0)
    stream = Independent(Poisson(14.0), Lengths((tokens,)), FixedOutput(output), round(14.0 * until_s), 1)
    table, _ = play(spec, stream)
    measured = table["finish_s"].between(until_s / 3, until_s).sum() / (until_s * 2 / 3)
    prefill_s, decode_s = tokens * profile.s_per_token, output * profile.step_s / profile.batch_max
    assert measured == pytest.approx(instances / (prefill_s + decode_s), rel=0.03)


def test_a_token_waits_for_the_chunk_that_goes_with_it() -> None:
    profile = TinyProfile(step_s=0.01)
    # The second prefill falls into the first answer: 5 of its 100 steps carry a chunk of 0.1 s each.
    batch = RequestBatch(np.array([0.0, 0.3]), np.array([200, 500]), np.array([100, 10]))
    table, _ = play(colocated(profile, 1, 100), [batch])
    assert table["ttft_s"].iloc[0] == pytest.approx(0.21)
    assert table["tpot_s"].iloc[0] == pytest.approx((99 * 0.01 + 5 * 0.1) / 99)
    assert table["prefill_s"].iloc[1] == pytest.approx(5 * 0.11)
    alone, _ = play(colocated(profile, 2, 100), [batch])
    assert alone["tpot_s"].tolist() == pytest.approx([0.01, 0.01])


def test_what_colocated_instances_do_not_do_is_refused_by_name() -> None:
    for kwargs in (
        {"faults": (Fault("pd", 0, 1.0, 1.0),)},
        {"scheduler": SchedulerSpec(Homogeneous(), long_term=LongTermSpec(enabled=True))},
    ):
        with pytest.raises(UserError, match=r"^cluster\.pd: colocated instances serve alone"):
            SimulationSpec((PdCluster(TinyProfile(), 1, 1, colocated_chunk_tokens=8),), **kwargs)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^cluster\.pd: colocated instances do both"):
        PdCluster(TinyProfile(), 1, 2, colocated_chunk_tokens=8)
    with pytest.raises(UserError, match=r"^chunk_tokens: 0 is below 1"):
        PdCluster(TinyProfile(), 1, 1, colocated_chunk_tokens=0)
