"""Public request traces from files: Mooncake, Qwen-Bailian, BurstGPT, Azure 2023 and 2024, and plain CSV, gzipped or not.

The kit ships no trace; a path is given by whoever has one. A format is recognised by its content, or named. Times are rebased to the first
arrival and sorted, so a piece cut out of a trace replays like the whole. Every value is looked at before anything runs: a trace with one
that is no number, negative, fractional or absurd is refused by line and field.

Where traces are published: kvcache-ai/Mooncake (FAST25-release/traces), alibaba-edu/qwen-bailian-usagetraces-anon, HPMLL/BurstGPT,
Azure/AzurePublicDataset (data).
"""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np

from repro.errors import UserError
from repro.workload.stream import Chains, Recorded, RequestBatch

MOONCAKE_BLOCK_TOKENS = 512
BAILIAN_BLOCK_TOKENS = 16

FORMATS = ("mooncake", "bailian", "burstgpt", "azure", "csv")
#: Time unit → how many make a second; dividing keeps decimal fractions exact where multiplying would not.
_PER_SECOND = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}
#: More than any model reads or writes at once, and longer than any trace: what lies beyond was read in the wrong unit.
_MOST_TOKENS, _LONGEST_S = 100_000_000, 10 * 366 * 86_400.0

_WHERE = (
    "accepted: JSON lines of Mooncake (kvcache-ai/Mooncake) or Qwen-Bailian (timestamp, input_length, output_length, hash_ids), CSV of "
    "Azure (TIMESTAMP, ContextTokens, GeneratedTokens) or BurstGPT (Timestamp, Request tokens, Response tokens), or CSV with the columns "
    "arrival_s, input_tokens, output_tokens or those named in columns"
)


@dataclass(frozen=True)
class TraceSpec:
    """A trace and how to read it; what is null or auto follows from the content.

    `speed` 2 replays at twice the rate. The window is cut after sorting: from `start_s` after the first arrival, for `duration_s`, at
    most `requests` of them. `time_unit` is that of numbers (dates need none), `block_tokens` what one prefix key stands for. `columns`
    maps arrival, input and output to the names that a CSV gives them.
    """

    path: str
    format: Literal["auto", "mooncake", "bailian", "burstgpt", "azure", "csv"] = "auto"
    speed: float = 1.0
    time_unit: Literal["auto", "s", "ms", "us", "ns"] = "auto"
    block_tokens: int | None = None
    start_s: float = 0.0
    duration_s: float | None = None
    requests: int | None = None
    columns: dict[str, str] = field(default_factory=dict)

    def check(self, key: str) -> None:
        """Refuse what cannot be meant.

        Raises:
            UserError: naming the key below `key`.
        """
        for name in ("speed", "duration_s", "requests", "block_tokens"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"{key}.{name}: {value}; accepted: above 0")
        if not self.start_s >= 0:
            raise UserError(f"{key}.start_s: {self.start_s} is negative")
        unknown = set(self.columns) - {"arrival", "input", "output"}
        if unknown:
            raise UserError(f"{key}.columns.{unknown.pop()}: no such column; accepted: arrival, input, output")
        if self.columns and self.format not in ("auto", "csv"):
            raise UserError(f"{key}.columns: has no effect with {key}.format={self.format}; accepted: csv")


@dataclass(frozen=True)
class Trace(Recorded):
    """Requests of a trace, the format that it was in, and how many tokens one of its prefix keys stands for, if it has any."""

    format: str = ""
    block_tokens: int | None = None

    @property
    def span_s(self) -> float:
        """From the first arrival to the last."""
        return float(self.batch.arrival_s[-1])


@dataclass(frozen=True)
class _Row:
    """One line as it was read: time in the trace's own unit, tokens, prefix keys."""

    line: int
    at: float  # of a date whole nanoseconds, which a float of seconds since 1970 could not tell apart
    input_tokens: int
    output_tokens: int
    keys: tuple[int, ...] | None


class _Refusal:
    """Says where in a file something is wrong."""

    def __init__(self, key: str, path: Path) -> None:
        self._where = f"{key}: {path}"

    def __call__(self, why: str, line: int | None = None) -> NoReturn:
        at = "" if line is None else f", line {line}"
        raise UserError(f"{self._where}{at}: {why}; {_WHERE}" if line is None else f"{self._where}{at}: {why}")


