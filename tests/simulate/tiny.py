"""Hand-made profiles and deployments for the simulator's tests: round numbers, so that results can be worked out by hand."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from repro.scheduling.policies import Homogeneous
from repro.scheduling.spec import SchedulerSpec
from repro.simulate.link_spec import SharedLinkSpec
from repro.simulate.records import Table
from repro.simulate.simulation import Simulation, Summary
from repro.simulate.spec import PdCluster, PrfaasCluster, SimulationSpec


@dataclass(frozen=True)
class TinyProfile:
    """T_prefill = tokens · s_per_token, S_kv = fixed + tokens · bytes_per_token, T_decode = base + growing parts."""

    s_per_token: float = 0.001
    fixed_bytes: float = 1e6
    bytes_per_token: float = 1e3
    step_s: float = 0.01
    per_sequence_s: float = 0.0
    per_context_s: float = 0.0
    batch_max: int = 4
    name: str = "tiny"

    def prefill_s(self, tokens: Any) -> Any:
        return np.asarray(tokens, dtype=np.float64) * self.s_per_token

    def kv_bytes(self, tokens: Any) -> Any:
        return self.fixed_bytes + np.asarray(tokens, dtype=np.float64) * self.bytes_per_token

    def decode_step_s(self, batch: int, context_tokens: float = 0.0) -> float:
        return self.step_s + self.per_sequence_s * batch + self.per_context_s * context_tokens


@dataclass(frozen=True)
class Lengths:
    """Exponential, fixed or two-point input lengths in whole tokens."""

    tokens: Sequence[int]

    def sample(self, rng: np.random.Generator, n: int) -> Any:
        return np.asarray(self.tokens, dtype=np.int64)[rng.integers(len(self.tokens), size=n)]


@dataclass(frozen=True)
class Exponential:
    mean: float

    def sample(self, rng: np.random.Generator, n: int) -> Any:
        return np.maximum(np.rint(rng.exponential(self.mean, n)), 1).astype(np.int64)


def local(profile: TinyProfile, n_p: int = 1, n_d: int = 100, **kwargs: Any) -> SimulationSpec:
    """A homogeneous PD cluster whose decode stage is wide enough not to matter."""
    return SimulationSpec((PdCluster(profile, n_p, n_d),), scheduler=SchedulerSpec(Homogeneous()), **kwargs)


def split(
    profile: TinyProfile,
    scheduler: SchedulerSpec,
    link: SharedLinkSpec,
    n_prfaas: int = 2,
    n_p: int = 2,
    n_d: int = 4,
    **kwargs: Any,
) -> SimulationSpec:
    """A PrfaaS cluster, a link and a PD cluster."""
    return SimulationSpec(
        (PdCluster(profile, n_p, n_d),), (PrfaasCluster(profile, n_prfaas, link),), scheduler, **kwargs
    )


def play(spec: SimulationSpec, stream: Any) -> tuple[pd.DataFrame, Summary]:
    table = Table()
    summary = Simulation(spec, table).run(stream)
    return table.frame(), summary
