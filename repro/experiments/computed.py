"""A live deployment that computes: the model's instances, its profile on this machine, and the tokens that it should answer with."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import pandas as pd
import torch

from repro.engine.gate import admit, seen_clearly
from repro.engine.reference import answer, compare, generate, tolerance_of
from repro.engine.torch_engine import EngineSpec, paced
from repro.errors import UserError
from repro.experiments.base import Context
from repro.experiments.live import Played
from repro.experiments.profile import accelerator_of
from repro.kvcache.prefix import PrefixCacheSpec, block_chain, root_of
from repro.kvcache.state import layout
from repro.models.build import build
from repro.models.spec import ModelSpec
from repro.profiles.base import PhaseProfile
from repro.profiles.measured import ProfileSpec, measure, profile_of
from repro.serving.cluster_caches import PD, PRFAAS
from repro.serving.fleet import START_TIMEOUT_S, Config
from repro.serving.torch_instance import TorchInstanceConfig, prompt_of
from repro.settings import Settings
from repro.transport import TransportSpec
from repro.workload.lengths import LengthDistribution
from repro.workload.stream import Chains

#: What decode leaves every request, in tokens/s, unless an experiment says otherwise: the SLO of the paper's case study.
TOKENS_PER_S = 40.0
#: Equally likely parts of a law, each of which a timed prefill stands for.
_LENGTHS = 8


@dataclass(frozen=True)
class Computing:
    """Makes instances that compute that model; prompts that they draw repeat after `prompts` requests.

    `caches` says which prefix cache each instance of a cluster has; without a word of it, none. `slowdowns` says how many times slower than
    this machine each instance of a cluster is. They say every token as it comes where it `streams`.
    """

    engine: EngineSpec
    vocabulary: int
    prompts: int
    caches: Mapping[str, PrefixCacheSpec] = field(default_factory=dict)
    slowdowns: Mapping[str, float] = field(default_factory=dict)
    streams: bool = False
    start_timeout_s: float = START_TIMEOUT_S
    listens: bool = False

    def config(self, name: str, transport: TransportSpec, host: str | None, batch_max: int, seed: int) -> Config:
        """What an instance of that name is started with."""
        cluster = name.partition(".")[0]
        engine = replace(
            self.engine, prefix_cache=self.caches.get(cluster, self.engine.prefix_cache), slowdown=self.slowdowns.get(cluster, 1.0)
        )  # fmt: skip
        return TorchInstanceConfig(
            name, engine, transport, host, self.vocabulary, self.prompts, batch_max, seed, self.streams
        )

    def named(self, prompt: Sequence[int], block_tokens: int) -> Chains:
        """The names that instances give to a prompt's full blocks; its last token is never cached, and of an answer nothing is kept."""
        return block_chain(prompt[:-1], block_tokens, root_of(self.engine.identity)), ()


def check_pools(settings: Settings, chunk_tokens: int, chunk_key: str) -> None:
    """Caches that instances which compute can have. Raises UserError naming the key."""
    cache = settings.policy.cache
    if cache.capacity_gb is None:
        raise UserError("policy.cache.capacity_gb: null; accepted where instances compute: gigabytes of host memory")
    if cache.block_tokens % chunk_tokens:
        raise UserError(
            f"policy.cache.block_tokens: {cache.block_tokens}; accepted: multiples of {chunk_key} ({chunk_tokens}), so that a block ends "
            "where a chunk of prefill ends"
        )


def pools(settings: Settings, n_p: int) -> dict[str, PrefixCacheSpec]:
    """The prefix cache of an instance by its cluster: the cluster's capacity in equal parts, one for each instance that prefills."""
    cache = settings.policy.cache
    assert cache.capacity_gb is not None
    whole = PrefixCacheSpec(cache.capacity_gb * 1e9, cache.block_tokens, cache.checkpoint_blocks, cache.eviction)
    return {
        cluster: replace(whole, capacity_bytes=whole.capacity_bytes / max(instances, 1))
        for cluster, instances in ((PD, n_p), (PRFAAS, settings.cluster.prfaas.instances))
    }


