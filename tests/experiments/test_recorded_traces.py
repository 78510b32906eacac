"""Experiments on recorded traces: rates over the trace's own window, hits in the trace's own blocks, lengths on every tier."""

import gzip
import math
from pathlib import Path

import pandas as pd
import pytest

from repro.composition import compose
from repro.errors import UserError
from repro.experiments.trace import hit_rates
from repro.kvcache.pool import CacheSpec, GroupSpec
from repro.runner import run
from repro.workload.traces import TraceSpec, read_trace

CASES = Path(__file__).parents[1] / "workload" / "cases"
HYBRID = CacheSpec((GroupSpec("mla", "block", 17_280.0), GroupSpec("kda", "request", 1.8e8)), math.inf, 16)


def metrics(folder: Path, *words: str) -> pd.DataFrame:
    lines: list[str] = []
    composed = compose([f"results={folder}", "tracking=disabled", "processes=1", *words])
    (record,) = [path.parent for path in _records(run(composed, words, lines.append), folder)]
    table = pd.read_csv(record / "metrics.csv")
    return table.set_index(["case", "metric"])["value"]


def _records(_: object, folder: Path) -> list[Path]:
    return list(folder.rglob("metrics.csv"))


def refused(*words: str) -> str:
    with pytest.raises(UserError) as caught:
        run(compose(["tracking=disabled", *words]), words, print)
    return str(caught.value)


def test_blocks_of_16_tokens_are_found_again_by_both_kinds_of_cache() -> None:
    trace = read_trace(TraceSpec(str(CASES / "01_bailian.jsonl")))
    rates = hit_rates(trace.batch, HYBRID)
    assert rates == {"attention_only": (4 + 6) / 21, "hybrid": (4 + 6) / 21}


def test_a_slice_of_a_trace_has_the_rate_of_its_own_window(tmp_path: Path) -> None:
    found = metrics(tmp_path, "experiment=trace", f"options.trace={CASES / '02_slice.jsonl'}")
    assert found[("static", "goodput")] == pytest.approx(0.3)


def test_one_request_gives_a_result_without_rates(tmp_path: Path) -> None:
    found = metrics(tmp_path, "experiment=trace", f"options.trace={CASES / '10_one_request.jsonl'}")
    assert found[("static", "ttft_mean_s")] > 0
    assert math.isnan(found[("static", "goodput")])
    assert math.isnan(found[("static", "egress_bps")])


def test_requests_of_one_instant_give_no_rates_either(tmp_path: Path) -> None:
    trace = tmp_path / "instant.csv.gz"
    trace.write_bytes(gzip.compress(b"arrival_s,input_tokens,output_tokens\n7,600,5\n7,600,5\n"))
    found = metrics(tmp_path, "experiment=trace", f"options.trace={trace}")
    assert found[("static", "completed_fraction")] == 1
    assert math.isnan(found[("static", "goodput")])


def test_the_readers_options_are_those_of_the_experiment(tmp_path: Path) -> None:
    words = ["experiment=trace", f"options.trace={CASES / '02_slice.jsonl'}", "options.speed=2", "options.requests=2"]
    assert metrics(tmp_path, *words)[("static", "goodput")] == pytest.approx(2 / 2.5)


@pytest.mark.parametrize("workload", ["experiment=table6", "experiment=simulation"])
def test_a_traces_lengths_serve_the_equations_and_the_simulator(workload: str, tmp_path: Path) -> None:
    trace = tmp_path / "long.csv"
    rows = "".join(f"{10 * i},{30_000 if i % 2 else 1_000},100\n" for i in range(20))
    trace.write_text(f"arrival_s,input_tokens,output_tokens\n{rows}")
    effort = [] if workload == "experiment=table6" else ["options.warmup_s=0"]
    found = metrics(tmp_path, workload, "workload=trace", f"workload.trace.path={trace}", *effort)
    if workload == "experiment=table6":
        assert found[("homogeneous_pd", "l_short_tokens")] == 15_500
        assert found[("naive_heterogeneous_pd", "l_long_tokens")] == 15_500
    else:
        assert found[("deployment", "goodput")] == pytest.approx(20 / 190)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["experiment=trace"], "options.trace: no file given"),
        (["experiment=trace", "options.trace=/none.jsonl"], "options.trace: /none.jsonl does not exist"),
        (["experiment=trace", f"options.trace={CASES / '12_infinite_tokens.jsonl'}"], "line 1: input_length: Infinity"),
        (
            ["experiment=trace", f"options.trace={CASES / '02_slice.jsonl'}", "options.columns.arrival=x"],
            "options.columns: has no effect",
        ),
        (
            ["experiment=trace", f"options.trace={CASES / '02_slice.jsonl'}", "policy.cache.block_tokens=16"],
            "policy.cache.block_tokens: not read by experiment=trace",
        ),
        (
            [
                "experiment=simulation", "workload=trace", f"workload.trace.path={CASES / '01_bailian.jsonl'}",
                "policy.cache.enabled=true",
            ],
            "policy.cache.block_tokens: 512, but workload=trace names blocks of 16 tokens; accepted: 16",
        ),
        (
            ["experiment=agentic", "policy.cache.block_tokens=16"],
            "policy.cache.block_tokens: 16, but options.sessions names blocks of 512",
        ),
        (["experiment=table6", "workload=trace", "workload.trace.path=/none"], "workload.trace.path: /none does not"),
        (["experiment=table6", "workload=trace"], "workload.trace.path"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_cannot_be_read_is_refused_before_anything_runs(words: list[str], message: str, tmp_path: Path) -> None:
    assert message in refused(f"results={tmp_path}", *words)
    assert not list(tmp_path.iterdir())