def read_trace(spec: TraceSpec, key: str = "workload.trace") -> Trace:
    """The requests of a trace's window, from time 0 on.

    Args:
        spec: the file and how to read it.
        key: the configuration's key of the trace, for messages.

    Raises:
        UserError: for a file that is missing, of no known format, or has a bad line, naming the line and the field.
    """
    spec.check(key)
    path = Path(spec.path)
    refuse = _Refusal(key, path)
    lines = _lines(path, refuse)
    if not lines:
        refuse("holds no request")
    json_lines = lines[0][1].lstrip().startswith("{")
    if json_lines:
        found, rows, per_second = _json_rows(lines, spec, refuse)
    else:
        found, rows, per_second = _csv_rows(lines, spec, refuse)
    if not rows:
        refuse("holds no request")
    block_tokens = spec.block_tokens
    if found in ("mooncake", "bailian") and block_tokens is None:
        block_tokens = MOONCAKE_BLOCK_TOKENS if found == "mooncake" else BAILIAN_BLOCK_TOKENS
    for row in rows:
        if row.keys is not None and block_tokens is not None and len(row.keys) > -(-row.input_tokens // block_tokens):
            refuse(
                f"hash_ids has {len(row.keys)} keys, but {row.input_tokens} tokens have "
                f"{-(-row.input_tokens // block_tokens)} blocks of {block_tokens}",
                row.line,
            )
    batch = _window(rows, per_second, spec, refuse)
    return Trace(batch, found, block_tokens if batch.chains is not None else None)


def _lines(path: Path, refuse: _Refusal) -> list[tuple[int, str]]:
    """Numbered lines that are not blank. Only line feeds end a line: a text may hold other separators, as U+2028."""
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        text = data.decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError, gzip.zlib.error) as error:  # type: ignore[attr-defined]
        refuse(f"cannot be read ({error})")
    return [(number, line) for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1) if line.strip()]


def _json_rows(lines: list[tuple[int, str]], spec: TraceSpec, refuse: _Refusal) -> tuple[str, list[_Row], float]:
    """Mooncake's fields; Qwen-Bailian has the same and names conversations, with seconds and smaller blocks."""
    parsed: list[tuple[int, dict[str, Any]]] = []
    for number, line in lines:
        try:
            value = json.loads(line)
        except ValueError as error:
            refuse(f"is no JSON object ({error})", number)
        if not isinstance(value, dict):
            refuse("is no JSON object", number)
        parsed.append((number, value))
    if spec.format not in ("auto", "mooncake", "bailian"):
        refuse(f"holds JSON lines, not {spec.format}")
    found = spec.format if spec.format != "auto" else "bailian" if _is_bailian(parsed) else "mooncake"
    with_keys = any("hash_ids" in value for _, value in parsed)
    rows = []
    for number, value in parsed:
        rows.append(
            _Row(
                number,
                _number(value, "timestamp", number, refuse),
                _tokens(value, "input_length", number, refuse, least=1),
                _tokens(value, "output_length", number, refuse),
                _keys(value, number, refuse) if with_keys else None,
            )
        )
    unit = spec.time_unit if spec.time_unit != "auto" else "s" if found == "bailian" else "ms"
    return found, rows, _PER_SECOND[unit]


