"""Clusters of two speeds on one machine: instances of either rest after every forward pass, each cluster's profile is measured that way."""

from __future__ import annotations

from dataclasses import dataclass

from repro.errors import UserError, at_least
from repro.experiments.base import Context
from repro.experiments.computed import Answers, Computing, measured_profile
from repro.experiments.split_model import engine_of, vocabulary_of
from repro.models.build import build
from repro.models.spec import ModelSpec
from repro.scheduling.throughput import Deployment
from repro.serving.cluster_caches import PD, PRFAAS
from repro.serving.torch_instance import TorchInstanceConfig


@dataclass(frozen=True)
class TwoSpeeds:
    """How many times slower than this machine an instance of either cluster is, and how instances compute.

    Decode batches are as large as leaves every request its `tokens_per_s`. Requests of one length have one of `prompts` prompts; tokens of
    the first `compared` are held against the model's. A profile's times are means of `repeats`.
    """

    prfaas_slowdown: float = 2.0
    pd_slowdown: float = 4.0
    tokens_per_s: float = 5.0
    compared: int = 30
    prompts: int = 16
    chunk_tokens: int = 128
    threads: int = 1
    repeats: int = 5
    pieces: int = 8

    def __post_init__(self) -> None:
        for key in ("prfaas_slowdown", "pd_slowdown"):
            if not getattr(self, key) >= 1:
                raise UserError(f"options.{key}: {getattr(self, key)}; accepted: 1 (as fast as this machine) or more")
        if not self.tokens_per_s > 0:
            raise UserError(f"options.tokens_per_s: {self.tokens_per_s} is not positive")
        at_least(self, "options", compared=1, prompts=1, chunk_tokens=1, threads=1, repeats=3, pieces=1)

    @property
    def slowdowns(self) -> dict[str, float]:
        """By cluster."""
        return {PRFAAS: self.prfaas_slowdown, PD: self.pd_slowdown}

    def computing(self, model: ModelSpec) -> Computing:
        """Makes the instances."""
        engine = engine_of(model, self.chunk_tokens, self.threads)
        return Computing(engine, vocabulary_of(model), self.prompts, slowdowns=self.slowdowns)


def measured(context: Context, model: ModelSpec, egress_bps: float) -> Deployment:
    """The deployment by the profiles of its two clusters, each measured now, as slow as its instances will be."""
    options, settings = context.options, context.settings
    law, found = settings.workload.length_law(), []
    for cluster, slowdown in options.slowdowns.items():
        context.progress(f"{model.name} on an instance of {cluster}, {slowdown:g} times slower than this machine")
        found.append(measured_profile(context, model, law, options.repeats, slowdown, options.tokens_per_s))
    prfaas, pd = found
    cluster = settings.cluster
    return Deployment(
        prfaas, cluster.prfaas.instances, pd, cluster.pd.instances, egress_bps, law, settings.workload.mean_output_tokens()
    )  # fmt: skip


def answers(context: Context, model: ModelSpec, computing: Computing) -> Answers:
    """What the instances must answer."""
    config = computing.config("reference", context.settings.transport, None, 1, context.settings.seed)
    assert isinstance(config, TorchInstanceConfig)
    return Answers(build(model, "cpu"), config, context.options.threads)
