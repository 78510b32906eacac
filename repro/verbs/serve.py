"""Serve a model through the live deployment at an OpenAI-compatible address: serve [<group>=<choice> <key>=<value> …] [--port 8000].

python -m repro serve
    the deployment of experiment=tiers (a PrfaaS instance, two PD instances, a link between) with the tiny kimi_linear
python -m repro serve pretrained=<folder or hub id> link=metro policy=paper cluster.pd.instances=3
    a checkpoint of your own, over another link, with both control loops
python -m repro serve --save-tokenizer bytes/
    only write the byte tokenizer of a randomly initialised model, for load generators that count tokens themselves

Clients find /v1/completions, /v1/chat/completions, /v1/models, /health and /metrics there; docs/serve.md says what they may ask.
Ctrl-C ends it; what was served is then in the folder that the last line names.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pandas as pd

from repro.arguments import Parser
from repro.composition import Composition, compose
from repro.configuration import plain
from repro.errors import UserError, writing
from repro.experiments import tiers
from repro.experiments.base import CACHES, MODEL, SCHEDULER, SIMULATED, WIRE, Context, Experiment, restricted
from repro.experiments.computed import Computing, check_pools, pools
from repro.experiments.live import Wire, deployed
from repro.experiments.simulated import scheduled
from repro.experiments.split_model import engine_of, vocabulary_of
from repro.experiments.table3 import one_model
from repro.profiles.base import PhaseProfile
from repro.record.directory import RunDirectory
from repro.scheduling.search import search
from repro.scheduling.throughput import Deployment as Capacity
from repro.serving.api import Api, Served
from repro.serving.exposition import Exposition
from repro.serving.front import Front, Limits
from repro.serving.http_server import listening, serve_until, signalled
from repro.serving.ray_launcher import RayLauncher
from repro.serving.scale import Scale
from repro.serving.tokenizer import ByteTokenizer, tokenizer_of
from repro.settings import Settings
from repro.simulate.deployments import shared_link, simulated
from repro.simulate.spec import SimulationSpec

#: Where the deployment's values come from; the command line changes them.
_BASE = "experiment=tiers"
#: Requests that decode together on an instance where neither a profile nor the command line says so.
_BATCH_MAX = 8
#: What serving reads, as an experiment would say it.
_READS = Experiment(
    "serve",
    {"execute": (*MODEL, *(key for key in SIMULATED if key != "workload.slo"), *SCHEDULER, "policy.cache.enabled", *CACHES, *WIRE, "ray")},
    tiers.run,
)  # fmt: skip


def main(argv: list[str]) -> int:
    """The tool's entry; returns the exit code."""
    parser = Parser(
        prog="python -m repro serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="what the deployment is, as for an experiment")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: loopback)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: 8000)")
    parser.add_argument(
        "--api-key-variable", metavar="NAME", help="environment variable that holds the key that clients must bring"
    )
    parser.add_argument(
        "--max-requests", type=int, default=64, help="under way at once; more get status 429 (default: 64)"
    )
    parser.add_argument(
        "--max-context-tokens", type=int, default=8192, help="of prompt and answer together (default: 8192)"
    )
    parser.add_argument("--max-output-tokens", type=int, default=1024, help="of an answer (default: 1024)")
    parser.add_argument("--max-body-bytes", type=int, default=4 << 20, help="of a request (default: 4 MiB)")
    parser.add_argument("--timeout-s", type=float, default=120.0, help="for a whole answer (default: 120)")
    parser.add_argument(
        "--batch-max", type=int, help="requests that decode together on an instance (default: the profile's, else 8)"
    )
    parser.add_argument("--chunk-tokens", type=int, default=128, help="of prefill (default: 128)")
    parser.add_argument("--threads", type=int, default=1, help="of each instance (default: 1)")
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="the same as ray=ADDRESS, a running Ray cluster: nodes with the resources prefill and decode take the instances",
    )
    parser.add_argument(
        "--save-tokenizer",
        type=Path,
        metavar="FOLDER",
        help="write the model's byte tokenizer there, and serve nothing",
    )
    given = parser.parse_intermixed_args(argv)
    composition = _composed([*given.words, *([f"ray={given.ray}"] if given.ray is not None else [])])
    settings = composition.settings
    if given.save_tokenizer is not None:
        return _save_tokenizer(settings, given.save_tokenizer)
    options = tiers.Options(chunk_tokens=given.chunk_tokens, threads=given.threads)
    tiers.check(settings, options)
    if settings.policy.cache.enabled:
        check_pools(settings, given.chunk_tokens, "--chunk-tokens")
    limits = Limits(
        given.max_body_bytes, given.max_context_tokens, given.max_output_tokens, given.max_requests, given.timeout_s
    )
    if given.batch_max is not None and given.batch_max < 1:
        raise UserError(f"--batch-max: {given.batch_max}; accepted: 1 or more")
    key = _key(given.api_key_variable, given.host)
    with listening(given.host, given.port) as listener:
        directory = RunDirectory(Path(settings.results) / "serve" / (settings.label or time.strftime("%Y%m%d-%H%M%S")))
        kept = restricted(plain(settings), _READS, "execute")
        described = {
            "kind": "serve",
            **{name: value for name, value in kept.items() if name not in ("name", "tier", "options")},
        }
        directory.begin({**described, "limits": asdict(limits)}, ["repro", "serve", *argv], {"seed": settings.seed})
        try:
            with writing(directory.path):
                _serve(settings, options, limits, key, listener, directory, given.batch_max)
            directory.complete()
        except BaseException as error:
            directory.fail(error)
            raise
    print(directory.path)
    return 0


