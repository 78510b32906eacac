"""A live deployment whose engine is vLLM: the kit's router in charge, state moved by the engine's own connector, an instance killed.

The same router, loops, faults and records as with the kit's own engines (`live_stress`, `live_faults`); each instance is a vLLM server
behind an adapter (`repro.serving.vllm_instance`). What an answer must be is what the decode instance says by itself, asked before; what
crossed is what its counters say, held against vLLM's own layout. One half of the requests meets the fault, the other comes when the
instance is back.

Instances that run already are put under the router, and neither started nor ended:

    python -m repro experiment=live_engines link.backend=none options.killed=null policy.n_p=0 policy.threshold_tokens=0 \
        cluster.pd.instances=1 'options.checkpoints=[<folder>]' \
        'options.endpoints={prefill: ["http://a:8000"], decode: ["http://b:8000"]}'
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from repro.engine.openai import OpenAIServer
from repro.engine.vllm import CACHE_INFO, handed_over_bytes, state_tokens_of
from repro.engine.vllm_pair import versions
from repro.engine.vllm_server import processes_of, socket_folder
from repro.errors import UserError, at_least
from repro.experiments.base import Context, Experiment, Outcome
from repro.experiments.engines_served import is_tie, steps_of
from repro.experiments.live import Deployment, Played, Wire, deployed
from repro.experiments.split_model import model_layout, vocabulary_of
from repro.experiments.vllm_instances import BYTES_WITHIN, VllmOptions, check_instances, written
from repro.models.layout import StateLayout
from repro.models.spec import ModelSpec
from repro.profiles.base import DecodeStep, KVSize, PhaseProfile, PrefillCurve
from repro.record.directory import Record
from repro.record.metrics import Metric, value
from repro.record.requests import ANSWERED
from repro.report import style
from repro.scheduling.policies import Naive, Threshold
from repro.scheduling.spec import SchedulerSpec
from repro.serving.cluster_caches import PD, PRFAAS
from repro.serving.faults import LiveFault
from repro.serving.scale import Scale
from repro.serving.vllm_fleet import VllmComputing
from repro.settings import Settings
from repro.simulate.link_spec import SharedLinkSpec
from repro.simulate.spec import PdCluster, PrfaasCluster, SimulationSpec
from repro.transport import TransportSpec
from repro.workload.stream import RequestBatch

#: What the router believes of prefill and decode on one core, until it has seen better: as vLLM took on two quiet cores.
_PREFILL: Final = PrefillCurve("linear", (1000.0, 6000.0), (0.13, 0.75))
_STEP_S: Final = 0.02
#: No instance's name, which its socket has, is longer.
_LONGEST_NAME: Final = f"{PRFAAS}.999"
#: A process that was told to go may take so long.
_GONE_WITHIN_S: Final = 5.0


@dataclass(frozen=True)
class Options(VllmOptions):
    """`requests` at `rate_per_s` of the lengths `input_tokens` in turn; in the first half `killed` has a fault, null none."""

    input_tokens: tuple[int, ...] = (100, 500, 1000)
    requests: int = 24
    rate_per_s: float = 1.0
    batch_max: int = 4
    killed: str | None = "prfaas0.0"
    kill_at_s: float = 4.0
    kill_for_s: float = 1.0
    drain_s: float = 300.0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, "options", requests=2, batch_max=1)
        for key in ("rate_per_s", "kill_for_s", "drain_s"):
            if not getattr(self, key) > 0:
                raise UserError(f"options.{key}: {getattr(self, key)} is not positive")
        if self.kill_at_s < 0:
            raise UserError(f"options.kill_at_s: {self.kill_at_s} is negative")


def check(settings: Settings, options: Options) -> None:
    """Checkpoints, a deployment that can serve, and an environment or addresses. Raises UserError naming the key."""
    check_instances(settings, options)
    policy, n_pd, n_prfaas = settings.policy, settings.cluster.pd.instances, settings.cluster.prfaas.instances
    if policy.threshold_tokens is None or policy.n_p is None:
        raise UserError(
            "policy.threshold_tokens, policy.n_p: null; accepted: numbers, for there is no profile to search"
        )
    if n_prfaas < 1 or not 0 <= policy.n_p < n_pd:
        raise UserError(f"policy.n_p: {policy.n_p} of {n_pd} PD instances; accepted: 0 to {n_pd - 1}, and a PrfaaS one")
    if policy.n_p == 0 and policy.threshold_tokens > 0:
        raise UserError(
            "policy.n_p: 0 leaves nobody to prefill what is shorter than policy.threshold_tokens; accepted: 1 or more, or "
            "policy.threshold_tokens=0"
        )
    names = [f"{PRFAAS}.{index}" for index in range(n_prfaas)] + [f"{PD}.{index}" for index in range(n_pd)]
    if options.killed is not None and options.killed not in names:
        raise UserError(f"options.killed: {options.killed!r} is none; accepted: {', '.join(names)}, or null")
    if options.running:
        _check_endpoints(settings, options)


def _check_endpoints(settings: Settings, options: Options) -> None:
    found = {"prefill": settings.cluster.prfaas.instances, "decode": settings.cluster.pd.instances}
    for side, cluster in (("prefill", "prfaas"), ("decode", "pd")):
        urls = getattr(options.endpoints, side)
        if len(urls) != found[side]:
            raise UserError(
                f"options.endpoints.{side}: {len(urls)} addresses for cluster.{cluster}.instances={found[side]}; accepted: as many"
            )
    if options.killed is not None:
        raise UserError("options.killed: instances of options.endpoints are not ended by the kit; accepted: null")


def run(context: Context) -> Outcome:
    """Each checkpoint through a deployment of its own."""
    options: Options = context.options
    context.folder.mkdir(parents=True, exist_ok=True)
    ones = list[_Served]()
    # In the run's own folder: of a run that is killed nothing stays elsewhere.
    with tempfile.TemporaryDirectory(prefix="vllm-", dir=context.folder) as scratch:
        for name, folder in written(options.checkpoints, Path(scratch)):
            one = _Served(context, name, folder)
            with socket_folder(context.folder, _LONGEST_NAME) as sockets:
                one.run(Path(sockets))
            ones.append(one)
    facts: dict[str, Any] = {one.name: one.facts for one in ones}
    facts["versions"] = {} if options.running else versions(Path(options.environment))
    requests = pd.concat([one.requests for one in ones], ignore_index=True)
    return Outcome(
        [metric for one in ones for metric in one.metrics()],
        {
            "events": pd.DataFrame(
                [(one.name, *event) for one in ones for event in one.events], columns=["model", "at_s", "event"]
            ),
            "controls": pd.concat([one.samples for one in ones], ignore_index=True),
        },
        requests=requests,
        provenance=facts,
        failure="; ".join(one.failure for one in ones if one.failure),
    )


class _Served:
    """One checkpoint under way."""

    def __init__(self, context: Context, name: str, folder: Path) -> None:
        self._context, self.name, self._folder = context, name, folder
        model = ModelSpec(name, "auto", pretrained=str(folder))
        self._layout: StateLayout = model_layout(model)
        self._vocabulary = vocabulary_of(model)
        options: Options = context.options
        # Engines that run already may remember the prompts of an earlier run.
        seed = int.from_bytes(os.urandom(4), "big") if options.running else context.settings.seed
        rng = np.random.default_rng(seed)
        self._arrivals_s = np.cumsum(rng.exponential(1 / options.rate_per_s, options.requests))
        lengths = [options.input_tokens[number % len(options.input_tokens)] for number in range(options.requests)]
        self._prompts = [rng.integers(0, self._vocabulary, tokens).tolist() for tokens in lengths]
        self.facts: dict[str, Any] = {"seed": seed}
        self.requests, self.samples = pd.DataFrame(), pd.DataFrame()
        self.events: list[tuple[float, str]] = []
        self._answers: dict[int, list[int]] = {}
        self._ends = self._twice = self._left = 0

    def run(self, sockets: Path) -> None:
        """Start the deployment, ask what each answer must be, serve both halves; the rows are in `requests`."""
        options, settings = self._context.options, self._context.settings
        logs = self._context.folder / "logs" / self.name
        logs.mkdir(parents=True, exist_ok=True)
        computing = VllmComputing(
            Path(options.environment), self._folder, self._vocabulary,
            max(options.input_tokens) + max(options.output_tokens, 16), sockets, logs, options.start_timeout_s, options.timeout_s,
            {PRFAAS: options.endpoints.prefill, PD: options.endpoints.decode} if options.running else {}, options.api_key_variable,
        )  # fmt: skip
        wire = Wire(settings.link, TransportSpec(), 1, Scale())  # the engine's connector is the transport
        self._context.progress(f"{self.name}: {'reaching' if options.running else 'starting'} the instances of vLLM")
        with deployed(self._spec(), wire, logs, "live-engines", settings.seed, computing) as live:
            self.facts["link"] = live.measured_link()
            with self._decoder(sockets) as decoder:
                alone = [decoder.answer(prompt, options.output_tokens).tokens for prompt in self._prompts]
                cache = decoder.info(CACHE_INFO)
            self.facts["cache"] = dict(cache)
            half = options.requests // 2
            kill = LiveFault(options.killed or "", options.kill_at_s, options.kill_for_s)
            faults = [kill] if options.killed is not None else []
            tables = [self._play(live, 0, half, faults, alone), self._play(live, half, options.requests, [], alone)]
            self.requests = pd.concat(tables, ignore_index=True)
            with self._decoder(sockets) as decoder:
                self.requests["ties"] = self._ties(decoder, alone)
            self.facts["workers"] = live.fleet.clocks.record()
        expected = [
            handed_over_bytes(self._layout, state_tokens_of(self._layout, tokens), cache)
            for tokens in self.requests["input_tokens"]
        ]
        self.requests["kv_bytes_layout"] = expected
        self._left = self._processes_left(sockets)

    def _spec(self) -> SimulationSpec:
        settings, options = self._context.settings, self._context.options
        policy, link = settings.policy, settings.link
        assert policy.threshold_tokens is not None
        assert policy.n_p is not None
        fixed, per_token = self._layout.fixed_bytes, self._layout.bytes_per_token
        profile = PhaseProfile(
            self.name, self.name, "processor", 1, _PREFILL, KVSize(fixed, per_token),
            DecodeStep(_STEP_S, batch_max=options.batch_max), kv_source="computed",
        )  # fmt: skip
        shared = SharedLinkSpec(link.rate_bps or 1e15, link.rtt_s, nic_bps=max(400e9, link.rate_bps or 1e15))
        return SimulationSpec(
            (PdCluster(profile, policy.n_p, settings.cluster.pd.instances - policy.n_p),),
            (PrfaasCluster(profile, settings.cluster.prfaas.instances, shared),),
            SchedulerSpec(
                Threshold() if policy.n_p else Naive(), policy.threshold_tokens, policy.placement, policy.short_term, policy.long_term,
                admission=policy.admission, fallback_s=policy.fallback_s,
            ),
        )  # fmt: skip

    def _decoder(self, sockets: Path) -> OpenAIServer:
        """The last decode instance, asked past the router: what it says by itself."""
        options, settings = self._context.options, self._context.settings
        name = f"{PD}.{settings.cluster.pd.instances - 1}"
        return OpenAIServer(
            options.endpoints.decode[-1] if options.running else f"http://{name}", self._vocabulary,
            key_variable=options.api_key_variable, timeout_s=options.timeout_s, key="options.endpoints.decode",
            socket=None if options.running else sockets / name,
        )  # fmt: skip

    def _play(
        self,
        live: Deployment,
        first: int,
        end: int,
        faults: Sequence[LiveFault],
        alone: Sequence[tuple[int, ...]],
    ) -> pd.DataFrame:
        options: Options = self._context.options
        prompts, arrivals_s = self._prompts[first:end], self._arrivals_s[first:end]
        lengths = np.array([len(prompt) for prompt in prompts])
        begin_s = arrivals_s[0] if first else 0.0
        batch = RequestBatch(arrivals_s - begin_s, lengths, np.full(len(prompts), options.output_tokens))
        played: Played = live.play([batch], prompts=prompts, faults=faults, drain_s=options.drain_s)
        phase = "fault" if faults else "after" if first else "before"
        table = played.requests.assign(case=self.name, phase=phase)
        table["same_tokens"] = [tuple(played.tokens.get(number, ())) == alone[first + number] for number in table["id"]]
        self._answers |= {first + number: tokens for number, tokens in played.tokens.items()}
        self._twice += int(table["id"].duplicated().sum())
        table["id"] += first
        self.events += [(at_s, f"{phase}: {words.split('; ')[0]}") for at_s, words in played.events]
        self._ends += sum(words.startswith("instance ") for _, words in played.events)
        self.samples = pd.concat([self.samples, played.samples.assign(model=self.name, phase=phase)], ignore_index=True)
        answered = int(table["outcome"].isin(ANSWERED).sum())
        self._context.progress(f"{self.name}: {answered} of {len(prompts)} requests answered")
        return table

    def _ties(self, decoder: OpenAIServer, alone: Sequence[tuple[int, ...]]) -> list[bool]:
        """Of each request whose tokens differ: whether the first that does was as good as the other one."""
        found = []
        for number, same in zip(self.requests["id"], self.requests["same_tokens"], strict=True):
            answer = self._answers.get(number)
            if same or answer is None or self._context.options.running:
                found.append(False)
                continue
            asked = {"logprobs": self._vocabulary, "return_tokens_as_token_ids": True}
            steps = decoder.complete(self._prompts[number], len(answer), **asked)
            found.append(is_tie(steps_of(steps, self._vocabulary)[1], alone[number], answer))
        return found

    def _processes_left(self, sockets: Path) -> int:
        deadline = time.monotonic() + _GONE_WITHIN_S
        while (left := processes_of(sockets)) and time.monotonic() < deadline:
            time.sleep(0.1)
        return left

    def metrics(self) -> Iterator[Metric]:
        """What became of its requests."""
        table, context = self.requests, self._context
        answered = table[table["outcome"].isin(ANSWERED)]
        right = answered["same_tokens"] | answered["ties"]
        yield from (
            context.metric(self.name, metric, number, unit, "measured", n=len(table))
            for metric, number, unit in (
                ("requests", len(table), "requests"),
                ("requests_lost", len(table) - len(answered), "requests"),
                ("requests_answered_twice", self._twice, "requests"),
                ("requests_tried_again", int((table["attempts"] > 1).sum()), "requests"),
                ("requests_fell_back", int((table["outcome"] == "fell_back").sum()), "requests"),
                ("instances_lost", self._ends, "instances"),
                ("processes_left", self._left, "processes"),
                ("offload_fraction", float((answered["route"] == "prfaas").mean()), ""),
                ("tokens_match", float(right.mean()), ""),
                ("ties", int(answered["ties"].sum()), "tokens"),
                ("ttft_p50_s", float(answered["ttft_s"].median()), "s"),
                ("ttft_mean_s", float(answered["ttft_s"].mean()), "s"),
                ("kv_bytes", float(answered["payload_bytes"].mean()), "bytes"),
            )
        )
        yield context.metric(
            self.name, "kv_bytes_layout", answered["kv_bytes_layout"].mean(), "bytes", "computed", n=len(answered)
        )

    @property
    def failure(self) -> str:
        """Why the run counts as failed; empty where all is well. Other tokens are a finding: see docs/engines.md on the hybrid."""
        table = self.requests
        answered = table[table["outcome"].isin(ANSWERED)]
        off = int(((answered["payload_bytes"] / answered["kv_bytes_layout"] - 1).abs() > BYTES_WITHIN).sum())
        lost = len(table) - len(answered)
        if not (off or lost or self._twice or self._left):
            return ""
        return (
            f"{self.name}: {lost} requests lost, {self._twice} answered twice, {off} with other bytes than vLLM's layout, {self._left} "
            "processes left"
        )


def finding(record: Record) -> str:
    """What was asked of each checkpoint's deployment and what became of it."""
    parts = []
    for case, table in record.metrics.groupby("case", sort=False):
        sent, lost, twice, again, ends = (
            int(value(table, name))
            for name in (
                "requests", "requests_lost", "requests_answered_twice", "requests_tried_again", "instances_lost",
            )
        )  # fmt: skip
        parts.append(
            f"{case}: of {sent} requests {lost} were lost and {twice} answered twice, {ends} instances were lost, {again} requests tried "
            f"again; {100 * value(table, 'tokens_match'):.0f} % of the answers are the unsplit instance's, bytes "
            f"{value(table, 'kv_bytes') / value(table, 'kv_bytes_layout'):.3f} of the layout's"
        )
    return f"vLLM under the kit's router: {'; '.join(parts)}."


