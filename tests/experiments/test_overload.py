"""A run whose queues grow is said to be overloaded, and its TTFT is compared with nobody's."""

import numpy as np
import pandas as pd
import pytest

from repro.experiments.simulated import _rows, overloaded


def table(gap_s: float, service_s: float, n: int = 2000) -> pd.DataFrame:
    arrival = gap_s * np.arange(1, n + 1)
    finish = np.empty(n)
    free = 0.0
    for i, at in enumerate(arrival):
        free = finish[i] = max(free, at) + service_s
    return pd.DataFrame({"arrival_s": arrival, "finish_s": finish, "outcome": "ok"})


@pytest.mark.parametrize(("load", "flagged"), [(0.8, False), (0.99, False), (1.1, True), (1.5, True)])
def test_a_run_is_overloaded_when_its_queues_grow(load: float, flagged: bool) -> None:
    assert overloaded(table(1.0, load)) is flagged


def test_requests_that_admission_refused_are_in_no_queue() -> None:
    mixed = table(1.0, 0.9)
    mixed.loc[::2, "outcome"] = "refused"
    mixed.loc[::2, "finish_s"] = np.nan
    assert not overloaded(mixed)


class _Context:
    def metric(self, case: str, metric: str, *_: object, **__: object) -> tuple[str, str]:
        return case, metric


def test_ttft_of_an_overloaded_case_is_not_compared_and_goodput_is() -> None:
    values = [dict.fromkeys(_METRICS, 1.0), dict.fromkeys(_METRICS, 2.0)]
    found = {"static": values, "full": values}
    usual = set(_rows(_Context(), found, dict.fromkeys(found, "static"), "", {}))  # type: ignore[arg-type]
    grown = set(_rows(_Context(), found, dict.fromkeys(found, "static"), "", {"full": 1}))  # type: ignore[arg-type]
    assert usual - grown == {("full", "ttft_mean_s_minus_static"), ("full", "ttft_p90_s_minus_static")}
    assert ("full", "goodput_minus_static") in grown


_METRICS = (
    "goodput", "good_fraction", "ttft_mean_s", "ttft_p50_s", "ttft_p90_s", "ttft_p99_s", "tpot_mean_s", "offload_fraction",
    "completed_fraction", "cached_fraction", "egress_bps", "link_egress_bps", "copied_bytes",
)  # fmt: skip