def _composed(words: Sequence[str]) -> Composition:
    """The deployment that the words ask for. Raises UserError for a key that serving does not read."""
    for word in words:
        if word.startswith(("experiment=", "bench=", "sweep=", "tier=")):
            raise UserError(
                f"{word}: serve runs no experiment; accepted: groups and keys of a deployment, as model=, link=, policy="
            )
    composition = compose([_BASE, *words])
    mine = {word.lstrip("+~").partition("=")[0].replace("/", ".") for word in words}
    for key in composition.asked:
        if key in mine and not _READS.reads_key(key, "execute"):
            raise UserError(f"{key}: not read by serve; accepted: {', '.join(_READS.reads['execute'][:6])}, …")
    return composition


def _save_tokenizer(settings: Settings, folder: Path) -> int:
    model = one_model(settings)
    tokenizer = tokenizer_of(model.pretrained, vocabulary_of(model))
    if not isinstance(tokenizer, ByteTokenizer):
        raise UserError(f"--save-tokenizer: {model.pretrained} has a tokenizer of its own; clients can read that")
    tokenizer.save(folder)
    print(folder)
    return 0


def _key(variable: str | None, host: str) -> str | None:
    """The key that clients must bring. Raises UserError where it is not set, or where others than this machine's could come without one."""
    if variable is not None:
        if not (key := os.environ.get(variable)):
            raise UserError(f"--api-key-variable: {variable} is not set in the environment")
        return key
    try:
        near = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        near = False
    if not near:
        raise UserError(
            f"--host: {host} is open to other machines; accepted: a loopback address, or any with --api-key-variable"
        )
    return None


def _batched(profile: PhaseProfile, settings: Settings, batch_max: int | None) -> PhaseProfile:
    """The profile with that BS_max. One that was just measured has the BS_max of a speed that this machine may not reach alone."""
    wanted = batch_max or (None if settings.profile is not None else _BATCH_MAX)
    return profile if wanted is None else replace(profile, decode=replace(profile.decode, batch_max=wanted))


def _specification(settings: Settings, profile: PhaseProfile) -> SimulationSpec:
    """The deployment at its best operating point for the configured lengths, under the configured policy."""
    base = Capacity(
        profile, settings.cluster.prfaas.instances, profile, settings.cluster.pd.instances, settings.link.rate_bps or float("inf"),
        settings.workload.length_law(), settings.workload.mean_output_tokens(),
    )  # fmt: skip
    point = search(base, replace(settings.policy, lengths="true_mean"))
    plain = scheduled(simulated(base, point, shared_link(settings.link, settings.transport)), settings.policy, point)
    cache = settings.policy.cache
    return replace(plain, cache=cache.spec(profile)) if cache.enabled else plain


def _serve(
    settings: Settings,
    options: tiers.Options,
    limits: Limits,
    key: str | None,
    listener: socket.socket,
    directory: RunDirectory,
    batch_max: int | None,
) -> None:
    """Start everything, serve until told to stop, and write what was served."""
    model = one_model(settings)
    words = vocabulary_of(model)
    tokenizer = tokenizer_of(model.pretrained, words)
    context = Context(settings, options, directory.path, _say)
    spec = _specification(settings, _batched(tiers.own_profile(context), settings, batch_max))
    home, remote = spec.pd[0], spec.prfaas[0].instances if spec.prfaas else 0
    instances = f"{remote} PrfaaS, {home.n_p} PD-P and {home.n_d} PD-D instances"
    _say(f"{model.name}, tokenizer {tokenizer.name}: {instances}, t = {spec.scheduler.threshold_tokens:g} tokens")
    caches = pools(settings, home.n_p) if spec.cache is not None else {}
    engine = engine_of(model, options.chunk_tokens, options.threads)
    computing = Computing(engine, words, prompts=1, caches=caches, streams=True)
    wire = Wire(settings.link, settings.transport, options.pieces, Scale())
    logs = directory.path / "logs"
    logs.mkdir()
    launcher = RayLauncher(settings.ray, logs) if settings.ray is not None else None
    with deployed(spec, wire, logs, f"serve-{os.getpid()}", settings.seed, computing, launcher) as live:
        named = partial(computing.named, block_tokens=settings.policy.cache.block_tokens)
        front = Front(Exposition(model.name), limits, live.first_number(), named if caches else lambda prompt: None)
        directory.add_provenance({"link": live.measured_link()})
        api = Api(front, Served(model.name, model.pretrained or f"{model.name}_{model.size}", tokenizer, words), key)
        host, port = listener.getsockname()[:2]
        with live.serving(front, limits.requests + 1) as router:
            _say(f"serving {model.name} at http://{f'[{host}]' if ':' in host else host}:{port}/v1; Ctrl-C ends it")
            serve_until(signalled(), router, front, api, listener)
        directory.add_provenance({"workers": live.fleet.clocks.record()})
    if front.rows:
        directory.write_requests(pd.DataFrame(front.rows).sort_values("id", ignore_index=True))
    _say(f"{len(front.rows)} requests served")


def _say(line: str) -> None:
    print(f"serve: {line}", file=sys.stderr, flush=True)
