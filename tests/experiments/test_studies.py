"""Studies: each finding is recomputed from the record, and each moves when the assumption that it names does."""

from __future__ import annotations

from pathlib import Path

import pytest

from repro.composition import compose
from repro.experiments import base
from repro.presets import choices
from repro.record.directory import Record
from repro.record.metrics import value
from repro.runner import run
from repro.sweeps import definition
from repro.sweeps import run as sweeps

#: Those that run alone, without another deployment or environment: live experiments name their assumptions too, and `engines`
#: needs the interpreter of an engine.
STUDIES = sorted(
    name
    for name in choices("experiment")
    if base.load(name).hinges_on
    and "emulate" not in base.load(name).tiers
    and name != "engines"
    and not name.startswith("live_")
)


def study(folder: Path, *words: str) -> Record:
    return run(
        compose([*words, f"results={folder}", "tracking=disabled", "processes=1"]), ["repro", *words], lambda line: None
    )


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_names_the_assumption_that_would_change_its_conclusion(name: str) -> None:
    experiment = base.load(name)
    assert experiment.finding is not None
    assert len(experiment.hinges_on) > 20


@pytest.fixture(scope="module")
def sensitivity(tmp_path_factory: pytest.TempPathFactory) -> Record:
    return study(tmp_path_factory.mktemp("results"), "experiment=sensitivity", "options.draws=20")


def test_sensitivity_says_what_the_length_rule_is_worth_beside_load_balancing(sensitivity: Record) -> None:
    table = sensitivity.metrics
    ours = value(table, "lambda_max", "prfaas_pd")
    worth = 100 * (ours / value(table, "lambda_max", "load_balanced") - 1)
    assert 0 < worth < 5
    assert f"{worth:.1f}" in sensitivity.provenance["finding"]
    assert f"{ours / value(table, 'lambda_max', 'homogeneous_pd'):.2f} ×" in sensitivity.provenance["finding"]


def test_sensitivity_names_the_longest_bar_of_its_tornado(sensitivity: Record) -> None:
    bars = sensitivity.table("tornado").dropna().set_index("input")
    longest = (bars["gain_at_high"] - bars["gain_at_low"]).abs().idxmax()
    assert longest == "prfaas_prefill"
    assert "T_prefill on PrfaaS" in sensitivity.provenance["finding"]
    assert (bars.loc["price_ratio", "gain_at_low"], bars.loc["price_ratio", "gain_at_high"]) == pytest.approx(
        [value(sensitivity.metrics, "throughput_ratio", "homogeneous_pd")] * 2
    ), "a price moves no throughput"
    assert bars.loc["price_ratio", "money_at_high"] < 1 < bars.loc["price_ratio", "money_at_low"]


def test_sensitivity_ends_where_both_accelerators_prefill_alike(tmp_path: Path) -> None:
    alike = study(tmp_path, "experiment=sensitivity", "options.draws=1", "cluster.prfaas.profile=paper_1t_h20")
    assert value(alike.metrics, "throughput_ratio", "homogeneous_pd") < 1.05


@pytest.fixture(scope="module")
def cost_map(tmp_path_factory: pytest.TempPathFactory) -> Record:
    return study(tmp_path_factory.mktemp("results"), "experiment=cost_map", "options.budgets=[1.0]")


def test_at_the_break_even_price_of_a_gigabyte_both_deployments_cost_the_same(cost_map: Record, tmp_path: Path) -> None:
    price = value(cost_map.metrics, "break_even_egress_usd_per_gb", "prfaas_pd")
    at_it = study(tmp_path, "experiment=cost", f"cost.usd_per_egress_gb={price}").metrics
    assert value(at_it, "cost_per_mtok_usd", "prfaas_pd") == pytest.approx(
        value(at_it, "cost_per_mtok_usd", "homogeneous_pd")
    )
    assert f"{price:.4f} USD per GB" in cost_map.provenance["finding"]


def test_hours_are_cheapest_where_the_day_is_night_and_dearest_where_it_is_not(cost_map: Record) -> None:
    table, day = cost_map.metrics, cost_map.table("day")
    cost = {hours: value(table, "cost_per_mtok_usd", f"by the hour, region {hours:+d} h") for hours in (0, 12)}
    assert cost[12] < value(table, "cost_per_mtok_usd", "PrfaaS by the hour, flat price") < cost[0]
    assert day["usd_0"].mean() == pytest.approx(day["usd_12"].mean()) == pytest.approx(8 * 4.0), (
        "the mean is the flat price"
    )
    assert value(table, "prfaas_instance_hours_share") == pytest.approx(day["n_prfaas"].sum() / (24 * 4))
    saved = 1 - value(table, "cost_per_mtok_usd", "PrfaaS by the hour, flat price") / value(
        table, "cost_per_mtok_usd", "PrfaaS all day"
    )
    assert f"saves {100 * saved:.0f} %" in cost_map.provenance["finding"]


def test_the_gain_ends_at_the_outputs_that_the_finding_names(tmp_path: Path) -> None:
    small = ["options.medians_tokens=[2e4]", "options.outputs_tokens=[1024]"]
    record = study(tmp_path, "experiment=long_contexts", *small)
    even = value(record.metrics, "break_even_output_tokens")
    assert f"outputs of {even:,.0f} tokens" in record.provenance["finding"]
    beyond, before = (
        study(tmp_path, "experiment=long_contexts", *small, f"workload.output_tokens={round(even * factor)}")
        for factor in (1.02, 0.98)
    )
    ratio = "throughput_ratio"
    assert value(beyond.metrics, ratio, "configured") <= 1 + 1e-9 < value(before.metrics, ratio, "configured")
    gains = record.metrics[record.metrics["metric"] == ratio].set_index("case")["value"]
    assert f"{gains.max():.2f} times" in record.provenance["finding"]
    assert gains.idxmin() == "reasoning, 32K out", "PrfaaS's instances do not decode"


