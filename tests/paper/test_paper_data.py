"""The paper's tables as data: complete, with units and rounding, and consistent with one another."""

import pytest

from repro.paper import tables, text
from repro.paper.quantity import Quantity, about, printed


def test_a_printed_number_is_good_to_half_of_its_last_digit() -> None:
    assert printed("2.10", "s", "x").interval == pytest.approx((2.095, 2.105))
    assert printed("2.1", "s", "x").interval == pytest.approx((2.05, 2.15))
    assert printed("17,280", "B", "x").interval == pytest.approx((17279.5, 17280.5))
    assert about(27_000, "tokens", "x", 500).interval == (26_500, 27_500)


def test_table_3_and_table_1_name_the_same_six_models() -> None:
    assert {row.model for row in tables.TABLE_1} == set(tables.TABLE_3)
    assert len(tables.TABLE_1) == 6


def test_every_cell_of_tables_3_and_5_is_there_with_its_unit() -> None:
    cells = [quantity for row in tables.TABLE_3.values() for quantity in row.values()]
    assert len(cells) == 6 * 4
    assert {cell.unit for cell in cells} == {"Gbps"}
    for row in tables.TABLE_3.values():
        assert tuple(row) == tables.LENGTHS
    assert tuple(tables.TABLE_5) == tables.LENGTHS
    assert [row.kv_size.unit for row in tables.TABLE_5.values()] == ["MiB"] * 4
    assert all(0 < quantity.precision < quantity.value for quantity in cells)


def test_table_2_has_five_mechanisms_each_high_or_low() -> None:
    assert len(tables.TABLE_2) == 5
    assert {word for pair in tables.TABLE_2.values() for word in pair} == {"high", "low"}


def test_table_4_names_every_symbol_of_the_equations() -> None:
    for symbol in ("Λ", "L", "t", "p", "l_long", "l_short", "L_out", "N_prfaas", "N_p", "N_d", "B_out"):
        assert symbol in tables.TABLE_4


def test_table_6_is_blank_exactly_where_the_paper_is() -> None:
    counts = {case: len(tables.TABLE_6[case]) for case in tables.CASES}
    assert counts == {"prfaas_pd": 11, "homogeneous_pd": 8, "naive_heterogeneous_pd": 8}
    assert tables.TABLE_6["prfaas_pd"]["threshold_tokens"].interval == pytest.approx((19_350, 19_450))
    assert "n_prfaas" not in tables.TABLE_6["homogeneous_pd"]


@pytest.mark.parametrize("case", tables.CASES)
def test_table_6_agrees_with_itself_under_equation_6(case: str) -> None:
    """Λ_max is the smallest bound of the row's own capacities at the printed offload fraction."""
    row = tables.TABLE_6[case]
    p = {"prfaas_pd": text.OFFLOAD_FRACTION.value, "homogeneous_pd": 0.0, "naive_heterogeneous_pd": 1.0}[case]
    bounds = [row["theta_pd_d"].value]
    if p > 0:
        bounds.append(row["theta_prfaas"].value / p)
    if p < 1:
        bounds.append(row["theta_pd_p"].value / (1 - p))
    assert row["lambda_max"].value == pytest.approx(min(bounds), abs=0.016)
    assert row["ratio"].value == pytest.approx(row["lambda_max"].value / 2.11, abs=0.006)


@pytest.mark.parametrize("length", tables.LENGTHS)
def test_table_5_agrees_with_itself_under_equation_1(length: str) -> None:
    row = tables.TABLE_5[length]
    slack = row.prefill.precision / row.prefill.value + row.kv_throughput.precision / row.kv_throughput.value
    assert row.kv_size.value * 2**20 * 8 / row.prefill.value / 1e9 == pytest.approx(row.kv_throughput.value, rel=slack)


def test_the_text_agrees_with_the_tables() -> None:
    reduction = 100 * (
        1 - tables.TABLE_6["prfaas_pd"]["ttft_mean_s"].value / tables.TABLE_6["homogeneous_pd"]["ttft_mean_s"].value
    )
    assert reduction == pytest.approx(text.TTFT_MEAN_REDUCTION.value, abs=0.5)
    assert tables.TABLE_6["prfaas_pd"]["n_prfaas"].value == text.PRFAAS_GPUS // text.GPUS_PER_INSTANCE
    assert text.FLEET_GPUS // text.FLEET_GPUS_PER_INSTANCE == 64
    ratio = tables.TABLE_3["minimax_m2_5"]["32K"].value / tables.TABLE_3["mimo_v2_flash"]["32K"].value
    low, high = text.MIMO_BELOW_MINIMAX_32K.interval
    assert low <= ratio <= high


def test_every_number_of_the_text_knows_its_section() -> None:
    quantities = [value for value in vars(text).values() if isinstance(value, Quantity)]
    assert len(quantities) > 15
    assert all(quantity.where.startswith("§") for quantity in quantities)
