"""The paper's tables and figures on tier `model`, through the same runner as the command line."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest

from repro.composition import compose
from repro.paper import tables
from repro.record.directory import Record
from repro.record.metrics import value
from repro.runner import prepare, run

MODEL_TIER = ("table3", "table5", "table6", "figure2", "figure5", "egress", "cost")


def run_experiment(folder: Path, *overrides: str) -> Record:
    composition = compose([*overrides, f"results={folder}", "tracking=disabled"])
    return run(composition, ["repro", *overrides], lambda line: None)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    folder = tmp_path_factory.mktemp("results")
    return {name: run_experiment(folder, f"experiment={name}") for name in MODEL_TIER}


def metric(record: Record, case: str, name: str) -> float:
    return value(record.metrics, name, case)


def test_grid_finds_the_papers_split_and_threshold_by_itself(records: dict[str, Record]) -> None:
    table6 = records["table6"]
    assert (metric(table6, "prfaas_pd", "n_p"), metric(table6, "prfaas_pd", "n_d")) == (3, 5)
    assert (metric(table6, "homogeneous_pd", "n_p"), metric(table6, "homogeneous_pd", "n_d")) == (9, 3)
    assert abs(metric(table6, "prfaas_pd", "threshold_tokens") - 19_400) <= 500


@pytest.mark.parametrize("case", tables.CASES)
def test_lambda_max_and_ratio_of_every_deployment_are_the_papers(records: dict[str, Record], case: str) -> None:
    printed = tables.TABLE_6[case]
    assert metric(records["table6"], case, "lambda_max") == pytest.approx(printed["lambda_max"].value, rel=0.02)
    assert metric(records["table6"], case, "ratio") == pytest.approx(printed["ratio"].value, abs=0.03)


def test_true_means_lower_every_lambda_max(records: dict[str, Record]) -> None:
    for case, expected in (("prfaas_pd", 3.17), ("homogeneous_pd", 2.03), ("naive_heterogeneous_pd", 2.38)):
        assert metric(records["table6"], f"{case}.true_mean", "lambda_max") == pytest.approx(expected, rel=0.01)
        assert metric(records["table6"], f"{case}.true_mean", "lambda_max") < metric(
            records["table6"], case, "lambda_max"
        )


def test_spread_encloses_the_value_it_belongs_to(records: dict[str, Record]) -> None:
    table = records["table6"].metrics
    known = table[table["ci_low"].notna()]
    assert len(known) > 60
    assert ((known["ci_low"] <= known["value"] + 1e-9) & (known["value"] <= known["ci_high"] + 1e-9)).all()


def test_what_calibrated_h20_is_never_called_a_prediction(records: dict[str, Record]) -> None:
    table = records["table6"].metrics.set_index(["case", "metric"])["source"]
    assert table["homogeneous_pd", "theta_pd_p"] == table["homogeneous_pd", "lambda_max"] == "calibrated"
    assert (
        table["prfaas_pd", "lambda_max"]
        == table["prfaas_pd", "theta_prfaas"]
        == table["naive_heterogeneous_pd", "lambda_max"]
        == "computed"
    )


def test_each_calibrating_value_is_also_predicted_from_the_others(records: dict[str, Record]) -> None:
    table = records["table6"].table("calibration")
    quadratic = table[table["fit"] == "T_prefill, quadratic"]
    assert len(quadratic) == 4
    assert quadratic["residual_pct"].abs().max() < 0.15
    assert (quadratic["left_out"] != quadratic["fitted"]).all()


def test_sizes_of_the_reconstructed_model_are_within_a_thousandth(records: dict[str, Record]) -> None:
    for label, printed in tables.TABLE_5.items():
        assert metric(records["table5"], label, "kv_bytes") / 2**20 == pytest.approx(printed.kv_size.value, rel=1e-3)
        assert metric(records["table5"], label, "phi_kv_bps") / 1e9 == pytest.approx(
            printed.kv_throughput.value, rel=0.01
        )


def test_other_reading_of_the_length_labels_leaves_a_hundred_times_the_residual(records: dict[str, Record]) -> None:
    table = records["table5"]
    ours = metric(table, "labels as reconstructed", "line_residual_bytes")
    assert metric(table, "labels as powers of two", "line_residual_bytes") > 100 * ours


def test_implied_prefill_times_increase_for_all_six_models(records: dict[str, Record]) -> None:
    table = records["table3"].metrics
    assert table.loc[table["metric"] == "prefill_is_increasing", "value"].tolist() == [1.0] * 6


def test_ratios_of_the_text_follow_from_bytes_and_time(records: dict[str, Record]) -> None:
    case = "minimax_m2_5 / mimo_v2_flash at 32K"
    whole = metric(records["table3"], case, "phi_kv_ratio")
    parts = metric(records["table3"], case, "kv_bytes_ratio") / metric(records["table3"], case, "prefill_ratio")
    assert whole == pytest.approx(parts)
    assert whole == pytest.approx(13, abs=0.5)
    assert metric(records["table3"], "Ring-2.5-1T, per token", "kv_bytes_ratio") == pytest.approx(36, abs=1)


def test_dense_prefill_times_are_figure_2s_line(records: dict[str, Record]) -> None:
    table = records["figure2"].metrics
    seconds = table.loc[table["metric"] == "prefill_s", "value"].tolist()
    assert seconds == pytest.approx([0.42, 0.51, 1.11, 5.57], abs=0.01)


def test_bounds_of_figure_5b_cross_where_its_peak_is(records: dict[str, Record]) -> None:
    crossing, peak = (metric(records["figure5"], "figure5b", name) for name in ("crossing_tokens", "threshold_tokens"))
    assert crossing == pytest.approx(peak, abs=200)
    assert crossing == pytest.approx(19_400, abs=500)


def test_fleet_egress_is_the_papers(records: dict[str, Record]) -> None:
    egress = records["egress"]
    assert metric(egress, "minimax_m2_5 32K, 512 GPUs", "egress_bps") == pytest.approx(3.8e12, rel=0.02)
    assert metric(egress, "ring_2_5_1t 128K, 512 GPUs", "egress_bps") < 100e9
    assert metric(egress, "ring_2_5_1t 128K, 10,000 GPUs", "egress_bps") == pytest.approx(1.8e12, rel=0.03)


def test_price_ratio_implied_by_fifteen_percent_is_about_two(records: dict[str, Record]) -> None:
    cost = records["cost"]
    assert metric(cost, "gain of 15 %", "price_ratio") == pytest.approx(2, abs=0.1)
    gain: pd.DataFrame = cost.table("gain")
    assert gain["gain"].is_monotonic_decreasing
    assert math.isclose(float(metric(cost, "price ratio 2", "equal_cost_gain")), 0.15, abs_tol=0.01)


def test_metered_egress_raises_the_cost_per_token(tmp_path: Path, records: dict[str, Record]) -> None:
    metered = run_experiment(tmp_path, "experiment=cost", "cost=cloud_metered")
    assert metric(metered, "prfaas_pd", "cost_per_mtok_usd") > metric(records["cost"], "prfaas_pd", "cost_per_mtok_usd")
    assert metric(metered, "homogeneous_pd", "cost_per_mtok_usd") == metric(
        records["cost"], "homogeneous_pd", "cost_per_mtok_usd"
    )


def test_a_link_below_the_demand_becomes_the_bottleneck(tmp_path: Path) -> None:
    narrow = run_experiment(tmp_path, "experiment=table6", "link.rate_bps=6e9", "options.draws=0")
    assert metric(narrow, "naive_heterogeneous_pd", "link_utilisation") == pytest.approx(1.0)
    assert metric(narrow, "prfaas_pd", "lambda_max") < 3.0


@pytest.mark.parametrize("name", MODEL_TIER)
def test_every_experiment_leaves_a_figure_and_both_reports(records: dict[str, Record], name: str) -> None:
    folder = records[name].path
    assert (folder / "figures" / f"{name}.png").stat().st_size > 10_000
    page = (folder / "report.html").read_text()
    assert "data:image/svg+xml;base64," in page
    assert "http://" not in page
    assert "https://" not in page
    assert (folder / "report.md").read_text().startswith(f"# {name}")


def test_case_study_on_a_tier_runs_table6_on_every_tier_up_to_it(tmp_path: Path) -> None:
    words = ["experiment=case_study", "link.rate_bps=6e9", f"results={tmp_path}"]
    for tier, on in {
        "model": ["model"],
        "simulate": ["model", "simulate"],
        "emulate": ["model", "simulate", "emulate"],
    }.items():
        prepared = prepare(compose([*words, f"tier={tier}"]))
        own = [part for part in prepared.parts if part.settings.name == "table6"]
        assert [part.settings.tier for part in own] == on
        assert {part.settings.link.rate_bps for part in own} == {6e9}
        assert len(prepared.configuration["parts"]) == len(prepared.parts)


def test_case_study_gathers_its_parts_and_runs_none_twice(tmp_path: Path) -> None:
    overrides = ["options.parts=[table5,figure2]", f"results={tmp_path}", "tracking=disabled"]
    lines: list[str] = []
    record = run(compose(overrides), ["repro", *overrides], lines.append)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    again = run(compose(overrides), ["repro", *overrides], lines.append)
    assert again.path == record.path
    assert lines[-1] == "case_study: already done, nothing to run"
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert "A request of 1K tokens" in (record.path / "report.md").read_text()
