"""Profiles from silicon data: what is committed, how a profile is chosen from it, and that the package still gives it."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from repro.errors import UserError
from repro.models import spec
from repro.models.architectures import layout_of
from repro.profiles import silicon, silicon_source
from repro.profiles.presets import load_profile
from repro.verbs.silicon import difference


def test_every_case_has_all_its_points_and_its_memory() -> None:
    points, memory = silicon.committed("points"), silicon.committed("memory")
    sizes = points.groupby([*silicon.CASE, "phase"]).size().unstack()
    assert set(sizes["prefill"]) == {len(silicon_source.LENGTHS)}
    assert set(sizes["decode"]) == {len(silicon_source.BATCHES) * len(silicon_source.CONTEXTS)}
    assert sorted(map(tuple, memory[list(silicon.CASE)].values)) == sorted(sizes.index)
    assert (points["seconds"] > 0).all()
    assert points["table_share"].between(0, 1).all()
    assert set(points["model"]) <= {*spec.names(), *spec.names_of_today()}


def test_prefill_grows_with_the_length_in_every_case() -> None:
    prefill = silicon.committed("points").query("phase == 'prefill'")
    for _, group in prefill.groupby(list(silicon.CASE)):
        assert np.all(np.diff(group.sort_values("tokens")["seconds"]) > 0)


def test_no_prompt_beyond_the_measured_tables_passes_for_measured() -> None:
    points, memory = silicon.committed("points").query("phase == 'prefill'"), silicon.committed("memory")
    joined = points.merge(memory, on=list(silicon.CASE))
    assert (joined["beyond_tables"] == (joined["tokens"] > joined["tables_end_tokens"])).all()
    assert joined["beyond_tables"].any()
    assert "prefill of" in load_profile("silicon:kimi_k3@h200").provenance["extrapolated"]


@pytest.mark.parametrize("name", silicon.names())
def test_a_profile_is_made_of_every_model_and_system_with_points(name: str) -> None:
    profile = load_profile(name)
    model, system = name.removeprefix("silicon:").split("@")
    assert (profile.model, profile.accelerator) == (model, system.upper())
    assert (profile.prefill_source, profile.kv_source, profile.decode_source) == ("silicon", "computed", "silicon")
    for tokens in (1000, 100_000):
        assert float(profile.kv_bytes(tokens)) == layout_of(model, "full").kv_bytes(tokens)
    found = silicon.cases(model, system)
    fastest = min(case.prefill_s(32_768) for case in found)
    assert float(profile.prefill_s(32_768)) == pytest.approx(fastest)
    kept = silicon.meets(profile.decode, 40, silicon.CONTEXT_TOKENS)
    assert profile.provenance["service level"].endswith("kept" if kept else "missed even by one request")
    rooms = [
        case.memory["kv_room_bytes"]
        / silicon_source.per_gpu_bytes(layout_of(model, "full"), int(silicon.CONTEXT_TOKENS), model)
        for case in found
    ]
    assert profile.batch_max <= max(1, *rooms)


def test_a_name_may_fix_framework_placement_and_quantisation() -> None:
    profile = load_profile("silicon:kimi_k3@b200/expert_ep/sglang")
    assert profile.provenance["prefill"].startswith("sglang, expert_ep")
    assert profile.provenance["decode"].startswith("sglang, expert_ep")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("silicon:kimi_k3@h20", "silicon:kimi_k3@h200"),
        ("silicon:kimi_k3", "has no points"),
        ("silicon:nope@h200", "silicon:minimax_m2_5@h200"),
        ("silicon:kimi_k3@h200/trtllm", "has no points"),
        ("silicon:kimi_k3@a100", "no MLA op rows"),
    ],
)
def test_a_name_without_points_names_those_that_have_some(name: str, said: str) -> None:
    with pytest.raises(UserError, match=r"cluster\.pd\.profile") as caught:
        load_profile(name, key="cluster.pd.profile")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_gpus_share_of_a_request_splits_heads_and_not_the_latent() -> None:
    k3 = silicon_source.per_gpu_bytes(layout_of("kimi_k3", "full"), 1000, "kimi_k3")
    assert k3 == 24 * 576 * 2 * 1000 + layout_of("kimi_k3", "full").fixed_bytes / 8
    qwen = silicon_source.per_gpu_bytes(layout_of("qwen3_235b", "full"), 1000, "qwen3_235b")  # 4 heads on 8 GPUs
    assert qwen == layout_of("qwen3_235b", "full").kv_bytes(1000) / 4


def test_a_difference_is_named_by_its_line() -> None:
    assert difference("a\nb\n", "a\nc\n") == "line 2 is 'b', derived 'c'"
    assert difference("a\n", "a\nb\n") == "1 lines, derived 2"


@pytest.mark.slow
def test_the_package_gives_the_committed_points_again() -> None:
    if (reason := silicon_source.installed()) is not None:
        pytest.skip(reason)
    derived = silicon_source.derive(lambda line: None, ("minimax_m2_5",), ("h200",))
    for name in silicon.FILES:
        kept = silicon.committed(name)
        kept = kept[(kept["model"] == "minimax_m2_5") & (kept["system"] == "h200")].reset_index(drop=True)
        found = getattr(derived, name)
        pd.testing.assert_frame_equal(found.reset_index(drop=True), kept, check_dtype=False)
