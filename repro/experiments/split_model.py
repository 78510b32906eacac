"""One model served split and unsplit on the same prompts: what `experiment=split` and `experiment=overlap` have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from repro.engine.base import Request
from repro.engine.reference import Agreement
from repro.engine.spans import now_s
from repro.engine.torch_engine import EngineSpec
from repro.errors import UserError
from repro.experiments.base import Context
from repro.experiments.table3 import one_model
from repro.kvcache.codecs import CodecSpec
from repro.kvcache.prefix import PrefixCacheSpec
from repro.link import Link, LinkMeasurement
from repro.models.architectures import layout_of
from repro.models.checkpoint import check_checkpoint
from repro.models.layout import StateLayout
from repro.models.spec import ModelSpec
from repro.processes import Cores, hand_out
from repro.record.metrics import Metric
from repro.record.request_metrics import good
from repro.record.statistics import Estimate
from repro.serving.bound import ttft_bound_s
from repro.serving.devices import Given
from repro.serving.system import Run, Served, System, joined
from repro.settings import Settings


@dataclass(frozen=True)
class ModelRun:
    """One model's runs by mode, the codec of its split modes, and what they are judged against.

    `admission` is what the engine's gate found of the model.
    `alone_s` is T_prefill by request, undisturbed: on the prefill worker, with nothing captured, sent or decoded meanwhile;
    `devices` is what each worker computed on.
    """

    name: str
    layout: StateLayout
    runs: Mapping[str, Run]
    origin_s: float
    measured: LinkMeasurement
    codec: CodecSpec
    admission: Mapping[str, Any]
    alone_s: Mapping[int, float]
    devices: Mapping[str, Any]

    def served(self, mode: str, input_tokens: int) -> list[Served]:
        """The repeats of one length in one mode."""
        return [served for served in self.runs[mode].served if len(served.request.prompt) == input_tokens]

    def prefill_s(self, input_tokens: int) -> float:
        """T_prefill, undisturbed: the mean of the repeats."""
        return float(np.mean([self.undisturbed_s(served) for served in self.served("unsplit", input_tokens)]))

    def undisturbed_s(self, served: Served) -> float:
        """T_prefill of that request where nothing disturbs it. Of one that found a prefix in a cache there is its own only."""
        return served.prefill_s if served.cached_tokens else self.alone_s[served.request.request_id]

    def slowdown(self, served: Served) -> float:
        """T_prefill in that mode ÷ undisturbed."""
        return served.prefill_s / self.undisturbed_s(served)

    @property
    def goodput_bps(self) -> float:
        """B of the bound: as measured, but a short measurement may count what buffers took, so at most the ideal."""
        return min(self.measured.rate_bps, self.measured.ideal_rate_bps)

    def bound_s(self, served: Served) -> float:
        """The lower bound of that request's TTFT, of times that nothing disturbed: T_prefill alone, a decode step unsplit."""
        unsplit = next(
            one for one in self.runs["unsplit"].served if one.request.request_id == served.request.request_id
        )
        return ttft_bound_s(
            queue_s=served.queue_s,
            prefill_s=self.undisturbed_s(served),
            first_piece_s=served.first_piece_s - served.prefill_start_s,
            kv_bytes=sum(self.expected_bytes(served).values()),
            goodput_bps=self.goodput_bps,
            rtt_s=self.measured.rtt_s,
            step_s=unsplit.tpot_s if served.request.output_tokens > 1 else unsplit.first_step_s,
        )

    def paired_ratios(self, mode: str, other: str, input_tokens: int) -> list[float]:
        """TTFT in one mode ÷ in another, of the same prompt in the same repeat."""
        other_s = {served.request.request_id: served.ttft_s for served in self.served(other, input_tokens)}
        return [served.ttft_s / other_s[served.request.request_id] for served in self.served(mode, input_tokens)]

    def agreements(self, mode: str) -> list[Agreement]:
        """How each answer compares with the model's own `generate`."""
        return [served.agreement for served in self.runs[mode].served if served.agreement is not None]

    def tokens_match(self, mode: str) -> bool:
        """Whether every request got the tokens of `generate`, ties apart, from its logits as far as the precision goes.

        Of a lossy codec, which changes logits by design, only tokens are asked.
        """
        found, lossy = self.agreements(mode), mode != "unsplit" and not self.codec.lossless
        is_complete = len(found) == len(self.runs[mode].served)
        return is_complete and all(one.same_tokens if lossy else one.matches for one in found)

    def wire_overhead(self, mode: str) -> float:
        """TCP payload ÷ S_kv − 1: what frames, manifests and repetitions add, and below 0 where a codec saves more."""
        run = self.runs[mode]
        return run.wire_bytes / sum(served.total_kv_bytes for served in run.served) - 1

    def codec_ratio(self, mode: str) -> float:
        """S_kv ÷ what the codec left of it."""
        served = self.runs[mode].served
        return sum(one.total_kv_bytes for one in served) / sum(one.encoded_bytes for one in served)

    def bytes_match(self, mode: str) -> bool:
        """Whether every request shipped what the layout says, to the byte and for each kind of state."""
        return all(served.kv_bytes == self.expected_bytes(served) for served in self.runs[mode].served)

    def expected_bytes(self, served: Served) -> dict[str, int]:
        """The layout's S_kv by kind, under the names that a run uses, without what the decode side held; nothing that is empty."""
        sizes = Counter(self.layout.by_kind(served.request.state_tokens))
        for state in self.layout.states:
            if state.window_tokens is None:
                sizes[state.kind] -= state.bytes_per_token * served.held_tokens
        return {kind.name.lower(): size for kind, size in sizes.items() if size}