def test_prefill_rented_by_the_hour_costs_less_and_is_busier(tmp_path: Path) -> None:
    record = study(tmp_path, "experiment=peak_hours", "options.day_s=1200")
    table = record.metrics
    spent = {
        case: value(table, "pd_gpu_hours_equivalent", case)
        for case in ("prfaas_pd", "prfaas_pd_elastic", "homogeneous_peak")
    }
    rented = record.table("rented")["n_prfaas"].sum()
    assert spent["prfaas_pd_elastic"] == pytest.approx(24 * 64 + 2 * 8 * rented), "an H200 costs two H20"
    assert spent["prfaas_pd_elastic"] < spent["prfaas_pd"] < spent["homogeneous_peak"]
    busy = {case: value(table, "prefill_utilisation", case) for case in ("prfaas_pd", "prfaas_pd_elastic")}
    assert busy["prfaas_pd"] < busy["prfaas_pd_elastic"]
    saved = 100 * (1 - spent["prfaas_pd_elastic"] / spent["homogeneous_peak"])
    missed = 100 * value(table, "beyond_slo_fraction", "prfaas_pd_elastic")
    assert f"costs {saved:.0f} % less" in record.provenance["finding"]
    assert f"with {missed:.1f} % missed" in record.provenance["finding"]


def test_the_sweep_of_studies_holds_all_of_them_and_opens_with_what_they_found(tmp_path: Path) -> None:
    named = definition.read(["sweep=studies", f"results={tmp_path}"])
    assert set(named.axes[0].values) == set(STUDIES)
    words = ["sweep=studies", "experiment=cost_map,long_contexts", "policy.threshold_step_tokens=4000"]
    sweep = definition.read([*words, "tracking=disabled", "processes=1", f"results={tmp_path}"])
    assert sweeps.run(sweep, ["repro", *words]) == 0
    page = (sweep.folder / "report.md").read_text()
    found = [
        Record(path.parent).provenance["finding"]
        for path in sorted(tmp_path.glob("*/*/DONE"))
        if path.parent != sweep.folder
    ]
    assert len(found) == 2
    assert all(0 < page.index(finding) < page.index("## Points") for finding in found)
    thumbnails = sorted(path.name for path in (sweep.folder / "figures").glob("*_small.png"))
    assert thumbnails == ["cost_map_small.png", "long_contexts_small.png"]
    assert (
        "With your own numbers: python -m repro experiment=cost_map policy.threshold_step_tokens=4000, and any of profile"
        in page
    )


def test_the_public_case_has_every_study_that_has_a_deployment() -> None:
    (axis,) = definition.read(["sweep=studies_public"]).axes
    deployed = [
        name for name in STUDIES if any(base.load(name).reads_key("cluster.pd", tier) for tier in base.load(name).tiers)
    ]
    assert sorted(axis.values) == deployed


def test_a_study_says_how_to_repeat_it_with_other_numbers(tmp_path: Path) -> None:
    words = ["experiment=many_clusters", "cluster=public", "cost=public", "options.tenants=[2]", "label=mine"]
    page = (study(tmp_path, *words).path / "report.md").read_text()
    assert "`python -m repro experiment=many_clusters cluster=public cost=public options.tenants=[2]`" in page
    for key in ("profile", "link.rate_bps", "workload.output_tokens", "cost.usd_per_gpu_hour", "options.spreads_h"):
        assert key in page.partition("With your own numbers (")[2].partition(")")[0].split(", ")


def test_reach_is_where_the_window_still_carries_what_prfaas_sends(tmp_path: Path) -> None:
    small = ["options.rates_bps=[2e10,1e11]", "options.losses=[0.0,0.001]", "options.connections=[8]"]
    measured = "options.measured=results/reference/link_fidelity/emulate"
    record = study(tmp_path, "experiment=distance", *small, measured)
    grid, table = record.table("grid"), record.metrics
    kept = grid[
        (grid["congestion_control"] == "cubic")
        & (grid["loss"] == 0)
        & (grid["lambda_max"] >= 0.95 * grid["lambda_max"].max())
    ]
    assert (
        value(table, "reach_rtt_s", "8 × cubic, loss 0")
        == kept["rtt_s"].max()
        > value(table, "reach_rtt_s", "8 × cubic, loss 0.001")
    )
    assert f"{1000 * kept['rtt_s'].max():g} ms (8 × cubic, loss 0)" in record.provenance["finding"]
    assert "20 Gbps keep" in record.provenance["finding"]
    assert 0.5 < value(table, "law_over_measured") < 2, "the law is the right one within a factor of two, under loss"
    assert (record.path / "figures" / "distance.png").is_file()


def test_tenants_at_opposite_hours_share_what_their_busiest_hour_needs(tmp_path: Path) -> None:
    record = study(tmp_path, "experiment=many_clusters", "options.tenants=[2]", "options.spreads_h=[0,24]")
    needed = record.table("day")["n_prfaas"].tolist()
    together = max(here + there for here, there in zip(needed, needed[12:] + needed[:12], strict=True))
    assert value(record.metrics, "n_prfaas", "2 tenants, peaks over 24 h") == together < 2 * max(needed)
    assert value(record.metrics, "shared_over_own", "2 tenants, peaks over 0 h") == 1, "equal peaks save nothing"
    assert f"share {100 * together / (2 * max(needed)):.0f} %" in record.provenance["finding"]
