"""What README says was found is what the committed records hold: each number is computed from them again."""

from __future__ import annotations

import re

import pytest

from repro.experiments.study_findings import differences
from repro.record.directory import REFERENCE, Record
from repro.record.metrics import value
from repro.record.provenance import PROJECT

TEXT = re.sub(r"\s+", " ", (PROJECT / "README.md").read_text())
CASES = ("prfaas_pd", "homogeneous_pd", "naive_heterogeneous_pd")


def record(name: str, tier: str) -> Record:
    return Record(REFERENCE / name / tier)


def test_the_table_of_what_is_reproduced_is_the_records() -> None:
    table = record("table6", "model").metrics

    def of(metric: str, *cases: str, form: str, scale: float = 1.0) -> list[str]:
        return [format(value(table, metric, case) / scale, form) for case in cases]

    (n_p,), (n_d,) = of("n_p", CASES[0], form=".0f"), of("n_d", CASES[0], form=".0f")
    assert f"| {n_p} : {n_d}, {value(table, 'threshold_tokens', CASES[0]) / 1000:.1f}K |" in TEXT
    assert f"| {' / '.join(of('lambda_max', *CASES, form='.2f'))} |" in TEXT
    assert f"| {of('ratio', CASES[0], form='.2f')[0]}×, {of('ratio', CASES[2], form='.2f')[0]}× |" in TEXT
    ttft = of("ttft_mean_s", CASES[0], form=".2f") + of("ttft_p90_s", CASES[0], form=".2f")
    assert f"| {' / '.join(ttft)} s |" in TEXT
    assert f"| {of('egress_bps', CASES[0], form='.1f', scale=1e9)[0]} Gbps |" in TEXT
    cost = record("cost", "model").metrics
    assert f"| {value(cost, 'equal_cost_gain', 'price ratio 2'):.1%} at a price ratio of 2 |".replace("%", " %") in TEXT
    assert value(cost, "break_even_egress_usd_per_gb", CASES[0]) < 0.01
    assert "at less than one US cent per GB" in TEXT


def test_representative_lengths_flatter_by_what_the_records_say() -> None:
    model, simulated = record("table6", "model").metrics, record("table6", "simulate").metrics
    true = [value(model, "lambda_max", f"{case}.true_mean") for case in CASES]
    ratio = value(model, "ratio", f"{CASES[0]}.true_mean")
    assert f"Λ_max is {true[0]:.2f}, {true[1]:.2f} and {true[2]:.2f}, and the gain {ratio:.2f}×" in TEXT
    assert "The simulator agrees with the latter within 1 %" in TEXT
    for case, by_model in zip(CASES, true, strict=True):
        assert value(simulated, "lambda_max", case) == pytest.approx(by_model, rel=0.01)


def test_a_slow_link_costs_static_t_what_the_record_says() -> None:
    table = record("bandwidth_drop", "simulate").metrics

    def gain(load: float, gbps: int) -> float:
        where = f"load_{load:g}.{gbps}_gbps"
        return value(table, "goodput_drop", f"{where}.short_term") / value(table, "goodput_drop", f"{where}.static") - 1

    slow = [gain(load, gbps) for load in (0.5, 0.65, 0.8) for gbps in (4, 2)]
    assert f"keeps {100 * min(slow):.0f} to {100 * max(slow):.0f} % more requests" in TEXT
    assert all(abs(gain(load, 10)) < 0.01 for load in (0.5, 0.65, 0.8)), "costs static t nothing at 10 Gbps"


