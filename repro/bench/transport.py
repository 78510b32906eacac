"""How fast is the transport, and what does it cost? Against plain sockets, iperf3 and the other backends, on one path.

Physics: over loopback the ceiling is two copies through the kernel, so CPU per byte decides, and what a transport adds
(framing, checksums, acknowledgements, locks) shows as the distance from plain sockets. Over a link the ceiling is what
TCP makes of rate, RTT and loss, and what shows is whether all connections are kept full: the reference is iperf3 with
the same connections, congestion control and windows.

All contenders run once per round, in a new order each round, so that whatever else the machine does falls on all alike;
ratios are taken within a round, and their 95 % intervals over the rounds (Student's t on the logarithms).

    scripts/bench transport options.repeats=10                                                     # loopback, no link
    scripts/bench transport tier=emulate link=lossy_1g options.seconds=20 'options.only=[tcp,iperf3]'     # over a link
"""

from __future__ import annotations

import json
import math
import random
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pandas as pd

from repro import processes
from repro.bench._transport_ends import Job
from repro.errors import UserError
from repro.experiments.base import TCP, Context, Experiment, Outcome
from repro.link import Link, LinkSpec, open_link
from repro.processes import Child, tied
from repro.record.metrics import Metric
from repro.record.provenance import PROJECT
from repro.record.statistics import Estimate
from repro.transport import TransportSpec
from repro.transport.certificates import make_certificates
from repro.transport.remote_memory import missing, started
from repro.transport.wire import LOCAL_BUFFER_BYTES

#: No link: the loopback of this machine.
LOOPBACK = LinkSpec(name="loopback", backend="none")
#: A link is what it is from the beginning: nothing here starts its schedule.
_UNCHANGING: dict[str, Any] = {"schedule": (), "capacity_trace": None, "reverse_capacity_trace": None}
_LINK = tuple(f"link.{item.name}" for item in fields(LinkSpec) if item.name not in _UNCHANGING)
_PATIENCE_S = 120.0
_IPERF3 = ("iperf3", "setpriv")  # it is started by the other, which ends it with us


