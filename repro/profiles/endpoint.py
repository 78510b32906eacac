"""Measure the phase profile of an engine that already runs, from outside: what an OpenAI-compatible server shows to a client.

T_prefill(l) is the time to the first token of a prompt of exactly l tokens with nothing else under way, less what a client waits for
outside of prefill: HTTP, the way into the engine's own process and back. That is as long for every prompt, so the smallest one shows
it: a prompt of one token waits for all of it and for one step of the engine. How long that is the engine's counters of that one request
say, or, where it has none, the steps of a longer answer. An exchange that computes nothing does not reach the engine and shows a part.
The fixed part of T_prefill (what does not grow with l) is fitted and stands beside it. A decode step is the gap between two tokens of
one stream while all streams of a batch decode. What a server may do to make such times wrong is looked for and either refused or
flagged: prompts answered from a prefix cache, tokens counted otherwise, a batch that never ran together.

Where the engine counts its own prefill, its counters are read around every single request: its times stand beside the client's of the
same requests, and none but that of the smallest one goes into the profile.

Prompts are random and new in every run: one that the server has seen before could be answered from its cache.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol, TypeVar

import numpy as np
from scipy.optimize import nnls

from repro.errors import UserError
from repro.profiles.answers import Answer, BrokenAnswerError, RefusedError
from repro.profiles.measured import Clock, ProfileSpec, Progress, Timing
from repro.record.statistics import Estimate

T = TypeVar("T")

#: What vLLM, and the kit where it serves, count of every request that they finish: the seconds between its scheduling and its first token.
ENGINE_PREFILL: Final = ("vllm:request_prefill_time_seconds", "prfaas_request_prefill_time_seconds")
#: The same from a request's arrival at its API server: HTTP's part lies outside of it.
ENGINE_TTFT: Final = ("vllm:time_to_first_token_seconds", "prfaas_ttft_seconds")
ENGINE_HITS: Final = ("vllm:prefix_cache_hits_total", "prfaas_prefix_cache_hits_total")
#: A repeated prompt that takes less than this of a new one came from a cache, and one that takes more than the second did not.
_CACHED_BELOW, _COMPUTED_ABOVE = 0.7, 0.85
#: Broken answers per timing that are asked again; one more ends the measurement.
_RETRIES: Final = 2
#: Special tokens that a server may add to a prompt by itself.
_MOST_ADDED_TOKENS: Final = 8
_MOST_OUTPUT_TOKENS: Final = 512
_NOISY: Final = 0.25
#: Repeats are added, up to so many times as many, until the interval is within this share of T_prefill or the length took that share of
#: the time: a machine that does other things as well disturbs short prompts most, which cost least.
_WITHIN, _MOST_ROUNDS, _SHARE_OF_LENGTH = 0.1, 4, 0.05
#: Tokens of the answer to the smallest prompt that show what a step takes.
_STEP_TOKENS: Final = 9
#: An engine may count a request after its answer; so often it is looked for, so far apart.
_COUNTED_LOOKS, _COUNTED_EVERY_S = 20, 0.05
#: Tokens that a server sends late are seen where they are worth this share of the time to the first.
_BURST_BEYOND = 0.25
#: Of the time that is left, at most so much goes to the next length: decode has to be measured as well.
_SHARE_OF_PREFILL: Final = 0.4


class Server(Protocol):
    """What is asked of a running engine."""

    #: The most tokens of prompt and answer together, or None where it does not say.
    limit_tokens: int | None

    def prompt(self, tokens: int, rng: np.random.Generator) -> Any:
        """A new random prompt of so many tokens."""

    def answer(self, prompt: Any, output_tokens: int) -> Answer:
        """Its answer of so many tokens. Raises BrokenAnswerError or RefusedError."""

    def together(self, prompts: Sequence[Any], output_tokens: int) -> list[Answer]:
        """The answers to prompts that are sent at once."""

    def counters(self) -> Mapping[str, float]:
        """The engine's own counters, empty where it shows none."""