def _is_bailian(parsed: list[tuple[int, dict[str, Any]]]) -> bool:
    """Conversations have ids there; without them the number of keys tells the size of a block."""
    first = parsed[0][1]
    if "chat_id" in first:
        return True

    def fits(block: int) -> bool:
        for _, value in parsed[:100]:
            tokens, keys = value.get("input_length"), value.get("hash_ids")
            if not isinstance(tokens, int) or not isinstance(keys, list) or len(keys) != -(-tokens // block):
                return False
        return True

    return fits(BAILIAN_BLOCK_TOKENS) and not fits(MOONCAKE_BLOCK_TOKENS)


def _keys(value: Mapping[str, Any], line: int, refuse: _Refusal) -> tuple[int, ...]:
    keys = value.get("hash_ids")
    if not isinstance(keys, list) or any(type(key) is not int for key in keys):
        refuse(f"hash_ids: {json.dumps(keys)[:60]}; accepted: a list of whole numbers", line)
    return tuple(keys)


#: Format → its columns of arrival, input and output.
_COLUMNS = {
    "azure": ("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
    "burstgpt": ("Timestamp", "Request tokens", "Response tokens"),
    "csv": ("arrival_s", "input_tokens", "output_tokens"),
}


def _csv_rows(lines: list[tuple[int, str]], spec: TraceSpec, refuse: _Refusal) -> tuple[str, list[_Row], float]:
    """A header and rows; columns may stand in any order, beside others."""
    header = [name.strip() for name in next(csv.reader([lines[0][1]]))]
    own = tuple(
        spec.columns.get(name, usual)
        for name, usual in zip(("arrival", "input", "output"), _COLUMNS["csv"], strict=True)
    )
    known = {**_COLUMNS, "csv": own}
    candidates = [spec.format] if spec.format != "auto" else ["csv"] if spec.columns else list(known)
    found = next((name for name in candidates if name in known and set(known[name]) <= set(header)), None)
    if found is None:
        wanted = (
            f" with the columns {', '.join(known[candidates[0]])}"
            if len(candidates) == 1 and candidates[0] in known
            else ""
        )
        refuse(f"is of no known format{wanted}; its first line is {lines[0][1][:80]!r}")
    at, reads, writes = known[found]
    rows = []
    dated = False
    for number, line in lines[1:]:
        cells = next(csv.reader([line]))
        if len(cells) < len(header):
            refuse(f"has {len(cells)} fields where the first line has {len(header)}", number)
        value = dict(zip(header, (cell.strip() for cell in cells), strict=False))
        date = _date(value[at])
        if date is None and dated:
            refuse(f"{at}: {value[at]!r} is no date, as those before it are", number)
        dated = dated or date is not None
        rows.append(
            _Row(
                number,
                date if date is not None else _number(value, at, number, refuse),
                _tokens(value, reads, number, refuse, least=1),
                _tokens(value, writes, number, refuse),
                None,
            )
        )
    unit = "ns" if dated else "s" if spec.time_unit == "auto" else spec.time_unit
    if rows and not dated and spec.time_unit == "auto" and max(row.at for row in rows) > 1e11:
        refuse(f"{at}: {rows[0].at:.17g} is no time in seconds; set time_unit to ms, us or ns", rows[0].line)
    return found, rows, _PER_SECOND[unit]


def _date(text: str) -> int | None:
    """Nanoseconds of a date, which may have a zone and up to nine digits of a second; None where it is none."""
    if not text[:4].isdigit() or "-" not in text:
        return None
    head, dot, rest = text.partition(".")
    digits = "".join(itertools.takewhile(str.isdigit, rest))
    zone = rest[len(digits) :]
    try:
        whole = datetime.fromisoformat(head + zone if dot else head)
    except ValueError:
        return None
    since = whole - datetime(1970, 1, 1, tzinfo=whole.tzinfo)
    return (since.days * 86_400 + since.seconds) * 10**9 + int(f"{digits:0<9}"[:9])


def _number(value: Mapping[str, Any], name: str, line: int, refuse: _Refusal) -> float:
    if name not in value:
        refuse(f"{name} is missing", line)
    found = value[name]
    try:
        number = float(found) if isinstance(found, str) or type(found) in (int, float) else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        refuse(f"{name}: {found!r} is no finite number", line)
    if number < 0:
        refuse(f"{name}: {found!r} is negative", line)
    return number


def _tokens(value: Mapping[str, Any], name: str, line: int, refuse: _Refusal, least: int = 0) -> int:
    """A count of tokens. An answer of none is one that broke off; the first token is counted all the same."""
    number = _number(value, name, line, refuse)
    if not number.is_integer():
        refuse(f"{name}: {value[name]!r} is no whole number of tokens", line)
    if not least <= number <= _MOST_TOKENS:
        refuse(f"{name}: {value[name]!r}; accepted: {least} to {_MOST_TOKENS:,} tokens", line)
    return int(number)


def _window(rows: list[_Row], per_second: float, spec: TraceSpec, refuse: _Refusal) -> RequestBatch:
    rows = sorted(rows, key=lambda row: row.at)
    first, last = rows[0], rows[-1]
    if (last.at - first.at) / per_second > _LONGEST_S:
        refuse(f"arrivals span {(last.at - first.at) / per_second / 86_400:,.0f} days; is time_unit right?", last.line)
    end_s = math.inf if spec.duration_s is None else spec.start_s + spec.duration_s
    kept = [row for row in rows if spec.start_s <= (row.at - first.at) / per_second < end_s][: spec.requests]
    if not kept:
        refuse(f"holds no request in its window from {spec.start_s:g} s on")
    arrival_s = np.array([row.at - kept[0].at for row in kept], np.float64) / per_second / spec.speed
    chains: list[Chains] | None = None
    if kept[0].keys is not None:
        chains = [(row.keys or (), ()) for row in kept]
    return RequestBatch(
        arrival_s,
        np.array([row.input_tokens for row in kept], np.int64),
        np.array([max(row.output_tokens, 1) for row in kept], np.int64),
        chains,
    )


def write_mooncake(path: Path, batch: RequestBatch) -> None:
    """The stream in Mooncake's format (whole milliseconds, ⌈l/512⌉ keys), for other tools and for tests.

    A block that the stream names no key for, as the last one of a prompt that does not fill it, gets a key of its own.
    """
    chains = batch.chains or [((), ())] * len(batch.arrival_s)
    fresh = itertools.count(1 + max((key for keys, _ in chains for key in keys), default=-1))
    path.write_text("".join(f"{json.dumps(row)}\n" for row in _mooncake_rows(batch, chains, fresh)), encoding="utf-8")


def _mooncake_rows(batch: RequestBatch, chains: list[Chains], fresh: Iterator[int]) -> Iterator[dict[str, Any]]:
    for at, tokens, output, (keys, _) in zip(
        batch.arrival_s.tolist(), batch.input_tokens.tolist(), batch.output_tokens.tolist(), chains, strict=True
    ):
        blocks = -(-tokens // MOONCAKE_BLOCK_TOKENS)
        named = list(keys[:blocks])
        yield {
            "timestamp": round(1000 * at),
            "input_length": tokens,
            "output_length": output,
            "hash_ids": named + [next(fresh) for _ in range(blocks - len(named))],
        }
