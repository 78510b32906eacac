"""How many requests the simulator plays per second on Table 6's PrfaaS-PD deployment, alone or beside other simulators in one run.

`scripts/bench simulate` plays 1,024-token outputs at 90 % load with every queue, link sharing, the PrfaaS router and both control loops
on; `options.requests=[10000,100000,1000000,10000000]` shows growth in time and memory. Each run has a process of its own. The hot modules
are compiled first, as by `python -m repro compile`, where there is a compiler; `options.compiled=false` leaves that out.

Beside others, each of which an environment variable finds once it is fetched:

    git clone (GitHub) Mutinifni/splitwise-sim    its requirements.txt in an environment of its own; 378088013a54 was run
    pip install vidur==0.0.26                     in an environment of its own
    SPLITWISE_SIM=CHECKOUT:PYTHON VIDUR=ENVIRONMENT scripts/bench simulate options.peers=[splitwise-sim,vidur]

All play the same requests. In every round each runs once per size, in an order drawn anew, so that what slows the machine slows all alike,
and ratios are taken within rounds. A peer too slow for a size plays fewer, and so does ours beside it. Clocks stand around event loops:
start-up, reading requests and writing results count for nobody; only ours draws its requests within. Neither peer has a link that
transfers share, a second cluster, routing by length or control loops; `_simulate_peers.py` says more of each, and how it is set.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import pandas as pd

from repro import native, processes
from repro.bench._simulate_ours import stream
from repro.bench._simulate_peers import Peer, Workload, peer_of
from repro.errors import UserError
from repro.experiments.base import Context, Experiment, Outcome
from repro.record.metrics import Metric
from repro.record.statistics import Estimate

#: What is asked of this simulator: so many times the fastest peer, of which 3,500 req/s were known (splitwise-sim).
FACTOR = 10
BAR_PER_S = 35_000
OURS = "ours"
#: What depends on the machine; the others are the simulation's own.
_MEASURED = {"requests_per_s": "req/s", "requests_per_cpu_s": "req/s", "peak_memory_mb": "MB"}
_SIMULATED = {"completed": "1", "ttft_mean_s": "s", "ttft_p99_s": "s", "goodput": "req/s"}


@dataclass(frozen=True)
class Options:
    """What is played, how often and beside whom.

    `requests` are sizes (null: 100,000 and 300,000; beside peers 10,000 and 50,000), `repeats` rounds (null: 1; beside peers 5), `load`
    the share of Λ_max at which requests arrive. `control_loops` false leaves both off.
    """

    requests: tuple[int, ...] | None = None
    repeats: int | None = None
    load: float = 0.9
    control_loops: bool = True
    compiled: bool = True
    peers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(set(self.peers)) < len(self.peers):
            raise UserError(f"options.peers: {list(self.peers)}; accepted: each simulator once")
        if min(self.sizes, default=0) < 1:
            raise UserError(f"options.requests: {list(self.sizes)}; accepted: 1 or more each")
        if self.rounds < 1:
            raise UserError(f"options.repeats: {self.rounds}; accepted: 1 or more")
        if not self.load > 0:
            raise UserError(f"options.load: {self.load:g}; accepted: above 0")

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many requests a run has."""
        return self.requests if self.requests is not None else (10_000, 50_000) if self.peers else (100_000, 300_000)

    @property
    def rounds(self) -> int:
        """How often everything runs."""
        return self.repeats if self.repeats is not None else 5 if self.peers else 1


def run(context: Context) -> Outcome:
    """A line per run, and verdicts at the end."""
    options = context.options
    assert isinstance(options, Options)
    peers = [peer_of(name) for name in options.peers]
    compiled = options.compiled and _compiled(context.progress)
    table = rounds(peers, options, compiled, context.progress)
    rows = summarise(table)
    for line in verdicts(rows, options.sizes):
        context.progress(line)
    # A record says what was run, not where it lay on this machine.
    known = {"peers": {peer.name: peer.version() for peer in peers}, "compiled": compiled}
    return Outcome(rows, {"rounds": table}, provenance=known)


def _compiled(progress: Callable[[str], None]) -> bool:
    try:
        native.build()
    except UserError as error:
        progress(f"running as Python: {error}")
        return False
    return True


