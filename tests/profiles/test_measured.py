"""Measured profiles: fits recover what they were made from, lengths stop before they would crash, files come back."""

import itertools

import pytest

from repro.errors import UserError
from repro.kvcache.state import layout
from repro.models import spec
from repro.models.architectures import layout_of
from repro.models.build import build
from repro.profiles import measured
from repro.profiles.measured import ProfileSpec, Timing, count_flops, fit_decode, kv_size, measure, profile_of
from repro.profiles.presets import load_profile, save_profile


def a_timing(tokens: int, batch: int, seconds: float, peak_bytes: int = 0) -> Timing:
    return Timing(tokens, batch, seconds, seconds, seconds, 3, peak_bytes)


def test_the_decode_fit_recovers_the_step_that_made_the_timings():
    timings = tuple(
        a_timing(context, batch, 0.004 + 0.001 * batch + 2e-6 * batch * context)
        for batch, context in itertools.product((1, 2, 4, 8), (128, 1024, 4096))
    )
    step = fit_decode(timings, slo_tokens_per_s=40)
    assert step.base_s == pytest.approx(0.004)
    assert step.per_sequence_s == pytest.approx(0.001)
    assert step.per_context_token_s == pytest.approx(2e-6)
    assert step.batch_max == 2  # 4 sequences of 4,096 tokens take 40.8 ms, above the 25 ms of 40 tokens/s


@pytest.mark.parametrize("name", spec.names())
def test_a_profile_holds_the_size_of_its_layout_exactly(name):
    states = layout_of(name)
    size = kv_size(states)
    for tokens in (1, 127, 128, 129, 100_000):
        assert size(tokens) == states.kv_bytes(tokens)


def test_lengths_end_where_time_or_memory_would_run_out(monkeypatch):
    model, options = build(spec.load("qwen3_235b")), ProfileSpec()
    short, long = a_timing(128, 1, 1.0, 10**9), a_timing(256, 1, 2.0, 2 * 10**9)
    monkeypatch.setattr(measured, "_memory_limit", lambda device: 5e9)
    assert measured._too_much(model, [short, long], 512, options, left_s=1000) == ""
    assert "time: 512 tokens" in measured._too_much(model, [short, long], 512, options, left_s=20)
    monkeypatch.setattr(measured, "_memory_limit", lambda device: 3e9)
    assert "memory: 512 tokens" in measured._too_much(model, [short, long], 512, options, left_s=1000)


def test_operations_are_counted_without_weights_and_match_the_published_active_parameters():
    per_token, per_pair = count_flops(build(spec.load("mimo_v2_flash", "full"), "meta"))
    assert per_token / 2 == pytest.approx(15e9, rel=0.1)  # published: 15B activated
    assert per_pair > 0


def test_a_measured_profile_is_saved_by_name_and_read_back(tmp_path):
    options = ProfileSpec(
        first_tokens=16, last_tokens=32, chunk_tokens=16, repeats=3, batches=(1, 2), contexts=(16,), decode_steps=3
    )
    model = spec.load("qwen3_235b")
    ticks = itertools.count()
    measurement = measure(build(model), build(model, "meta"), options, lambda line: None, lambda: 0.001 * next(ticks))
    assert "sdpa_attention_forward" in measurement.kernels["prefill"]
    assert [t.tokens for t in measurement.prefill] == [16, 32]
    assert [(t.tokens, t.batch) for t in measurement.decode] == [(16, 1), (16, 2)]
    assert all(t.seconds == pytest.approx(0.001) for t in (*measurement.prefill, *measurement.decode))
    profile = profile_of("mine", "qwen3_235b", "CPU", measurement, layout(build(model, "meta")), options)
    save_profile(profile, tmp_path / "mine.yaml")
    assert load_profile("mine", tmp_path) == profile
    assert profile.kv_throughput_bps(32) == pytest.approx(8 * layout_of("qwen3_235b", "tiny").kv_bytes(32) / 0.001)


@pytest.mark.parametrize(
    ("values", "named"),
    [({"repeats": 2}, "options.repeats"), ({"last_tokens": 128}, "options.last_tokens"), ({"batches": ()}, "batches")],
)
def test_a_wrong_option_is_named(values, named):
    with pytest.raises(UserError, match=named):
        ProfileSpec(**values)


@pytest.mark.parametrize(("together", "passes", "rows"), [(True, 1, 3), (False, 3, 1)])
def test_a_batch_is_stepped_in_one_pass_or_one_after_the_other(monkeypatch, together, passes, rows):
    options = ProfileSpec(
        first_tokens=16, last_tokens=32, chunk_tokens=16, repeats=3, batches=(3,), contexts=(16,), decode_steps=4
    )
    seen, forward = [], measured.forward
    monkeypatch.setattr(
        measured, "forward", lambda model, ids, *rest: seen.append(ids.shape) or forward(model, ids, *rest)
    )
    found = measure(
        build(spec.load("qwen3_235b")),
        build(spec.load("qwen3_235b"), "meta"),
        options,
        lambda _: None,
        together=together,
    )
    warmed = 1 + options.decode_steps
    steps = [shape for shape in seen if shape == (rows, 1)]
    assert len(steps) == passes * warmed + (rows == 1), "one pass more where kernels are watched"
    assert found.decode[0].batch == 3


def test_prefill_is_timed_at_the_lengths_that_are_given_and_no_others():
    options = ProfileSpec(
        first_tokens=16, last_tokens=64, chunk_tokens=16, repeats=3, batches=(1,), contexts=(16,), decode_steps=2
    )
    bare, said = build(spec.load("qwen3_235b"), "meta"), list[str]()
    found = measure(build(spec.load("qwen3_235b")), bare, options, said.append, lengths=(17, 23, 40))
    assert [timing.tokens for timing in found.prefill] == [17, 23, 40]
    doubled = measure(build(spec.load("qwen3_235b")), bare, options, said.append)
    assert [timing.tokens for timing in doubled.prefill] == [16, 32, 64]
