"""The paper's two profiles reproduce what they were made from, and profiles survive a file."""

from pathlib import Path

import numpy as np
import pytest

from repro.errors import UserError
from repro.paper import tables
from repro.profiles.base import DecodeStep, KVSize, PhaseProfile, PrefillCurve
from repro.profiles.presets import MEBIBYTE, PaperInputs, load_profile, save_profile

MEASURED = PhaseProfile(
    "mine", "kimi_linear", "CPU", 1,
    PrefillCurve("monotone_cubic", (128.0, 1024.0, 4096.0), (0.1, 0.5, 2.5)),
    KVSize(1e6, 128.0, 32, 64.0), DecodeStep(0.02, 0.001, 1e-7, 4),
    notes="3 repeats", provenance={"machine": "a laptop"},
)  # fmt: skip


@pytest.mark.parametrize("length", tables.LENGTHS)
def test_h200_prefills_and_stores_what_table_5_says(length: str) -> None:
    profile, row, tokens = load_profile("paper_1t_h200"), tables.TABLE_5[length], tables.TOKENS[length]
    assert profile.prefill_s(tokens) == pytest.approx(row.prefill.value)
    assert profile.kv_bytes(tokens) / MEBIBYTE == pytest.approx(row.kv_size.value, abs=0.07)
    # Φ_kv follows from both, so it holds to the rounding of the latency.
    slack = row.prefill.precision / row.prefill.value + row.kv_throughput.precision / row.kv_throughput.value
    assert profile.kv_throughput_bps(tokens) / 1e9 == pytest.approx(row.kv_throughput.value, rel=slack)


def test_both_profiles_emit_the_same_bytes() -> None:
    lengths = np.array([128, 10_000, 131_072])
    assert np.array_equal(
        load_profile("paper_1t_h200").kv_bytes(lengths), load_profile("paper_1t_h20").kv_bytes(lengths)
    )


def test_h20_is_slower_than_h200_at_every_length() -> None:
    lengths = np.geomspace(128, 131_072, 200)
    assert np.all(load_profile("paper_1t_h20").prefill_s(lengths) > load_profile("paper_1t_h200").prefill_s(lengths))


def test_the_decode_step_meets_the_slo_with_the_largest_whole_batch() -> None:
    profile = load_profile("paper_1t_h20")
    assert profile.batch_max == 20
    assert profile.decode_step_s(20) == pytest.approx(0.025, rel=2e-3)


def test_a_draw_stays_within_the_rounding_of_every_input_and_repeats_with_its_seed() -> None:
    exact = PaperInputs.draw()
    one, again = (PaperInputs.draw(np.random.default_rng(3)) for _ in range(2))
    assert one == again
    assert one != exact
    for length, drawn in zip(tables.LENGTHS, one.prefill_s, strict=True):
        low, high = tables.TABLE_5[length].prefill.interval
        assert low <= drawn <= high


def test_a_profile_read_from_its_file_is_the_profile_that_was_saved(tmp_path: Path) -> None:
    save_profile(MEASURED, tmp_path / "profiles" / "mine.yaml")
    assert load_profile("mine", tmp_path / "profiles") == MEASURED
    assert load_profile(str(tmp_path / "profiles" / "mine.yaml")) == MEASURED
    assert [path.name for path in (tmp_path / "profiles").iterdir()] == ["mine.yaml"]


@pytest.mark.parametrize("name", ["paper_1t_h200", "paper_1t_h20"])
def test_a_preset_survives_a_file_too(name: str, tmp_path: Path) -> None:
    save_profile(load_profile(name), tmp_path / "copy.yaml")
    assert load_profile("copy", tmp_path) == load_profile(name)


def test_a_missing_profile_names_the_ones_that_exist(tmp_path: Path) -> None:
    save_profile(MEASURED, tmp_path / "mine.yaml")
    with pytest.raises(UserError, match=r"profile: 'nope'.*paper_1t_h200, paper_1t_h20, mine"):
        load_profile("nope", tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1, 2]", "holds no profile"),
        ("a: [", "cannot be read"),
        ("name: x\n", "model: no value given"),
        ("bogus: 1\n", "bogus: no such key"),
    ],
)
def test_a_broken_file_is_named_with_what_is_wrong(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_profile("bad", tmp_path)
    assert "bad.yaml" in str(caught.value)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
