"""A production engine beside the kit's own: vLLM's prefill and decode instances on two sides of an emulated link, NIXL between them.

What is deployed today sends a request's state when its prefill is over, by a connector of the engine's own; §3.3 sends it layer by layer
while prefill computes. Both are measured here with the same checkpoints (a hybrid and a dense one, written by the kit), the same
prompts and links. The engines compute at different speeds, so what a mode adds to the TTFT of the same engine unsplit stands beside the
TTFT itself. vLLM's own counters say what crossed; a deployment that decodes alone is refused.

Instances that run elsewhere are measured in place of the kit's, on whatever network they have:

    python -m repro experiment=engines link.backend=none 'options.checkpoints=[<folder>]' \
        'options.endpoints={prefill: ["http://a:8000"], decode: ["http://b:8000"]}'
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from repro.engine.openai import OpenAIServer
from repro.engine.vllm_pair import Pair, versions
from repro.engine.vllm_server import EngineRefusedError
from repro.errors import UserError, at_least
from repro.experiments.base import Context, Experiment, Outcome
from repro.experiments.engines_served import (
    ALONE_OF,
    VLLM,
    VLLM_ALONE,
    Condition,
    Instances,
    Row,
    served_by_kit,
    served_by_vllm,
)
from repro.experiments.split_model import cores_of, engine_of, model_layout, prompts, row, vocabulary_of
from repro.experiments.vllm_instances import BYTES_WITHIN, VllmOptions, check_instances, written
from repro.link import Link, LinkSpec, open_link
from repro.link.conditions import go_to, measured, scheduled
from repro.models.layout import StateLayout
from repro.models.spec import ModelSpec
from repro.processes import placed
from repro.profiles.answers import BrokenAnswerError, RefusedError
from repro.record.directory import Record
from repro.record.metrics import Metric
from repro.record.request_metrics import good
from repro.report import style
from repro.serving.system import System
from repro.settings import Settings

_RATES_BPS: Final = (1e9, 3e8, 1e8)
_RTTS_S: Final = (0.05, 0.01)
_MODES: Final = ("layerwise", "bulk")
#: Rate and RTT are the experiment's conditions; everything else of the link is the configuration's.
_OF_THE_LINK: Final = tuple(
    item.name
    for item in fields(LinkSpec)
    if item.name
    not in (
        "rate_bps", "reverse_rate_bps", "rtt_s", "capacity_trace", "reverse_capacity_trace", "schedule", "queue_bytes",
    )
)  # fmt: skip


@dataclass(frozen=True)
class EnginesOptions(VllmOptions):
    """Every prompt `repeats` times, under each condition of the link.

    `rates_bps`, `rtts_s` and `modes` (of the kit's own workers) are null for the default and not taken where nothing of the kit lies
    between the instances.
    """

    repeats: int = 3
    rates_bps: tuple[float, ...] | None = None
    rtts_s: tuple[float, ...] | None = None
    modes: tuple[str, ...] | None = None
    chunk_tokens: int = 256
    threads: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, "options", repeats=1)
        for key, values in (("rates_bps", self.rates_bps), ("rtts_s", self.rtts_s)):
            if values is not None and (not values or min(values) < 0 or (key == "rates_bps" and min(values) == 0)):
                raise UserError(f"options.{key}: {list(values)}; accepted: one value or more, above 0")
        for mode in self.modes or ():
            if mode not in _MODES:
                raise UserError(f"options.modes: {mode!r}; accepted: {', '.join(_MODES)}")

    @property
    def kit_modes(self) -> tuple[str, ...]:
        """The modes of the kit's workers beside vLLM; none where they cannot stand beside it."""
        return () if self.running else (_MODES if self.modes is None else self.modes)


def check(settings: Settings, options: EnginesOptions) -> None:
    """Checkpoints, and an environment or addresses that can be used. Raises UserError naming the key."""
    check_instances(settings, options)
    if options.running and options.modes:
        raise UserError("options.modes: the kit's workers do not stand beside options.endpoints; accepted: null or []")
    if settings.link.backend == "none" and (options.rates_bps or options.rtts_s):
        raise UserError("options.rates_bps, options.rtts_s: there is no link with link.backend=none")


def run(context: Context) -> Outcome:
    """Each checkpoint through vLLM and through the kit's workers, under every condition of the link."""
    rows, metrics, facts = list[Row](), list[Metric](), dict[str, Any]()
    refusals: dict[str, str] = {}
    context.folder.mkdir(parents=True, exist_ok=True)
    # In the run's own folder: of a run that is killed nothing stays elsewhere.
    with tempfile.TemporaryDirectory(prefix="engines-", dir=context.folder) as scratch:
        for name, folder in written(context.options.checkpoints, Path(scratch)):
            model = ModelSpec(name, "auto", pretrained=str(folder))
            one = _Model(context, model)
            metrics += one.run()
            rows += one.rows
            facts[name] = one.facts
            if one.refusal:
                refusals[name] = one.refusal
    for name, reason in refusals.items():
        context.progress(f"{name}: refused by vLLM: {reason}")
    table = pd.DataFrame([asdict(one) for one in rows])
    metrics += _metrics(context, table)
    wrong = _wrong_bytes(table)
    options = context.options
    facts |= {"refusals": refusals, "versions": {} if options.running else versions(Path(options.environment))}
    return Outcome(metrics, {"served": table}, provenance=facts, failure=wrong)


class _Model:
    """One checkpoint under way."""

    def __init__(self, context: Context, model: ModelSpec) -> None:
        self._context, self._model = context, model
        self._layout: StateLayout = model_layout(model)
        self._vocabulary = vocabulary_of(model)
        options: EnginesOptions = context.options
        # Engines that run already may remember the prompts of an earlier run.
        seed = int.from_bytes(os.urandom(4), "big") if options.running else context.settings.seed
        lengths = options.input_tokens
        self._repeats = prompts(lengths, options.repeats, options.output_tokens, self._vocabulary, seed)
        self.rows: list[Row] = []
        self.facts: dict[str, Any] = {"seed of prompts": seed}
        self.refusal = ""

    def run(self) -> list[Metric]:
        """Serve; the rows are in `rows`. Returns what the rows do not say."""
        options: EnginesOptions = self._context.options
        if options.running:
            return self._of_endpoints(options)
        specs = _specs(self._context.settings.link, options)
        cores = cores_of(options.threads, own=True)
        metrics = list[Metric]()
        with ExitStack() as closing:
            with placed(cores.others):
                link = closing.enter_context(open_link(scheduled(specs), run="engines"))
            if link.backend == "relay":
                raise UserError(
                    "link.backend: only a relay can be had here, which carries no connection that NIXL opens"
                )
            conditions = [
                Condition(spec.name, spec.rate_bps or np.nan, spec.rtt_s)
                if link.backend != "none"
                else Condition("loopback")
                for spec in specs
            ]
            if link.backend != "none":
                metrics += self._measure(link, specs)
            self.facts["link"] = link.record()
            metrics += self._vllm(link, conditions)
            if options.kit_modes:
                with placed(cores.others):
                    self._kit(link, conditions)
        return metrics

    def _measure(self, link: Link, specs: Sequence[LinkSpec]) -> Iterator[Metric]:
        for number, spec in enumerate(specs):
            go_to(link, number)
            found = measured(link, spec)
            self.facts.setdefault("measured", {})[spec.name] = asdict(found)
            case = f"{self._model.name}/{spec.name}"
            yield row(self._context, case, "link_goodput_bps", [found.rate_bps], "bit/s")
            yield row(self._context, case, "link_rtt_s", [found.rtt_s], "s")

    def _vllm(self, link: Link, conditions: Sequence[Condition]) -> list[Metric]:
        options, context = self._context.options, self._context
        name, logs = self._model.name, context.folder / "logs" / self._model.name
        context.progress(f"{name}: starting two instances of vLLM")
        pair = Pair(
            Path(options.environment), Path(str(self._model.pretrained)), link, logs, vocabulary=self._vocabulary,
            most_tokens=max(options.input_tokens) + max(options.output_tokens, 16), start_timeout_s=options.start_timeout_s,
            answer_timeout_s=options.timeout_s,
        )  # fmt: skip
        try:
            with pair:
                self.facts["unconfined"] = pair.unconfined
                try:
                    return self._served([pair.prefill], [pair.decode], conditions, link, self._vocabulary)
                except (BrokenAnswerError, RefusedError) as error:
                    raise EngineRefusedError(pair.refusal() or str(error)) from error
        except EngineRefusedError as refusal:
            self.refusal = str(refusal)
            return [row(context, f"{name}/{VLLM}", "refused", [1], "", "measured")]

    def _of_endpoints(self, options: EnginesOptions) -> list[Metric]:
        with ExitStack() as closing:
            servers: dict[str, list[OpenAIServer]] = {}
            for side in ("prefill", "decode"):
                for url in getattr(options.endpoints, side):
                    server = closing.enter_context(
                        OpenAIServer(
                            url, self._vocabulary, key_variable=options.api_key_variable, timeout_s=options.timeout_s,
                            key=f"options.endpoints.{side}",
                        )
                    )  # fmt: skip
                    if server.prepare() != "token ids":
                        raise UserError(
                            f"options.endpoints.{side}: {url} does not take and give token ids; accepted: vLLM"
                        )
                    servers.setdefault(side, []).append(server)
            try:
                return self._served(servers["prefill"], servers["decode"], [Condition("endpoints")], None, None)
            except (BrokenAnswerError, RefusedError) as error:
                raise UserError(f"options.endpoints: {error}") from error

    def _served(
        self,
        prefill: Sequence[OpenAIServer],
        decode: Sequence[OpenAIServer],
        conditions: Sequence[Condition],
        link: Link | None,
        vocabulary: int | None,
    ) -> list[Metric]:
        name, progress = self._model.name, self._context.progress
        instances = Instances(name, self._layout, prefill, decode)
        self.facts["cache"] = dict(instances.cache)
        self.rows += served_by_vllm(instances, self._repeats, conditions, vocabulary, _goer(link), progress)
        found = list(instances.agreements.values())
        if not found:
            return []
        context, case = self._context, f"{name}/{VLLM}"
        return [
            context.metric(
                case, "logits_max_error", max(one.logits_error for one in found), "", "measured", n=len(found)
            ),
            context.metric(
                case, "logits_first_error", max(instances.first_errors.values()), "", "measured", n=len(found)
            ),
            row(context, case, "logits_tolerance", [found[0].tolerance], "", "computed"),
        ]

    def _kit(self, link: Link, conditions: Sequence[Condition]) -> None:
        options, context = self._context.options, self._context
        name, cores = self._model.name, cores_of(options.threads, own=True)
        engine = engine_of(self._model, options.chunk_tokens, options.threads)
        context.progress(f"{name}: starting the kit's prefill and decode workers")
        logs = context.folder / "logs" / name
        with System(engine, context.settings.transport, link, logs, options.timeout_s, cores=cores) as system:
            self.rows += served_by_kit(
                name, system, self._layout, self._repeats, conditions, options.kit_modes, _goer(link), context.progress
            )


def _goer(link: Link | None) -> Any:
    return (lambda number: None) if link is None or link.backend == "none" else (lambda number: go_to(link, number))


def _specs(link: LinkSpec, options: EnginesOptions) -> list[LinkSpec]:
    """The link's conditions, the fastest first, for which its buffer is made; one where there is no link."""
    link = LinkSpec(**{name: getattr(link, name) for name in _OF_THE_LINK})
    if link.backend == "none":
        return [replace(link, name="loopback")]
    pairs = [
        (rate, rtt)
        for rate in sorted(options.rates_bps or _RATES_BPS, reverse=True)
        for rtt in sorted(options.rtts_s if options.rtts_s is not None else _RTTS_S, reverse=True)
    ]
    fastest = replace(link, rate_bps=pairs[0][0], rtt_s=pairs[0][1])
    queue_bytes = int(fastest.queue_limit_bytes("forward"))
    return [
        replace(link, name=f"{_rate_words(rate)}-{1e3 * rtt:g}ms", rate_bps=rate, rtt_s=rtt, queue_bytes=queue_bytes)
        for rate, rtt in pairs
    ]


def _rate_words(bps: float) -> str:
    return f"{bps / 1e9:g}Gbps" if bps >= 1e9 else f"{bps / 1e6:g}Mbps"


def _metrics(context: Context, table: pd.DataFrame) -> Iterator[Metric]:
    """Of each model, length, condition and mode. What a mode adds is of pairs: the same prompt unsplit on the same engine."""
    if table.empty:
        return
    alone_s = {
        (one["model"], one["input_tokens"], one["repeat"], one["mode"]): one["ttft_s"] for one in _records(table)
    }
    for (model, tokens, condition, mode), found in table.groupby(
        ["model", "input_tokens", "condition", "mode"], sort=False
    ):
        case = "/".join(str(part) for part in (model, tokens, condition, mode) if part != "")
        yield row(context, case, "ttft_mean_s", found["ttft_s"].tolist(), "s")
        met = good(found["ttft_s"].to_numpy(), np.nan_to_num(found["tpot_s"].to_numpy()), context.settings.workload.slo)
        yield context.metric(case, "good_fraction", float(met.mean()), "", "measured", n=len(found))
        if mode not in ALONE_OF:
            continue
        added_s = [
            one["ttft_s"] - alone_s[model, tokens, one["repeat"], ALONE_OF[str(mode)]] for one in _records(found)
        ]
        yield row(context, case, "ttft_added_s", added_s, "s")
        yield row(context, case, "prefill_s", found["prefill_s"].tolist(), "s")
        yield row(context, case, "transfer_s", found["transfer_s"].tolist(), "s")
        yield row(context, case, "kv_bytes", found["kv_bytes"].tolist(), "bytes")
        yield row(context, case, "kv_bytes_layout", found["kv_bytes_layout"].tolist(), "bytes", "computed")
        matches = (found["tokens_equal"] | (found["ties"] > 0)).all()
        yield context.metric(case, "tokens_match", float(matches), "", "measured", n=len(found))
        yield context.metric(case, "ties", float(found["ties"].sum()), "tokens", "measured", n=len(found))


def _records(table: pd.DataFrame) -> list[dict[Any, Any]]:
    return table.to_dict("records")


def _wrong_bytes(table: pd.DataFrame) -> str:
    """What the engine counted otherwise than its layout says; empty where all is well, or where the layout is not known."""
    if table.empty:
        return ""
    off = table[(table["mode"] == VLLM) & ((table["kv_bytes"] / table["kv_bytes_layout"] - 1).abs() > BYTES_WITHIN)]
    if off.empty:
        return ""
    first = off.iloc[0]
    return (
        f"{len(off)} transfers are not what vLLM's layout says: {first['model']}, {first['input_tokens']} tokens: "
        f"{first['kv_bytes']:.0f} bytes where {first['kv_bytes_layout']:.0f} were expected"
    )


def finding(record: Record) -> str:
    """What the longest prompt waits for its state, by vLLM's connector and layer-wise, on the slowest link."""
    table = record.table("served")
    crossed = table[table["rate_bps"].notna()]
    if crossed.empty:
        return ""
    slowest = crossed[(crossed["rate_bps"] == crossed["rate_bps"].min()) & (crossed["rtt_s"] == crossed["rtt_s"].min())]
    longest, parts = slowest[slowest["input_tokens"] == slowest["input_tokens"].max()], list[str]()
    for model, rows in longest.groupby("model", sort=False):
        found = {str(mode): _added_s(table, own) for mode, own in rows.groupby("mode")}
        words = ", ".join(f"{found[mode]:.2f} s {words}" for mode, words in _WORDS.items() if mode in found)
        parts.append(f"{model}: {words}")
    at = longest.iloc[0]
    return (
        f"At {at['rate_bps'] / 1e6:g} Mbps and {1e3 * at['rtt_s']:g} ms a split of {at['input_tokens']} tokens adds to the median TTFT of "
        f"the same engine unsplit: {'; '.join(parts)}."
    )


_WORDS: Final[Mapping[str, str]] = {VLLM: "by vLLM with NIXL", "layerwise": "layer-wise", "bulk": "in bulk"}


def _added_s(table: pd.DataFrame, found: pd.DataFrame) -> float:
    """Median TTFT less that of the same engine and prompts unsplit: a stall of one request in the engine is none of the link's."""
    first = found.iloc[0]
    alone = table[
        (table["model"] == first["model"])
        & (table["input_tokens"] == first["input_tokens"])
        & (table["mode"] == ALONE_OF[str(first["mode"])])
    ]
    return float(found["ttft_s"].median() - alone["ttft_s"].median())


def draw(record: Record) -> Figure:
    """A column per model, over the link's rate, of the longest prompt: median TTFT, and what it is above the same engine unsplit."""
    table = record.table("served")
    table = table[table["input_tokens"] == table["input_tokens"].max()]
    names = list(table["model"].unique())
    figure, panels = style.panels(len(names), 2, width_in=1.0 + 3.4 * len(names), height_in=5.2, sharex=True)
    columns = np.asarray(panels, dtype=object).reshape(2, len(names)).T
    for (top, below), name in zip(columns, names, strict=True):
        own = table[table["model"] == name]
        for (mode, words), (colour, marker, _) in zip(_WORDS.items(), style.SERIES, strict=False):
            for (rtt, rows), dash in zip(_by_rtt(own[own["mode"] == mode]), ("-", "--", ":", "-."), strict=False):
                middles = [(rate, of["ttft_s"].median(), _added_s(table, of)) for rate, of in rows.groupby("rate_bps")]
                if not middles:  # no link of the kit's: one condition, which has no place on the axis
                    middles = [(1e9, rows["ttft_s"].median(), _added_s(table, rows))]
                rates, ttfts, added = (list(values) for values in zip(*middles, strict=True))
                look = {"color": colour, "marker": marker, "linestyle": dash}
                label = f"{words}, {1e3 * float(rtt):g} ms" if np.isfinite(float(rtt)) else words
                top.plot(np.array(rates) / 1e6, ttfts, label=label, **look)
                below.plot(np.array(rates) / 1e6, added, **look)
        alone = own[own["mode"] == VLLM_ALONE]
        if len(alone):
            top.axhline(alone["ttft_s"].median(), color=style.GREY, linestyle=":", label="vLLM unsplit")
        top.set(xscale="log", ylabel="median TTFT (s)", title=f"{name}, {own['input_tokens'].iloc[0]:,} tokens")
        below.set(xlabel="rate of the link (Mbps)", ylabel="added to unsplit (s)")
        below.axhline(0, color=style.GREY, linewidth=0.8)
        rates = sorted(own["rate_bps"].dropna().unique())
        if len(rates):
            below.set_xticks([rate / 1e6 for rate in rates], [f"{rate / 1e6:g}" for rate in rates])
            below.minorticks_off()
    figure.legend(*top.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _by_rtt(table: pd.DataFrame) -> Iterable[tuple[float, pd.DataFrame]]:
    return table.groupby("rtt_s", dropna=False, sort=True)  # type: ignore[return-value]


EXPERIMENT = Experiment(
    "engines",
    {"execute": (*(f"link.{name}" for name in _OF_THE_LINK), "transport", "workload.slo", "seed", "options")},
    run,
    {"engines": draw},
    EnginesOptions,
    check=check,
    timed=True,
    finding=finding,
    hinges_on="both engines compute on one core each; an accelerator makes prefill shorter, and with it what can hide a transfer",
)