def prompts(
    lengths: Sequence[int],
    repeats: int,
    output_tokens: int,
    vocabulary: int,
    seed: int,
    shared_prefix_tokens: int = 0,
) -> list[list[Request]]:
    """One list of random prompts per repeat, the same for every mode; ids count from 1 over all of them.

    The first `shared_prefix_tokens` tokens are the same in all.
    """
    rng = np.random.default_rng(seed)
    shared = np.random.default_rng((seed, 1)).integers(0, vocabulary, shared_prefix_tokens)

    def prompt(length: int) -> tuple[int, ...]:
        tokens = rng.integers(0, vocabulary, length)
        tokens[:shared_prefix_tokens] = shared[:length]
        return tuple(tokens.tolist())

    return [
        [Request(1 + repeat * len(lengths) + at, prompt(length), output_tokens) for at, length in enumerate(lengths)]
        for repeat in range(repeats)
    ]


def check_models(settings: Settings, _: object) -> None:
    """Refuse a checkpoint that is none, and sizes that no worker can hold.

    Raises:
        UserError: naming the key.
    """
    for model in settings.model.values():
        if model.pretrained is not None:
            check_checkpoint(model.pretrained)
        elif model.size == "full":
            raise UserError(f"size: full has no weights (model {model.name}); accepted: tiny, single_gpu")


def check_one(settings: Settings, options: object) -> None:
    """One model that can be built. Raises UserError naming the key."""
    one_model(settings)
    check_models(settings, options)


def engine_of(
    model: ModelSpec, chunk_tokens: int, threads: int, prefix_cache: PrefixCacheSpec | None = None
) -> EngineSpec:
    """How both workers compute that model."""
    spec = EngineSpec(model, chunk_tokens, threads)
    return spec if prefix_cache is None else replace(spec, prefix_cache=prefix_cache)


def cores_of(threads: int, *, own: bool) -> Cores:
    """Cores for both workers and for everything else; `own` false leaves all to the kernel's scheduler."""
    if not own:
        return Cores({}, (), "handed out to nobody, as asked")
    return hand_out({"prefill": threads, "decode": threads})


def vocabulary_of(model: ModelSpec) -> int:
    """How many tokens prompts may be drawn from."""
    if model.pretrained is None:
        return int(model.values()["vocab_size"])
    from repro.models.build import config_of

    return int(config_of(model).get_text_config().vocab_size)


def model_layout(model: ModelSpec) -> StateLayout:
    """The layout of a model's state: from its values, or, of a checkpoint, from its modules without weights."""
    if model.pretrained is None:
        return layout_of(model, model.size)
    from repro.kvcache.state import layout
    from repro.models.build import build

    return layout(build(model, "meta"))


