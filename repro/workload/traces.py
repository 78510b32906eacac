"""Public request traces from files: Mooncake, Qwen-Bailian, BurstGPT, Azure 2023 and 2024, and plain CSV, gzipped or not.

The kit ships no trace; a path is given by whoever has one. A format is recognised by its content, or named. Times are rebased to the first
arrival and sorted, so a piece cut out of a trace replays like the whole. They are decimal numbers until then: seconds since 1970 and their
fractions have more digits than a float. Every value is looked at before anything runs: a trace with one that is no number, negative,
fractional or absurd is refused by line and field.

Where traces are published: kvcache-ai/Mooncake (FAST25-release/traces), alibaba-edu/qwen-bailian-usagetraces-anon, HPMLL/BurstGPT,
Azure/AzurePublicDataset (data).
"""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import math
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import numpy as np

from repro.errors import UserError
from repro.workload.stream import Chains, Recorded, RequestBatch

#: Tokens of one key in `hash_ids`, by format.
BLOCK_TOKENS = {"mooncake": 512, "bailian": 16}

_SECONDS = {"s": Decimal(1), "ms": Decimal("1e-3"), "us": Decimal("1e-6"), "ns": Decimal("1e-9")}
#: More than any model reads or writes at once, and longer than any trace: what lies beyond was read in the wrong unit.
_MOST_TOKENS, _LONGEST_S, _MOST_TIME = 100_000_000, 10 * 366 * 86_400, Decimal("1e20")
#: Numbers that are seconds, milliseconds, … since 1970 in every year from 2001 to 2096, and nothing else in a trace that is shorter.
_EPOCH = {unit: (Decimal("1e9") / seconds, Decimal("4e9") / seconds) for unit, seconds in _SECONDS.items()}

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,4})?", re.ASCII)
_DATE = re.compile(
    r"(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d(?::\d\d)?)(?:\.(\d+))? ?(Z|UTC|[+-]\d\d:?\d\d)?", re.ASCII
)  # fmt: skip

_WHERE = (
    "accepted: JSON lines of Mooncake (kvcache-ai/Mooncake) or Qwen-Bailian (timestamp, input_length, output_length, hash_ids), CSV of "
    "Azure (TIMESTAMP, ContextTokens, GeneratedTokens) or BurstGPT (Timestamp, Request tokens, Response tokens), or CSV with the columns "
    "arrival_s, input_tokens, output_tokens or those named in columns"
)