@dataclass(frozen=True)
class Fixed:
    """The fit T_prefill(l) = fixed + per token · l + per pair · l², none negative."""

    fixed_s: float
    per_token_s: float
    per_pair_s: float


@dataclass(frozen=True)
class EngineTiming:
    """One length by the engine's own counters: medians, and that of T_prefill ÷ the engine's own, request by request.

    `ttft_s` is counted from the request's arrival at the engine's API server, nan where it does not count that.
    """

    tokens: int
    prefill_s: float
    ttft_s: float
    ratio: Estimate


@dataclass(frozen=True)
class EndpointMeasurement:
    """What was measured of a running engine. `prefix_cache` is on, off or unclear, `flags` are reasons to distrust the rest.

    `prefill` is T_prefill, `ttft_s` what a client waited at the same lengths, `outside` the part of that which is no prefill: the
    wait for the smallest request less `outside_by`.
    """

    prefill: tuple[Timing, ...]
    ttft_s: tuple[float, ...]
    outside: Estimate
    outside_by: str
    decode: tuple[Timing, ...]
    engine: tuple[EngineTiming, ...]
    fixed: Fixed
    prefix_cache: str
    repeated_ratio: float
    stopped: str
    flags: tuple[str, ...] = ()


class _Measuring:
    """One measurement under way: the server, what was noticed so far, and the time that is left."""

    def __init__(self, server: Server, spec: ProfileSpec, progress: Progress, clock: Clock, nonce: int) -> None:
        self.server, self.spec, self.progress, self.clock = server, spec, progress, clock
        self.rng = np.random.default_rng(nonce)
        self.flags: dict[str, None] = {}
        self.added: set[int] = set()
        self.outside_s: list[float] = []
        self.outside_by: set[str] = set()
        self.smallest_tokens = 1
        self.began_s = clock()

    def left_s(self) -> float:
        return self.spec.budget_s - (self.clock() - self.began_s)

    def asked(self, what: str, action: Callable[[], T]) -> T:
        """What a request yields; one that breaks is made again, a few times."""
        for left in reversed(range(_RETRIES + 1)):
            try:
                return action()
            except BrokenAnswerError as error:
                if not left:
                    raise UserError(f"options.endpoint: {what}: {error}, {_RETRIES + 1} times in a row") from error
                self.flag(f"answers that broke and were asked again: {error}")
        raise AssertionError

    def flag(self, text: str) -> None:
        if text not in self.flags:
            self.flags[text] = None
            self.progress(f"flagged: {text}")

    def first(self, tokens: int) -> Answer:
        """The first token of a new prompt of that length, counted as it was asked and computed in whole."""

        def ask() -> Answer:
            return self.server.answer(self.server.prompt(tokens, self.rng), 1)

        answer = self.asked(f"a prompt of {tokens} tokens", ask)
        self.judge(tokens, answer)
        return answer

    def smallest_outside_s(self) -> float:
        """What a client waits for outside of prefill: TTFT of a prompt of one token, or two where one is refused, less its prefill."""

        def ask(output_tokens: int) -> Answer:
            what = f"a prompt of {self.smallest_tokens} token(s)"
            prompt = self.server.prompt(self.smallest_tokens, self.rng)
            return self.asked(what, lambda: self.server.answer(prompt, output_tokens))

        before = self.server.counters()
        try:
            short = ask(1)
        except RefusedError as error:
            if self.smallest_tokens > 1:
                raise UserError(
                    f"options.endpoint: a prompt of {self.smallest_tokens} tokens is refused: {error}"
                ) from error
            # An engine that keeps a prompt's last token for decode, as the kit's, has nothing to prefill in one of a single token.
            self.smallest_tokens = 2
            return self.smallest_outside_s()
        own_s = _own_s(self.server, before, ENGINE_PREFILL)
        if math.isfinite(own_s):
            self.outside_by.add("the engine's own time of it")
            return short.ttft_s - own_s
        self.outside_by.add("a step of decode")
        long = ask(_STEP_TOKENS)
        steps = sum(long.token_counts) - 1
        if steps < 1:
            self.flag("an answer to one token ends at once: T_prefill lacks one step of the engine")
            return short.ttft_s
        # Whole answers: a server that sends its tokens in bursts, or all at the end, shows its steps by them only.
        return short.ttft_s - (long.token_times_s[-1] - short.token_times_s[-1]) / steps

    def judge(self, tokens: int, answer: Answer) -> None:
        """Refuse what the server counted otherwise than it was asked; flag what it did not count, or took from a cache."""
        if answer.cached_tokens > max(64, tokens // 20):
            raise UserError(
                f"options.endpoint: of a new random prompt of {tokens} tokens the server says that {answer.cached_tokens} were cached: "
                "its times are not T_prefill"
            )
        if answer.prompt_tokens is None:
            self.flag("the server does not say how many tokens a prompt has: lengths are as asked, unchecked")
            return
        added = answer.prompt_tokens - tokens
        self.added.add(added)
        if not 0 <= added <= _MOST_ADDED_TOKENS or len(self.added) > 1:
            raise UserError(
                f"options.endpoint: a prompt of {tokens} tokens is counted as {answer.prompt_tokens} by the server: another tokenizer, or "
                f"a prompt that it alters; accepted: the same number, or always the same few more, at most {_MOST_ADDED_TOKENS}"
            )
        if added:
            self.flag(f"the server adds {added} token(s) to every prompt; lengths are as it counts them")


def measure_endpoint(
    server: Server, spec: ProfileSpec, progress: Progress, nonce: int, clock: Clock = time.perf_counter
) -> EndpointMeasurement:
    """Measure both phases of what runs behind `server`. Prompts are drawn from `nonce`, which must be new in every run.

    Raises:
        UserError: where the server's answers cannot be made into a profile, saying what it did.
    """
    run = _Measuring(server, spec, progress, clock, nonce)
    prefill, ttft_s, engine, stopped = _prefill(run)
    outside = _median(run.outside_s)
    prefix_cache, ratio = _prefix_cache(run, prefill, outside.value)
    decode = tuple(_decode(run))
    if not decode:
        raise UserError(
            "options.endpoint: no decode step could be measured: " + ("; ".join(run.flags) or "budget_s is used up")
        )
    return EndpointMeasurement(
        prefill,
        ttft_s,
        outside,
        " or ".join(sorted(run.outside_by)),
        decode,
        engine,
        fit_fixed(prefill),
        prefix_cache,
        ratio,
        stopped,
        tuple(run.flags),
    )


@dataclass(frozen=True)
class _First:
    """One request for a first token: T_prefill by the client and, nan where it does not count it, by the engine."""

    prefill_s: float
    ttft_s: float
    engine_prefill_s: float
    engine_ttft_s: float


def _prefill(
    run: _Measuring,
) -> tuple[tuple[Timing, ...], tuple[float, ...], tuple[EngineTiming, ...], str]:
    spec, timings, ttfts_s, engine = run.spec, list[Timing](), list[float](), list[EngineTiming]()
    length, stopped, last_took_s = spec.first_tokens, f"last_tokens: {spec.last_tokens}", 0.0
    while length <= spec.last_tokens:
        if reason := _too_much(run, timings, length, last_took_s):
            stopped = reason
            break
        began_s = run.clock()
        try:
            run.first(length)  # warm-up: allocations, compiled kernels, captured graphs
            firsts = _firsts(run, length)
        except RefusedError as error:
            if len(timings) < 2:
                raise UserError(f"options.endpoint: a prompt of {length} tokens is refused: {error}") from error
            stopped = f"the server, which refused {length} tokens: {error}"
            break
        last_took_s = (run.clock() - began_s) * (spec.repeats + 1) / (len(firsts) + 1)
        found, counted = (
            _median([one.prefill_s for one in firsts]),
            length + max(run.added, default=0),
        )
        ttft_s = statistics.median(one.ttft_s for one in firsts)
        if found.value <= 0:
            raise UserError(
                f"options.first_tokens: a prompt of {length} tokens has its first token after {ttft_s:.4g} s, no later than one of a "
                "single token; accepted: longer prompts, more options.repeats, or a quieter server"
            )
        timings.append(Timing(counted, 1, found.value, max(found.low, 0.0), found.high, found.n, 0))
        ttfts_s.append(ttft_s)
        run.progress(
            f"prefill of {counted} tokens: {found.value:.4f} s ({counted / found.value:.0f} tokens/s) of {ttft_s:.4f} s to the first token"
        )
        if found.high - found.low > 2 * _NOISY * found.value:
            run.flag(
                f"repeats of {counted} tokens scatter: {found.low:.4g} to {found.high:.4g} s around {found.value:.4g} s"
            )
        if len(timings) > 1 and timings[-1].seconds < 0.9 * timings[-2].seconds:
            run.flag(f"{counted} tokens take less time than {timings[-2].tokens}")
        if (own := _engine_timing(counted, firsts)) is not None:
            engine.append(own)
            run.progress(f"the engine's own: {own.prefill_s:.4f} s, from outside {own.ratio.value:.2f} of it")
        length *= 2
    return tuple(timings), tuple(ttfts_s), tuple(engine), stopped


def _firsts(run: _Measuring, length: int) -> list[_First]:
    """As many first tokens as are asked for; more of them, while there is time, where they leave T_prefill uncertain."""
    firsts, began_s = list[_First](), run.clock()
    while len(firsts) < _MOST_ROUNDS * run.spec.repeats:
        firsts += [_first(run, length) for _ in range(run.spec.repeats)]
        found = _median([one.prefill_s for one in firsts])
        # An interval of equal values has no bounds.
        if not found.high - found.low > 2 * _WITHIN * found.value:
            break
        if run.clock() - began_s > _SHARE_OF_LENGTH * run.spec.budget_s:
            break
    return firsts


def _median(values: Sequence[float]) -> Estimate:
    """With its interval, which values that differ by rounding only do not have."""
    middle = statistics.median(values)
    if max(values) - min(values) <= 1e-9 * abs(middle):
        return Estimate(middle, math.nan, math.nan, len(values))
    return Estimate.of_quantile(values, 0.5)


def _first(run: _Measuring, length: int) -> _First:
    """One first token of that length, and right before it the smallest request: what disturbs one disturbs the other as often."""
    outside_s = run.smallest_outside_s()
    before = run.server.counters()
    answer = run.first(length)
    own = [_own_s(run.server, before, names) for names in (ENGINE_PREFILL, ENGINE_TTFT)]
    run.outside_s.append(outside_s)
    return _First(answer.ttft_s - outside_s, answer.ttft_s, *own)


def _own_s(server: Server, before: Mapping[str, float], names: Sequence[str]) -> float:
    """What the engine counted of the one request since `before`; nan where it counts none, or those of others as well."""
    if _counted(before, names, "_count") is None:
        return math.nan
    for look in range(_COUNTED_LOOKS):
        if look:
            time.sleep(_COUNTED_EVERY_S)
        after = server.counters()
        requests, total_s = (
            (_counted(after, names, part) or 0.0) - (_counted(before, names, part) or 0.0)
            for part in ("_count", "_sum")
        )
        if requests:
            return total_s if requests == 1 else math.nan
    return math.nan


def _engine_timing(tokens: int, firsts: Sequence[_First]) -> EngineTiming | None:
    """Medians of the requests that the engine counted; None where it counted fewer than three of them by themselves."""
    counted = [one for one in firsts if one.engine_prefill_s > 0]
    if len(counted) < 3:
        return None
    prefill_s, ttft_s = (
        statistics.median(values)
        for values in ([one.engine_prefill_s for one in counted], [one.engine_ttft_s for one in counted])
    )
    ratio = _median([one.prefill_s / one.engine_prefill_s for one in counted])
    return EngineTiming(tokens, prefill_s, ttft_s, ratio)


def _too_much(run: _Measuring, timings: list[Timing], length: int, last_took_s: float) -> str:
    """Why a prompt of `length` is not tried; empty where it is."""
    limit = run.server.limit_tokens
    if limit is not None and length + 1 > limit:
        if len(timings) < 2:
            raise UserError(f"options.first_tokens: {length} tokens are more than the {limit} that the server takes")
        return f"the server, which takes {limit} tokens"
    if len(timings) < 2:
        if run.left_s() < 0:
            raise UserError(f"options.budget_s: {run.spec.budget_s:g} s were used up before two lengths were measured")
        return ""
    growth = max(timings[-1].seconds / timings[-2].seconds, 2.0)
    expected_s = last_took_s * growth
    if expected_s > _SHARE_OF_PREFILL * run.left_s():
        return f"time: {length} tokens would take about {expected_s:.0f} s of the {max(run.left_s(), 0):.0f} s left"
    return ""


def _counted(counters: Mapping[str, float], names: Sequence[str], part: str = "") -> float | None:
    """The counter by the first of its names that the engine knows; None where it knows none."""
    return next((counters[name + part] for name in names if name + part in counters), None)


def _prefix_cache(run: _Measuring, prefill: Sequence[Timing], outside_s: float) -> tuple[str, float]:
    """Whether a prompt that the server has just seen is computed again: by its own count, by its counters, else by time."""
    # The longest prompt that the wait for it allows: the longer, the clearer.
    added = max(run.added, default=0)
    longest = max(prefill, key=lambda timing: timing.tokens)
    ratios, cached = [], 0
    before = _counted(run.server.counters(), ENGINE_HITS)
    for _ in range(min(3, run.spec.repeats)):
        ask = partial(run.server.answer, run.server.prompt(longest.tokens - added, run.rng), 1)
        # Twice again: of a hybrid, vLLM was seen to compute a prompt of 1,000 tokens twice in full, and to hit its cache the third time.
        new, second, again = (run.asked(what, ask) for what in ("a new prompt", *2 * ("a repeated prompt",)))
        cached = max(cached, second.cached_tokens, again.cached_tokens)
        ratios.append(max(again.ttft_s - outside_s, 0.0) / max(new.ttft_s - outside_s, 1e-9))
    ratio, hits = statistics.median(ratios), _counted(run.server.counters(), ENGINE_HITS)
    if cached or hits is not None:
        # The engine's word: times of a machine that does other things as well say less.
        found = "on" if cached or (hits or 0.0) > (before or 0.0) else "off"
    elif max(ratios) < _CACHED_BELOW:
        found = "on"
    else:
        found = "off" if ratio > _COMPUTED_ABOVE else "unclear"
    run.progress(
        f"prefix caching {found}: a repeated prompt of {longest.tokens} tokens takes {ratio:.2f} of a new one's time"
    )
    if found == "unclear":
        run.flag(f"a repeated prompt takes {ratio:.2f} of a new one's time: neither cached nor computed")
    return found, ratio


def _decode(run: _Measuring) -> Iterator[Timing]:
    for number, (context, batch) in enumerate(itertools.product(run.spec.contexts, run.spec.batches)):
        if run.left_s() < 0 and number:
            run.flag("decode: budget_s was used up before every batch and context was measured")
            return
        gaps = _together(run, context, batch)
        if not gaps:
            continue
        found = Estimate.of(gaps)
        run.progress(f"decode at batch {batch}, context {context}: {1e3 * found.value:.2f} ms per step")
        yield Timing(context, batch, found.value, found.low, found.high, len(gaps), 0)


def _together(run: _Measuring, context: int, batch: int) -> list[float]:
    """Seconds of single steps of so many sequences that decode at the same time; none where they never did."""
    output_tokens = run.spec.decode_steps + 2
    limit = run.server.limit_tokens
    while output_tokens <= _MOST_OUTPUT_TOKENS and (limit is None or context + output_tokens < limit):
        prompts = [run.server.prompt(context, run.rng) for _ in range(batch)]
        try:
            ask = partial(run.server.together, prompts, output_tokens)
            answers = run.asked(f"{batch} prompts of {context} tokens", ask)
        except RefusedError as error:
            run.flag(f"decode at batch {batch}, context {context} is refused: {error}")
            return []
        if any(answer.output_tokens not in (None, output_tokens) for answer in answers):
            counts = sorted({answer.output_tokens for answer in answers if answer.output_tokens is not None})
            run.flag(f"answers of {counts} tokens where {output_tokens} were asked: the server ends them by itself")
        gaps = steps_together(answers)
        if len(gaps) >= run.spec.decode_steps or (gaps and run.left_s() < 0):
            return _unless_in_bursts(run, context, answers, output_tokens, gaps)
        output_tokens *= 2
    run.flag(f"decode at batch {batch}, context {context}: its sequences did not decode together long enough; left out")
    return []


def _unless_in_bursts(
    run: _Measuring, context: int, answers: Sequence[Answer], output_tokens: int, gaps: list[float]
) -> list[float]:
    """The gaps, or, where tokens come in bursts and gaps say nothing, what a step adds to whole answers: against those of one token."""
    batch = len(answers)
    prompts = [run.server.prompt(context, run.rng) for _ in range(batch)]
    short = run.asked(f"{batch} prompts of {context} tokens", partial(run.server.together, prompts, 1))
    short_s, long_s = (statistics.mean(one.token_times_s[-1] for one in those) for those in (short, answers))
    step_s, gap_s = (long_s - short_s) / (output_tokens - 1), statistics.mean(gaps)
    is_beyond_noise = (step_s - gap_s) * (output_tokens - 1) > _BURST_BEYOND * short_s or gap_s < step_s / 10
    if gap_s >= step_s / 2 or not is_beyond_noise:
        return gaps
    run.flag(
        f"decode at batch {batch}, context {context}: tokens come in bursts, {1e3 * gap_s:.2f} ms apart where each adds "
        f"{1e3 * step_s:.2f} ms to an answer; the latter is taken"
    )
    return [step_s]


def steps_together(answers: Sequence[Answer]) -> list[float]:
    """Seconds per step of the stream that began last, between the first token of the last stream and the end of the first."""
    starts = [answer.start_s + answer.token_times_s[0] for answer in answers]
    begin, end = max(starts), min(answer.start_s + answer.token_times_s[-1] for answer in answers)
    last = answers[int(np.argmax(starts))]
    gaps, before_s = list[float](), begin
    for at_s, count in zip(last.token_times_s[1:], last.token_counts[1:], strict=True):
        now_s = last.start_s + at_s
        if now_s > end + 1e-9:
            break
        gaps += [(now_s - before_s) / count] * max(1, round(count))
        before_s = now_s
    return gaps


def fit_fixed(timings: Sequence[Timing]) -> Fixed:
    """The part of T_prefill that does not grow with the length, by least squares of the relative error, nothing negative."""
    tokens = np.array([timing.tokens for timing in timings], np.float64)
    seconds = np.array([timing.seconds for timing in timings])
    columns = [np.ones_like(tokens), tokens, tokens**2][: max(2, min(3, len(timings) - 1))]
    scale = np.array([float(column.max()) for column in columns])
    design = np.stack(columns, axis=1) / scale
    found = nnls(design / seconds[:, None], np.ones(len(timings)))[0] / scale
    return Fixed(float(found[0]), float(found[1]), float(found[2]) if len(found) > 2 else 0.0)
