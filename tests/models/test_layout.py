"""S_kv(l) from configurations: the paper's formulas, the cache classes and real caches agree."""

import pytest

from repro.errors import UserError
from repro.models import spec
from repro.models.architectures import layout_of
from repro.models.layout import StateKind, layout_from_config

GIB, MIB = 2**30, 2**20


@pytest.mark.parametrize(
    ("name", "layers", "bytes_per_token", "fixed_bytes"),
    [
        ("kimi_linear", 27, 7 * (512 + 64) * 2, 20 * (32 * 128 * 128 * 4 + 3 * (3 * 32 * 128) * 2)),
        ("mimo_v2_flash", 48, 9 * 4 * (192 + 128) * 2, 39 * 128 * 8 * (192 + 128) * 2),
        ("qwen3_5_397b", 60, 15 * 2 * 2 * 256 * 2, 45 * (64 * 128 * 128 * 4 + 3 * (2 * 16 * 128 + 64 * 128) * 2)),
        ("ring_2_5_1t", 80, 10 * (512 + 64) * 2, 70 * 64 * 128 * 128 * 4),
        ("minimax_m2_5", 62, 62 * 8 * 2 * 128 * 2, 0),
        ("qwen3_235b", 94, 94 * 4 * 2 * 128 * 2, 0),
        ("paper_1t", 57, 17_280, 42 * (64 * 128 * 128 * 4 + 3 * (3 * 64 * 128) * 2)),
    ],
)
def test_full_sizes_have_the_published_state(name, layers, bytes_per_token, fixed_bytes):
    layout = layout_of(name, "full")
    assert layout.layers == layers
    assert layout.bytes_per_token == bytes_per_token
    assert layout.fixed_bytes == fixed_bytes
    assert layout.kv_bytes(100_000) == fixed_bytes + 100_000 * bytes_per_token


def test_the_reconstructed_model_has_the_sizes_of_table_5():
    layout = layout_of("paper_1t")
    published_mib = {1024: 190.8, 8192: 308.9, 32_000: 701.3, 130_000: 2316.3}
    for tokens, mib in published_mib.items():
        assert layout.kv_bytes(tokens) / MIB == pytest.approx(mib, abs=0.07)


def test_a_window_stops_growing_and_a_recurrent_state_never_grows():
    layout = layout_of("mimo_v2_flash")
    at = [layout.by_kind(tokens)[StateKind.SLIDING_KEY] for tokens in (64, 128, 129, 4096)]
    assert at[1] == 2 * at[0]
    assert at[1] == at[2] == at[3]
    kimi = layout_of("kimi_linear")
    assert kimi.by_kind(1)[StateKind.RECURRENT] == kimi.by_kind(100_000)[StateKind.RECURRENT]


@pytest.mark.parametrize("name", spec.names())
@pytest.mark.parametrize("size", spec.SIZES)
def test_every_architecture_has_every_size_and_keeps_the_kinds_of_its_layers(name, size):
    layout, full = layout_of(name, size), layout_of(name, "full")
    assert layout.layers_by_kind().keys() == full.layers_by_kind().keys()
    assert sum(layout.by_kind(5000).values()) == layout.kv_bytes(5000)


def test_a_layer_word_is_written_out():
    assert spec.layer_types("LF*2 S") == ["linear_attention", "full_attention"] * 2 + ["sliding_attention"]
    with pytest.raises(UserError, match="LX"):
        spec.layer_types("LX*2")


def test_an_unknown_name_size_type_or_dtype_is_named():
    with pytest.raises(UserError, match=r"nope.*kimi_linear"):
        spec.load("nope")
    with pytest.raises(UserError, match=r"huge.*single_gpu"):
        spec.load("kimi_linear", "huge")
    with pytest.raises(UserError, match=r"jamba.*known are"):
        layout_from_config("jamba", {})
    with pytest.raises(UserError, match="int8"):
        spec.ModelSpec("x", "llama", dtype="int8")
