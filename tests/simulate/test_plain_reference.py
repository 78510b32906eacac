"""The simulator request by request against a second one that shares no code with it and plays every decode step and every piece."""

import numpy as np
import pytest
from plain import Plain
from tiny import Exponential, TinyProfile, play

from repro.scheduling.policies import Threshold
from repro.scheduling.spec import SchedulerSpec
from repro.simulate.link_spec import SharedLinkSpec
from repro.simulate.spec import PdCluster, PrfaasCluster, SimulationSpec
from repro.workload.arrivals import Poisson
from repro.workload.outputs import LogNormalOutput
from repro.workload.stream import Independent, RequestBatch

FAST = TinyProfile(s_per_token=1e-4, fixed_bytes=5e6, bytes_per_token=2e4)
GROWING = TinyProfile(
    s_per_token=3e-4, fixed_bytes=5e6, bytes_per_token=2e4, step_s=0.004, per_sequence_s=0.0005, per_context_s=2e-7, batch_max=8
)  # fmt: skip
T = 6000
#: What is full → rate of arrivals, decode instances, link in bit/s, memory in bytes, and how far TTFT may be apart in seconds.
DEPLOYMENTS = {
    "nothing": (1.5, 3, 1e11, None, 1e-3),
    "decode": (3.1, 1, 1e13, None, 1e-6),
    "link": (2.5, 3, 1.2e9, None, 0.05),
    "memory": (2.0, 1, 1e13, 5e8, 1e-6),
}


def stream(arrivals: list[tuple[float, int, int]]) -> RequestBatch:
    at_s, tokens, outputs = zip(*arrivals, strict=True)
    return RequestBatch(np.array(at_s), np.array(tokens), np.array(outputs))


@pytest.mark.parametrize("full", DEPLOYMENTS)
def test_every_request_has_the_times_of_the_plain_simulator(full: str) -> None:
    rate, n_d, rate_bps, memory, apart_s = DEPLOYMENTS[full]
    output, count = (60, 800) if memory is None else (400, 250)  # long answers are what fills memory
    arrivals = [
        row
        for batch in Independent(Poisson(rate), Exponential(5000), LogNormalOutput(output, 0.8, 2000), count, 5)
        for row in zip(batch.arrival_s.tolist(), batch.input_tokens.tolist(), batch.output_tokens.tolist(), strict=True)
    ]
    if memory is not None:
        arrivals = [(at, min(tokens, 20_000), output) for at, tokens, output in arrivals]
    plain = Plain(
        GROWING, 2, n_d, FAST, 2, T, rate_bps, 0.03, 57, memory if memory is not None else float("inf")
    )  # fmt: skip
    expected = plain.run(arrivals)
    spec = SimulationSpec(
        (PdCluster(GROWING, 2, n_d, decode_memory_bytes=memory),),
        (PrfaasCluster(FAST, 2, SharedLinkSpec(rate_bps, 0.03, nic_bps=1e15, connection_bps=1e15)),),
        SchedulerSpec(Threshold(), threshold_tokens=T),
    )
    found, summary = play(spec, [stream(arrivals)])
    assert summary.completed == len(expected)
    ttft = np.array([one.first_s - one.arrival_s for one in expected])
    np.testing.assert_allclose(found["ttft_s"], ttft, rtol=0, atol=apart_s)
    np.testing.assert_allclose(found["finish_s"], [one.finish_s for one in expected], rtol=0, atol=apart_s)
    assert found["ttft_s"].mean() == pytest.approx(ttft.mean(), rel=5e-4)
    assert summary.egress_bytes == pytest.approx(plain.sent_bytes, rel=1e-6)
    assert summary.preemptions == sum(one.preempted for one in expected)
    assert (summary.preemptions > 20) == (full == "memory"), "what is said to be full is"
