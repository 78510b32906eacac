"""What `experiment=silicon` and `public_hardware` find, recomputed from the committed points: what stops being true fails here."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from repro.composition import compose
from repro.errors import UserError
from repro.experiments import public_hardware, silicon
from repro.experiments.public_hardware import Options, best, pair, profile_on
from repro.experiments.table3 import implied_prefill
from repro.models import spec
from repro.profiles.silicon import cases
from repro.scheduling.throughput import Deployment

MODELS = ("mimo_v2_flash", "qwen3_5_397b", "minimax_m2_5", "qwen3_235b")


@pytest.fixture(scope="module")
def bands() -> pd.DataFrame:
    printed = implied_prefill(spec.load(name) for name in MODELS)
    points = [
        point for model, series in printed.groupby("model", sort=False) for point in silicon._points(str(model), series)
    ]
    return silicon.bands(pd.DataFrame(points)).set_index(["model", "label"])


@pytest.fixture(scope="module")
def settings():  # type: ignore[no-untyped-def]
    return compose(["experiment=public_hardware", "policy.threshold_step_tokens=500"]).settings


def test_at_1k_the_papers_times_hold_a_third_of_a_second_that_no_kernel_explains(bands: pd.DataFrame) -> None:
    """Between 0.31 and 0.45 s in each model whose kernels were timed, five to fifteen times the kernels themselves."""
    short = bands.xs("1K", level="label")
    assert set(short.index) == set(MODELS)
    assert short["fixed_part_s"].between(0.31, 0.45).all()
    assert (short["paper_s"] / short["high_s"] > 4).all()
    default = Options().fixed_s
    assert default == pytest.approx(float(short["fixed_part_s"].median()), abs=0.03)


def test_at_32k_qwen3_235b_lies_within_the_band_that_expert_placement_makes(bands: pd.DataFrame) -> None:
    band = bands.loc[("qwen3_235b", "32K")]
    assert band["low_s"] < band["paper_s"] < band["high_s"]
    assert "placement" in band["explanation"]


def test_lengths_beyond_16k_are_extrapolated_by_the_package_and_marked(bands: pd.DataFrame) -> None:
    for label, beyond in (("1K", False), ("8K", False), ("32K", True), ("128K", True)):
        assert (bands.xs(label, level="label")["beyond_tables"] == beyond).all()


def test_kimi_k3_needs_two_nodes_where_the_papers_model_needed_one() -> None:
    """1.5 TB of weights: 8 × H200, B200 or GB200 do not hold them beside one request of 128K."""
    for system, stages in (("h200", 2), ("b200", 2), ("gb200", 2)):
        assert {case.memory["stages"] for case in cases("kimi_k3", system)} == {stages}


def test_a_dense_model_gains_nothing_since_the_link_lets_few_requests_through(settings) -> None:  # type: ignore[no-untyped-def]
    row = pair(settings, Options(), "minimax_m2_5", "b200", "h200", 0.0)
    assert row["equal_cost_gain"] < 0
    assert row["offload_fraction"] < 0.1
    assert row["egress_bps"] > 0.85 * settings.link.rate_bps
    assert row["link_binds_below_bps"] > 0.5 * settings.link.rate_bps


def test_kimi_k3_scaled_by_its_layers_is_faster_than_the_papers_model_at_1k_and_slower_at_32k() -> None:
    """The one holds a fixed part, the other wider experts and more heads: 57 layers of 93 are less than half at 1K, 1.3 times at 32K."""
    table = silicon._table_5().set_index("label")
    assert table.loc["1K", "seconds"] < 0.5 * table.loc["1K", "paper_s"]
    assert table.loc["32K", "seconds"] > 1.3 * table.loc["32K", "paper_s"]


def test_kimi_k3_on_blackwell_and_hopper_gains_as_the_paper_says_over_the_pd_sides_kind_and_loses_to_blackwell_alone(
    settings,
) -> None:  # type: ignore[no-untyped-def]
    """Over H200 alone some 15 % at equal cost, as over H20 in the paper; B200 alone serves three times as much per dollar."""
    row = pair(settings, Options(), "kimi_k3", "b200", "h200", 0.0)
    assert 0.05 < row["equal_cost_gain_pd"] < 0.25
    assert row["equal_cost_gain_prefill"] < -0.5


def test_at_public_prices_no_pair_beats_buying_one_kind_alone(settings) -> None:  # type: ignore[no-untyped-def]
    """The paper's gain rests on the price of H20's decode: none of the public accelerators is as cheap for what it does."""
    for model in ("kimi_k3", "qwen3_5_397b"):
        for prefill, decode in (("b200", "h200"), ("h100", "h200")):
            for fixed_s in (0.0, Options().fixed_s):
                assert pair(settings, Options(), model, prefill, decode, fixed_s)["equal_cost_gain"] < 0.05


def test_what_is_compared_is_what_the_equations_say(settings) -> None:  # type: ignore[no-untyped-def]
    """Gain at equal cost against the PD side's accelerator, by hand."""
    row = pair(settings, Options(), "qwen3_5_397b", "b200", "h100", 0.0)
    prices = settings.cost.usd_per_gpu_hour
    own = row["lambda_max"] / (8 * row["n_prfaas"] * prices["B200"] + 128 * prices["H100"])
    rival = row["lambda_max_homogeneous"] / (8 * (row["n_prfaas"] + 16) * prices["H100"])
    assert row["equal_cost_gain_pd"] == pytest.approx(own / rival - 1)
    assert row["equal_cost_gain"] == pytest.approx(min(row["equal_cost_gain_pd"], row["equal_cost_gain_prefill"]))


def test_the_fixed_part_is_added_at_every_length(settings) -> None:  # type: ignore[no-untyped-def]
    without, with_it = (profile_on(settings, "qwen3_5_397b", "b200", fixed) for fixed in (0.0, 0.35))
    lengths = np.array([1024, 16_384, 131_072])
    assert with_it.prefill_s(lengths) - without.prefill_s(lengths) == pytest.approx(0.35)


def test_splits_come_in_whole_pipelines(settings) -> None:  # type: ignore[no-untyped-def]
    fast, slow = (profile_on(settings, "kimi_k3", system, 0.0) for system in ("b200", "h200"))
    law = settings.workload.length_law()
    point = best(Deployment(fast, 8, slow, 16, 100e9, law, 1024), settings, 40)
    assert point.n_p % int(slow.provenance["decode stages"]) == 0
    with pytest.raises(UserError, match=r"options\.pd_gpus: kimi_k3 needs pipelines"):
        best(Deployment(fast, 8, slow, 1, 100e9, law, 1024), settings, 40)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["options.prfaas_gpus=12"], "options.prfaas_gpus: 12"),
        (["options.models=[bytes]"], "options.models: 'bytes' has no points"),
        (["options.decode=[]"], "options.decode: empty"),
        (["options.fixed_s=0"], "options.fixed_s: 0"),
        (["cost=cloud"], "cost.usd_per_gpu_hour.H100: no price given"),
    ],
)
def test_what_cannot_run_is_refused_by_its_key(words: list[str], said: str) -> None:
    from repro import runner

    with pytest.raises(UserError) as caught:
        runner.prepare(compose(["experiment=public_hardware", *words]))
    assert said in str(caught.value)


def test_h20_and_a100_have_no_public_data_and_the_result_says_so(settings) -> None:  # type: ignore[no-untyped-def]
    for system in ("h20", "a100"):
        with pytest.raises(UserError, match="has no points"):
            pair(settings, Options(), "kimi_k3", "b200", system, 0.0)
    assert {"h20", "a100"} <= set(public_hardware.Options().decode)