def draw(record: Record) -> Figure:
    """A panel per checkpoint: TTFT of each request by its number, by where it was prefilled, those that were tried again marked."""
    requests = record.requests
    names = list(requests["case"].unique())
    figure, panels = style.panels(len(names), height_in=3.2)
    for axis, name in zip(panels, names, strict=True):
        own = requests[requests["case"] == name]
        for words, rows, colour in (
            ("prefilled across the link", own[own["route"] == "prfaas"], style.BLUE),
            ("prefilled beside decode", own[own["route"] == "pd"], style.ORANGE),
        ):
            axis.plot(rows["id"], rows["ttft_s"], "o", ms=4, color=colour, label=words)
        again = own[own["attempts"] > 1]
        axis.plot(again["id"], again["ttft_s"], "o", ms=9, mfc="none", color=style.RED, label="tried again")
        if len(ill := own[own["phase"] == "fault"]):
            axis.axvspan(-0.5, ill["id"].max() + 0.5, color="0.93", zorder=0, label="half with an instance killed")
        axis.set(xlabel="request", ylabel="TTFT (s)", yscale="log", title=name)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


EXPERIMENT = Experiment(
    "live_engines",
    {
        "execute": (
            "cluster.prfaas.instances", "cluster.pd.instances", "link", "policy.threshold_tokens", "policy.n_p",
            "policy.placement", "policy.admission", "policy.short_term", "policy.long_term", "policy.fallback_s", "seed", "options",
        )
    },
    run,
    {"live_engines": draw},
    Options,
    check,
    timed=True,
    finding=finding,
)  # fmt: skip
