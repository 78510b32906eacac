"""Streams, traces and sessions: what a run is fed."""

from pathlib import Path

import numpy as np
import pytest

from repro.errors import UserError
from repro.kvcache.pool import CacheSpec, GroupSpec, HybridPool
from repro.workload.arrivals import Poisson
from repro.workload.lengths import TruncatedLogNormal
from repro.workload.mixtures import Empirical, Mixture
from repro.workload.outputs import FixedOutput, LogNormalOutput
from repro.workload.sessions import SessionSpec, draw_sessions
from repro.workload.stream import Independent, RequestBatch
from repro.workload.traces import TraceSpec, read_trace, write_mooncake

LAW = TruncatedLogNormal(9.9, 1.0, 128, 131_072)
TRACES = Path(__file__).resolve().parents[3] / "shared" / "traces"


def whole(stream) -> RequestBatch:  # type: ignore[no-untyped-def]
    parts = list(stream)
    return RequestBatch(*(np.concatenate([part[i] for part in parts]) for i in range(3)))


def test_another_rate_leaves_every_length_as_it_is() -> None:
    slow, fast = (whole(Independent(Poisson(rate), LAW, LogNormalOutput(), 70_000, seed=5)) for rate in (1.0, 4.0))
    assert np.array_equal(slow.input_tokens, fast.input_tokens)
    assert np.array_equal(slow.output_tokens, fast.output_tokens)
    assert slow.arrival_s == pytest.approx(4 * fast.arrival_s)


def test_lengths_change_at_the_shift_and_only_then() -> None:
    plain = whole(Independent(Poisson(1.0), LAW, FixedOutput(8), 5000, seed=5))
    longer = TruncatedLogNormal(11.0, 0.5, 128, 131_072)
    moved = whole(Independent(Poisson(1.0), LAW, FixedOutput(8), 5000, 5, longer, shift_at_s=2500.0))
    before = plain.arrival_s < 2500
    assert np.array_equal(plain.arrival_s, moved.arrival_s)
    assert np.array_equal(plain.input_tokens[before][:1000], moved.input_tokens[before][:1000])
    assert moved.input_tokens[~before].mean() == pytest.approx(longer.mean_tokens, rel=0.05)


def test_log_normal_outputs_have_the_stated_mean() -> None:
    drawn = LogNormalOutput(500.0, 1.5, 100_000).sample(np.random.default_rng(0), 200_000)
    assert drawn.mean() == pytest.approx(500, rel=0.02)
    assert drawn.min() >= 1


def test_an_empirical_distribution_agrees_with_the_law_it_was_drawn_from() -> None:
    sample = Empirical(LAW.sample(np.random.default_rng(0), 200_000))
    for threshold in (5_000.0, 19_400.0, 60_000.0):
        assert float(sample.fraction_above(threshold)) == pytest.approx(float(LAW.fraction_above(threshold)), abs=0.005)
        assert float(sample.mean_above(threshold)) == pytest.approx(float(LAW.mean_above(threshold)), rel=0.01)
        assert float(sample.mean_below(threshold)) == pytest.approx(float(LAW.mean_below(threshold)), rel=0.01)
    assert np.isnan(sample.mean_above(1e9))


def test_a_mixture_weighs_its_parts_exactly() -> None:
    short = TruncatedLogNormal(7.0, 0.5, 128, 131_072)
    both = Mixture((LAW, short), (1.0, 3.0))
    assert both.mean_tokens == pytest.approx(0.25 * LAW.mean_tokens + 0.75 * short.mean_tokens)
    drawn = both.sample(np.random.default_rng(0), 400_000)
    for threshold in (1_000.0, 20_000.0):
        assert float(both.fraction_above(threshold)) == pytest.approx((drawn > threshold).mean(), abs=0.003)
        assert float(both.mean_above(threshold)) == pytest.approx(drawn[drawn > threshold].mean(), rel=0.01)
        assert float(both.expectation_below(np.sqrt, threshold)) == pytest.approx(
            np.sqrt(drawn[drawn <= threshold]).mean(), rel=0.01
        )
    assert float(both.quantile(0.5)) == pytest.approx(np.median(drawn), rel=0.02)


