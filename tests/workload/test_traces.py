"""Readers of public traces: what every published format says, and what is refused by line and field."""

import gzip
import json
import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from repro.errors import UserError
from repro.kvcache.pool import CacheSpec, GroupSpec, HybridPool
from repro.workload.sessions import SessionSpec, draw_sessions
from repro.workload.stream import RequestBatch
from repro.workload.traces import TraceSpec, read_trace, write_mooncake

CASES = Path(__file__).parent / "cases"
TRACES = Path(__file__).resolve().parents[3] / "shared" / "traces"


def read(path: Path, **options: object):  # type: ignore[no-untyped-def]
    return read_trace(TraceSpec(str(path), **options), "options.trace", "options")  # type: ignore[arg-type]


# Files made after what people reported.


@pytest.mark.parametrize(
    ("name", "found", "arrival_s"),
    [
        ("01_bailian.jsonl", "bailian", [0, 10, 20]),
        ("02_slice.jsonl", "mooncake", [0, 5, 10]),
        ("03_epoch_ms.jsonl", "mooncake", [0, 5]),
        ("04_azure2024.csv", "azure", [0, 0.998837, 2.498837]),
        ("06_azure_relative_seconds.csv", "azure", [0, 5, 60]),
        ("07_azure_unsorted.csv", "azure", [0, 10]),
        ("10_one_request.jsonl", "mooncake", [0]),
        ("14_u2028.jsonl", "mooncake", [0, 5]),
        ("15_blank_lines.jsonl", "mooncake", [0, 5]),
        ("16_bom.jsonl", "mooncake", [0, 5]),
    ],
)
def test_a_reported_file_is_read_as_what_it_is(name: str, found: str, arrival_s: list[float]) -> None:
    trace = read(CASES / name)
    assert trace.format == found
    assert trace.batch.arrival_s.tolist() == arrival_s
    assert trace.span_s == arrival_s[-1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("09_azure_header_only.csv", "holds no request"),
        ("12_infinite_tokens.jsonl", "line 1: input_length: Infinity is no finite number"),
        ("17_more_keys_than_tokens.jsonl", r"line 1: hash_ids: 4 keys, but 10 tokens have 1 block\(s\) of 512"),
    ],
)
def test_a_reported_file_that_cannot_be_right_is_refused(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read(CASES / name)
    assert str(caught.value).startswith(f"options.trace: {CASES / name}")


def test_every_reported_file_is_tried_here_or_by_the_experiment() -> None:
    text = Path(__file__).read_text()
    assert [path.name for path in CASES.iterdir() if path.name not in text] == []


def test_rows_out_of_order_keep_their_own_lengths() -> None:
    assert read(CASES / "07_azure_unsorted.csv").batch.input_tokens.tolist() == [100, 300]


# Bad files of our own. Each is named by what is wrong with it.

HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
DATE = "2023-11-16 18:17:03.5"


def mooncake(**changes: object) -> str:
    row = {"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]} | changes
    return json.dumps({name: value for name, value in row.items() if value is not ...}) + "\n"


BAD: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "holds no request"),
    "blank": ("\n \n\r\n", "holds no request"),
    "utf-16": (mooncake().encode("utf-16"), "cannot be read"),
    "gzip cut off": (gzip.compress(mooncake().encode(), mtime=0)[:-9], "cannot be read"),
    "line cut off": (mooncake() + mooncake()[:30], "line 2: is no JSON object"),
    "a list": (mooncake() + "[1, 2]\n", "line 2: is no JSON object"),
    "brackets without end": (mooncake() + "[" * 100_000, "line 2: is no JSON object"),
    "no time": (mooncake(timestamp=...), "line 1: timestamp: missing"),
    "time not a number": (mooncake() + mooncake(timestamp=float("nan")), "line 2: timestamp: NaN is no finite number"),
    "time negative": (mooncake(timestamp=-1), "line 1: timestamp: -1 is negative"),
    "time null": (mooncake(timestamp=None), "line 1: timestamp: null is no finite number"),
    "time beyond numbers": (mooncake(timestamp="TIME").replace('"TIME"', "1e400"), "line 1: timestamp: 1E[+]400"),
    "time beyond decimals": (mooncake(timestamp="TIME").replace('"TIME"', "1e99999999999999999999"), "line 1"),
    "epoch seconds": (mooncake(timestamp=1_700_003_600), "line 1: .* in s, but is read in ms; set options.time_unit"),
    "one epoch time": (mooncake() + mooncake(timestamp=1_700_003_600_000), "line 2: arrives 19,676 days after"),
    "no prompt": (mooncake(input_length=0), "line 1: input_length: 0; accepted: 1 to 100,000,000 tokens"),
    "half a token": (mooncake(input_length=10.5), "line 1: input_length: 10.5 is no whole number"),
    "1e20 tokens": (mooncake(input_length=10**20), "line 1: input_length: 100000000000000000000; accepted"),
    "true tokens": (mooncake(input_length=True), "line 1: input_length: true is no finite number"),
    "tokens in words": (mooncake(input_length="many"), 'line 1: input_length: "many" is no finite number'),
    "tokens in other digits": (mooncake(input_length="１２"), "line 1: input_length"),
    "negative answer": (mooncake(output_length=-5), "line 1: output_length: -5 is negative"),
    "no answer's length": (mooncake(output_length=...), "line 1: output_length: missing"),
    "keys missing once": (mooncake() + mooncake(hash_ids=...), "line 2: hash_ids: null; accepted: a list"),
    "keys in words": (mooncake(hash_ids=["a"]), "line 1: hash_ids"),
    "keys of half": (mooncake(hash_ids=[1.5]), "line 1: hash_ids"),
    "another header": ("a,b,c\n1,2,3\n", "is of no known format"),
    "no header": (f"{DATE},100,5\n", "is of no known format"),
    "a column twice": (f"{HEAD.strip()},TIMESTAMP\n{DATE},1,1,{DATE}\n", "TIMESTAMP: two columns"),
    "month 13": (f"{HEAD}2023-13-16 18:17:03,100,5\n", "line 2: TIMESTAMP"),
    "date after numbers": (f"{HEAD}0.0,100,5\n{DATE},100,5\n", "line 3: TIMESTAMP: .* the time of the first request no date"),
    "number after dates": (f"{HEAD}{DATE},100,5\n0.0,100,5\n", "line 3: TIMESTAMP"),
    "zone now and then": (f"{HEAD}{DATE},100,5\n{DATE}+00:00,100,5\n", "line 3: TIMESTAMP: .* a date with a zone"),
    "too few fields": (f"{HEAD}{DATE},100\n", "line 2: has 2 fields where the first line has 3"),
    "decimal comma": (f"{HEAD}1,5,100,5\n", "line 2: has 4 fields where the first line has 3"),
    "a field empty": (f"{HEAD}{DATE},,5\n", "line 2: ContextTokens"),
    "infinite time": ("Timestamp,Request tokens,Response tokens\ninf,1,1\n", "line 2: Timestamp"),
    "epoch milliseconds": ("arrival_s,input_tokens,output_tokens\n1700003600000,1,1\n", "line 2: .* set options.time_unit"),
    "underscores": ("arrival_s,input_tokens,output_tokens\n0,1_000,1\n", "line 2: input_tokens"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_by_line_and_field(name: str, tmp_path: Path) -> None:
    content, message = BAD[name]
    path = tmp_path / "trace"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith("options.trace: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (mooncake(), {"speed": float("inf")}, "options.speed: inf"),
        (mooncake(), {"speed": 0.0}, "options.speed: 0"),
        (mooncake(), {"start_s": float("nan")}, "options.start_s: nan"),
        (mooncake(), {"duration_s": -1.0}, "options.duration_s: -1"),
        (mooncake(), {"requests": 0}, "options.requests: 0"),
        (mooncake(), {"start_s": 1.0}, "options.start_s, options.duration_s: no request"),
        (mooncake(), {"format": "azure"}, "options.format: .* holds JSON lines"),
        (mooncake(), {"columns": {"arrival": "timestamp"}}, "options.columns: has no effect"),
        (f"{HEAD}0,1,1\n", {"format": "mooncake"}, "options.format: .* holds no JSON lines"),
        (f"{HEAD}0,1,1\n", {"format": "csv"}, "has no column arrival_s, input_tokens, output_tokens"),
        (f"{HEAD}0,1,1\n", {"block_tokens": 16}, "options.block_tokens: has no effect"),
        (f"{HEAD}{DATE},1,1\n", {"time_unit": "ms"}, "options.time_unit: has no effect"),
        (f"{HEAD}0,1,1\n", {"columns": {"when": "TIMESTAMP"}}, "options.columns.when: no such column"),
        (f"{HEAD}0,1,1\n", {"columns": {"arrival": "at"}}, "has no column at"),
    ],
)
def test_an_option_that_has_no_meaning_for_the_file_is_refused_by_key(
    content: str, options: dict[str, object], message: str, tmp_path: Path
) -> None:
    (tmp_path / "trace").write_text(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / "trace", **options)


def test_a_missing_trace_is_named_with_where_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"options\.trace: .*nowhere\.jsonl does not exist") as caught:
        read(tmp_path / "nowhere.jsonl")
    assert "kvcache-ai/Mooncake" in str(caught.value)
    with pytest.raises(UserError, match="is not a file"):
        read(tmp_path)