def test_layer_wise_transfer_costs_and_hides_what_the_record_says() -> None:
    table = record("overlap", "execute").metrics

    def between(metric: str, mode: str) -> tuple[float, float]:
        own = table[(table["metric"] == metric) & table["case"].str.endswith(f"/{mode}")]["value"]
        return float(own.min()), float(own.max())

    to_bulk, bound = between("ttft_to_bulk", "layerwise"), between("ttft_bound_ratio", "layerwise")
    slowed, bulk = between("prefill_slowdown", "layerwise"), between("prefill_slowdown", "bulk")
    assert (
        f"layer-wise TTFT {to_bulk[0]:.2f} to {to_bulk[1]:.2f} of bulk, {bound[0]:.2f} to {bound[1]:.2f} of the bound"
        in TEXT
    )
    assert f"slowed by {100 * slowed[0] - 100:.0f} to {100 * slowed[1] - 100:.0f} % layer-wise" in TEXT
    assert f"by {100 * bulk[0] - 100:.0f} to {100 * bulk[1] - 100:.0f} % in bulk" in TEXT


def test_each_part_of_the_scheduler_is_worth_what_the_records_say() -> None:
    def found(name: str) -> dict[str, float]:
        return {one.case: one.value if one.shown else 0.0 for one in differences(record(name, "simulate").metrics)}

    burst, flap, outputs, parts = (found(name) for name in ("burst", "link_flap", "output_length", "ablation"))
    assert f"In bursts (`burst`) it keeps {burst['short_term']:.2f} req/s more" in TEXT
    assert flap["short_term"] == 0.0
    assert "in short flaps (`link_flap`) it makes no difference" in TEXT
    assert burst["two_timescale"] == pytest.approx(burst["short_term"], abs=0.02)
    assert flap["two_timescale"] == 0.0
    assert f"it adds {outputs['fixed_2048.two_timescale']:.2f} req/s" in TEXT
    assert max(parts, key=lambda case: parts[case]) == "with_admission"
    assert f"admission is worth the most under bursts: {parts['with_admission']:.2f} req/s" in TEXT


def test_what_the_studies_found_is_what_their_records_say() -> None:
    inputs, shapes, day = (
        record(name, tier).metrics
        for name, tier in (("sensitivity", "model"), ("long_contexts", "model"), ("peak_hours", "simulate"))
    )
    readings = [value(inputs, "throughput_ratio", f"load_balanced{reading}") for reading in ("", ".true_mean")]
    low, high = (100 * (worth - 1) for worth in sorted(readings))
    assert f"{low:.1f} to {high:.1f} % over load balancing" in TEXT
    ahead = value(inputs, "probability_ahead_at_equal_cost", "homogeneous_pd")
    assert f"at equal cost in {100 * ahead:.0f} % of the draws" in TEXT
    assert f"at {value(shapes, 'break_even_output_tokens', 'configured'):,.0f} tokens with the paper's inputs" in TEXT
    assert f"long documents raise it to {value(shapes, 'throughput_ratio', 'long documents'):.2f}×" in TEXT
    spent, missed = (
        [value(day, metric, case) for case in ("prfaas_pd_elastic", "homogeneous_peak")]
        for metric in ("pd_gpu_hours_equivalent", "beyond_slo_fraction")
    )
    assert f"costs {100 * (1 - spent[0] / spent[1]):.0f} % less than a homogeneous cluster bought for the peak" in TEXT
    assert f"({100 * missed[0]:.1f} against {100 * missed[1]:.1f} %)" in TEXT


def test_the_adaptive_policy_is_as_near_to_the_oracle_as_the_record_says() -> None:
    table = record("scenarios", "simulate").metrics

    def over(metric: str, policy: str) -> list[float]:
        own = table[(table["metric"] == metric) & table["case"].str.endswith(f".{policy}")]
        assert (own["n"] == 20).all()
        assert len(own) == 6
        return [100 * float(found) for found in own["value"]]

    regret, gain = over("regret_fraction", "adaptive"), over("goodput_over_static_fraction", "adaptive")
    assert f"leaves at most {max(regret):.1f} % of an oracle's goodput" in TEXT
    assert f"stays within {min(gain):.1f} to +{max(gain):.1f} % of the static plan" in TEXT
    assert f"leave up to {max(over('regret_fraction', 'two_timescale')):.0f} %" in TEXT
    assert max(regret) < 5.0
    assert min(gain) > -1.0