@dataclass(frozen=True)
class TraceSpec:
    """A trace and how to read it; what is null or auto follows from the content.

    `speed` 2 replays at twice the rate. The window is cut after sorting: from `start_s` after the first arrival, for `duration_s`, at
    most `requests` of them, all in the trace's own time. `time_unit` is that of numbers (dates need none), `block_tokens` what one prefix
    key stands for. `columns` maps arrival, input and output to the names that a CSV gives them.
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
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{key}.{name}: {value}; accepted: a finite number above 0")
        if not 0 <= self.start_s < math.inf:
            raise UserError(f"{key}.start_s: {self.start_s}; accepted: 0 seconds or more")
        unknown = sorted(set(self.columns) - {"arrival", "input", "output"})
        if unknown:
            raise UserError(f"{key}.columns.{unknown[0]}: no such column; accepted: arrival, input, output")
        if self.columns and self.format not in ("auto", "csv"):
            raise UserError(f"{key}.columns: has no effect with {key}.format={self.format}; accepted: csv")


@dataclass(frozen=True)
class Trace(Recorded):
    """Requests of a trace, the format that it was in, and how many tokens one of its prefix keys stands for, if it has any."""

    format: str = ""
    block_tokens: int | None = None

    @property
    def span_s(self) -> float:
        """From the first arrival, which is at 0, to the last."""
        return float(self.batch.arrival_s[-1])

    @property
    def end_s(self) -> float:
        """Just after the last arrival, so that a window up to here holds all requests."""
        return math.nextafter(self.span_s, math.inf)


class _Row(NamedTuple):
    """One request as it was read, with the line that it stands on; `at` is in the trace's own unit, or a date's seconds since 1970."""

    line: int
    at: Decimal
    input_tokens: int
    output_tokens: int
    keys: tuple[int, ...] | None = None


class _Read(NamedTuple):
    """What a file was found to be, its rows, and the seconds of its unit of time."""

    format: str
    rows: list[_Row]
    unit_s: Decimal


@dataclass(frozen=True)
class _File:
    """The file under `key`, read with the options below `node`, for messages that say where something is wrong."""

    key: str
    node: str
    path: Path

    def refuse(self, why: str, line: int | None = None) -> NoReturn:
        """Raise UserError with the file, and the line if there is one; else with the formats that are accepted."""
        if line is None:
            raise UserError(f"{self.key}: {self.path} {why}; {_WHERE}")
        raise UserError(f"{self.key}: {self.path}, line {line}: {why}")

    def without_effect(self, spec: TraceSpec, names: Sequence[str], because: str) -> None:
        """Refuse options that were set and that this file has no use for."""
        for name in names:
            if getattr(spec, name) not in (None, "auto", {}):
                raise UserError(f"{self.node}.{name}: has no effect: {self.path} {because}")


def read_trace(spec: TraceSpec, key: str = "workload.trace.path", node: str = "workload.trace") -> Trace:
    """The requests of a trace's window, from time 0 on.

    Args:
        spec: the file and how to read it.
        key: the configuration's key of the file, for messages.
        node: the node of the other keys.

    Raises:
        UserError: for a file that is missing, of no known format, or has a bad line, naming the line and the field.
    """
    spec.check(node)
    file = _File(key, node, Path(spec.path))
    text = _text(file)
    read = _json_rows(text, spec, file) if text.lstrip().startswith("{") else _csv_rows(text, spec, file)
    if not read.rows:
        file.refuse("holds no request")
    with_keys = read.rows[0].keys is not None
    if not with_keys:
        file.without_effect(spec, ("block_tokens",), "has no prefix keys")
    block_tokens = (spec.block_tokens or BLOCK_TOKENS[read.format]) if with_keys else None
    for row in read.rows:
        blocks = -(-row.input_tokens // block_tokens) if block_tokens else 0
        if len(row.keys or ()) > blocks:
            file.refuse(
                f"hash_ids: {len(row.keys or ())} keys, but {row.input_tokens} tokens have {blocks} block(s) of {block_tokens}",
                row.line,
            )
    return Trace(_window(read, spec, file), read.format, block_tokens)


def _text(file: _File) -> str:
    """The file's text, without a byte order mark, with line feeds alone at the ends of lines."""
    if not file.path.is_file():
        file.refuse("is not a file" if file.path.exists() else "does not exist")
    try:
        data = file.path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        file.refuse(f"cannot be read ({error})")


def _json_rows(text: str, spec: TraceSpec, file: _File) -> _Read:
    """Mooncake's fields; Qwen-Bailian has the same and names conversations, with seconds and smaller blocks."""
    if spec.format not in ("auto", *BLOCK_TOKENS):
        raise UserError(f"{file.node}.format: {file.path} holds JSON lines, not {spec.format}")
    file.without_effect(spec, ("columns",), "holds JSON lines")
    parsed: list[tuple[int, dict[str, Any]]] = []
    for number, line in enumerate(text.split("\n"), 1):  # only line feeds: a text may hold other separators, as U+2028
        if not line.strip():
            continue
        try:
            value = json.loads(line, parse_float=Decimal, parse_constant=Decimal)
        except (ValueError, ArithmeticError, RecursionError) as error:
            file.refuse(f"is no JSON object ({error})", number)
        if not isinstance(value, dict):
            file.refuse("is no JSON object", number)
        parsed.append((number, value))
    found = spec.format if spec.format != "auto" else "bailian" if _is_bailian(parsed) else "mooncake"
    with_keys = any("hash_ids" in value for _, value in parsed)
    rows = [
        _Row(
            number,
            _number(value, "timestamp", number, file),
            _tokens(value, "input_length", number, file, least=1),
            _tokens(value, "output_length", number, file),
            _keys(value, number, file) if with_keys else None,
        )
        for number, value in parsed
    ]
    usual = "s" if found == "bailian" else "ms"
    return _Read(found, rows, _unit_s(rows, usual, "timestamp", spec, file))