def rounds(
    peers: Sequence[Peer], options: Options, compiled: bool, progress: Callable[[str], None] = lambda line: None
) -> pd.DataFrame:
    """Every simulator at every size once per round, in an order drawn anew: columns round, who, requests and what was measured."""
    turns = {(peer, min(size, peer.most_requests)) for peer in peers for size in options.sizes}
    sizes = {*options.sizes, *(size for _, size in turns)}
    plan: list[tuple[Peer | None, int]] = [(None, size) for size in sorted(sizes)]
    plan += [(peer, size) for peer in peers for size in sorted({size for one, size in turns if one is peer})]
    order, rows = random.Random(0), []
    for index in range(options.rounds):
        order.shuffle(plan)
        for peer, size in plan:
            values = _ours(size, options, compiled) if peer is None else _theirs(peer, size, options.load)
            who = OURS if peer is None else peer.name
            if values["completed"] != size:
                raise UserError(f"{who}: {values['completed']:,.0f} of {size:,} requests completed; accepted: all")
            row = {"round": index, "who": who, "requests": size, **values}
            row |= {"requests_per_s": size / values["wall_s"], "requests_per_cpu_s": size / values["cpu_s"]}
            memory = f", peak {values['peak_memory_mb']:.0f} MB" if peer is None else ""
            progress(
                f"{who:>14} {size:>10,} requests: {row['requests_per_s']:>8,.0f} req/s, "
                f"{row['requests_per_cpu_s']:>8,.0f} per CPU second{memory}"
            )
            rows.append(row)
    return pd.DataFrame(rows)


def _ours(size: int, options: Options, compiled: bool) -> dict[str, float]:
    loops = "controllers" if options.control_loops else "static"
    command = [sys.executable, "-m", "repro.bench._simulate_ours", str(size), str(options.load), loops]
    environment = os.environ | {"REPRO_COMPILED": str(int(compiled))}
    done = processes.run(command, environment=environment)
    if done.returncode:
        raise UserError(f"{size:,} requests: {' '.join(done.stderr.split()[-40:])}")
    values: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return values


def _theirs(peer: Peer, size: int, load: float) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix=f"{peer.name}-") as scratch:
        return asdict(peer.play(_workload(size, load), Path(scratch)))


@cache
def _workload(size: int, load: float) -> Workload:
    return Workload.of(stream(size, load))


def summarise(table: pd.DataFrame) -> list[Metric]:
    """Geometric means over rounds with 95 % intervals; for each peer also that of the ratios within rounds, ours to its."""
    rows = []
    for (who, size), runs in table.groupby(["who", "requests"], sort=True):
        case = f"{size} requests" if who == OURS else f"{who}, {size} requests"
        for metric, unit in _MEASURED.items():
            if metric in runs and runs[metric].notna().all():
                rows.append(_mean(case, metric, runs[metric], unit))
        for metric, unit in _SIMULATED.items():
            if who == OURS or metric == "completed":
                value = float(runs[metric].iloc[0])
                rows.append(Metric("bench_simulate", "simulate", case, metric, value, unit, "simulated"))
        if who == OURS:
            continue
        ours = table[(table["who"] == OURS) & (table["requests"] == size)].set_index("round")
        theirs = runs.set_index("round")
        for metric in ("requests_per_s", "requests_per_cpu_s"):
            rows.append(_mean(case, f"{metric}_ratio", ours[metric] / theirs[metric], "1"))
    return rows


def _mean(case: str, metric: str, values: pd.Series[float], unit: str) -> Metric:
    """The geometric mean with its 95 % interval."""
    found = Estimate.geometric(values.to_list())
    return Metric(
        "bench_simulate", "simulate", case, metric, found.value, unit, "measured", found.low, found.high, found.n
    )


def verdicts(rows: Sequence[Metric], sizes: Sequence[int]) -> list[str]:
    """A line per peer and size, and the last on the bar at the sizes that were asked for: met or missed, as far as intervals tell."""
    by_name = {(row.case, row.metric): row for row in rows}
    lines = []
    for (case, metric), row in by_name.items():
        if metric == "requests_per_s_ratio":
            cpu = by_name[case, "requests_per_cpu_s_ratio"]
            lines.append(
                f"{case}: {_spread(row, '.2f')} times as fast, per CPU second {_spread(cpu, '.2f')}; "
                f"{FACTOR} times: {_standing(row, FACTOR)}, per CPU second {_standing(cpu, FACTOR)}"
            )
    ours = [by_name[f"{size} requests", "requests_per_s"] for size in sizes]
    standing = [f"{_standing(row, BAR_PER_S)} at {row.case} ({_spread(row, ',.0f')})" for row in ours]
    return [*lines, f"bar of {BAR_PER_S:,} req/s: {'; '.join(standing)}"]


def _standing(row: Metric, bar: float) -> str:
    low, high = (row.ci_low, row.ci_high) if row.n > 1 else (row.value, row.value)
    return "met" if low >= bar else "missed" if high < bar else "undecided"


def _spread(row: Metric, form: str) -> str:
    return f"{row.value:{form}}" + (f" (95 %: {row.ci_low:{form}} to {row.ci_high:{form}})" if row.n > 1 else "")


def check(_settings: object, options: object) -> None:
    """Refuse a peer that is not there."""
    assert isinstance(options, Options)
    for name in options.peers:
        peer_of(name)


EXPERIMENT = Experiment(
    "bench_simulate", reads={"simulate": ("options",)}, run=run, options=Options, check=check, timed=True
)
