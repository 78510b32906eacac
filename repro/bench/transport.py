"""How fast is the transport, and what does it cost? Against plain sockets, iperf3 and the other backends, on one path.

Physics: over loopback the ceiling is two copies through the kernel, so CPU per byte decides, and what a transport adds
(framing, checksums, acknowledgements, locks) shows as the distance from plain sockets. Over a link the ceiling is what
TCP makes of rate, RTT and loss, and what shows is whether all connections are kept full: the reference is iperf3 with
the same connections, congestion control and windows.

All contenders run once per round, in a new order each round, so that whatever else the machine does falls on all alike;
ratios are taken within a round, and their 95 % intervals over the rounds (Student's t on the logarithms).

    scripts/bench transport --seconds 3 --repeats 10                  # loopback
    scripts/bench transport --link 1g --seconds 20 --repeats 5        # 1 Gbps, RTT 50 ms, loss 0.1 %, BBR
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import pandas as pd

from repro import processes
from repro.bench._transport_ends import Job
from repro.errors import UserError
from repro.link import Link, LinkSpec, open_link
from repro.processes import Child, tied
from repro.record.directory import RunDirectory, configuration_hash
from repro.record.metrics import Metric
from repro.record.provenance import PROJECT
from repro.record.statistics import Estimate
from repro.transport import ReceiverLimits, TransportSpec
from repro.transport.certificates import make_certificates
from repro.transport.remote_memory import missing, started
from repro.transport.wire import LOCAL_BUFFER_BYTES

LINKS = {
    "loopback": LinkSpec(name="loopback", backend="none"),
    "1g": LinkSpec(name="1g", rate_bps=1e9, rtt_s=0.05, loss=0.001),
    "5g": LinkSpec(name="5g", rate_bps=5e9, rtt_s=0.05, loss=0.001),
}
_PATIENCE_S = 120.0
_IPERF3 = ("iperf3", "setpriv")  # it is started by the other, which ends it with us


@dataclass(frozen=True)
class Contender:
    """One way of moving bytes. `kind` is `sockets`, `transport` or `iperf3`; `spec` what its ends are told."""

    name: str
    kind: str
    spec: TransportSpec = field(default_factory=TransportSpec)
    own_process: bool = False


def contenders(base: TransportSpec, connections: Sequence[int], certificates: str, *, local: bool) -> list[Contender]:
    """Everything that can be compared here; what is not installed is left out with a line on stderr, before anything runs."""
    chosen = []
    absent = [program for program in _IPERF3 if shutil.which(program) is None]
    if absent:
        print(f"iperf3 is left out: {' and '.join(absent)} not installed", file=sys.stderr)
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
            print(f"{backend} is left out: {reason}", file=sys.stderr)
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


def rounds(chosen: list[Contender], run: Callable[[Contender], dict[str, float]], repeats: int) -> pd.DataFrame:
    """One row per contender and round."""
    rows = []
    for index in range(repeats):
        for contender in random.Random(index).sample(chosen, len(chosen)):
            try:
                values = run(contender)
                if not values["goodput_bps"]:
                    raise UserError("nothing was confirmed in the time given")
            except UserError as error:
                print(f"{contender.name}, round {index}: {error}", file=sys.stderr)
                continue
            values["cpu_s_per_gb"] = values["send_cpu_s_per_gb"] + values["receive_cpu_s_per_gb"]
            rows.append({"round": index, "case": contender.name, **values})
            print(
                f"round {index + 1}/{repeats} {contender.name:12s} {values['goodput_bps'] / 1e9:7.3f} Gbps "
                f"{values['cpu_s_per_gb']:.3f} CPU s/GB",
                file=sys.stderr,
            )
    if not rows:
        raise UserError(
            "bench transport: no contender got a byte confirmed; --seconds may be too short for --piece-bytes"
        )
    return pd.DataFrame(rows)


def summarise(table: pd.DataFrame, tier: str) -> list[Metric]:
    """Means, and within each round the ratios to plain sockets and to iperf3 of as many connections."""
    source = "measured" if tier == "execute" else "emulated"
    units = {
        "goodput_bps": "bit/s",
        "cpu_s_per_gb": "s/GB",
        "send_cpu_s_per_gb": "s/GB",
        "receive_cpu_s_per_gb": "s/GB",
    }
    rows = []
    cases = list(dict.fromkeys(table["case"]))
    for case in sorted(cases):
        mine = table[table["case"] == case].set_index("round")
        for metric, unit in units.items():
            found = Estimate.of(mine[metric].to_list())
            rows.append(
                Metric("bench_transport", tier, case, metric, found.value, unit, source, found.low, found.high, found.n)
            )
        for reference in ("sockets", "iperf3"):
            other = f"{reference}_{case.rpartition('_')[2]}"
            if other not in cases or other == case:
                continue
            pairs = mine.join(table[table["case"] == other].set_index("round"), rsuffix="_other", how="inner")
            for metric in ("goodput_bps", "cpu_s_per_gb"):
                found = Estimate.geometric((pairs[metric] / pairs[f"{metric}_other"]).to_list())
                name = f"{metric.removesuffix('_bps')}_to_{reference}"
                rows.append(
                    Metric(
                        "bench_transport", tier, case, name, found.value, "1", source, found.low, found.high, found.n
                    )
                )
    return rows


def main(argv: list[str]) -> int:
    """Run, print the table on stderr, save it, and end with the path of the record."""
    parser = argparse.ArgumentParser(prog="bench transport", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--warm", type=float, default=None, help="seconds before the measurement; 1, or 3 over a link")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--link", choices=sorted(LINKS), default="loopback")
    parser.add_argument("--connections", default="1,4,8")
    parser.add_argument(
        "--congestion-control", default=None, help="cubic, bbr, reno; BBR over a link where none is given"
    )
    parser.add_argument("--segment-bytes", type=int, default=TransportSpec.segment_bytes)
    parser.add_argument("--piece-bytes", type=int, default=None, help="32 MiB, or 4 MiB over a link")
    parser.add_argument("--only", default="", help="names or kinds, separated by commas")
    parser.add_argument("--results", type=Path, default=Path("results"))
    arguments = parser.parse_args(argv)
    local = arguments.link == "loopback"
    base = TransportSpec(
        secret="bench",
        segment_bytes=arguments.segment_bytes,
        congestion_control=arguments.congestion_control or (None if local else "bbr"),
        deadline_s=600,
        # The requests under way and what the pipe holds beside them: less would make the youngest wait for a release.
        limits=ReceiverLimits(window_bytes=512 << 20, prefault_bytes=512 << 20),
    )
    warm_s = arguments.warm if arguments.warm is not None else 1.0 if local else 3.0
    configuration = {
        **{k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items()},
        "spec": asdict(base),
    }
    name = f"{arguments.link}-{configuration_hash(configuration)}"
    directory = RunDirectory(arguments.results / "bench_transport" / name)
    directory.begin(configuration, ["bench", "transport", *argv], {"order": 0})
    try:
        with (
            tempfile.TemporaryDirectory(prefix="certificates-") as scratch,
            open_link(LINKS[arguments.link], run=f"bench-{arguments.link}") as link,
        ):
            make_certificates(Path(scratch) / "tls")
            wanted = [word for word in arguments.only.split(",") if word]
            counts = [int(count) for count in arguments.connections.split(",")]
            chosen = [
                contender
                for contender in contenders(base, counts, f"{scratch}/tls", local=local)
                if not wanted or any(contender.name == word or contender.name.startswith(f"{word}_") for word in wanted)
            ]
            if link.backend == "relay" and any(contender.spec.backend != "tcp" for contender in chosen):
                chosen = [contender for contender in chosen if contender.spec.backend == "tcp"]
                print("mooncake and nixl are left out: a relay link does not carry what they open", file=sys.stderr)
            if not chosen:
                raise UserError(f"bench transport: --only {arguments.only}: nothing of that can run here")
            if not local:
                link.measure()
            piece_bytes = arguments.piece_bytes or (32 << 20 if local else 4 << 20)
            job = Job("", link.listen_host("decode"), arguments.seconds, warm_s, piece_bytes, base)
            table = rounds(chosen, lambda contender: measure(contender, link, job), arguments.repeats)
            metrics = summarise(table, "execute" if local else "emulate")
            directory.add_provenance({"link": link.record()})
        directory.write_table("rounds", table)
        directory.write_metrics(metrics)
        print(_printed(metrics), file=sys.stderr)
        print(directory.complete().path)
    except BaseException as error:
        directory.fail(error)
        raise
    return 0


def _printed(metrics: list[Metric]) -> str:
    frame = pd.DataFrame([{"case": m.case, "metric": m.metric, "value": m.value} for m in metrics])
    wide = frame.pivot(index="case", columns="metric", values="value")
    wide["goodput_gbps"] = wide.pop("goodput_bps") / 1e9
    return wide.round(3).to_string(na_rep="")