# What editors, exporters and other parsers leave.


@pytest.mark.parametrize(
    ("content", "options", "arrival_s"),
    [
        (f"{HEAD}{DATE},7,1\n2023-11-16 18:17:04.7500000,7,1\n".replace("\n", "\r\n"), {}, [0, 1.25]),
        (f"\ufeff{HEAD}{DATE},7,1\n\n,,\n", {}, [0]),
        (HEAD + "2024-05-12T02:00:00Z,7,1\n2024-05-12 02:30:00.000000001UTC,7,1\n", {}, [0, 1800.000000001]),
        (HEAD + "2024-05-12 02:00:00+02:00,7,1\n2024-05-12 00:00:01+00:00,7,1\n", {}, [0, 1]),
        ('note,output_tokens,arrival_s,input_tokens\n"two\nlines, a comma",1,5,7\nx,1,6.5,7\n', {}, [0, 1.5]),
        ("Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,GPT-4,7,18,25,API\n", {}, [0]),
        ("at,in,out\n2,7,1\n7,7,1\n", {"columns": {"arrival": "at", "input": "in", "output": "out"}}, [0, 5]),
        ("at,input_tokens,output_tokens\n0,7,1\n2000,7,1\n", {"columns": {"arrival": "at"}, "time_unit": "ms"}, [0, 2]),
        (mooncake(timestamp="0", input_length=7.0, hash_ids=[1]), {}, [0]),
        (mooncake(input_length=7, hash_ids=...), {}, [0]),
        (mooncake(timestamp=1_700_000_000, input_length=7, hash_ids=[1]), {"time_unit": "s"}, [0]),
        (gzip.compress(f"{HEAD}0,7,1\n1,7,1\n".encode(), mtime=0), {}, [0, 1]),
    ],
)  # fmt: skip
def test_what_exporters_leave_is_taken(
    content: str | bytes, options: dict[str, object], arrival_s: list[float], tmp_path: Path
) -> None:
    path = tmp_path / "trace"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    batch = read(path, **options).batch
    assert batch.arrival_s.tolist() == arrival_s
    assert set(batch.input_tokens.tolist()) == {7}