def serve(
    context: Context,
    engine: EngineSpec,
    repeats: Sequence[Sequence[Request]],
    modes: Sequence[str],
    link: Link,
    codec: CodecSpec,
    cores: Cores,
    devices: Mapping[str, Given],
) -> ModelRun:
    """Serve the same requests in every mode on one pair of workers, after a warm-up that is not recorded.

    Each repeat goes through all modes before the next begins, each time in another order, so that what else the machine does
    hits all modes alike. Before and after it, its prefills are timed alone, on the worker that prefills; the mean of both counts.
    The link has been checked.
    """
    name = engine.model.name
    # The longest prompt, so that both workers have touched all the memory that they will need.
    warm_up = [Request(0, max(repeats[0], key=lambda request: len(request.prompt)).prompt, 2, "warm-up")]
    runs: dict[str, list[Run]] = {mode: [] for mode in modes}
    alone_s: dict[int, float] = {}
    context.progress(f"{name}: starting a prefill and a decode worker")
    if not codec.lossless:
        context.progress(f"{name}: codec {', '.join(codec.names)} is lossy, tokens may differ from generate's")
    logs = context.folder / "logs" / f"{name}-{link.spec.name}"
    with System(
        engine,
        context.settings.transport,
        link,
        logs,
        codec=codec,
        transport_process=True,
        cores=cores,
        devices=devices,
    ) as system:
        for mode in ("unsplit", "layerwise"):
            system.serve(warm_up, mode)
        system.observe(warm_up[0])
        system.prefill_alone(warm_up)
        for requests in repeats:
            system.reference(requests)
        admission = system.admission
        ran_on = {side: {"given": devices[side].record(), **found} for side, found in system.seen.items()}
        origin_s = now_s()
        link.start()
        for number, requests in enumerate(repeats, start=1):
            before_s = system.prefill_alone(requests)
            for mode in in_turn(modes, number):
                # Each mode with a cache of its own: a prompt must not find what another mode left of it.
                salted = [replace(request, cache_salt=mode) for request in requests]
                runs[mode].append(system.serve(salted, mode))
            after_s = system.prefill_alone(requests)
            alone_s |= {request_id: (before_s[request_id] + after_s[request_id]) / 2 for request_id in before_s}
            context.progress(f"{name}: {', '.join(modes)} served, {number} of {len(repeats)}")
    layout = model_layout(engine.model)
    whole = {mode: joined(parts) for mode, parts in runs.items()}
    return ModelRun(name, layout, whole, origin_s, link.measured["forward"], codec, admission, alone_s, ran_on)


def in_turn(modes: Sequence[str], number: int) -> Sequence[str]:
    """The modes in the order of that repeat: each comes first once before one does again."""
    first = (number - 1) % len(modes)
    return [*modes[first:], *modes[:first]]


def match_metrics(context: Context, model: ModelRun, case: str, mode: str) -> list[Metric]:
    """How a mode's answers compare with the model's own `generate`: tokens, logits in standard deviations, ties."""
    found = model.agreements(mode)
    return [
        row(context, case, "tokens_match", [model.tokens_match(mode)], ""),
        context.metric(case, "logits_max_error", max(one.logits_error for one in found), "", "measured", n=len(found)),
        row(context, case, "logits_tolerance", [found[0].tolerance], "", "computed"),
        context.metric(case, "ties", sum(one.ties for one in found), "tokens", "measured", n=len(found)),
        *(
            [context.metric(case, "logits_max_error_unsplit", max(errors), "", "measured", n=len(errors))]
            if (errors := [one.unsplit_error for one in found if one.unsplit_error is not None])
            else []
        ),
    ]


def codec_metrics(context: Context, model: ModelRun, case: str, mode: str) -> list[Metric]:
    """What the codec of a split mode did, and whether its tokens had to match; nothing where bytes went as they were."""
    if model.codec.names == ("none",):
        return []
    return [
        row(context, case, "codec_ratio", [model.codec_ratio(mode)], ""),
        row(context, case, "codec_lossless", [model.codec.lossless], ""),
    ]


def good_fraction(context: Context, case: str, found: Sequence[Served]) -> Metric:
    """Share of requests that met both parts of the service level; one token has no TPOT to miss."""
    ttft_s = np.array([served.ttft_s for served in found])
    tpot_s = np.nan_to_num(np.array([served.tpot_s for served in found]))
    met = good(ttft_s, tpot_s, context.settings.workload.slo)
    return context.metric(case, "good_fraction", float(met.mean()), "", "measured", n=len(found))


def row(
    context: Context, case: str, metric: str, values: Sequence[float], unit: str, source: str = "measured"
) -> Metric:
    """A metric of repeats: their mean with its 95 % interval."""
    found = Estimate.of([float(value) for value in values])
    return context.metric(case, metric, found.value, unit, source, interval=(found.low, found.high), n=found.n)