def _is_bailian(parsed: list[tuple[int, dict[str, Any]]]) -> bool:
    """Conversations have ids there; without them the number of keys tells the size of a block."""

    def fits(block: int) -> bool:
        for _, value in parsed[:100]:
            tokens, keys = value.get("input_length"), value.get("hash_ids")
            if not isinstance(tokens, int) or not isinstance(keys, list) or len(keys) != -(-tokens // block):
                return False
        return True

    return "chat_id" in parsed[0][1] or (fits(BLOCK_TOKENS["bailian"]) and not fits(BLOCK_TOKENS["mooncake"]))


def _keys(value: Mapping[str, Any], line: int, file: _File) -> tuple[int, ...]:
    keys = value.get("hash_ids")
    if not isinstance(keys, list) or any(type(key) is not int for key in keys):
        file.refuse(f"hash_ids: {_shown(keys)}; accepted: a list of whole numbers", line)
    return tuple(keys)


#: Format → its columns of arrival, input and output.
_COLUMNS = {
    "azure": ("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
    "burstgpt": ("Timestamp", "Request tokens", "Response tokens"),
    "csv": ("arrival_s", "input_tokens", "output_tokens"),
}


def _csv_rows(text: str, spec: TraceSpec, file: _File) -> _Read:
    """A header and rows; columns may stand in any order, beside others. Times are dates or numbers, the same in all rows."""
    records = _records(text, file)
    _, header = next(records, (1, []))
    if not header:
        file.refuse("holds no request")
    found, columns = _csv_format(header, spec, file)
    at, reads, writes = columns
    rows: list[_Row] = []
    zones: set[str] = set()
    for number, cells in records:
        if len(cells) != len(header):
            file.refuse(f"has {len(cells)} fields where the first line has {len(header)}", number)
        value = dict(zip(header, cells, strict=True))
        kind, seconds = _date(value[at])
        if zones and kind not in zones:
            file.refuse(f"{at}: {_shown(value[at])} is {kind}, the time of the first request {zones.pop()}", number)
        zones.add(kind)
        when = _number(value, at, number, file) if seconds is None else seconds
        answer = _tokens(value, writes, number, file)
        rows.append(_Row(number, when, _tokens(value, reads, number, file, least=1), answer))
    if zones - {"no date"}:
        file.without_effect(spec, ("time_unit",), "has dates")
        return _Read(found, rows, Decimal(1))
    return _Read(found, rows, _unit_s(rows, "s", at, spec, file))


def _records(text: str, file: _File) -> Iterator[tuple[int, list[str]]]:
    """Lines that are not blank, split into fields, with their numbers; a quoted field may hold line feeds."""
    reader = csv.reader(f"{line}\n" for line in text.split("\n"))
    while True:
        try:
            cells = [cell.strip() for cell in next(reader)]
        except StopIteration:
            return
        except csv.Error as error:
            file.refuse(f"is no CSV ({error})", reader.line_num)
        if any(cells):
            yield reader.line_num, cells


def _csv_format(header: list[str], spec: TraceSpec, file: _File) -> tuple[str, tuple[str, str, str]]:
    """The format whose columns the header has, and their names."""
    arrival, reads, writes = (
        spec.columns.get(name, usual)
        for name, usual in zip(("arrival", "input", "output"), _COLUMNS["csv"], strict=True)
    )
    known = _COLUMNS | {"csv": (arrival, reads, writes)}
    if spec.format in BLOCK_TOKENS:
        raise UserError(f"{file.node}.format: {file.path} holds no JSON lines, as {spec.format} does")
    candidates = [spec.format] if spec.format != "auto" else ["csv"] if spec.columns else list(known)
    found = next((name for name in candidates if set(known[name]) <= set(header)), None)
    if found is None:
        lacking = [name for name in known[candidates[0]] if name not in header]
        why = f"has no column {', '.join(lacking)}" if len(candidates) == 1 else "is of no known format"
        file.refuse(f"{why}; its first line is {_shown(','.join(header))}")
    twice = [name for name in known[found] if header.count(name) > 1]
    if twice:
        file.refuse(f"{twice[0]}: two columns have this name", 1)
    return found, known[found]


def _date(text: str) -> tuple[str, Decimal | None]:
    """Seconds since 1970 of a date to all digits, and which kind of time it is; a date without a zone counts as UTC."""
    parts = _DATE.fullmatch(text)
    if parts is None:
        return "no date", None
    day, time, fraction, zone = parts.groups()
    try:
        whole = datetime.fromisoformat(f"{day}T{time}{'Z' if zone == 'UTC' else zone or ''}")
    except ValueError:
        return "no date", None
    since = whole.replace(tzinfo=whole.tzinfo or UTC) - datetime(1970, 1, 1, tzinfo=UTC)
    seconds = Decimal(86_400 * since.days + since.seconds)
    return "a date with a zone" if zone else "a date without a zone", seconds + Decimal(f"0.{fraction or 0}")


def _unit_s(rows: list[_Row], usual: str, name: str, spec: TraceSpec, file: _File) -> Decimal:
    """Seconds of the trace's unit; without an explicit one, numbers that are seconds since 1970 in another are refused."""
    if spec.time_unit != "auto":
        return _SECONDS[spec.time_unit]
    for row in rows:
        for unit, (low, high) in _EPOCH.items():
            if unit != usual and low <= row.at <= high:
                file.refuse(
                    f"{name}: {row.at} would be a time since 1970 in {unit}, but is read in {usual}; set {file.node}.time_unit",
                    row.line,
                )
    return _SECONDS[usual]


def _number(value: Mapping[str, Any], name: str, line: int, file: _File) -> Decimal:
    if name not in value:
        file.refuse(f"{name}: missing", line)
    found = value[name]
    number = Decimal("NaN")
    if type(found) in (int, Decimal) or (isinstance(found, str) and _NUMBER.fullmatch(found)):
        number = Decimal(found)
    if not number.is_finite():
        file.refuse(f"{name}: {_shown(found)} is no finite number", line)
    if not 0 <= number <= _MOST_TIME:
        file.refuse(f"{name}: {_shown(found)} is {'negative' if number < 0 else 'no number that can be meant'}", line)
    return number


def _tokens(value: Mapping[str, Any], name: str, line: int, file: _File, least: int = 0) -> int:
    """A count of tokens. An answer of none is one that broke off; its request is prefilled all the same, so it counts as 1 later."""
    plain = value.get(name)
    if isinstance(plain, str) and len(plain) < 9 and plain.isascii() and plain.isdecimal():
        plain = int(plain)
    if (
        type(plain) is int and least <= plain <= _MOST_TOKENS
    ):  # nearly all are plain digits, and traces have millions of lines
        return plain
    number = _number(value, name, line, file)
    if number != number.to_integral_value():
        file.refuse(f"{name}: {_shown(value[name])} is no whole number of tokens", line)
    if not least <= number <= _MOST_TOKENS:
        file.refuse(f"{name}: {_shown(value[name])}; accepted: {least} to {_MOST_TOKENS:,} tokens", line)
    return int(number)


def _shown(value: object) -> str:
    """A value of the file as it stands there, cut where it is long."""
    text = str(value) if isinstance(value, Decimal) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _window(read: _Read, spec: TraceSpec, file: _File) -> RequestBatch:
    """The rows of the window in order of arrival, from time 0 on; equal times stay in the file's order."""
    rows = sorted(read.rows, key=lambda row: row.at)
    first, last = rows[0], rows[-1]
    if (last.at - first.at) * read.unit_s > _LONGEST_S:
        days = (last.at - first.at) * read.unit_s / 86_400
        file.refuse(f"arrives {days:,.0f} days after the first request; is {file.node}.time_unit right?", last.line)
    begin = first.at + Decimal(spec.start_s) / read.unit_s
    end = Decimal("Infinity") if spec.duration_s is None else begin + Decimal(spec.duration_s) / read.unit_s
    kept = [row for row in rows if begin <= row.at < end][: spec.requests]
    if not kept:
        span = float((last.at - first.at) * read.unit_s)
        raise UserError(
            f"{file.node}.start_s, {file.node}.duration_s: no request of {file.path} lies in that window; its arrivals span {span:g} s"
        )
    chains: list[Chains] | None = None
    if kept[0].keys is not None:
        chains = [(row.keys or (), ()) for row in kept]
    return RequestBatch(
        np.array([float((row.at - kept[0].at) * read.unit_s) for row in kept]) / spec.speed,
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
        blocks = -(-tokens // BLOCK_TOKENS["mooncake"])
        named = list(keys[:blocks])
        yield {
            "timestamp": round(1000 * at),
            "input_length": tokens,
            "output_length": output,
            "hash_ids": named + [next(fresh) for _ in range(blocks - len(named))],
        }