def measured_profile(
    context: Context,
    spec: ModelSpec,
    law: LengthDistribution,
    repeats: int,
    slowdown: float = 1.0,
    tokens_per_s: float = TOKENS_PER_S,
) -> PhaseProfile:
    """The model's profile on this machine's CPU over those lengths, computed as an instance will: threads, chunks, decode step by step.

    T_prefill is timed at lengths that the law draws: kernels compute whole blocks of tokens, so round lengths are the cheapest of their
    neighbours, and a curve through them alone is below what requests take. The batches of an instance that is `slowdown` times slower are
    as large as leaves every request its `tokens_per_s`.
    """
    options = context.options
    measuring = ProfileSpec(
        chunk_tokens=options.chunk_tokens, first_tokens=max(16, int(law.minimum_tokens)),
        last_tokens=max(32, int(law.maximum_tokens)), repeats=repeats, contexts=(64, int(law.maximum_tokens)),
        slo_tokens_per_s=tokens_per_s,
    )  # fmt: skip
    engine, model = EngineSpec(spec, options.chunk_tokens, options.threads, slowdown=slowdown), build(spec, "cpu")
    with _threads(options.threads), paced(model, engine):
        states = layout(build(spec, "meta"))
        found = measure(
            model, build(spec, "meta"), measuring, context.progress, lengths=drawn_lengths(law), together=False
        )
        return profile_of(spec.name, spec.name, accelerator_of(torch.device("cpu")), found, states, measuring)


def drawn_lengths(law: LengthDistribution) -> list[int]:
    """Lengths in tokens that stand for the law: its ends, and the middle of each of equally likely parts."""
    inner = law.quantile((np.arange(_LENGTHS) + 0.5) / _LENGTHS)
    return sorted({round(float(tokens)) for tokens in (law.minimum_tokens, *inner, law.maximum_tokens)})


def prefill_over_profile(served: pd.DataFrame, profile: PhaseProfile) -> float:
    """The median over requests of the time that their prefill took while instances served ÷ the profile's at that length."""
    predicted_s = np.asarray(profile.prefill_s(served["input_tokens"].to_numpy(float)))
    return float(np.median(served["prefill_s"].to_numpy(float) / predicted_s))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Compute in so many threads: two that wait for each other in every operation are slow where a core is not theirs."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class Answers:
    """The tokens that a deployment must answer its prompts with; each prompt is asked once.

    They are those of the model in one process, in chunks as an instance computes: on a CPU the same bits. That this is what the model
    says is asked of its own `generate` in float32: in bfloat16 the order of sums alone turns a token, or a router to another expert.
    """

    model: torch.nn.Module
    config: TorchInstanceConfig
    threads: int
    _known: dict[tuple[int, ...], list[int]] = field(default_factory=dict)

    @cached_property
    def _chunk_tokens(self) -> int:
        return self.config.engine.chunk_tokens if admit(self.model).chunked else sys.maxsize

    @cached_property
    def _clear(self) -> torch.nn.Module:
        with seen_clearly(self.model) as clear:
            return clear

    def expected(self, prompt: tuple[int, ...], output_tokens: int) -> list[int]:
        """The answer to a prompt; none where the model's own `generate` has other logits."""
        if len(self._known.get(prompt, ())) < output_tokens:
            ids = torch.tensor([prompt])
            theirs = generate(self._clear, ids, output_tokens)
            ours = answer(self._clear, ids, output_tokens, self._chunk_tokens)
            agreement = compare(theirs, ours.tokens, list(ours.logits), tolerance_of(self._clear))
            found = answer(self.model, ids, output_tokens, self._chunk_tokens) if agreement.matches else None
            self._known[prompt] = list(found.tokens) if found is not None else []
        return self._known[prompt][:output_tokens]

    def right(
        self, played: Played, most: int | None = None, prompts: Sequence[tuple[int, ...]] | None = None
    ) -> tuple[int, int]:
        """Of the answers, or the first `most` of them: how many are right, and how many there are.

        `prompts` are those of all requests, where instances did not draw them.
        """
        lengths: pd.Series[int] = played.requests.set_index("id")["input_tokens"]
        answers = sorted(played.tokens.items())[:most]
        with _threads(self.threads):
            same = [
                self.expected(
                    prompt_of(self.config, number, int(lengths[number])) if prompts is None else prompts[number],
                    len(found),
                )
                == list(found)
                for number, found in answers
            ]
        return sum(same), len(same)