def test_session_prompts_grow_and_share_their_beginning() -> None:
    stream = draw_sessions(SessionSpec(0.5, families=2), 600.0, seed=1).batch
    assert stream.chains is not None
    kept: dict[int, tuple[int, ...]] = {}
    grown = 0
    for prompt, after in stream.chains:
        assert after[: len(prompt)] == prompt
        own = next((key for key in prompt if key < 0), None)
        if own is not None and own in kept:
            assert prompt[: len(kept[own])] == kept[own]
            grown += 1
        if own is not None:
            kept[own] = after
    assert grown > 200
    assert len({prompt[0] for prompt, _ in stream.chains if prompt}) == 2


def test_a_trace_survives_writing_and_reading(tmp_path: Path) -> None:
    batch = draw_sessions(SessionSpec(0.2), 300.0, seed=2).batch
    write_mooncake(tmp_path / "trace.jsonl", batch)
    back = read_trace(TraceSpec(str(tmp_path / "trace.jsonl"))).batch
    assert back.arrival_s == pytest.approx(batch.arrival_s - batch.arrival_s[0], abs=1e-3)
    assert np.array_equal(back.input_tokens, batch.input_tokens)
    assert back.chains is not None
    assert batch.chains is not None
    pairs = list(zip(back.chains, batch.chains, batch.input_tokens.tolist(), strict=True))
    assert all(read[: len(written)] == written for (read, _), (written, _), _ in pairs)
    assert all(len(read) == -(-tokens // 512) for (read, _), _, tokens in pairs)
    assert read_trace(TraceSpec(str(tmp_path / "trace.jsonl"), speed=2.0)).batch.arrival_s[-1] == pytest.approx(
        back.arrival_s[-1] / 2
    )


def test_an_azure_trace_is_read_in_seconds_from_its_first_request(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.5000000,4808,10\n2023-11-16 18:18:04.2500000,31,0\n"
    )
    batch = read_trace(TraceSpec(str(path))).batch
    assert batch.arrival_s.tolist() == [0.0, 60.75]
    assert batch.output_tokens.tolist() == [10, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"timestamp": 0}\n', "line 1: input_length is missing"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nx,1,2\n", "line 2: TIMESTAMP: 'x' is no finite number"),
    ],
)
def test_a_bad_line_is_refused_by_its_number_and_field(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "trace"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_trace(TraceSpec(str(path)))


def test_a_file_of_no_known_format_is_refused_with_where_to_get_a_good_one(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text("a,b,c\n1,2,3\n")
    with pytest.raises(UserError, match="no known format") as caught:
        read_trace(TraceSpec(str(path)))
    assert "kvcache-ai/Mooncake" in str(caught.value)


def test_a_missing_trace_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.jsonl"):
        read_trace(TraceSpec(str(tmp_path / "nowhere.jsonl")))


@pytest.mark.skipif(not TRACES.is_dir(), reason=f"public traces are not at {TRACES}")
@pytest.mark.parametrize(("name", "requests", "rate"), [("conversation", 12_031, 0.366), ("synthetic", 3_993, 0.640)])
def test_an_unlimited_attention_cache_hits_what_the_traces_are_known_for(name: str, requests: int, rate: float) -> None:
    batch = read_trace(TraceSpec(str(TRACES / f"mooncake_{name}.jsonl"))).batch
    assert batch.chains is not None
    assert len(batch.chains) == requests
    attention = HybridPool(CacheSpec((GroupSpec("mla", "block", 17_280.0),)))
    hybrid = HybridPool(CacheSpec((GroupSpec("mla", "block", 17_280.0), GroupSpec("kda", "request", 1.8e8))))
    hits = hybrid_hits = blocks = 0
    for tokens, (keys, _) in zip(batch.input_tokens.tolist(), batch.chains, strict=True):
        blocks += len(keys)
        full = keys[: (tokens - 1) // 512]
        hits += attention.match_blocks(keys)
        hybrid_hits += hybrid.match_blocks(full)
        attention.insert(keys)
        hybrid.insert(full)
    assert hits / blocks == pytest.approx(rate, abs=0.0005)
    assert (
        0.5 * hits < hybrid_hits < hits
    )  # a checkpoint at each prompt's end serves the next turn, not a shared beginning
