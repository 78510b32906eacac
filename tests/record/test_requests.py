"""One schema of requests for every tier, and one definition of every number that comes from it."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from repro.record.request_metrics import UNITS, Totals, summarise
from repro.record.requests import COLUMNS, validate
from repro.simulate.records import Streaming, Table
from repro.workload.spec import ServiceLevel

SLO = ServiceLevel(tokens_per_s=40.0, ttft_s=2.0)
NAN = float("nan")
#: id, arrival, input, cached, output, route, queue, prefill, transfer, exposed, bytes, decode queue, TTFT, TPOT, finish, outcome, workers
ROWS = [
    (0, 0.0, 100, 50, 10, 0, 0.1, 0.5, 0.0, 0.0, 1e6, 0.0, 0.7, 0.02, 2.0, 0, 0, 1),
    (1, 1.0, 900, 0, 10, 1, 0.3, 1.0, 1.2, 0.2, 9e6, 0.1, 1.7, 0.02, 4.0, 0, 2, 0),
    (2, 2.0, 500, 0, 10, 0, 0.0, 0.5, 0.0, 0.0, 5e6, 0.0, 0.6, 0.03, 4.0, 3, 1, 1),
    (3, 3.0, 400, 400, 10, 1, NAN, NAN, NAN, NAN, 4e6, NAN, NAN, NAN, NAN, 2, -1, -1),
]


def frame() -> pd.DataFrame:
    table = Table()
    table.take(ROWS)
    return table.frame()


def test_a_simulated_table_fits_the_schema_and_names_its_workers() -> None:
    found = frame()
    validate(found)
    assert list(found.columns) == list(COLUMNS)
    assert list(found["prefill_worker"]) == ["pd_p/0", "prfaas/2", "pd_p/1", ""]
    assert list(found["decode_worker"]) == ["pd_d/1", "pd_d/0", "pd_d/1", ""]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.drop(columns="kv_bytes"), "kv_bytes is missing"),
        (lambda table: table.assign(route="local"), "route 'local'; accepted: pd, prfaas"),
        (lambda table: table.assign(outcome="lost"), "outcome 'lost'"),
        (lambda table: table.assign(decode_worker=3), "decode_worker holds int64, not text"),
        (lambda table: table.assign(input_tokens=1.5), "input_tokens holds float64"),
    ],
)
def test_a_table_that_does_not_fit_is_refused_by_column(change, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        validate(change(frame()))


def test_a_request_is_good_only_when_it_meets_both_parts_of_the_service_level() -> None:
    found = summarise(frame(), (0.0, 4.0), SLO)
    assert (found.requests, found.completed) == (4, 3)
    assert found.goodput == pytest.approx(2 / 4)  # request 2 is slower than 40 tokens/s
    assert summarise(frame(), (0.0, 4.0), ServiceLevel(20.0, 2.0)).goodput == pytest.approx(3 / 4)
    assert summarise(frame(), (0.0, 4.0), ServiceLevel(20.0, 1.0)).goodput == pytest.approx(2 / 4)


def test_what_is_cached_counts_against_the_input_of_the_same_requests() -> None:
    found = summarise(frame(), (0.0, 4.0), SLO)
    assert found.cached_fraction == pytest.approx(50 / 1500)
    assert found.offload_fraction == pytest.approx(1 / 3)
    assert found.egress_bps == pytest.approx(8 * 9e6 / 4)


def test_kept_and_streamed_requests_give_the_same_numbers() -> None:
    rng = np.random.default_rng(3)
    rows = []
    for i in range(2000):
        offloaded, ttft = int(rng.integers(2)), float(rng.lognormal(0, 1))
        outcome = int(rng.choice([0, 0, 0, 3, 1]))
        rows.append((i, i * 0.1, int(rng.integers(1, 9000)), 7, 20, offloaded, 0.1, 0.5, 0.6, 0.1, 1e6, 0.0, ttft, 0.024, i * 0.1 + 5,
                     outcome, 0, 0))  # fmt: skip
    table, streaming = Table(), Streaming(SLO, from_s=20.0, until_s=150.0)
    table.take(rows)
    streaming.take(rows)
    kept, streamed = summarise(table.frame(), (20.0, 150.0), SLO).values(), streaming.totals().values()
    for name, value in kept.items():
        rough = 0.006 if name.startswith(("ttft_p", "tpot_p")) else 1e-12  # a sketch's bins are 1 % wide
        assert streamed[name] == pytest.approx(value, rel=rough), name


def test_every_metric_of_requests_has_a_unit() -> None:
    assert set(UNITS) == set(Totals.__dataclass_fields__)