def test_keys_of_16_tokens_tell_bailian_from_mooncake_without_its_conversations(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(
        mooncake(input_length=65, hash_ids=[1, 2, 3, 4, 5]) + mooncake(timestamp=10, input_length=16, hash_ids=[1])
    )
    trace = read(path)
    assert (trace.format, trace.block_tokens, trace.span_s) == ("bailian", 16, 10.0)
    as_told = read(path, format="mooncake", time_unit="ms", block_tokens=13)
    assert (as_told.format, as_told.block_tokens, as_told.span_s) == ("mooncake", 13, 0.01)


def test_an_answer_that_broke_off_counts_as_one_token(tmp_path: Path) -> None:
    (tmp_path / "azure.csv").write_text(f"{HEAD}{DATE},31,0\n")
    assert read(tmp_path / "azure.csv").batch.output_tokens.tolist() == [1]


def test_a_window_begins_at_its_own_first_arrival_and_speed_shortens_it(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(HEAD + "".join(f"{at},{1 + at},1\n" for at in range(100, 200, 10)))
    whole = read(path).batch
    window = read(path, start_s=15.0, duration_s=40.0, speed=2.0).batch
    assert whole.arrival_s.tolist() == list(range(0, 100, 10))
    assert window.arrival_s.tolist() == [0, 5, 10, 15]
    assert window.input_tokens.tolist() == [121, 131, 141, 151]
    assert read(path, start_s=15.0, requests=2).batch.input_tokens.tolist() == [121, 131]


# Properties of every reader.

Requests = list[tuple[int, int, int]]
requests = st.lists(
    st.tuples(st.integers(0, 10**8), st.integers(1, 200_000), st.integers(0, 5000)),
    min_size=1, max_size=20, unique_by=lambda request: request[0],
)  # fmt: skip


def _date(ms: int) -> datetime:
    return datetime(2023, 11, 16, tzinfo=UTC) + timedelta(milliseconds=ms)


def _azure_2024(ms: int) -> str:
    return _date(ms).isoformat(sep=" ")  # without a fraction where there is none


def _bailian(ms: int, input_tokens: int, output_tokens: int) -> str:
    keys = list(range(-(-input_tokens // 16)))
    values = {"timestamp": ms / 1000, "input_length": input_tokens, "output_length": output_tokens, "hash_ids": keys}
    return json.dumps({"chat_id": 1, "parent_chat_id": -1, **values, "type": "text", "turn": 1})


#: Format → its first line, if it has one, and a line for a request at so many milliseconds.
WRITERS: dict[str, tuple[str, Callable[[int, int, int], str]]] = {
    "mooncake": ("", lambda ms, i, o: mooncake(timestamp=ms, input_length=i, output_length=o, hash_ids=list(range(-(-i // 512)))).strip()),
    "bailian": ("", _bailian),
    "azure 2023": (HEAD, lambda ms, i, o: f"{_date(ms).replace(tzinfo=None):%Y-%m-%d %H:%M:%S.%f}0,{i},{o}"),
    "azure 2024": (HEAD, lambda ms, i, o: f"{_azure_2024(ms)},{i},{o}"),
    "burstgpt": (
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n",
        lambda ms, i, o: f"{ms / 1000},ChatGPT,{i},{o},{i + o},Conversation log",
    ),
    "csv": ("arrival_s,input_tokens,output_tokens\n", lambda ms, i, o: f"{ms / 1000},{i},{o}"),
}  # fmt: skip


def written(path: Path, name: str, rows: Requests, shift_ms: int = 0, packed: bool = False) -> Path:
    head, line = WRITERS[name]
    text = head + "".join(line(ms + shift_ms, i, o) + "\n" for ms, i, o in rows)
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    return path


def same(one: RequestBatch, other: RequestBatch) -> bool:
    return one.chains == other.chains and all(np.array_equal(a, b) for a, b in zip(one[:3], other[:3], strict=True))


each_reader = pytest.mark.parametrize("name", WRITERS)
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@each_reader
@quick
@given(rows=requests, packed=st.booleans())
def test_what_was_written_is_read(name: str, tmp_path: Path, rows: Requests, packed: bool) -> None:
    trace = read(written(tmp_path / "trace", name, rows, packed=packed))
    rows = sorted(rows)
    assert trace.format == name.split()[0]
    assert trace.batch.arrival_s.tolist() == [(ms - rows[0][0]) / 1000 for ms, _, _ in rows]
    assert trace.batch.input_tokens.tolist() == [i for _, i, _ in rows]
    assert trace.batch.output_tokens.tolist() == [max(o, 1) for _, _, o in rows]
    if trace.block_tokens:
        assert trace.batch.chains is not None
        assert [len(keys) for keys, _ in trace.batch.chains] == [-(-i // trace.block_tokens) for _, i, _ in rows]


@each_reader
@quick
@given(rows=requests, order=st.randoms(use_true_random=False))
def test_shuffled_lines_are_the_same_trace(name: str, tmp_path: Path, rows: Requests, order: random.Random) -> None:
    other = list(rows)
    order.shuffle(other)
    assert same(read(written(tmp_path / "one", name, rows)).batch, read(written(tmp_path / "other", name, other)).batch)


@each_reader
@quick
@given(rows=requests, shift_ms=st.sampled_from([1, 3_600_000, 86_400_001, 1_700_003_600_000]))
def test_a_trace_shifted_in_time_is_the_same(name: str, tmp_path: Path, rows: Requests, shift_ms: int) -> None:
    later = written(tmp_path / "other", name, rows, shift_ms)
    assert same(read(written(tmp_path / "one", name, rows)).batch, read(later).batch)


# Writing, and the public traces themselves.


def test_sessions_survive_writing_and_reading_and_each_block_has_a_key(tmp_path: Path) -> None:
    batch = draw_sessions(SessionSpec(0.2), 300.0, seed=2).batch
    write_mooncake(tmp_path / "trace.jsonl", batch)
    rows = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    assert all(len(row["hash_ids"]) == -(-row["input_length"] // 512) for row in rows)
    trace = read(tmp_path / "trace.jsonl")
    back = trace.batch
    assert trace.format == "mooncake"
    assert back.arrival_s == pytest.approx(batch.arrival_s - batch.arrival_s[0], abs=1e-3)
    assert np.array_equal(back.input_tokens, batch.input_tokens)
    assert back.chains is not None
    assert batch.chains is not None
    for (keys, _), (own, _) in zip(back.chains, batch.chains, strict=True):
        assert keys[: len(own)] == own
    filled = [keys[len(own) :] for (keys, _), (own, _) in zip(back.chains, batch.chains, strict=True)]
    ours = {key for own, _ in batch.chains for key in own}
    fresh = [key for keys in filled for key in keys]
    assert len(set(fresh)) == len(fresh) > 0
    assert not ours & set(fresh)


@pytest.mark.skipif(not TRACES.is_dir(), reason=f"public traces are not at {TRACES}")
@pytest.mark.parametrize(("name", "requests", "rate"), [("conversation", 12_031, 0.366), ("synthetic", 3_993, 0.640)])
def test_an_unlimited_attention_cache_hits_what_the_traces_are_known_for(name: str, requests: int, rate: float) -> None:
    batch = read(TRACES / f"mooncake_{name}.jsonl").batch
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


@pytest.mark.skipif(not TRACES.is_dir(), reason=f"public traces are not at {TRACES}")
@pytest.mark.parametrize(("name", "requests", "span_s"), [("code", 8_819, 3435.948056), ("conv", 19_366, 3501.721937)])
def test_the_azure_traces_have_the_span_that_their_dates_say(name: str, requests: int, span_s: float) -> None:
    trace = read(TRACES / f"azure_llm_{name}_2023.csv")
    assert (len(trace.batch.arrival_s), trace.span_s) == (requests, span_s)


@pytest.mark.skipif(not TRACES.is_dir(), reason=f"public traces are not at {TRACES}")
def test_the_end_of_a_trace_has_the_rate_of_its_own_window(tmp_path: Path) -> None:
    lines = (TRACES / "mooncake_conversation.jsonl").read_text().splitlines()[-1000:]
    (tmp_path / "end.jsonl").write_text("\n".join(lines))
    assert 1000 / read(tmp_path / "end.jsonl").span_s == pytest.approx(3.66, abs=0.05)
