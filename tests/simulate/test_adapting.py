"""What was seen to fail: outputs grow after hours of shorter ones, and the deployment has to be split anew."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
from tiny import play

from repro.bench._simulate_ours import deployment
from repro.configuration import build
from repro.presets import preset
from repro.record.request_metrics import good
from repro.scheduling.policies import Prfaas
from repro.scheduling.spec import PolicySpec
from repro.simulate.deployments import requests, simulated, with_scheduler
from repro.simulate.link_spec import SharedLinkSpec
from repro.simulate.spec import SimulationSpec
from repro.workload.arrivals import Poisson
from repro.workload.outputs import LogNormalOutput
from repro.workload.spec import ServiceLevel
from repro.workload.stream import RequestBatch

RATE, AFTER_S = 2.2, 7200.0


@dataclass(frozen=True)
class Shifted:
    """Outputs of 1,024 tokens for so many seconds, then log-normal ones of 2,048 on average."""

    warmup_s: float
    seed: int

    def __iter__(self) -> Iterator[RequestBatch]:
        base, _ = deployment()
        rng = np.random.default_rng(self.seed)
        for batch in requests(base, Poisson(RATE), round(RATE * (self.warmup_s + AFTER_S)), self.seed):
            later = LogNormalOutput(2048, 1.0).sample(rng, len(batch.arrival_s))
            yield RequestBatch(
                batch.arrival_s,
                batch.input_tokens,
                np.where(batch.arrival_s < self.warmup_s, batch.output_tokens, later),
            )


def under(policy: str) -> SimulationSpec:
    """The paper's deployment under a policy of the configuration."""
    base, point = deployment()
    chosen = build(PolicySpec, preset("policy", policy))
    return with_scheduler(
        simulated(base, point, SharedLinkSpec(), Prfaas()),
        short_term=chosen.short_term,
        long_term=chosen.long_term,
        adaptive=chosen.adaptive,
        fallback_s=chosen.fallback_s,
    )


@pytest.mark.parametrize("hours", [1, pytest.param(3, marks=pytest.mark.slow), pytest.param(6, marks=pytest.mark.slow)])
def test_longer_outputs_are_answered_however_long_the_shorter_ones_lasted(hours: float) -> None:
    table, summary = play(under("adaptive"), Shifted(3600.0 * hours, 5))
    after = table[table["arrival_s"] >= 3600.0 * hours]
    met = good(after["ttft_s"].to_numpy(), after["tpot_s"].to_numpy(), ServiceLevel())
    assert met.mean() >= 0.95
    moved = sum(a.n_p != b.n_p for a, b in zip(summary.samples, summary.samples[1:], strict=False))
    assert moved <= 4 * (hours + AFTER_S / 3600)


def test_the_same_requests_give_the_same_decisions_with_the_adaptive_loop() -> None:
    stream = replace(Shifted(300.0, 3), warmup_s=60.0)
    spec = under("adaptive")
    first = next(iter(stream))
    short = RequestBatch(*(column[:1500] for column in first[:3]))
    assert play(spec, [short])[0].equals(play(spec, [short])[0])