@dataclass(frozen=True)
class Options:
    """Who is compared, for how long and how often.

    `only` are names or kinds of contenders, all where empty. Null stands for what suits the path: `warm_s` 1 on loopback and 3 over a
    link, pieces of 32 and 4 MiB.
    """

    only: tuple[str, ...] = ()
    connections: tuple[int, ...] = (1, 4, 8)
    seconds: float = 3.0
    warm_s: float | None = None
    piece_bytes: int | None = None
    repeats: int = 5

    def __post_init__(self) -> None:
        if not self.connections or not all(1 <= count <= 64 for count in self.connections):
            raise UserError(f"options.connections: {list(self.connections)}; accepted: some of 1 to 64")
        for name in ("seconds", "warm_s", "piece_bytes", "repeats"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise UserError(f"options.{name}: {value:g}; accepted: above 0")


@dataclass(frozen=True)
class Contender:
    """One way of moving bytes. `kind` is `sockets`, `transport` or `iperf3`; `spec` what its ends are told."""

    name: str
    kind: str
    spec: TransportSpec = field(default_factory=TransportSpec)
    own_process: bool = False


def contenders(
    base: TransportSpec, connections: Sequence[int], certificates: str, progress: Callable[[str], None], *, local: bool
) -> list[Contender]:
    """Everything that can be compared here; what is not installed is left out with a line, before anything runs."""
    chosen = []
    absent = [program for program in _IPERF3 if shutil.which(program) is None]
    if absent:
        progress(f"iperf3 is left out: {' and '.join(absent)} not installed")
    for count in connections:
        spec = replace(base, connections=count)
        chosen.append(Contender(f"sockets_{count}", "sockets", spec))
        if not absent:
            chosen.append(Contender(f"iperf3_{count}", "iperf3", spec))
        chosen.append(Contender(f"tcp_{count}", "transport", spec))
    middle = replace(base, connections=sorted(connections)[len(connections) // 2])
    if local:
        # Plain sockets with the buffers that the transport chooses within a machine: what that choice alone is worth.
        buffers = replace(middle, send_buffer_bytes=LOCAL_BUFFER_BYTES, receive_buffer_bytes=LOCAL_BUFFER_BYTES)
        chosen.append(Contender(f"tuned_{middle.connections}", "sockets", buffers))
    chosen.append(Contender(f"own_process_{middle.connections}", "transport", middle, own_process=True))
    chosen.append(Contender(f"tls_{middle.connections}", "transport", replace(middle, tls=certificates)))
    for backend in ("mooncake", "nixl"):
        if reason := missing(backend):
            progress(f"{backend} is left out: {reason}")
        else:
            # These ask for places first: large batches keep the round trips of that out of their way. They open
            # connections and spinning threads of their own, so one of ours does them the least harm.
            spec = replace(base, connections=min(connections), backend=backend, segment_bytes=16 << 20)
            chosen.append(Contender(f"{backend}_{spec.connections}", "transport", spec))
    return chosen


def measure(contender: Contender, link: Link, job: Job) -> dict[str, float]:
    """One run: goodput in bit/s, and CPU seconds per 10⁹ bytes of the sending and of the receiving end."""
    if contender.kind == "iperf3":
        return _iperf3(contender.spec, link, job)
    told = replace(job, contender=contender.kind, spec=contender.spec, own_process=contender.own_process)
    end = started(
        contender.spec.backend,
        [sys.executable, "-m", "repro.bench._transport_ends"],
        namespaced=link.backend not in ("none", "relay"),
    )
    with _end("receiving", link.command("decode", end)) as receiving:
        host, port = link.dial(receiving.ask("open", _PATIENCE_S, role="receive", job=asdict(told), where=[])["port"])
        there = asdict(replace(told, host=host))
        with _end("sending", link.command("prefill", end)) as sending:
            sending.ask("open", _PATIENCE_S, role="send", job=there, where=[port])
            sent, received = (one.ask("result", _PATIENCE_S) for one in (sending, receiving))
    return {
        "goodput_bps": 8 * sent["bytes"] / sent["wall_s"],
        "send_cpu_s_per_gb": 1e9 * sent["cpu_s"] / sent["total_bytes"],
        "receive_cpu_s_per_gb": 1e9 * received["cpu_s"] / received["total_bytes"],
    }


def _iperf3(spec: TransportSpec, link: Link, job: Job) -> dict[str, float]:
    """iperf3 says what its two ends used, in percent of one core."""
    host, port = link.dial(5201)
    server = tied(["iperf3", "--json", "-p", "5201", "-s", "-1", "-B", link.listen_host("decode")])
    options = ["-P", str(spec.connections), "-t", f"{job.seconds:.0f}", "-O", f"{math.ceil(job.warm_s)}"]
    if spec.congestion_control:
        options += ["-C", spec.congestion_control]
    client = tied(["iperf3", "--json", "-c", host, "-p", str(port), *options])
    with Child("iperf3 server", link.command("decode", server), channel=False, stderr="dropped"):
        for _ in range(20):
            done = processes.run(link.command("prefill", client), timeout_s=_PATIENCE_S)
            try:
                result = json.loads(done.stdout)
            except ValueError:
                raise UserError(f"iperf3: {done.stderr.strip() or f'no result, status {done.returncode}'}") from None
            if "refused" not in result.get("error", ""):
                break
            threading.Event().wait(0.1)  # the server is not up yet
    if "error" in result:
        raise UserError(f"iperf3: {result['error']}")
    end = result["end"]
    rate_bps = float(end["sum_received"]["bits_per_second"])
    share = {side: float(end["cpu_utilization_percent"][f"{side}_total"]) / 100 for side in ("host", "remote")}
    return {
        "goodput_bps": rate_bps,
        "send_cpu_s_per_gb": share["host"] * 8e9 / rate_bps,
        "receive_cpu_s_per_gb": share["remote"] * 8e9 / rate_bps,
    }


def _end(name: str, command: list[str]) -> Child:
    return Child(f"{name} end", command, stderr="inherited", cwd=PROJECT)


def rounds(
    chosen: list[Contender],
    run: Callable[[Contender], dict[str, float]],
    repeats: int,
    progress: Callable[[str], None],
) -> pd.DataFrame:
    """One row per contender and round."""
    rows = []
    for index in range(repeats):
        for contender in random.Random(index).sample(chosen, len(chosen)):
            try:
                values = run(contender)
                if not values["goodput_bps"]:
                    raise UserError("nothing was confirmed in the time given")
            except UserError as error:
                progress(f"{contender.name}, round {index + 1}: {error}")
                continue
            values["cpu_s_per_gb"] = values["send_cpu_s_per_gb"] + values["receive_cpu_s_per_gb"]
            rows.append({"round": index, "case": contender.name, **values})
            progress(
                f"round {index + 1}/{repeats} {contender.name:14s} {values['goodput_bps'] / 1e9:7.3f} Gbps "
                f"{values['cpu_s_per_gb']:.3f} CPU s/GB"
            )
    if not rows:
        raise UserError(
            "options.seconds: no contender got a byte confirmed; accepted: more of them, or a smaller options.piece_bytes"
        )
    return pd.DataFrame(rows)


def summarise(context: Context, table: pd.DataFrame) -> list[Metric]:
    """Means, and within each round the ratios to plain sockets and to iperf3 of as many connections."""
    source = "measured" if context.settings.tier == "execute" else "emulated"
    units = {
        "goodput_bps": "bit/s",
        "cpu_s_per_gb": "s/GB",
        "send_cpu_s_per_gb": "s/GB",
        "receive_cpu_s_per_gb": "s/GB",
    }
    rows = []

    def add(case: str, metric: str, found: Estimate, unit: str) -> None:
        span = (found.low, found.high)
        rows.append(context.metric(case, metric, found.value, unit, source, interval=span, n=found.n))

    cases = list(dict.fromkeys(table["case"]))
    for case in sorted(cases):
        mine = table[table["case"] == case].set_index("round")
        for metric, unit in units.items():
            add(case, metric, Estimate.of(mine[metric].to_list()), unit)
        for reference in ("sockets", "iperf3"):
            other = f"{reference}_{case.rpartition('_')[2]}"
            if other not in cases or other == case:
                continue
            pairs = mine.join(table[table["case"] == other].set_index("round"), rsuffix="_other", how="inner")
            for metric in ("goodput_bps", "cpu_s_per_gb"):
                ratio = Estimate.geometric((pairs[metric] / pairs[f"{metric}_other"]).to_list())
                add(case, f"{metric.removesuffix('_bps')}_to_{reference}", ratio, "1")
    return rows


def run(context: Context) -> Outcome:
    """All contenders on loopback (tier `execute`) or across the link (tier `emulate`)."""
    options, base = context.options, context.settings.transport
    assert isinstance(options, Options)
    local = context.settings.tier == "execute"
    spec = LOOPBACK if local else replace(context.settings.link, **_UNCHANGING)
    context.folder.mkdir(parents=True, exist_ok=True)
    # In the run's own folder: of a run that is killed nothing stays elsewhere.
    scratched = tempfile.TemporaryDirectory(prefix="certificates-", dir=context.folder)
    with scratched as scratch, open_link(spec, run="bench-transport") as link:
        make_certificates(Path(scratch) / "tls")
        chosen = _chosen(
            contenders(base, options.connections, f"{scratch}/tls", context.progress, local=local), options
        )
        if link.backend == "relay" and any(contender.spec.backend != "tcp" for contender in chosen):
            chosen = [contender for contender in chosen if contender.spec.backend == "tcp"]
            context.progress("mooncake and nixl are left out: a relay link does not carry what they open")
        if not chosen:
            raise UserError(f"options.only: {', '.join(options.only)}: nothing of that can run here")
        if not local:
            link.measure()
        warm_s = options.warm_s or (1.0 if local else 3.0)
        piece_bytes = options.piece_bytes or (32 << 20 if local else 4 << 20)
        job = Job("", link.listen_host("decode"), options.seconds, warm_s, piece_bytes, base)
        table = rounds(chosen, lambda one: measure(one, link, job), options.repeats, context.progress)
        record = link.record()
    metrics = summarise(context, table)
    for line in _printed(metrics).splitlines():
        context.progress(line)
    return Outcome(metrics, {"rounds": table}, provenance={"link": record})


def _chosen(found: list[Contender], options: Options) -> list[Contender]:
    """Those that `only` names, whole or by their kind."""
    return [
        one
        for one in found
        if not options.only or any(one.name == word or one.name.startswith(f"{word}_") for word in options.only)
    ]


def _printed(metrics: list[Metric]) -> str:
    frame = pd.DataFrame([{"case": m.case, "metric": m.metric, "value": m.value} for m in metrics])
    wide = frame.pivot(index="case", columns="metric", values="value")
    wide["goodput_gbps"] = wide.pop("goodput_bps") / 1e9
    return wide.round(3).to_string(na_rep="")


EXPERIMENT = Experiment(
    "bench_transport",
    reads={"execute": (*TCP, "options"), "emulate": (*_LINK, *TCP, "options")},
    run=run,
    options=Options,
    timed=True,
)
